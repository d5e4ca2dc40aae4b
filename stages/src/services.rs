//! What the stages of one node share, given to them at construction.
//!
//! Stages reach each other only through the graph; these are the things that are not items: who the node is, the model,
//! the epoch, the board of living tasks and the journal. Nothing here runs by itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use butterfly_engine::clock::Clock;
use butterfly_engine::shutdown::Shutdown;
use butterfly_engine::stage::Readiness;
use butterfly_engine::telemetry::Telemetry;
use butterfly_engine::transport::PeerState;
use butterfly_topology::plan::Plan;
use butterfly_topology::{NodeId, Topology};
use butterfly_verify::{Epoch, NodeIndex, Signer};

use tokio::sync::watch;

use crate::assign::readiness;
use crate::commit::Journal;
use crate::ingest::Board;
use crate::model::Model;

/// The shared things of one node.
#[derive(Clone)]
pub struct Services {
    /// This node.
    pub node: NodeId,
    /// Its place in the roster.
    pub index: NodeIndex,
    /// The checked topology.
    pub topology: Arc<Topology>,
    /// The epoch every peer must agree on.
    pub epoch: Arc<Epoch>,
    /// The epoch's plan.
    pub plan: Arc<Plan>,
    /// The model, opened but not loaded.
    pub model: Arc<Model>,
    /// Signs votes and requests with the node's identity key.
    pub signer: Arc<Signer>,
    /// Living tasks of this gateway.
    pub board: Arc<Board>,
    /// The durable log.
    pub journal: Arc<Journal>,
    /// Metrics and events.
    pub telemetry: Arc<Telemetry>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Which peers are up.
    pub peers: watch::Receiver<BTreeMap<NodeId, PeerState>>,
    /// What is known against nodes.
    pub standing: Arc<Standing>,
    /// Where relative paths of the topology file begin.
    pub base_dir: PathBuf,
    /// How this node lies.
    #[cfg(feature = "adversary")]
    pub behaviour: Option<crate::adversary::Behaviour>,
}

impl Services {
    /// Whether work may be expected of a node: it is this one or up, and not excluded.
    #[must_use]
    pub fn is_useful(&self, node: &NodeId, peers: &BTreeMap<NodeId, PeerState>) -> bool {
        *node == self.node || matches!(peers.get(node), Some(PeerState::Up { .. }))
    }

    /// The node at a place of the roster.
    #[must_use]
    pub fn node_id(&self, index: NodeIndex) -> Option<NodeId> {
        self.epoch.member(index).and_then(|member| member.id.parse().ok())
    }

    /// Why this node cannot answer now; empty when it can. A process that answers and computes nothing is not ready, so work
    /// that has not moved for `stalled_after` is a reason too.
    #[must_use]
    pub fn unready(&self, stages: &Readiness, shutdown: &Shutdown, stalled_after: Duration) -> Vec<&'static str> {
        let quorum = readiness(&self.plan, &self.peers.borrow(), &self.node, self.topology.cluster.max_byzantine);
        let checks = [
            (!shutdown.is_running(), "draining"),
            (!stages.is_ready(), "loading"),
            (self.journal.failure().is_some(), "log_failed"),
            (quorum.is_err(), "no_quorum"),
            (self.board.still_for() >= stalled_after, "stalled"),
        ];
        checks.into_iter().filter_map(|(holds, reason)| holds.then_some(reason)).collect()
    }
}

/// What this node holds against others: shown in `/health`, never a change of the roster.
#[derive(Debug, Default)]
pub struct Standing {
    nodes: Mutex<BTreeMap<NodeIndex, Conduct>>,
}

/// The record of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conduct {
    /// Votes that agreed with a certificate.
    pub agreed: u64,
    /// Pieces of evidence, by kind.
    pub accused: BTreeMap<String, u64>,
    /// Requests for which no vote came in time: unavailability, never called lying.
    pub silent: u64,
}

impl Standing {
    fn with(&self, node: NodeIndex, change: impl FnOnce(&mut Conduct)) {
        let mut nodes = self.nodes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        change(nodes.entry(node).or_default());
    }

    /// Counts a vote that agreed.
    pub fn agreed(&self, node: NodeIndex) {
        self.with(node, |conduct| conduct.agreed += 1);
    }

    /// Counts evidence of a kind.
    pub fn accused(&self, node: NodeIndex, kind: &str) {
        self.with(node, |conduct| *conduct.accused.entry(kind.to_owned()).or_default() += 1);
    }

    /// Counts a vote that did not come.
    pub fn silent(&self, node: NodeIndex) {
        self.with(node, |conduct| conduct.silent += 1);
    }

    /// The record so far.
    pub fn conduct(&self) -> BTreeMap<NodeIndex, Conduct> {
        self.nodes.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}
