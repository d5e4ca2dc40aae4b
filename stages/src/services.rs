//! What the stages of one node share, given to them at construction.
//!
//! Stages reach each other only through the graph; these are the things that are not items: who the node is, the model,
//! the epoch, the board of living tasks and the journal. Nothing here runs by itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::clock::Clock;
use butterfly_engine::shutdown::Shutdown;
use butterfly_engine::stage::Readiness;
use butterfly_engine::telemetry::Telemetry;
use butterfly_engine::transport::{DownReason, PeerState};
use butterfly_topology::plan::Plan;
use butterfly_topology::{NodeId, Topology};
use butterfly_verify::{Epoch, NodeIndex, Signer};

use tokio::sync::watch;

use crate::assign::{quorum, readiness};
use crate::commit::Journal;
use crate::ingest::Board;
use crate::model::Model;
pub use crate::standing::{Conduct, Standing};

/// How long a peer is expected whose link broke, or was not made yet when this node started. A node that was stopped for a moment
/// and goes on finds its links given up; they are made anew in much less.
const BACK_WITHIN: Duration = Duration::from_secs(1);

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
        let is_up = *node == self.node || matches!(peers.get(node), Some(PeerState::Up { .. }));
        is_up && !self.is_excluded(node)
    }

    /// Whether work may be expected of a node now or in a moment: it is useful, or its link broke just now, or this node has
    /// just started.
    #[must_use]
    pub fn is_expected(&self, node: &NodeId, peers: &BTreeMap<NodeId, PeerState>) -> bool {
        self.is_useful(node, peers)
            || self.back_within(peers.get(node)).is_some_and(|wait| !wait.is_zero()) && !self.is_excluded(node)
    }

    /// How much longer a peer that is away is expected; `None` when it is up, or away for another reason.
    fn back_within(&self, peer: Option<&PeerState>) -> Option<Duration> {
        match peer {
            Some(PeerState::Down {
                since,
                reason: DownReason::NotYet | DownReason::Unreachable(_) | DownReason::Replaced,
            }) => Some(since.saturating_add(BACK_WITHIN).saturating_sub(self.clock.now())),
            _ => None,
        }
    }

    /// Waits while too few replicas are up and those that are missing may be back in a moment. Safe to cancel.
    pub async fn quorum_or_none(&self) {
        if readiness(self, &self.peers.borrow()).is_ok() {
            return;
        }
        let mut peers = self.peers.clone();
        loop {
            let wait = {
                let peers = peers.borrow_and_update();
                let expected = |node: &NodeId| self.is_expected(node, &peers);
                if readiness(self, &peers).is_ok() || quorum(self, expected).is_err() {
                    return;
                }
                peers.values().filter_map(|peer| self.back_within(Some(peer))).filter(|wait| !wait.is_zero()).min()
            };
            tokio::select! {
                changed = peers.changed() => if changed.is_err() { return },
                () = self.clock.sleep(wait.unwrap_or_default()) => {}
            }
        }
    }

    /// Whether a node is proven to lie, and gets no more work.
    #[must_use]
    pub fn is_excluded(&self, node: &NodeId) -> bool {
        self.epoch.index_of(node.as_ref()).is_some_and(|index| self.standing.is_excluded(index))
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
        let quorum = readiness(self, &self.peers.borrow());
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
