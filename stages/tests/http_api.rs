//! The public listener against a running node: statuses, forms, streams, cancellation and overload.
//!
//! One node with no liars to tolerate is enough here; what votes are worth is the business of the cluster tests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::net::SocketAddr;

use butterfly::loopback::{Cluster, Loopback};
use butterfly_verify::{Answer, Epoch, Receipt, Request};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::HeaderMap;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

struct Gateway {
    address: SocketAddr,
    cluster: Cluster,
    _folder: tempfile::TempDir,
}

struct Reply {
    status: u16,
    headers: HeaderMap,
    bytes: Vec<u8>,
    /// Whether the body came to its proper end.
    is_whole: bool,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&self.bytes)))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    fn code(&self) -> String {
        let body = self.json();
        assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string(), "{body}");
        body["error"]["code"].as_str().unwrap().to_owned()
    }
}

async fn gateway(settings: &[(&'static str, &str)]) -> Gateway {
    with_model("builtin:tiny-rust", settings).await
}

async fn with_model(model: &str, settings: &[(&'static str, &str)]) -> Gateway {
    let settings = settings.iter().map(|(kind, setting)| (*kind, (*setting).to_owned())).collect();
    let loopback = Loopback { model: model.into(), max_byzantine: 0, settings, ..Loopback::default() };
    let folder = tempfile::tempdir().unwrap();
    let cluster = loopback.start(folder.path()).await.unwrap();
    cluster.meshed().await;
    Gateway { address: cluster.http_address().unwrap(), cluster, _folder: folder }
}

/// Sends a request on a connection of its own; the body is still to be read. Dropping it closes the connection.
async fn open(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> (hyper::Response<Incoming>, tokio::task::AbortHandle) {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection).abort_handle();
    let mut request = hyper::Request::builder().method(method).uri(path).header("host", "gateway");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Full::new(body.into())).unwrap()).await.unwrap();
    (response, connection)
}

async fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Reply {
    let (response, _connection) = open(address, method, path, headers, body).await;
    let (parts, mut body) = response.into_parts();
    let (mut bytes, mut is_whole) = (Vec::new(), true);
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => bytes.extend_from_slice(frame.data_ref().unwrap()),
            Err(_) => {
                is_whole = false;
                break;
            }
        }
    }
    Reply { status: parts.status.as_u16(), headers: parts.headers, bytes, is_whole }
}

async fn get(address: SocketAddr, path: &str) -> Reply {
    send(address, "GET", path, &[], "").await
}

async fn post(address: SocketAddr, path: &str, body: Value) -> Reply {
    send(address, "POST", path, &[], body.to_string()).await
}

/// A task that runs for a while.
fn long(task_id: &str) -> Value {
    json!({ "prompt": "Ownership", "max_tokens": 1000, "ignore_eos": true, "task_id": task_id, "wait": false })
}

fn events(bytes: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(bytes).unwrap();
    let frames = text.split("\n\n").filter(|frame| !frame.is_empty() && !frame.starts_with(':'));
    frames
        .map(|frame| {
            let data = frame.strip_prefix("data: ").unwrap_or_else(|| panic!("no data frame: {frame}"));
            serde_json::from_str(data).unwrap_or(Value::String(data.into()))
        })
        .collect()
}

fn text_of(events: &[Value]) -> String {
    events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect()
}

/// Waits until the node's metrics say this.
async fn until_metric(gateway: &Gateway, line: &str) {
    let telemetry = &gateway.cluster.nodes[0].services().telemetry;
    while !telemetry.render(butterfly_engine::telemetry::TextFormat::Classic).lines().any(|metric| metric == line) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_has_its_status_its_code_and_the_same_form() {
    let gateway = gateway(&[("ingest", "max_request_size_mb = 1")]).await;
    let large = json!({ "prompt": "x".repeat(1 << 20) }).to_string();
    let no_receipt = format!("/v1/receipts/{}", "0".repeat(64));
    let cases: Vec<(&str, &str, String, u16, &str)> = vec![
        ("POST", "/v1/completions", "{".into(), 400, "invalid_json"),
        ("POST", "/v1/completions", "[1]".into(), 400, "invalid_json"),
        ("POST", "/v1/completions", "{}".into(), 400, "invalid_value"),
        ("POST", "/v1/completions", r#"{"prompt": "x", "n": 2, "best_of": 3}"#.into(), 400, "unsupported_parameter"),
        ("POST", "/v1/completions", r#"{"prompt": "x", "logprobs": 21}"#.into(), 400, "invalid_value"),
        ("POST", "/v1/completions", r#"{"prompt": "x", "max_tokens": 5000}"#.into(), 400, "context_length_exceeded"),
        ("POST", "/v1/completions", r#"{"prompt": "x", "model": "gpt"}"#.into(), 404, "model_not_found"),
        ("POST", "/v1/completions", large, 413, "request_too_large"),
        ("POST", "/inference", r#"{"input": [1.0]}"#.into(), 400, "invalid_value"),
        ("POST", "/inference", r#"{"prompt": "x", "text": "y"}"#.into(), 400, "invalid_value"),
        ("POST", "/inference", r#"{"prompt": "x", "stream": true}"#.into(), 400, "unsupported_parameter"),
        ("GET", "/inference/nothing", String::new(), 404, "task_not_found"),
        ("GET", "/inference/%ff", String::new(), 400, "invalid_value"),
        ("DELETE", "/v1/requests/nothing", String::new(), 404, "task_not_found"),
        ("GET", &no_receipt, String::new(), 404, "receipt_not_found"),
        ("GET", "/v1/receipts/x", String::new(), 404, "receipt_not_found"),
        ("GET", "/v1/models/other", String::new(), 404, "model_not_found"),
        ("GET", "/v1/chat", String::new(), 404, "not_found"),
        ("GET", "/v1/completions", String::new(), 405, "method_not_allowed"),
        ("PUT", "/inference", String::new(), 405, "method_not_allowed"),
    ];
    for (method, path, body, status, code) in cases {
        let reply = send(gateway.address, method, path, &[], body).await;
        assert_eq!((reply.status, reply.code().as_str()), (status, code), "{method} {path}");
        assert!(!reply.header("x-request-id").is_empty(), "{method} {path}");
        assert_eq!(reply.header("content-type"), "application/json", "{method} {path}");
    }
    let reply = send(gateway.address, "GET", "/v1/completions", &[("x-request-id", "mine-1")], "").await;
    assert_eq!((reply.header("allow"), reply.header("x-request-id")), ("POST", "mine-1"));
    until_metric(&gateway, r#"butterfly_tasks_total{model="tiny-rust",kind="completion",status="rejected"} 8"#).await;
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_be_asked_about_is_there() {
    let gateway = gateway(&[]).await;
    let models = get(gateway.address, "/v1/models").await.json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["context_length"]), (&json!("tiny-rust"), &json!(1024)));
    assert_eq!(get(gateway.address, "/v1/models/tiny-rust").await.json(), models["data"][0]);
    let epoch = get(gateway.address, "/v1/epoch").await;
    let parsed = Epoch::from_json(std::str::from_utf8(&epoch.bytes).unwrap()).unwrap();
    assert_eq!(models["data"][0]["epoch"], parsed.digest().to_string());
    let health = get(gateway.address, "/health").await;
    assert_eq!((health.status, &health.json()["healthy"]), (200, &json!(true)));
    assert_eq!(health.json()["services"]["ingest"], "ready");
    let metrics = get(gateway.address, "/metrics").await;
    assert!(String::from_utf8_lossy(&metrics.bytes).contains("butterfly_tasks_waiting 0"));
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_says_what_a_whole_answer_says_and_both_are_proved() {
    let gateway = gateway(&[]).await;
    let mut body =
        json!({ "prompt": "The borrow checker", "max_tokens": 24, "temperature": 0, "return_token_ids": true });
    let whole = post(gateway.address, "/v1/completions", body.clone()).await;
    assert_eq!(whole.status, 200, "{}", whole.json());
    let whole = whole.json();
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let stream = post(gateway.address, "/v1/completions", body).await;
    assert_eq!((stream.status, stream.header("content-type")), (200, "text/event-stream"));
    assert_eq!(stream.header("cache-control"), "no-cache, no-transform");
    assert_eq!(stream.header("x-accel-buffering"), "no");
    assert!(stream.is_whole);
    let events = events(&stream.bytes);
    let [chunks @ .., last, usage, done] = events.as_slice() else { panic!("{events:?}") };
    assert!(chunks.iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null() && chunk["usage"].is_null()));
    assert_eq!(text_of(&events), whole["choices"][0]["text"].as_str().unwrap());
    let tokens: Vec<Value> =
        events.iter().filter_map(|event| event["choices"][0]["token_ids"].as_array()).flatten().cloned().collect();
    assert_eq!(json!(tokens), whole["choices"][0]["token_ids"]);
    assert_eq!(last["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    assert_eq!((&usage["usage"], done), (&whole["usage"], &json!("[DONE]")));
    for answered in [&whole, last] {
        let proof = &answered["butterfly"];
        assert_eq!(proof["verification"]["status"], "unverified", "f = 0: one node's word");
        let id = proof["receipt_id"].as_str().unwrap();
        let receipt = get(gateway.address, &format!("/v1/receipts/{id}")).await;
        assert!(receipt.header("cache-control").contains("immutable"));
        let tag = receipt.header("etag").to_owned();
        let known = send(gateway.address, "GET", &format!("/v1/receipts/{id}"), &[("if-none-match", &tag)], "").await;
        assert_eq!((known.status, known.bytes.len(), known.header("etag")), (304, 0, tag.as_str()));
    }
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_can_be_polled_to_a_bundle_that_verifies() {
    let gateway = with_model("builtin:mlp", &[]).await;
    let input: Vec<f32> = (0..64).map(|i| i as f32 / 64.0).collect();
    let waited = post(gateway.address, "/inference", json!({ "input": input, "task_id": "waited" })).await;
    assert_eq!(waited.status, 200, "{}", waited.json());
    let accepted =
        post(gateway.address, "/inference", json!({ "input": input, "task_id": "polled", "wait": false })).await;
    assert_eq!((accepted.status, accepted.header("location")), (202, "/inference/polled"));
    let bundle = loop {
        let task = get(gateway.address, "/inference/polled").await.json();
        match task["status"].as_str().unwrap() {
            "queued" | "running" => tokio::task::yield_now().await,
            _ => break task,
        }
    };
    assert_eq!((&bundle["status"], &bundle["output"]), (&json!("completed"), &waited.json()["output"]));
    let request = Request::from_json(&bundle["request"].to_string()).unwrap();
    let answer = Answer::from_json(&bundle["answer"].to_string()).unwrap();
    let receipt = Receipt::from_json(&bundle["receipt"].to_string()).unwrap();
    let epoch = Epoch::from_json(&bundle["epoch"].to_string()).unwrap();
    assert!(receipt.verify(&epoch, Some(&request), Some(&answer)).unwrap().is_complete());
    let by_receipt = format!("/inference/{}", bundle["receipt_id"].as_str().unwrap());
    assert_eq!(get(gateway.address, &by_receipt).await.json(), bundle);
    let again = post(gateway.address, "/inference", json!({ "input": input, "task_id": "polled" })).await;
    assert_eq!(again.status, 200, "the id of a task that has ended may be used again");
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_living_id_is_taken_and_a_deleted_task_has_failed() {
    let gateway = gateway(&[]).await;
    assert_eq!(post(gateway.address, "/inference", long("one")).await.status, 202);
    let second = post(gateway.address, "/inference", long("one")).await;
    assert_eq!((second.status, second.code().as_str()), (409, "task_already_exists"));
    assert_eq!(second.header("x-should-retry"), "false");
    let deleted = send(gateway.address, "DELETE", "/v1/requests/one", &[], "").await.json();
    assert_eq!((&deleted["status"], &deleted["error"]["code"]), (&json!("failed"), &json!("cancelled")));
    assert_eq!(get(gateway.address, "/inference/one").await.json()["status"], "failed");
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_its_work() {
    let gateway = gateway(&[]).await;
    let body = json!({ "prompt": "Ownership", "max_tokens": 1000, "ignore_eos": true, "stream": true }).to_string();
    let (response, connection) = open(gateway.address, "POST", "/v1/completions", &[], body).await;
    let mut stream = response.into_body();
    assert!(stream.frame().await.unwrap().is_ok());
    connection.abort();
    drop(stream);
    let cancelled = r#"butterfly_tasks_total{model="tiny-rust",kind="completion",status="cancelled"} 1"#;
    until_metric(&gateway, cancelled).await;
    let services = gateway.cluster.nodes[0].services();
    services.board.drained().await;
    assert_eq!(services.journal.open_requests().unwrap(), vec![], "its end is in the log");
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_is_told_and_breaks_off() {
    let gateway = gateway(&[]).await;
    let body = json!({ "prompt": "Ownership", "max_tokens": 1000, "ignore_eos": true, "stream": true }).to_string();
    let (response, _connection) = open(gateway.address, "POST", "/v1/completions", &[], body).await;
    let mut stream = response.into_body();
    let first = stream.frame().await.unwrap().unwrap().into_data().unwrap();
    let id = events(&first)[0]["id"].as_str().unwrap().to_owned();
    let deleted = send(gateway.address, "DELETE", &format!("/v1/requests/{id}"), &[], "").await;
    assert_eq!(deleted.status, 200);
    let mut bytes = Vec::new();
    let broken = loop {
        match stream.frame().await {
            Some(Ok(frame)) => bytes.extend_from_slice(frame.data_ref().unwrap()),
            Some(Err(_)) => break true,
            None => break false,
        }
    };
    assert!(broken, "a clean end would pass for success");
    let events = events(&bytes);
    assert_eq!(events.last().unwrap()["error"]["code"], "cancelled");
    assert!(!events.contains(&json!("[DONE]")));
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_so_at_once_and_writes_nothing() {
    let settings = [("assign", "max_in_flight = 1\nmax_queue_size = 2"), ("partition", "capacity = 1")];
    let gateway = gateway(&settings).await;
    let mut accepted = 0;
    let refused = loop {
        let reply = post(gateway.address, "/inference", long(&format!("task-{accepted}"))).await;
        match reply.status {
            202 => accepted += 1,
            _ => break reply,
        }
        // One runs, two wait in the queue, the edges hold 257 and what is on its way between them; and some may have ended.
        assert!(accepted <= 400, "nothing bounds the queue");
    };
    assert_eq!(accepted, 3, "one runs and two wait");
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("2 requests wait"));
    assert_eq!((refused.status, refused.code().as_str()), (429, "queue_full"));
    let seconds: u64 = refused.header("retry-after").parse().unwrap();
    assert!((1..=120).contains(&seconds));
    let services = gateway.cluster.nodes[0].services();
    assert!(services.journal.task("", &format!("task-{accepted}")).unwrap().is_none());
    assert_eq!(services.journal.open_requests().unwrap().len(), services.board.living());
    for task in 0..accepted {
        send(gateway.address, "DELETE", &format!("/v1/requests/task-{task}"), &[], "").await;
    }
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_most_urgent_request_goes_first() {
    let settings = [("assign", "max_in_flight = 1\nscheduler_type = \"priority\"")];
    let gateway = gateway(&settings).await;
    let address = gateway.address;
    assert_eq!(post(address, "/inference", long("runs")).await.status, 202);
    for (task, priority) in [("low", 0), ("high", 9), ("usual", 5)] {
        let mut body = long(task);
        match task {
            "high" => body["butterfly"] = json!({ "priority": priority }),
            _ => body["priority"] = json!(priority),
        }
        assert_eq!(post(address, "/inference", body).await.status, 202);
    }
    // What waits is shown.
    until_metric(&gateway, "butterfly_tasks_waiting 3").await;
    until_metric(&gateway, "butterfly_tasks_running 1").await;
    for (ends, next) in [("runs", "high"), ("high", "usual"), ("usual", "low")] {
        send(address, "DELETE", &format!("/v1/requests/{ends}"), &[], "").await;
        loop {
            let task = get(address, &format!("/inference/{next}")).await.json();
            if task["status"] == "running" {
                break;
            }
            assert_eq!(task["status"], "queued", "{task}");
        }
    }
    let mut body = long("unknown");
    body["priority"] = json!(10);
    let refused = post(address, "/inference", body).await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "invalid_value"));
    let completion = json!({ "prompt": "x", "priority": 1 });
    let refused = post(address, "/v1/completions", completion).await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "unsupported_parameter"), "another scale elsewhere");
    send(address, "DELETE", "/v1/requests/low", &[], "").await;
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_what_waits() {
    let gateway = gateway(&[("assign", "max_in_flight = 1")]).await;
    assert_eq!(post(gateway.address, "/inference", long("runs")).await.status, 202);
    let mut hurried = long("waits");
    hurried["wait"] = json!(true);
    hurried["butterfly"] = json!({ "deadline_ms": 1 });
    let late = post(gateway.address, "/inference", hurried).await;
    assert_eq!((late.status, late.code().as_str()), (504, "deadline_exceeded"));
    assert!(late.json()["error"]["message"].as_str().unwrap().contains("0.001 s"));
    assert_eq!(late.header("x-should-retry"), "false");
    send(gateway.address, "DELETE", "/v1/requests/runs", &[], "").await;
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_tell_clients_apart_and_keep_strangers_out() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens.txt");
    let line = |key: &str, name: &str| format!("{} {name}\n", hex::encode(Sha256::digest(key)));
    std::fs::write(&tokens, line("alice-key", "alice") + &line("bob-key", "bob")).unwrap();
    let gateway = gateway(&[("ingest", &format!("tokens_file = {:?}", tokens.to_str().unwrap()))]).await;
    let (alice, bob) = ([("authorization", "Bearer alice-key")], [("authorization", "Bearer bob-key")]);
    for headers in [&[][..], &[("authorization", "Bearer nobody")], &[("authorization", "Basic alice-key")]] {
        for (method, path) in [("GET", "/v1/models"), ("POST", "/inference"), ("GET", "/metrics"), ("GET", "/x")] {
            let refused = send(gateway.address, method, path, headers, "").await;
            assert_eq!((refused.status, refused.code().as_str()), (401, "invalid_api_key"), "{method} {path}");
            assert!(refused.header("www-authenticate").starts_with("Bearer"));
        }
    }
    let body = json!({ "prompt": "Ownership", "max_tokens": 2, "task_id": "same" }).to_string();
    for headers in [&alice, &bob] {
        assert_eq!(send(gateway.address, "POST", "/inference", headers, body.clone()).await.status, 200);
    }
    let of_alice = send(gateway.address, "GET", "/inference/same", &alice, "").await.json();
    assert_eq!(of_alice["request"]["client"], "alice");
    let by_receipt = format!("/inference/{}", of_alice["receipt_id"].as_str().unwrap());
    assert_eq!(send(gateway.address, "GET", &by_receipt, &bob, "").await.status, 404, "not bob's");
    let stranger = get(gateway.address, "/health").await.json();
    assert_eq!((&stranger["healthy"], stranger.get("nodes")), (&json!(true), None));
    assert!(send(gateway.address, "GET", "/health", &bob, "").await.json()["nodes"].is_array());
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_too_often_waits() {
    let gateway = gateway(&[("ingest", "rate_limit_per_second = 2")]).await;
    let mut last = get(gateway.address, "/v1/models").await;
    for _ in 0..50 {
        if last.status == 429 {
            break;
        }
        last = get(gateway.address, "/v1/models").await;
    }
    assert_eq!((last.status, last.code().as_str()), (429, "rate_limited"));
    assert_eq!(last.header("retry-after"), "1");
    assert_eq!(get(gateway.address, "/health").await.status, 200, "probes are not counted");
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_finishes_what_it_has_and_takes_no_more() {
    let gateway = gateway(&[]).await;
    let address = gateway.address;
    let body = json!({ "prompt": "Ownership", "max_tokens": 200, "ignore_eos": true, "stream": true }).to_string();
    let (response, _connection) = open(address, "POST", "/v1/completions", &[], body).await;
    let mut stream = response.into_body();
    assert!(stream.frame().await.unwrap().is_ok());
    let stopping = tokio::spawn(gateway.cluster.shutdown());
    loop {
        let Ok(mut refused) = TcpStream::connect(address).await else { break };
        let request = b"POST /inference HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 16\r\n\r\n{\"prompt\": \"x\"} ";
        refused.write_all(request).await.unwrap();
        let mut reply = String::new();
        refused.read_to_string(&mut reply).await.unwrap();
        if reply.starts_with("HTTP/1.1 503") {
            assert!(reply.contains("\"draining\"") && reply.contains("retry-after: "), "{reply}");
            break;
        }
    }
    let mut rest = Vec::new();
    while let Some(frame) = stream.frame().await {
        rest.extend_from_slice(frame.unwrap().data_ref().unwrap());
    }
    assert_eq!(events(&rest).last().unwrap(), "[DONE]");
    stopping.await.unwrap().unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http_closes_the_connection_and_nothing_else() {
    let gateway = gateway(&[]).await;
    let many_headers: String = (0..100).map(|number| format!("x-{number}: y\r\n")).collect();
    let long_header = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(200 << 10));
    let chunks = "POST /inference HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n";
    for bytes in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        &format!("GET / HTTP/1.1\r\n{many_headers}\r\n"),
        &long_header,
        chunks,
        "POST /inference HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(gateway.address).await.unwrap();
        // The gateway may close before it has read everything.
        let _ = stream.write_all(bytes.as_bytes()).await;
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply).await;
        assert!(reply.is_empty() || reply.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&reply));
    }
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_told_so() {
    let gateway = gateway(&[("ingest", "max_connections = 2")]).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(gateway.address).await.unwrap();
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        held.push(stream);
    }
    let third = send(gateway.address, "GET", "/health", &[], "").await;
    assert_eq!((third.status, third.code().as_str(), third.header("retry-after")), (429, "queue_full", "1"));
    drop(held);
    gateway.cluster.shutdown().await.unwrap();
}
