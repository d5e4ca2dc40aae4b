//! A whole cluster in this process, its nodes joined over the loopback: what `butterfly demo`, the benches and the
//! integration tests run.
//!
//! Nothing is short-cut: every node has its own identity, journal, graph and QUIC endpoint, and the nodes know each other
//! only through a checked topology. Ports are bound before the topology is written, so that it can name them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use butterfly_engine::transport::LocalHub;
use butterfly_topology::catalogue::{Catalogue, KindSignature};
use butterfly_topology::{NodeId, Topology};
use k256::ecdsa::SigningKey;
use k256::elliptic_curve::Generate;

use crate::node::{Extension, Node, NodeError, NodeOptions};
use crate::registry::SIGNATURES;

/// What the cluster is like.
#[derive(Clone)]
pub struct Loopback {
    /// `builtin:…`, or a folder.
    pub model: String,
    /// f.
    pub max_byzantine: usize,
    /// Slices; each is held by 2f+1 nodes of its own.
    pub slices: usize,
    /// Nodes beyond those.
    pub spares: usize,
    /// Behaviour of lying nodes, by index.
    pub adversaries: BTreeMap<usize, &'static str>,
    /// Nodes that take requests over HTTP; the others only compute.
    pub gateways: usize,
    /// Further keys of stages, as `(kind, "key = value")`.
    pub settings: Vec<(&'static str, String)>,
    /// The `[[stage]]` tables, in place of the usual ones.
    pub stages: Option<String>,
    /// The file with the secret of admin listeners; every node has one if it is there.
    pub admin_token_file: Option<PathBuf>,
    /// Kinds beside the seven: their signatures, and how a node makes them.
    pub extension: Option<(Vec<KindSignature>, Extension)>,
}

impl Default for Loopback {
    fn default() -> Self {
        Self {
            model: "builtin:tiny-rust".into(),
            max_byzantine: 1,
            slices: 1,
            spares: 0,
            adversaries: BTreeMap::new(),
            gateways: 1,
            settings: Vec::new(),
            stages: None,
            admin_token_file: None,
            extension: None,
        }
    }
}

/// A topology whose ports are bound and whose keys are known, ready to be started node by node.
pub struct Prepared {
    /// The text of the topology file.
    pub text: String,
    /// The same, checked.
    pub topology: Arc<Topology>,
    /// Identity keys by node.
    pub keys: BTreeMap<NodeId, SigningKey>,
    sockets: BTreeMap<NodeId, UdpSocket>,
    extension: Option<Extension>,
}

/// A running cluster.
pub struct Cluster {
    /// The text of the topology file.
    pub text: String,
    /// The nodes, gateways first.
    pub nodes: Vec<Node>,
}

impl Loopback {
    /// Binds ports, makes keys and writes the topology.
    ///
    /// # Errors
    /// When ports cannot be bound, or the settings do not pass the check.
    pub fn prepare(&self) -> Result<Prepared, NodeError> {
        let count = (2 * self.max_byzantine + 1) * self.slices.max(1) + self.spares;
        let mut text = String::new();
        let mut keys = BTreeMap::new();
        let mut sockets = BTreeMap::new();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "[cluster]\nname = \"loopback\"\nmodel = {:?}\nmax_byzantine = {}\nslices = {}\n",
            self.model,
            self.max_byzantine,
            self.slices.max(1)
        );
        for index in 0..count {
            let id: NodeId = format!("n{index}").parse().map_err(|_| NodeError::Topology("node id".into()))?;
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(NodeError::Bind)?;
            let address = socket.local_addr().map_err(NodeError::Bind)?;
            let key = SigningKey::generate();
            let public = hex::encode(key.verifying_key().to_sec1_point(true).as_bytes());
            let _ = writeln!(
                text,
                "[[node]]\nid = \"{id}\"\nlisten_address = \"{address}\"\npublic_key = \"{public}\"\ndomain = \"lab-{}\"",
                char::from(b'a' + (index % 26) as u8)
            );
            if self.admin_token_file.is_some() {
                text.push_str("admin_address = \"127.0.0.1:0\"\n");
            }
            if let Some(behaviour) = self.adversaries.get(&index) {
                let _ = writeln!(text, "adversary = \"{behaviour}\"");
            }
            text.push('\n');
            keys.insert(id.clone(), key);
            sockets.insert(id, socket);
        }
        match &self.stages {
            Some(stages) => text.push_str(stages),
            None => self.write_stages(&mut text),
        }
        if let Some(file) = &self.admin_token_file {
            let _ = writeln!(text, "\n[telemetry]\nadmin_token_file = {:?}", file.display().to_string());
        }
        let mut signatures = SIGNATURES.to_vec();
        signatures.extend(self.extension.iter().flat_map(|(signatures, _)| signatures.iter().cloned()));
        let topology = butterfly_topology::parse(&text, "loopback.toml", &Catalogue::new(signatures))
            .map_err(|diagnostics| NodeError::Topology(diagnostics.render(false)))?;
        let extension = self.extension.as_ref().map(|(_, extension)| Arc::clone(extension));
        Ok(Prepared { text, topology: Arc::new(topology), keys, sockets, extension })
    }

    fn write_stages(&self, text: &mut String) {
        let gateways: Vec<String> = (0..self.gateways.max(1)).map(|index| format!("\"n{index}\"")).collect();
        let ingest = format!("on = [{}]\nbind_address = \"127.0.0.1:0\"\n", gateways.join(", "));
        let stages: [(&str, &str); 7] = [
            ("ingest", &ingest),
            ("partition", "input = \"ingest\"\n"),
            ("assign", "input = \"partition\"\n"),
            ("transfer", "input = [\"assign\", { from = \"compute.boundary\", feedback = true }]\n"),
            ("compute", "input = \"transfer\"\n"),
            ("consensus", "input = \"compute.outcome\"\n"),
            ("commit", "input = \"consensus\"\n"),
        ];
        for (kind, keys) in stages {
            let _ = write!(text, "[[stage]]\nkind = \"{kind}\"\n{keys}");
            for (_, setting) in self.settings.iter().filter(|(of, _)| *of == kind) {
                let _ = writeln!(text, "{setting}");
            }
            text.push('\n');
        }
    }

    /// Prepares the cluster and starts every node of it, with data below `data_dir`.
    ///
    /// # Errors
    /// When a node cannot start.
    pub async fn start(&self, data_dir: &Path) -> Result<Cluster, NodeError> {
        let prepared = self.prepare()?;
        let text = prepared.text.clone();
        let mut nodes = Vec::new();
        for options in prepared.options(data_dir) {
            nodes.push(Node::start(options).await?);
        }
        for node in &nodes {
            node.ready().await?;
        }
        Ok(Cluster { text, nodes })
    }
}

impl Prepared {
    /// What each node is started with, in the order of the topology.
    pub fn options(mut self, data_dir: &Path) -> Vec<NodeOptions> {
        let hub = LocalHub::new();
        let mut options = Vec::new();
        for spec in &self.topology.cluster.nodes {
            let Some(identity) = self.keys.get(&spec.id) else { continue };
            options.push(NodeOptions {
                topology: Arc::clone(&self.topology),
                node: spec.id.clone(),
                identity: identity.clone(),
                data_dir: data_dir.join(spec.id.as_ref()),
                base_dir: PathBuf::new(),
                socket: self.sockets.remove(&spec.id),
                hub: Some(hub.clone()),
                extension: self.extension.clone(),
            });
        }
        options
    }
}

impl Cluster {
    /// Where the first gateway takes requests.
    #[must_use]
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.nodes.first().and_then(Node::http_address)
    }

    /// Waits until every node sees every other.
    pub async fn meshed(&self) {
        for node in &self.nodes {
            node.meshed().await;
        }
    }

    /// Drains and stops the first gateway, then all other nodes together.
    ///
    /// # Errors
    /// The first failure of a node.
    pub async fn shutdown(self) -> Result<(), NodeError> {
        let mut nodes = self.nodes.into_iter();
        let gateway = match nodes.next() {
            Some(gateway) => gateway.shutdown().await,
            None => Ok(()),
        };
        let others = futures::future::join_all(nodes.map(Node::shutdown)).await;
        others.into_iter().fold(gateway, Result::and)
    }
}
