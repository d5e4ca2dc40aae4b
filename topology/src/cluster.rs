//! The cluster: who takes part, what they run and how many of them may lie.
//!
//! Invariants of a [`Cluster`] that came from [`crate::parse`]: ids, addresses and keys are each distinct, there are at
//! least 2f+1 nodes, and every key is a point of secp256k1. What the keys are used for is not known here.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use crate::name::NodeId;

/// The most nodes of a cluster.
pub const NODES_MAX: usize = 1024;
/// The most nodes that may lie, `f`: 2f+1 of them must still fit in [`NODES_MAX`].
pub const MAX_BYZANTINE_MAX: usize = (NODES_MAX - 1) / 2;
/// The most slices of a plan.
pub const SLICES_MAX: usize = 1024;
/// Behaviours a node may be told to show, for demonstrations and tests: `adversary = "wrong-vote"`.
pub const BEHAVIOURS: &[&str] =
    &["wrong-activations", "wrong-vote", "feed-back-other", "silent", "crash", "collude", "equivocate"];

/// The `[cluster]` table and the `[[node]]` list.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cluster {
    /// Name of the cluster; part of its epoch.
    pub name: String,
    /// The model: `builtin:…`, a folder or a file.
    pub model: String,
    /// How many nodes may lie, `f`. Every slice is held by 2f+1 nodes.
    pub max_byzantine: usize,
    /// Into how many slices the model is cut; the planner chooses when `None`.
    pub slices: Option<usize>,
    /// The nodes, in the order of the file.
    pub nodes: Vec<NodeSpec>,
}

impl Cluster {
    /// Nodes of a replica set: 2f+1.
    #[must_use]
    pub fn replicas(&self) -> usize {
        self.max_byzantine.saturating_mul(2).saturating_add(1)
    }

    /// The node of this id.
    #[must_use]
    pub fn node(&self, id: &NodeId) -> Option<&NodeSpec> {
        self.nodes.iter().find(|node| node.id == *id)
    }
}

/// One `[[node]]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NodeSpec {
    /// Its id.
    pub id: NodeId,
    /// Where it listens and where its peers dial it (UDP).
    pub listen_address: SocketAddr,
    /// Its identity: a compressed secp256k1 point.
    #[serde(serialize_with = "hex_key")]
    pub public_key: [u8; 33],
    /// Who operates it, the trust domain. A node without one counts as a domain of its own.
    pub domain: Option<String>,
    /// Memory for weights and caches, in bytes; unlimited when unknown.
    pub memory_bytes: Option<u64>,
    /// Measured speed relative to the other nodes; 1 when unknown.
    pub compute: Option<f64>,
    /// Measured bandwidth of its link to the others, in bytes per second.
    pub bandwidth: Option<u64>,
    /// Where its admin listener binds; it has none when `None`.
    pub admin_address: Option<SocketAddr>,
    /// A behaviour of [`BEHAVIOURS`] that it shows instead of the honest one.
    pub adversary: Option<String>,
}

fn hex_key<S: serde::Serializer>(key: &[u8; 33], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex::encode(key))
}

/// The `[telemetry]` table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TelemetrySpec {
    /// Where metrics go.
    pub collector_type: CollectorType,
    /// How often metrics are written by collectors that write.
    pub export_interval: Duration,
    /// The file with the secret of the admin listeners, relative to the topology file.
    pub admin_token_file: String,
}

impl Default for TelemetrySpec {
    fn default() -> Self {
        Self {
            collector_type: CollectorType::Prometheus,
            export_interval: Duration::from_secs(60),
            admin_token_file: "admin.token".to_owned(),
        }
    }
}

/// Where metrics go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CollectorType {
    /// Scraped over HTTP in the Prometheus text format.
    Prometheus,
    /// Written to the console.
    Console,
    /// Written as JSON lines.
    Json,
}
