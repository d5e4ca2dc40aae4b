//! What the cluster tests share: nodes as real processes on the loopback, and an HTTP client.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use butterfly::loopback::Loopback;
use butterfly_topology::NodeId;
use butterfly_verify::{Answer, Epoch, Receipt, Request};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// The reference of the built-in model: prompts, and the tokens greedy decoding gives, where the first is no near-tie.
pub fn reference() -> Vec<(String, Vec<u32>)> {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-rust-reference.json")).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let tokens = |ids: &Value| ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let cases = document["cases"].as_array().unwrap().iter();
    let cases = cases.map(|case| (case["prompt"].as_str().unwrap().to_owned(), tokens(&case["greedy_ids"])));
    cases.filter(|(_, tokens): &(String, Vec<u32>)| !tokens.is_empty()).collect()
}

/// Nodes as processes of the built program.
pub struct Processes {
    pub folder: tempfile::TempDir,
    pub http: SocketAddr,
    pub nodes: Vec<NodeId>,
    children: BTreeMap<usize, Child>,
}

impl Processes {
    /// Writes topology and keys and starts every node.
    pub async fn start(loopback: &Loopback) -> Self {
        // A port that was free a moment ago; the gateway's peers and clients need to know it before it starts.
        let http = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let prepared = loopback.prepare().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let text = prepared.text.replace("127.0.0.1:0", &http.to_string());
        std::fs::write(folder.path().join("topology.toml"), text).unwrap();
        std::fs::create_dir(folder.path().join("keys")).unwrap();
        for (node, key) in &prepared.keys {
            let path = folder.path().join("keys").join(format!("{node}.key"));
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
            std::io::Write::write_all(&mut file, hex::encode(key.to_bytes()).as_bytes()).unwrap();
        }
        let nodes = prepared.topology.cluster.nodes.iter().map(|node| node.id.clone()).collect();
        // The sockets that held the nodes' ports are freed here.
        drop(prepared);
        let mut processes = Self { folder, http, nodes, children: BTreeMap::new() };
        for index in 0..processes.nodes.len() {
            processes.spawn(index);
        }
        processes.wait_until_up(processes.nodes.len() - 1).await;
        processes
    }

    pub fn spawn(&mut self, index: usize) {
        self.spawn_under(index, &[]);
    }

    /// Starts a node whose files cannot grow beyond a size, as on a disk that is full.
    pub fn spawn_on_full_disk(&mut self, index: usize, file_bytes_max: u64) {
        let limited = format!("trap '' XFSZ; exec prlimit --fsize={file_bytes_max} \"$@\"");
        self.spawn_under(index, &["sh", "-c", &limited, "sh"]);
    }

    fn spawn_under(&mut self, index: usize, before: &[&str]) {
        let log = self.folder.path().join(format!("{}.log", self.nodes[index]));
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        let mut words = before.iter().copied().chain([env!("CARGO_BIN_EXE_butterfly"), "serve"]);
        let child = Command::new(words.next().unwrap())
            .args(words)
            .arg(self.folder.path().join("topology.toml"))
            .args(["--node", self.nodes[index].as_ref()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.children.insert(index, child);
    }

    /// Waits until the gateway is healthy and sees this many peers.
    pub async fn wait_until_up(&mut self, peers: usize) {
        loop {
            if let Ok((_, health)) = call(self.http, "GET", "/health", None).await {
                let up = health["nodes"].as_array().map_or(0, |nodes| {
                    nodes.iter().filter(|node| node["state"] == "up" && node["self"] != true).count()
                });
                if up >= peers && health["healthy"] == true {
                    return;
                }
            }
            self.assert_alive();
            tokio::task::yield_now().await;
        }
    }

    /// A test must not wait for a node that is gone.
    fn assert_alive(&mut self) {
        for (index, child) in &mut self.children {
            if let Some(status) = child.try_wait().unwrap() {
                let log = self.folder.path().join(format!("{}.log", self.nodes[*index]));
                panic!("{} ended with {status}:\n{}", self.nodes[*index], std::fs::read_to_string(log).unwrap());
            }
        }
    }

    /// Kills a node as a power cut would.
    pub fn kill(&mut self, index: usize) {
        let mut child = self.children.remove(&index).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Sends SIGTERM to a node.
    pub fn terminate(&mut self, index: usize) -> Child {
        self.signal(index, "-TERM");
        self.children.remove(&index).unwrap()
    }

    /// Sends a signal to a node.
    pub fn signal(&self, index: usize, signal: &str) {
        send_signal(&self.children[&index], signal);
    }

    /// Forgets a node that is expected to end by itself, and waits for that.
    pub fn wait_for_end(&mut self, index: usize) -> ExitStatus {
        self.children.remove(&index).unwrap().wait().unwrap()
    }

    pub fn log(&self, index: usize) -> String {
        std::fs::read_to_string(self.folder.path().join(format!("{}.log", self.nodes[index]))).unwrap()
    }

    pub fn epoch(&self) -> Epoch {
        Epoch::from_json(&std::fs::read_to_string(self.folder.path().join("epoch.json")).unwrap()).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in self.children.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a signal to a process.
pub fn send_signal(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

/// One request on a connection of its own: status and JSON body.
pub async fn call(address: SocketAddr, method: &str, path: &str, body: Option<Value>) -> anyhow::Result<(u16, Value)> {
    let (status, body) = exchange(address, method, path, body).await?;
    Ok((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
}

/// What a route says, as text.
pub async fn get_text(address: SocketAddr, path: &str) -> String {
    String::from_utf8(exchange(address, "GET", path, None).await.unwrap().1.into()).unwrap()
}

async fn exchange(address: SocketAddr, method: &str, path: &str, body: Option<Value>) -> anyhow::Result<(u16, Bytes)> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
    let request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header("host", address.to_string())
        .header("content-type", "application/json")
        .body(Full::new(body))?;
    let response = sender.send_request(request).await?;
    let status = response.status().as_u16();
    let body = response.into_body().collect().await?.to_bytes();
    connection.abort();
    Ok((status, body))
}

/// The body of a greedy completion that tells its token ids.
pub fn completion(prompt: &str, max_tokens: usize) -> Value {
    json!({ "model": "tiny-rust", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": true })
}

/// The token ids of a completion.
pub fn token_ids(response: &Value) -> Vec<u32> {
    let ids = response["choices"][0]["token_ids"].as_array().expect("token ids");
    ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The id of the receipt of an answer.
pub fn receipt_id(response: &Value) -> String {
    response["butterfly"]["receipt_id"].as_str().expect("a receipt id").to_owned()
}

/// Fetches the bundle of an answer and verifies it offline against an epoch.
pub async fn verified(address: SocketAddr, id: &str, epoch: &Epoch) -> (Request, Answer, Receipt) {
    let (status, bundle) = call(address, "GET", &format!("/inference/{id}"), None).await.unwrap();
    assert_eq!(status, 200, "{bundle}");
    let request = Request::from_json(&bundle["request"].to_string()).unwrap();
    let answer = Answer::from_json(&bundle["answer"].to_string()).unwrap();
    let receipt = Receipt::from_json(&bundle["receipt"].to_string()).unwrap();
    receipt.verify(epoch, Some(&request), Some(&answer)).expect("the receipt holds");
    (request, answer, receipt)
}

/// Waits until the gateway's health says something of a node.
pub async fn until_node(address: SocketAddr, node: &str, says: impl Fn(&Value) -> bool) -> Value {
    loop {
        let (_, health) = call(address, "GET", "/health", None).await.unwrap();
        let entry =
            health["nodes"].as_array().and_then(|nodes| nodes.iter().find(|entry| entry["id"] == node).cloned());
        if let Some(entry) = entry.filter(|entry| says(entry)) {
            return entry;
        }
        tokio::task::yield_now().await;
    }
}

pub fn folder(path: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect()
}
