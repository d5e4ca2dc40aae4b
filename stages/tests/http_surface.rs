//! What surrounds the routes of the public listener: pages of other origins, limits of heads and bodies, methods, keys of
//! retries, the result cache, and the OpenAPI document.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use butterfly::loopback::{Cluster, Loopback};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

mod support;
use support::Processes;

struct Gateway {
    address: SocketAddr,
    cluster: Cluster,
    _folder: tempfile::TempDir,
}

#[derive(Debug)]
struct Reply {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&self.body)))
    }

    fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap().to_owned()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

async fn gateway(ingest: &str) -> Gateway {
    let settings = if ingest.is_empty() { Vec::new() } else { vec![("ingest", ingest.to_owned())] };
    let loopback = Loopback { max_byzantine: 0, settings, ..Loopback::default() };
    let folder = tempfile::tempdir().unwrap();
    let cluster = loopback.start(folder.path()).await.unwrap();
    cluster.meshed().await;
    Gateway { address: cluster.http_address().unwrap(), cluster, _folder: folder }
}

/// Where a gateway listens.
struct At(SocketAddr);

impl At {
    async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
        let stream = TcpStream::connect(self.0).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut request = hyper::Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", self.0.to_string());
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = sender.send_request(request.body(Full::new(body.into())).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let text = |value: &hyper::header::HeaderValue| value.to_str().unwrap().to_owned();
        let headers = response.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect();
        let body = response.into_body().collect().await.unwrap().to_bytes().to_vec();
        connection.abort();
        Reply { status, headers, body }
    }
}

impl Gateway {
    async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
        At(self.address).ask(method, path, headers, body).await
    }

    /// What comes back for these bytes until the gateway closes.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).await.unwrap();
        String::from_utf8(reply).unwrap()
    }

    async fn stop(self) {
        self.cluster.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_reads_answers_only_where_its_origin_is_named() {
    let gateway = gateway("cors_origins = \"https://app.example http://localhost:3000\"").await;
    let preflight = [
        ("origin", "https://app.example"),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization, x-stainless-lang"),
    ];
    let allowed = gateway.ask("OPTIONS", "/v1/completions", &preflight, "").await;
    assert_eq!((allowed.status, allowed.header("access-control-allow-origin")), (204, "https://app.example"));
    assert_eq!(allowed.header("access-control-allow-headers"), "authorization, x-stainless-lang");
    assert!(allowed.header("access-control-allow-methods").contains("POST"));
    let read = gateway.ask("GET", "/v1/models", &preflight[..1], "").await;
    assert_eq!((read.status, read.header("access-control-allow-origin")), (200, "https://app.example"));
    assert!(read.header("access-control-expose-headers").contains("x-request-id"));
    let foreign = gateway.ask("POST", "/inference", &[("origin", "https://evil.example")], "{}").await;
    assert_eq!((foreign.status, foreign.code().as_str()), (403, "forbidden"));
    assert_eq!((foreign.header("access-control-allow-origin"), foreign.header("vary")), ("", "origin"));
    let own = gateway.ask("GET", "/v1/models", &[("origin", &format!("http://{}", gateway.address))], "").await;
    assert_eq!(own.status, 200, "its own pages are not foreign");
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_are_held_to_a_size_and_methods_are_named() {
    let gateway = gateway("").await;
    let many: Vec<(String, &str)> = (0..70).map(|number| (format!("x-{number}"), "y")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    let long = "y".repeat(40 << 10);
    for headers in [many.as_slice(), &[("x-long", long.as_str())]] {
        let refused = gateway.ask("GET", "/v1/models", headers, "").await;
        assert_eq!((refused.status, refused.code().as_str()), (431, "headers_too_large"));
    }
    let refused = gateway.ask("GET", &format!("/inference/{}", "y".repeat(9 << 10)), &[], "").await;
    assert_eq!((refused.status, refused.code().as_str()), (414, "uri_too_long"));
    let options = gateway.ask("OPTIONS", "/v1/completions", &[], "").await;
    assert_eq!((options.status, options.header("allow"), options.body.len()), (204, "POST", 0));
    let head = gateway.ask("HEAD", "/v1/models", &[], "").await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    let patch = gateway.ask("PATCH", "/v1/models", &[], "").await;
    assert_eq!((patch.status, patch.header("allow"), patch.code().as_str()), (405, "GET,HEAD", "method_not_allowed"));
    gateway.stop().await;
}

/// A client that writes all of a large body before it reads must get the refusal, not a reset connection; and one that asks
/// first is not made to send it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens.txt");
    std::fs::write(&tokens, format!("{} alice\n", "0".repeat(64))).unwrap();
    let gateway = gateway(&format!("max_request_size_mb = 1\ntokens_file = {:?}", tokens.to_str().unwrap())).await;
    let body = "x".repeat(8 << 20);
    for path in ["/v1/completions", "/nothing", "/v1/models"] {
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        let reply = gateway.raw(format!("{head}{body}").as_bytes()).await;
        assert!(reply.starts_with("HTTP/1.1 401 ") && reply.contains("invalid_api_key"), "{path}: {reply}");
    }
    let asks = "POST /inference HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 9999999\r\n\r\n";
    let reply = gateway.raw(asks.as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 401 "), "no 100 before the refusal: {reply}");
    gateway.stop().await;
    let open = self::gateway("max_request_size_mb = 1").await;
    for path in ["/v1/completions", "/nothing", "/v1/models"] {
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        let reply = open.raw(format!("{head}{body}").as_bytes()).await;
        assert!(reply.starts_with("HTTP/1.1 4") && reply.contains("\"error\""), "{path}: {reply}");
    }
    open.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_are_answered_in_order() {
    let gateway = gateway("").await;
    let body = json!({ "prompt": "Ownership", "max_tokens": 2 }).to_string();
    let bytes = format!(
        "POST /inference HTTP/1.1\r\nhost: x\r\nx-request-id: one\r\ncontent-length: {}\r\n\r\n{body}\
         GET /v1/models HTTP/1.1\r\nhost: x\r\nx-request-id: two\r\n\r\n\
         GET /nothing HTTP/1.1\r\nhost: x\r\nx-request-id: three\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let reply = gateway.raw(bytes.as_bytes()).await;
    let ids: Vec<&str> = reply.lines().filter_map(|line| line.strip_prefix("x-request-id: ")).collect();
    assert_eq!(ids, ["one", "two", "three"], "{reply}");
    gateway.stop().await;
}

fn completion(max_tokens: usize) -> Value {
    json!({ "model": "tiny-rust", "prompt": "Ownership is", "max_tokens": max_tokens })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_gets_the_answer_that_is_there_and_a_key_stands_for_one_request() {
    let gateway = gateway("").await;
    let key = [("idempotency-key", "retry-1")];
    let body = completion(8).to_string();
    let first = gateway.ask("POST", "/v1/completions", &key, body.clone()).await;
    assert_eq!((first.status, first.header("idempotent-replayed")), (200, ""));
    let again = gateway.ask("POST", "/v1/completions", &key, body.clone()).await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, "true"));
    assert_eq!(again.body, first.body, "sampled with temperature 1: only the same answer is the same");
    let other = gateway.ask("POST", "/v1/completions", &[("idempotency-key", "retry-2")], body.clone()).await;
    assert_ne!(other.json()["id"], first.json()["id"]);
    let changed = gateway.ask("POST", "/v1/completions", &key, completion(9).to_string()).await;
    assert_eq!((changed.status, changed.code().as_str()), (422, "idempotency_key_reused"));
    let elsewhere = gateway.ask("POST", "/inference", &key, body).await;
    assert_eq!((elsewhere.status, elsewhere.code().as_str()), (422, "idempotency_key_reused"));
    let mut likely = completion(8);
    (likely["logprobs"], likely["echo"]) = (json!(1), json!(true));
    let key = [("idempotency-key", "retry-4")];
    let first = gateway.ask("POST", "/v1/completions", &key, likely.to_string()).await;
    let again = gateway.ask("POST", "/v1/completions", &key, likely.to_string()).await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, "true"));
    assert!(first.json()["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len() > 8, "{}", first.json());
    assert_eq!(again.body, first.body, "log-probabilities are kept with the answer");
    let mut streamed = completion(8);
    streamed["stream"] = json!(true);
    let key = [("idempotency-key", "retry-3")];
    let text = |reply: &Reply| -> String {
        let text = std::str::from_utf8(&reply.body).unwrap();
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
        events.filter_map(|event| Some(event["choices"][0]["text"].as_str()?.to_owned())).collect()
    };
    let first = gateway.ask("POST", "/v1/completions", &key, streamed.to_string()).await;
    let again = gateway.ask("POST", "/v1/completions", &key, streamed.to_string()).await;
    assert_eq!((text(&again), again.header("idempotent-replayed")), (text(&first), "true"));
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_gets_every_choice_that_is_there() {
    let gateway = gateway("").await;
    let key = [("idempotency-key", "choices-1")];
    let body = json!({ "messages": [{ "role": "user", "content": "Traits" }], "max_tokens": 6, "n": 3 }).to_string();
    let first = gateway.ask("POST", "/v1/chat/completions", &key, body.clone()).await;
    assert_eq!((first.status, first.header("idempotent-replayed")), (200, ""), "{}", first.json());
    assert_eq!(first.json()["choices"].as_array().unwrap().len(), 3);
    let again = gateway.ask("POST", "/v1/chat/completions", &key, body).await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, "true"));
    assert_eq!(again.json(), first.json(), "sampled with temperature 1: only the same answers are the same");
    gateway.stop().await;
}

/// The client of a keyed task that goes away comes back to the same task.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_joins_the_task_that_runs() {
    let gateway = gateway("").await;
    let body = json!({ "prompt": "Ownership", "max_tokens": 300, "ignore_eos": true, "temperature": 1 }).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nidempotency-key: joined\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut first = TcpStream::connect(gateway.address).await.unwrap();
    first.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let services = gateway.cluster.nodes[0].services();
    // It may run before it is in the log, where the retry looks for it; after some tokens it is there.
    let tokens = || {
        let open = services.journal.open_requests().unwrap();
        open.first()
            .and_then(|open| services.board.status("", &open.accepted.task_id))
            .map_or(0, |status| status.tokens)
    };
    while tokens() < 8 {
        tokio::task::yield_now().await;
    }
    drop(first);
    let key = [("idempotency-key", "joined")];
    let (one, two) = futures::join!(
        gateway.ask("POST", "/v1/completions", &key, body.clone()),
        gateway.ask("POST", "/v1/completions", &key, body.clone()),
    );
    assert_eq!((one.status, two.status), (200, 200), "{}", one.json());
    assert_eq!(one.body, two.body);
    assert_eq!(one.header("idempotent-replayed"), "true");
    assert_eq!(services.telemetry.metrics().receipts_total.get(), 1, "it was computed once");
    gateway.stop().await;
}

/// What a key stands for outlives the process.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_after_a_restart_gets_the_answer_of_before() {
    let prepared = || Loopback { max_byzantine: 0, ..Loopback::default() };
    let folder = tempfile::tempdir().unwrap();
    let key = [("idempotency-key", "kept")];
    let mut bodies = Vec::new();
    for _ in 0..2 {
        let cluster = prepared().start(folder.path()).await.unwrap();
        cluster.meshed().await;
        let gateway =
            Gateway { address: cluster.http_address().unwrap(), cluster, _folder: tempfile::tempdir().unwrap() };
        let reply = gateway.ask("POST", "/v1/completions", &key, completion(8).to_string()).await;
        assert_eq!(reply.status, 200, "{}", reply.json());
        bodies.push(reply.json());
        gateway.stop().await;
    }
    assert_eq!(bodies[0]["id"], bodies[1]["id"]);
    assert_eq!(bodies[0]["choices"], bodies[1]["choices"]);
}

/// A request that was acknowledged before a power cut is the one that a retry finds after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_after_a_crash_finds_what_was_acknowledged() {
    let mut node = Processes::start(&Loopback { max_byzantine: 0, ..Loopback::default() }).await;
    let gateway = |node: &Processes| At(node.http);
    let key = [("idempotency-key", "acknowledged")];
    let body = json!({ "prompt": "Ownership", "max_tokens": 200, "ignore_eos": true, "wait": false }).to_string();
    let accepted = gateway(&node).ask("POST", "/inference", &key, body.clone()).await;
    assert_eq!(accepted.status, 202, "{}", accepted.json());
    node.kill(0);
    node.spawn(0);
    node.wait_until_up(0).await;
    let again = gateway(&node).ask("POST", "/inference", &key, body).await;
    assert_eq!((again.status, again.header("idempotent-replayed")), (202, "true"));
    assert_eq!(again.json(), accepted.json(), "the same task");
    let path = again.header("location").to_owned();
    loop {
        let task = gateway(&node).ask("GET", &path, &[], "").await.json();
        match task["status"].as_str().unwrap() {
            "completed" => break,
            "failed" => panic!("{task}"),
            _ => tokio::task::yield_now().await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeat_that_can_have_one_answer_only_is_answered_from_the_cache() {
    let gateway = gateway("result_cache = \"1 MiB\"").await;
    let mut body = completion(8);
    body["temperature"] = json!(0);
    let first = gateway.ask("POST", "/v1/completions", &[], body.to_string()).await.json();
    assert_eq!(first["butterfly"].get("cached"), None);
    let again = gateway.ask("POST", "/v1/completions", &[], body.to_string()).await.json();
    assert_eq!(again["butterfly"]["cached"], json!(true));
    assert_eq!(again["butterfly"]["receipt_id"], first["butterfly"]["receipt_id"], "the original receipt");
    assert_eq!(again["choices"], first["choices"]);
    let metrics = gateway.cluster.nodes[0].services().telemetry.metrics();
    assert!((metrics.result_cache_hit_ratio.ratio() - 0.5).abs() < f64::EPSILON);
    body["butterfly"] = json!({ "nonce": "07".repeat(32) });
    let own = gateway.ask("POST", "/v1/completions", &[], body.to_string()).await.json();
    assert_ne!(
        own["butterfly"]["receipt_id"], first["butterfly"]["receipt_id"],
        "a nonce asks for an answer of its own"
    );
    body["butterfly"] = json!({ "nonce": "07" });
    assert_eq!(gateway.ask("POST", "/v1/completions", &[], body.to_string()).await.status, 400);
    let warm = completion(8).to_string();
    for _ in 0..2 {
        let warm = gateway.ask("POST", "/v1/completions", &[], warm.clone()).await.json();
        assert_eq!(warm["butterfly"].get("cached"), None, "chance has many answers");
    }
    gateway.stop().await;
}

/// Whatever a running gateway does for a method that the document has not is 405, and what it has is not.
#[tokio::test(flavor = "multi_thread")]
async fn the_document_is_what_the_gateway_does() {
    let gateway = gateway("").await;
    let served = gateway.ask("GET", "/openapi.json", &[], "").await;
    assert_eq!((served.status, served.header("content-type")), (200, "application/json"));
    let document = served.json();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH"] {
            let reply = gateway.ask(method, &path.replace("{id}", "x"), &[], "").await;
            let operation = methods.get(method.to_ascii_lowercase());
            assert_eq!(reply.status == 405, operation.is_none(), "{method} {path}");
            let Some(operation) = operation else { continue };
            let described = &operation["responses"][reply.status.to_string()];
            assert!(described.is_object(), "{method} {path} answered {}", reply.status);
            let described = match described["$ref"].as_str() {
                Some(reference) => document.pointer(reference.strip_prefix('#').unwrap()).unwrap(),
                None => described,
            };
            let form = reply.header("content-type").split(';').next().unwrap();
            assert!(described["content"].get(form).is_some(), "{method} {path} answered in {form}");
        }
    }
    gateway.stop().await;
}

/// Every metric that the dashboard asks for is there from the start, on a node with peers.
#[tokio::test(flavor = "multi_thread")]
async fn the_dashboard_shows_what_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Loopback::default().start(folder.path()).await.unwrap();
    cluster.meshed().await;
    let metrics = At(cluster.http_address().unwrap()).ask("GET", "/metrics", &[], "").await;
    let metrics = String::from_utf8(metrics.body).unwrap();
    let exported: BTreeSet<&str> = metrics
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/grafana/butterfly.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let expressions: Vec<&str> = panels
        .filter_map(|panel| panel["targets"].as_array())
        .flatten()
        .map(|target| target["expr"].as_str().unwrap())
        .collect();
    assert!(expressions.len() > 20, "{}", expressions.len());
    for expression in expressions {
        let words = expression.split(|char: char| !char.is_ascii_alphanumeric() && char != '_');
        let asked: Vec<&str> = words.filter(|word| word.starts_with("butterfly_")).collect();
        assert!(!asked.is_empty(), "{expression}");
        for name in asked {
            assert!(exported.contains(name), "{name} is not exported");
        }
    }
    cluster.shutdown().await.unwrap();
}

/// A request that is taken up again after a crash keeps the trace and the id that it came with.
#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_request_keeps_its_trace() {
    let folder = tempfile::tempdir().unwrap();
    // Nobody votes, so the task lives when the log is copied, as a crash would leave it.
    let mute = Loopback { adversaries: [(1, "silent"), (2, "silent")].into(), ..Loopback::default() };
    let (before, after) = (folder.path().join("before"), folder.path().join("after"));
    let cluster = mute.start(&before).await.unwrap();
    cluster.meshed().await;
    let headers = [
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("x-request-id", "req-before-the-crash"),
    ];
    let body = json!({ "prompt": "Ownership", "max_tokens": 8, "task_id": "traced", "wait": false }).to_string();
    let gateway = At(cluster.http_address().unwrap());
    let accepted = gateway.ask("POST", "/inference", &headers, body).await;
    assert_eq!(accepted.status, 202, "{}", accepted.json());
    std::fs::create_dir_all(after.join("n0")).unwrap();
    std::fs::copy(before.join("n0/commit.redb"), after.join("n0/commit.redb")).unwrap();
    assert_eq!(gateway.ask("DELETE", "/v1/requests/traced", &[], "").await.status, 200);
    cluster.shutdown().await.unwrap();

    let cluster = Loopback::default().start(&after).await.unwrap();
    cluster.meshed().await;
    let gateway = At(cluster.http_address().unwrap());
    let answered = loop {
        let task = gateway.ask("GET", "/inference/traced", &[], "").await.json();
        match task["status"].as_str() {
            Some("queued" | "running") => tokio::task::yield_now().await,
            _ => break task,
        }
    };
    assert_eq!(answered["status"], "completed", "{answered}");
    let rd: butterfly_verify::Digest = answered["receipt_id"].as_str().unwrap().parse().unwrap();
    // On its gateway, and on the nodes that voted: a node that came up later never heard of it.
    let voters = answered["butterfly"]["replicas"][0]["nodes"].as_array().unwrap();
    assert!(voters.len() >= 2, "{answered}");
    for node in cluster.nodes.iter().map(butterfly::node::Node::services) {
        if node.node.as_ref() == "n0" || voters.contains(&json!(node.node)) {
            let context = node.telemetry.traces().context(&rd.0).expect("the request is followed");
            assert_eq!(hex::encode(context.trace_id), "0af7651916cd43dd8448eb211c80319c");
            let client = (hex::encode(context.parent_id), &*context.request_id);
            assert_eq!(client, ("b7ad6b7169203331".to_owned(), headers[1].1));
        }
    }
    cluster.shutdown().await.unwrap();
}
