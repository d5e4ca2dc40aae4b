//! A cluster as its operator sees it: the admin listeners of three nodes, and the commands that ask them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use butterfly::loopback::{Cluster, Loopback};
use butterfly::node::Node;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

const SECRET: &str = "a-secret-of-the-operator-0123456789";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

struct Watched {
    cluster: Cluster,
    token_file: PathBuf,
    _folder: tempfile::TempDir,
}

impl Watched {
    async fn start(slices: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let token_file = folder.path().join("admin.token");
        std::fs::write(&token_file, format!("{SECRET}\n")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&token_file, mode).unwrap();
        let loopback = Loopback { slices, admin_token_file: Some(token_file.clone()), ..Loopback::default() };
        let cluster = loopback.start(folder.path()).await.unwrap();
        cluster.meshed().await;
        Self { cluster, token_file, _folder: folder }
    }

    fn admins(&self) -> Vec<SocketAddr> {
        self.cluster.nodes.iter().map(|node| node.admin_address().unwrap()).collect()
    }

    /// Runs a command of the program against every node.
    async fn command(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_butterfly"));
        command.args(arguments).arg("--token-file").arg(&self.token_file).stdin(Stdio::null());
        for address in self.admins() {
            command.args(["--admin", &format!("http://{address}")]);
        }
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// The timelines of an answered request on the nodes that have voted: f+1 of every slice, and perhaps more.
    async fn voters(&self, rd: &str) -> Vec<Value> {
        let mut voters = Vec::new();
        for (address, node) in self.admins().into_iter().zip(&self.cluster.nodes) {
            let (status, body) = admin(address, &format!("/api/v1/requests/{rd}/timeline")).await;
            let Some(timeline) = (status == 200).then(|| serde_json::from_slice::<Value>(&body).unwrap()) else {
                continue;
            };
            assert_eq!(timeline["node"], json!(node.services().node));
            if has_mark(&timeline, "consensus", "voted") {
                voters.push(timeline);
            }
        }
        voters
    }

    /// Asks the gateway something, as a client that has a trace.
    async fn ask(&self, request_id: &str) -> Value {
        let headers = [("traceparent", PARENT), ("x-request-id", request_id)];
        let body = json!({ "prompt": "Ownership is", "max_tokens": 4, "task_id": format!("task-{request_id}") });
        let address = self.cluster.http_address().unwrap();
        let (status, answer) = read(send(address, "POST", "/inference", &headers, body.to_string()).await).await;
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
        serde_json::from_slice(&answer).unwrap()
    }
}

async fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: String,
) -> hyper::Response<Incoming> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut request = hyper::Request::builder().method(method).uri(path).header("host", "node");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    sender.send_request(request.body(Full::new(Bytes::from(body))).unwrap()).await.unwrap()
}

async fn read(response: hyper::Response<Incoming>) -> (u16, Bytes) {
    let status = response.status().as_u16();
    (status, response.into_body().collect().await.unwrap().to_bytes())
}

async fn admin(address: SocketAddr, path: &str) -> (u16, Bytes) {
    let bearer = format!("Bearer {SECRET}");
    read(send(address, "GET", path, &[("authorization", &bearer)], String::new()).await).await
}

async fn document(address: SocketAddr, path: &str) -> Value {
    let (status, body) = admin(address, path).await;
    assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&body));
    serde_json::from_slice(&body).unwrap()
}

/// The timeline of a request once it has this mark: a worker votes a moment after the client has its answer.
async fn timeline(address: SocketAddr, id: &str, until: &str) -> Value {
    loop {
        let (status, body) = admin(address, &format!("/api/v1/requests/{id}/timeline")).await;
        if status == 200 {
            let timeline: Value = serde_json::from_slice(&body).unwrap();
            if timeline["marks"].as_array().unwrap().iter().any(|mark| mark["what"] == until) {
                return timeline;
            }
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_complete_from_the_start_and_only_for_who_knows_the_secret() {
    let watched = Watched::start(1).await;
    for address in watched.admins() {
        for path in ["/metrics", "/api/v1/nodes", "/nowhere"] {
            let (status, body) = read(send(address, "GET", path, &[], String::new()).await).await;
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!((status, &body["error"]["code"]), (401, &json!("invalid_api_key")), "{path}");
            let wrong = [("authorization", "Bearer a-secret-of-the-operator-0123456780")];
            assert_eq!(send(address, "GET", path, &wrong, String::new()).await.status(), 401);
        }
        for path in ["/livez", "/readyz"] {
            assert_eq!(send(address, "GET", path, &[], String::new()).await.status(), 200, "{path}");
        }
        assert_eq!(admin(address, "/nowhere").await.0, 404);
        let (status, metrics) = admin(address, "/metrics").await;
        assert_eq!(status, 200);
        let metrics = String::from_utf8(metrics.to_vec()).unwrap();
        // Which there are is the engine's to say; on a node every one of them has a value.
        let families = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let families: Vec<&str> = families.map(|(name, _)| name).collect();
        assert!(families.len() > 30, "{families:?}");
        for name in families {
            assert!(metrics.contains(&format!("\n{name}")), "{name} is not there from the start");
        }
        lint(&metrics);
    }
    watched.cluster.shutdown().await.unwrap();
}

/// Debian's `prometheus` has the program; where it is not installed there is nothing to ask, and CI has it.
fn lint(metrics: &str) {
    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else {
        assert!(std::env::var_os("BUTTERFLY_REQUIRE_PROMTOOL").is_none(), "promtool is required and not installed");
        return;
    };
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), metrics.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_followed_over_every_node() {
    let watched = Watched::start(1).await;
    let answer = watched.ask("req-follow").await;
    let admins = watched.admins();
    let gateway = timeline(admins[0], "req-follow", "answered").await;
    let rd = gateway["request"].as_str().unwrap();
    assert_eq!(gateway["names"], json!(["task-req-follow"]));
    let voters = watched.voters(rd).await;
    assert!(voters.len() >= 2, "f+1 voted: {voters:?}");
    for timeline in &voters {
        assert_eq!(timeline["request_id"], "req-follow");
        assert_eq!(timeline["trace_id"], "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(timeline["parent_id"], "b7ad6b7169203331");
        let marks = timeline["marks"].as_array().unwrap();
        let times: Vec<u64> = marks.iter().map(|mark| mark["at_us"].as_u64().unwrap()).collect();
        assert!(times.is_sorted(), "{times:?}");
        for (stage, what) in [("transfer", "opened"), ("compute", "pass"), ("consensus", "voted")] {
            assert!(has_mark(timeline, stage, what), "{stage} {what} on {}: {timeline}", timeline["node"]);
        }
    }
    let whats: Vec<&Value> = gateway["marks"].as_array().unwrap().iter().map(|mark| &mark["what"]).collect();
    for what in ["admitted", "planned", "running", "sent", "hop", "decided", "written", "answered"] {
        assert!(whats.iter().any(|known| **known == what), "{what}: {whats:?}");
    }
    for id in ["task-req-follow", "0af7651916cd43dd8448eb211c80319c"] {
        assert_eq!(document(admins[0], &format!("/api/v1/requests/{id}/timeline")).await["request"], rd);
    }
    assert_eq!(admin(admins[0], "/api/v1/requests/unknown/timeline").await.0, 404);
    let receipt = answer["butterfly"]["receipt_id"].as_str().unwrap_or(rd);
    let receipts = document(admins[0], "/api/v1/receipts").await;
    assert_eq!(receipts["data"][0]["receipt_id"], receipt);

    let text = watched.command(&["trace", "req-follow"]).await;
    let text = String::from_utf8(text.stdout).unwrap();
    let nodes = voters.iter().map(|timeline| timeline["node"].as_str().unwrap());
    for expected in nodes.chain(["n0 (gateway)", "voted", "0af7651916cd43dd8448eb211c80319c"]) {
        assert!(text.contains(expected), "{expected}\n{text}");
    }
    let chrome = watched.command(&["trace", rd, "--format", "chrome"]).await;
    let chrome: Value = serde_json::from_slice(&chrome.stdout).unwrap();
    let processes = chrome["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "M").count();
    assert!((voters.len()..=3).contains(&processes), "{chrome}");
    let otlp = watched.command(&["trace", rd, "--format", "otlp"]).await;
    let otlp: Value = serde_json::from_slice(&otlp.stdout).unwrap();
    assert!((voters.len()..=3).contains(&otlp["resourceSpans"].as_array().unwrap().len()), "{otlp}");
    let unknown = watched.command(&["trace", "unknown"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    watched.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_between_slices_are_hops_at_their_receivers() {
    let watched = Watched::start(2).await;
    watched.ask("req-hop").await;
    let admins = watched.admins();
    let gateway = timeline(admins[0], "req-hop", "answered").await;
    let rd = gateway["request"].as_str().unwrap();
    let voters = watched.voters(rd).await;
    assert!(voters.len() >= 4, "f+1 of each slice voted: {voters:?}");
    for timeline in &voters {
        assert!(has_mark(timeline, "transfer", "hop"), "{}: {timeline}", timeline["node"]);
    }
    watched.cluster.shutdown().await.unwrap();
}

/// Of the events that have come whole.
fn names(stream: &[u8]) -> Vec<String> {
    let lines = std::str::from_utf8(stream).unwrap().lines();
    let events = lines.filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
    events.map(|event| event["name"].as_str().unwrap().to_owned()).collect()
}

fn has_mark(timeline: &Value, stage: &str, what: &str) -> bool {
    timeline["marks"].as_array().unwrap().iter().any(|mark| mark["stage"] == stage && mark["what"] == what)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_is_shown_as_json_as_a_page_and_as_events() {
    let watched = Watched::start(1).await;
    let admins = watched.admins();
    let bearer = format!("Bearer {SECRET}");
    let events = |query| {
        let path = format!("/api/v1/events{query}");
        let (admin, bearer) = (admins[0], &bearer);
        async move { send(admin, "GET", &path, &[("authorization", bearer)], String::new()).await }
    };
    let (limited, all) = (events("?limit=1").await, events("").await);
    assert_eq!(all.headers()["content-type"], "text/event-stream");
    watched.ask("req-shown").await;
    let limited = limited.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(names(&limited).len(), 1);
    // A link that is late may come up in between.
    let (mut body, mut seen) = (all.into_body(), Vec::new());
    while !names(&seen).iter().any(|name| name == "running") {
        seen.extend(body.frame().await.unwrap().unwrap().into_data().unwrap());
    }
    let tasks: Vec<String> = names(&seen).into_iter().filter(|name| !name.starts_with("link_")).collect();
    assert_eq!(tasks[..2], ["admitted", "running"]);

    let graph = document(admins[0], "/api/v1/graph").await;
    assert_eq!(graph["stages"].as_array().unwrap().len(), 7);
    assert!(graph["edges"].as_array().unwrap().iter().any(|edge| edge["feedback"] == true));
    let worker = document(admins[1], "/api/v1/graph").await;
    let ingest = worker["stages"].as_array().unwrap().iter().find(|stage| stage["name"] == "ingest").unwrap();
    assert_eq!(ingest["runs_here"], false, "a worker has no ingest stage");
    let nodes = document(admins[0], "/api/v1/nodes").await;
    assert_eq!(nodes["nodes"].as_array().unwrap().iter().filter(|node| node["state"] == "up").count(), 3);
    let stages = document(admins[0], "/api/v1/stages").await;
    assert!(stages["stages"].as_array().unwrap().iter().any(|stage| stage["name"] == "compute"));
    assert_eq!(stages["tasks"]["receipts"], 1);
    assert!(!document(admins[0], "/api/v1/edges").await["edges"].as_array().unwrap().is_empty());
    let requests = document(admins[0], "/api/v1/requests?limit=1").await;
    assert_eq!(requests["data"][0]["request_id"], "req-shown");
    assert_eq!(admin(admins[0], "/api/v1/requests?limit=x").await.0, 400);

    let secret = [("authorization", bearer.as_str())];
    let path = "/api/v1/tap/consensus?limit=1";
    let tapped = send(admins[0], "GET", path, &secret, String::new()).await;
    let told = send(admins[0], "GET", "/api/v1/tap/partition?limit=1&payload=true", &secret, String::new()).await;
    watched.ask("req-tapped").await;
    let tapped = String::from_utf8(tapped.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap();
    assert!(tapped.contains("\"request\"") && !tapped.contains("payload"), "{tapped}");
    let told = String::from_utf8(told.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap();
    assert!(told.contains("Ownership is"), "{told}");
    assert_eq!(admin(admins[1], "/api/v1/tap/ingest").await.0, 400, "a worker has no ingest stage");

    let status = watched.command(&["status", "--json"]).await;
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((&status["ready"], status["nodes"].as_array().unwrap().len()), (&json!(true), 3));
    let top = watched.command(&["top", "--once", "--interval", "1"]).await;
    let top = String::from_utf8(top.stdout).unwrap();
    assert!(top.contains("compute") && top.contains("n2") && !top.contains('\x1b'), "{top}");
    // A node that is gone is named, and the status says so.
    let Watched { cluster: Cluster { mut nodes, .. }, token_file, .. } = watched;
    let gone = nodes.pop().unwrap();
    let address = gone.admin_address().unwrap();
    Node::shutdown(gone).await.unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_butterfly"));
    command.args(["status", "--admin", &address.to_string(), "--token-file"]).arg(&token_file);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("unreachable"), "{output:?}");
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}
