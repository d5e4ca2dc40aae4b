//! What a networked stage holds: a port to its counterparts on other nodes, and senders to them.
//!
//! Invariants: from one peer a stage sees *up*, then frames in the order sent, each once, then *down*, and so on; frames
//! to oneself come back in order. A node is always up to itself, so neither is said about it.
//!
//! It refuses to know connections.

use std::sync::Arc;

use butterfly_topology::{NodeId, StageName};
use tokio::task::coop;

use super::lane::Lane;
use super::mesh::Handle;
use crate::channel::Bounds;
use crate::frame::Frame;
use crate::telemetry::StageStates;

/// What a stage learns from its peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// A frame.
    Frame {
        /// Who sent it, proved.
        from: NodeId,
        /// What was sent.
        frame: Frame,
    },
    /// Frames can be sent to this peer, and may come from it, from now on.
    Up(NodeId),
    /// No longer. Frames sent to it may be lost; what arrived from it was delivered before.
    Down(NodeId),
}

/// Why a frame was not sent. Nothing of it has been queued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerSendError {
    /// The receiver's inbox for this node has no room.
    #[error("no room at `{0}`")]
    Full(NodeId),
    /// The lane to the peer is not up.
    #[error("`{0}` is down")]
    Down(NodeId),
    /// Not in the roster.
    #[error("`{0}` is not in the roster")]
    Unknown(NodeId),
    /// The frame does not fit the lane even when that is empty.
    #[error("a frame of {bytes} bytes does not fit into {bytes_max}")]
    TooLarge {
        /// Its length.
        bytes: u64,
        /// The most that would fit.
        bytes_max: u64,
    },
}

/// A stage's port to its counterparts. It has one owner; dropping it tells the peers that nothing more is taken.
pub struct PeerPort {
    lane: Arc<Lane>,
    handle: Arc<Handle>,
    states: Option<StageStates>,
}

/// Sends to a stage's counterparts. Clones share the lane and its credits.
#[derive(Clone)]
pub struct PeerSender {
    lane: Arc<Lane>,
    _handle: Arc<Handle>,
    states: Option<StageStates>,
}

impl PeerPort {
    pub(super) fn new(lane: Arc<Lane>, handle: Arc<Handle>) -> Self {
        Self { lane, handle, states: None }
    }

    /// Records waiting in the account of the stage: *starved* when it receives, *blocked* when it sends by a sender made
    /// from here on.
    #[must_use]
    pub fn accounted(mut self, states: StageStates) -> Self {
        self.states = Some(states);
        self
    }

    /// This node.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        self.lane.own()
    }

    /// The stage whose lane this is.
    #[must_use]
    pub fn lane(&self) -> &StageName {
        self.lane.name()
    }

    /// Room for frames from each peer, and for frames to oneself.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.lane.bounds()
    }

    /// The other nodes of the roster, in order.
    pub fn peers(&self) -> impl Iterator<Item = &NodeId> {
        self.lane.peers()
    }

    /// The next delivery; `None` once the mesh is shut down and everything was taken. Taking a frame gives its credit
    /// back to the sender. Safe to cancel.
    pub async fn recv(&mut self) -> Option<Delivery> {
        coop::consume_budget().await;
        loop {
            match (self.lane.take(), &self.states) {
                (Ok(Some(delivery)), _) => return Some(delivery),
                (Ok(None), Some(states)) => states.while_starved(self.lane.arrived()).await,
                (Ok(None), None) => self.lane.arrived().await,
                (Err(_), _) => return None,
            }
        }
    }

    /// The next delivery, if there is one now.
    pub fn try_recv(&mut self) -> Option<Delivery> {
        self.lane.take().ok().flatten()
    }

    /// Up to `max` deliveries; waits for the first. Empty once the mesh is shut down and everything was taken. Safe to
    /// cancel.
    pub async fn recv_many(&mut self, max: usize) -> Vec<Delivery> {
        let mut deliveries = Vec::new();
        if max == 0 {
            return deliveries;
        }
        deliveries.extend(self.recv().await);
        while !deliveries.is_empty() && deliveries.len() < max {
            match self.try_recv() {
                Some(delivery) => deliveries.push(delivery),
                None => break,
            }
        }
        deliveries
    }

    /// A sender on this lane. It may outlive the port.
    #[must_use]
    pub fn sender(&self) -> PeerSender {
        PeerSender { lane: Arc::clone(&self.lane), _handle: Arc::clone(&self.handle), states: self.states.clone() }
    }
}

impl Drop for PeerPort {
    fn drop(&mut self) {
        self.lane.leave();
    }
}

impl PeerSender {
    /// Takes credit for the frame and queues it, or says why not. A frame to oneself goes to one's own inbox.
    ///
    /// # Errors
    /// [`PeerSendError`].
    pub fn try_send(&self, to: &NodeId, frame: Frame) -> Result<(), PeerSendError> {
        self.lane.try_send(to, frame)
    }

    /// Queues the frame as soon as there is credit. Safe to cancel: then nothing was queued.
    ///
    /// # Errors
    /// [`PeerSendError`], but never [`Full`](PeerSendError::Full).
    pub async fn send(&self, to: &NodeId, frame: Frame) -> Result<(), PeerSendError> {
        coop::consume_budget().await;
        match (self.lane.try_send(to, frame.clone()), &self.states) {
            (Err(PeerSendError::Full(_)), Some(states)) => states.while_blocked(self.lane.send(to, frame)).await,
            (Err(PeerSendError::Full(_)), None) => self.lane.send(to, frame).await,
            (decided, _) => decided,
        }
    }
}

impl std::fmt::Debug for PeerPort {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("PeerPort").field("lane", self.lane.name()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for PeerSender {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("PeerSender").field("lane", self.lane.name()).finish_non_exhaustive()
    }
}
