//! Talks to the admin listeners of nodes: which there are, the secret that opens them, and short questions in JSON.
//!
//! The secret is read from a file that only its owner can read; it never is an argument. Answers are bounded in size and in
//! patience, because a node that is asked may be the one that is broken.

use std::path::{Path, PathBuf};
use std::time::Duration;

use butterfly::admin::read_secret;
use butterfly_topology::Topology;
use bytes::Bytes;
use futures::future::join_all;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::exit::Failure;
use crate::global::Global;
use crate::topology_file;

/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest answer.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Where a topology lies unless something else is said.
const USUAL_FILES: [&str; 2] = ["topology.toml", "cluster/topology.toml"];

/// Which nodes are asked.
#[derive(clap::Args)]
pub(crate) struct Where {
    /// The topology file, which says where the admin listeners are [default: topology.toml or cluster/topology.toml]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Ask this admin listener instead of those of the topology; may be given again
    #[arg(long, value_name = "URL")]
    admin: Vec<String>,
    /// File with the secret of the admin listeners [default: what the topology names]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// The admin listeners that are asked.
pub(crate) struct Admins {
    targets: Vec<Target>,
    secret: Option<String>,
}

/// One admin listener.
#[derive(Clone)]
struct Target {
    /// The node, or the address where it is not known.
    name: String,
    /// Host and port.
    authority: String,
}

/// What one listener said.
pub(crate) struct Said {
    /// Who.
    pub(crate) name: String,
    /// Status and document, or why there is none.
    pub(crate) answer: Result<(u16, Value), String>,
}

impl Said {
    /// The document, if the question was answered as it was meant.
    pub(crate) fn document(&self) -> Option<&Value> {
        self.answer.as_ref().ok().filter(|(status, _)| *status == 200).map(|(_, document)| document)
    }

    /// Why there is no document.
    pub(crate) fn problem(&self) -> Option<String> {
        match &self.answer {
            Err(why) => Some(why.clone()),
            Ok((200, _)) => None,
            Ok((status, document)) => {
                let message = document["error"]["message"].as_str().unwrap_or("no reason is given");
                Some(format!("{status}: {message}"))
            }
        }
    }
}

impl Where {
    /// Finds the listeners and the secret.
    pub(crate) fn admins(&self, global: &Global) -> Result<Admins, Failure> {
        let file = match &self.file {
            Some(file) => Some(file.clone()),
            None if self.admin.is_empty() => {
                let usual = USUAL_FILES.iter().map(PathBuf::from).find(|file| file.is_file());
                Some(usual.ok_or_else(|| {
                    Failure::usage("which nodes? There is no topology.toml here")
                        .help("name the topology file, or an admin listener with --admin http://127.0.0.1:9100")
                })?)
            }
            None => None,
        };
        let topology = file.as_deref().map(|file| topology_file::load(file, global)).transpose()?;
        let targets = match (&topology, self.admin.as_slice()) {
            (Some(topology), []) => targets(topology)?,
            (_, urls) => urls.iter().map(|url| target(url)).collect::<Result<_, _>>()?,
        };
        let base = file.as_deref().and_then(Path::parent).unwrap_or(Path::new(""));
        let named = topology.as_ref().map(|topology| base.join(&topology.telemetry.admin_token_file));
        let secret = self.token_file.clone().or(named).map(|path| read_secret(&path)).transpose();
        let secret = secret.map_err(|error| Failure::environment(error.to_string()))?;
        Ok(Admins { targets, secret })
    }
}

fn targets(topology: &Topology) -> Result<Vec<Target>, Failure> {
    let nodes = topology.cluster.nodes.iter();
    let targets: Vec<Target> = nodes
        .filter_map(|node| Some(Target { name: node.id.to_string(), authority: node.admin_address?.to_string() }))
        .collect();
    if targets.is_empty() {
        return Err(Failure::usage("no node of this topology has an `admin_address`")
            .help("give each node one, such as admin_address = \"127.0.0.1:9100\", and restart it"));
    }
    Ok(targets)
}

fn target(url: &str) -> Result<Target, Failure> {
    let rest = url.strip_prefix("http://").unwrap_or(url);
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if authority.contains(['/', '@', ' ']) || !has_port {
        return Err(Failure::usage(format!("--admin {url}: expected http://HOST:PORT")));
    }
    Ok(Target { name: authority.to_owned(), authority: authority.to_owned() })
}

impl Admins {
    /// The listeners of a topology, without the secret: for what is told to everybody.
    pub(crate) fn open(topology: &Topology) -> Self {
        Self { targets: targets(topology).unwrap_or_default(), secret: None }
    }

    /// Asks every listener the same question, all at once.
    pub(crate) async fn ask_all(&self, path: &str) -> Vec<Said> {
        join_all(self.targets.iter().map(|target| self.ask(target, path))).await
    }

    async fn ask(&self, target: &Target, path: &str) -> Said {
        let answer = match tokio::time::timeout(PATIENCE, self.get(target, path)).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
        };
        Said { name: target.name.clone(), answer }
    }

    /// Follows a stream of every listener at once, until each has ended, and shows each entry with who said it. Tells how
    /// each ended: with nothing, or why.
    pub(crate) async fn follow_all(
        &self,
        path: &str,
        show: impl Fn(&str, &Value) -> Result<(), Failure>,
    ) -> Result<Vec<(String, Option<String>)>, Failure> {
        let follow = |target: &Target| {
            let (target, show) = (target.clone(), &show);
            async move {
                let problem = self.follow(&target, path, show).await?;
                Ok::<_, Failure>((target.name, problem))
            }
        };
        futures::future::try_join_all(self.targets.iter().map(follow)).await
    }

    async fn follow(
        &self,
        target: &Target,
        path: &str,
        show: &impl Fn(&str, &Value) -> Result<(), Failure>,
    ) -> Result<Option<String>, Failure> {
        let opened = tokio::time::timeout(PATIENCE, self.send(target, path)).await;
        let mut response = match opened {
            Ok(Ok(response)) => response,
            Ok(Err(why)) => return Ok(Some(why)),
            Err(_) => return Ok(Some(format!("no answer within {} s", PATIENCE.as_secs()))),
        };
        if response.status() != 200 {
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
            let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
            let document = serde_json::from_slice::<Value>(&body).unwrap_or_default();
            return Ok(Some(document["error"]["message"].as_str().unwrap_or("refused").to_owned()));
        }
        let mut waiting = Vec::new();
        while let Some(frame) = response.body_mut().frame().await {
            let Ok(frame) = frame else { return Ok(Some("the connection was cut".to_owned())) };
            waiting.extend_from_slice(frame.data_ref().map_or(&[][..], |bytes| bytes));
            while let Some(end) = waiting.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = waiting.drain(..=end).collect();
                if let Some(entry) = line.strip_prefix(b"data: ").and_then(|entry| serde_json::from_slice(entry).ok()) {
                    show(&target.name, &entry)?;
                }
            }
            if waiting.len() > ANSWER_BYTES_MAX {
                return Ok(Some("an entry without an end".to_owned()));
            }
        }
        Ok(None)
    }

    async fn get(&self, target: &Target, path: &str) -> Result<(u16, Value), String> {
        let response = self.send(target, path).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        serde_json::from_slice(&body).map(|document| (status, document)).map_err(|error| error.to_string())
    }

    /// Sends a question on a connection of its own, which lives as long as its answer is read.
    async fn send(&self, target: &Target, path: &str) -> Result<hyper::Response<hyper::body::Incoming>, String> {
        let stream = TcpStream::connect(&target.authority).await.map_err(|error| error.to_string())?;
        let connected = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = connected.map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        let mut request = hyper::Request::builder().uri(path).header("host", &target.authority);
        if let Some(secret) = &self.secret {
            request = request.header("authorization", format!("Bearer {secret}"));
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
        sender.send_request(request).await.map_err(|error| error.to_string())
    }
}

/// Percent-encodes what goes into a path.
pub(crate) fn path_segment(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// Runs a short conversation with nodes.
pub(crate) fn block_on<T>(conversation: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::environment(format!("the runtime does not start: {error}")))?;
    Ok(runtime.block_on(conversation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_admin_listener_is_named_by_host_and_port() {
        for (url, authority) in [("http://127.0.0.1:9100", "127.0.0.1:9100"), ("node-1:9100/", "node-1:9100")] {
            assert_eq!(target(url).ok().map(|target| target.authority).as_deref(), Some(authority));
        }
        for url in ["", "http://host", "https://host:1", "http://a@b:1", "http://host:1/path"] {
            assert!(target(url).is_err(), "{url}");
        }
        assert_eq!(path_segment("a/b c%"), "a%2Fb%20c%25");
    }
}
