//! A client in Rust: streams an answer, and takes it for one only when it is whole.
//!
//! `cargo run --example client -- "Ownership is"`, beside `butterfly serve`; `BUTTERFLY_URL` and `BUTTERFLY_API_KEY` say where
//! and as whom.
//!
//! The body of a stream that failed breaks off, and so does one whose server died: reading it gives an error. A stream has
//! ended well when `[DONE]` came, and never otherwise.

use std::error::Error;
use std::io::Write;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let prompt = if arguments.is_empty() { "Ownership is".to_owned() } else { arguments.join(" ") };
    let base = std::env::var("BUTTERFLY_URL").unwrap_or_else(|_| "http://127.0.0.1:8080".to_owned());
    let host = base.strip_prefix("http://").ok_or("BUTTERFLY_URL must begin with http://")?.trim_end_matches('/');

    let models = ask(host, "GET", "/v1/models", None).await?.into_body().collect().await?.to_bytes();
    let models: Value = serde_json::from_slice(&models)?;
    let model = models["data"][0]["id"].as_str().ok_or("the gateway names no model")?;

    let body = json!({ "model": model, "prompt": prompt, "max_tokens": 48, "stream": true });
    let response = ask(host, "POST", "/v1/completions", Some(&body)).await?;
    print!("{prompt}");
    let last = stream(response).await?;
    let proof = &last["butterfly"];
    println!();
    eprintln!("receipt {} is {}", proof["receipt_id"], proof["verification"]["status"]);
    Ok(())
}

/// Sends one request; gives the response of one that was taken.
async fn ask(host: &str, method: &str, path: &str, body: Option<&Value>) -> Result<Response<Incoming>, Box<dyn Error>> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(TcpStream::connect(host).await?)).await?;
    // It ends with the response's body, whose reader hears of its errors.
    tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header("host", host);
    if let Ok(key) = std::env::var("BUTTERFLY_API_KEY") {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
    let response =
        sender.send_request(request.header("content-type", "application/json").body(Full::new(body))?).await?;
    if response.status().is_success() {
        return Ok(response);
    }
    let failure: Value = serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?;
    Err(format!("{}: {}", failure["error"]["code"], failure["error"]["message"]).into())
}

/// Prints the text of a stream as it comes; gives the chunk that says what backs it.
async fn stream(response: Response<Incoming>) -> Result<Value, Box<dyn Error>> {
    let (mut body, mut buffer, mut last) = (response.into_body(), Vec::new(), Value::Null);
    while let Some(frame) = body.frame().await {
        buffer.extend_from_slice(frame?.data_ref().map_or(&[], |data| data));
        while let Some(end) = buffer.windows(2).position(|window| window == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            // Lines that begin with a colon only show that the connection lives.
            let Some(data) = event.strip_prefix(b"data: ") else { continue };
            if data.starts_with(b"[DONE]") {
                return Ok(last);
            }
            let chunk: Value = serde_json::from_slice(data)?;
            if let Some(failure) = chunk.get("error") {
                return Err(format!("{}: {}", failure["code"], failure["message"]).into());
            }
            print!("{}", chunk["choices"][0]["text"].as_str().unwrap_or_default());
            std::io::stdout().flush()?;
            if chunk.get("butterfly").is_some() {
                last = chunk;
            }
        }
    }
    Err("the stream ended before [DONE]; what came of it is no answer".into())
}
