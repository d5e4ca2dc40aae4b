//! A stage of one's own: `guard` lets no prompt through that contains a forbidden word.
//!
//! `cargo run --example custom_stage`
//!
//! Three things make a kind: its signature, which lets `butterfly check` find mistakes in a topology that uses it; its
//! mapping, an async function from an item to at most one item; and the entry in the registry that joins the two. The
//! topology is `examples/custom_stage.toml`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use butterfly::error::{ApiError, ButterflyError};
use butterfly::items::Request;
use butterfly::loopback::Loopback;
use butterfly::node::Extension;
use butterfly_engine::stage::StageError;
use butterfly_topology::catalogue::{KeySpec, KindSignature, PortSpec, ValueSpec, WhenFull};
use butterfly_verify::Input;

const GUARD: KindSignature = KindSignature {
    kind: "guard",
    doc: "refuses prompts that contain a forbidden word",
    inputs: &[PortSpec { name: "requests", item: "Request", required: true }],
    outputs: &[PortSpec { name: "allowed", item: "Request", required: true }],
    keys: &[KeySpec {
        name: "forbidden",
        doc: "the word no prompt may contain",
        value: ValueSpec::Text,
        default: None,
        required: true,
    }],
    networked: false,
    full: &[WhenFull::Wait],
};

fn guard() -> Extension {
    Arc::new(|registry, services| {
        let board = Arc::clone(&services.board);
        registry.map(GUARD, move |spec| {
            let word = spec.config.text("forbidden").unwrap_or_default().to_owned();
            if word.is_empty() {
                return Err(StageError::configuration("forbidden", "an empty word is in every prompt"));
            }
            let board = Arc::clone(&board);
            Ok(move |request: Request| {
                let (board, word) = (Arc::clone(&board), word.clone());
                async move {
                    match &request.body.input {
                        Input::Text { prompt, .. } if prompt.contains(&word) => {
                            let refusal = ApiError::InvalidRequest(format!("prompts must not contain {word:?}"));
                            board.fail(&request.rd, ButterflyError::Api(refusal)).await;
                            None
                        }
                        _ => Some(request),
                    }
                }
            })
        })
    })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let data = std::env::temp_dir().join(format!("butterfly-custom-stage-{}", std::process::id()));
    let loopback = Loopback {
        stages: Some(include_str!("custom_stage.toml").to_owned()),
        extension: Some((vec![GUARD], guard())),
        ..Loopback::default()
    };
    let cluster = loopback.start(&data).await?;
    cluster.meshed().await;
    let gateway = cluster.http_address().ok_or("the gateway has no address")?;
    for prompt in ["Ownership is", "The unsafe keyword"] {
        let answer = tokio::task::spawn_blocking(move || ask(gateway, prompt)).await??;
        println!("{prompt:?}\n  {answer}\n");
    }
    cluster.shutdown().await?;
    std::fs::remove_dir_all(&data)?;
    Ok(())
}

/// Asks over HTTP; gives status line and body.
fn ask(gateway: SocketAddr, prompt: &str) -> std::io::Result<String> {
    let body = format!("{{\"prompt\": {prompt:?}, \"max_tokens\": 12}}");
    let mut stream = TcpStream::connect(gateway)?;
    write!(
        stream,
        "POST /inference HTTP/1.1\r\nhost: {gateway}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response.split_once("\r\n\r\n").unwrap_or((&response, ""));
    Ok(format!("{} {body}", head.lines().next().unwrap_or_default()))
}
