//! What clients ask of generation over HTTP, on clusters within one process: three replicas, one of which may lie.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use butterfly::loopback::{Cluster, Loopback};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use support::call;
use tokio::net::TcpStream;

struct Gateway {
    address: SocketAddr,
    cluster: Cluster,
    _folder: tempfile::TempDir,
}

/// Three replicas, the last of which lies about its votes.
async fn gateway() -> Gateway {
    let settings = vec![("transfer", "backend_type = \"local\"".to_owned())];
    let adversaries = BTreeMap::from([(2, "wrong-vote")]);
    let folder = tempfile::tempdir().unwrap();
    let cluster = Loopback { settings, adversaries, ..Loopback::default() }.start(folder.path()).await.unwrap();
    cluster.meshed().await;
    Gateway { address: cluster.http_address().unwrap(), cluster, _folder: folder }
}

impl Gateway {
    async fn ask(&self, path: &str, body: &Value) -> Value {
        let (status, response) = call(self.address, "POST", path, Some(body.clone())).await.unwrap();
        assert_eq!(status, 200, "{response}");
        response
    }

    /// The events of a stream, which must come to its proper end.
    async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let request =
            hyper::Request::post(path).header("host", "gateway").body(Full::new(Bytes::from(body.to_string())));
        let response = sender.send_request(request.unwrap()).await.unwrap();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        connection.abort();
        let text = std::str::from_utf8(&bytes).unwrap();
        let frames = text.split("\n\n").filter(|frame| !frame.is_empty() && !frame.starts_with(':'));
        let mut events: Vec<Value> = frames
            .map(|frame| {
                let data = frame.strip_prefix("data: ").unwrap_or_else(|| panic!("no data frame: {frame}"));
                serde_json::from_str(data).unwrap_or(Value::String(data.into()))
            })
            .collect();
        assert_eq!(events.pop(), Some(json!("[DONE]")), "{events:?}");
        events
    }
}

fn floats(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_those_of_the_reference_and_the_same_in_a_stream() {
    let gateway = gateway().await;
    let text = include_str!("data/tiny-rust-reference.json");
    let reference: Value = serde_json::from_str(text).unwrap();
    for case in reference["cases"].as_array().unwrap() {
        let logits = floats(&case["last_logits"]);
        let body = json!({
            "prompt": case["prompt_ids"], "max_tokens": 6, "temperature": 0, "logprobs": 3, "return_token_ids": true,
        });
        let whole = gateway.ask("/v1/completions", &body).await;
        let choice = &whole["choices"][0];
        let listed = &choice["logprobs"];
        let first = choice["token_ids"][0].as_u64().unwrap() as usize;
        let expected = logits[first] - logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        let found = floats(&listed["token_logprobs"]);
        assert!((found[0] - expected).abs() < 5e-3, "{found:?} {expected}");
        assert_eq!(found.len(), choice["token_ids"].as_array().unwrap().len());
        // Greedy: the chosen token is the likeliest, so there are no more than were asked for.
        for (position, top) in listed["top_logprobs"].as_array().unwrap().iter().enumerate() {
            let top = top.as_object().unwrap();
            assert_eq!(top.len(), 3);
            assert_eq!(top[listed["tokens"][position].as_str().unwrap()], listed["token_logprobs"][position]);
            assert!(top.values().map(|value| value.as_f64().unwrap().exp()).sum::<f64>() <= 1.0 + 1e-6);
        }
        assert_eq!(listed["text_offset"][0], 0);
        let streamed = gateway.stream("/v1/completions", &body).await;
        for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let pieces = streamed.iter().filter_map(|event| event["choices"][0]["logprobs"][field].as_array());
            let joined: Vec<&Value> = pieces.flatten().collect();
            assert_eq!(json!(joined), listed[field], "{field}");
        }
    }
    gateway.cluster.shutdown().await.unwrap();
}
