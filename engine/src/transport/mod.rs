//! Drivers of links: how frames reach the counterparts of a stage on other nodes.
//!
//! A [`Mesh`] joins this node to every other of its [`Roster`]. A stage gets a [`PeerPort`] for its lane: what arrives
//! from its counterparts, in order and once, and who of them is up. A [`PeerSender`] sends, within the credit that the
//! receiver's inbox has given.
//!
//! Two drivers, one behaviour: `quic` between processes, `local` within one. Both move frames and messages between the
//! same sessions, which hold everything that a stage can observe.
//!
//! Invariants: nothing is sent to, and nothing taken from, a peer whose identity, epoch and place in the roster have not
//! been proved; there is no insecure mode; everything that a peer can make this node hold is bounded by the bounds of
//! the lanes and the limits named here and in [`crate::link`]; keys appear in no log and no `Debug` output; no type of a
//! network library leaves this module.
//!
//! It refuses to know what frames mean.

mod breaker;
mod identity;
mod lane;
mod local;
mod mesh;
mod port;
mod quic;
mod session;

use std::time::Duration;

use butterfly_topology::{NodeId, StageName};

pub use identity::{IdentityError, LinkIdentity, Refusal, Roster, RosterMember};
pub use local::LocalHub;
pub use mesh::Mesh;
pub use port::{Delivery, PeerPort, PeerSendError, PeerSender};
pub use quic::QuicConfig;

use crate::link::LinkFault;

/// Why a mesh or a port could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The node is not a member of the roster, or the roster has another key for it.
    #[error("identity of this node: {0}")]
    Identity(#[from] IdentityError),
    /// The address could not be bound, or the socket not be set up.
    #[error("cannot use {address} for peers: {source}")]
    Bind {
        /// The address, if known.
        address: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// There is no tokio runtime to run in.
    #[error("no tokio runtime")]
    NoRuntime,
    /// The encryption layer refused its configuration.
    #[error("encryption of links: {reason}")]
    Encryption {
        /// What it says.
        reason: String,
    },
    /// Two stages of one name asked for a port.
    #[error("the lane `{lane}` is taken")]
    LaneTaken {
        /// The name.
        lane: StageName,
    },
    /// The bounds of a lane are zero or beyond a limit, or there are too many lanes.
    #[error("lane `{lane}`: {what}")]
    LaneBounds {
        /// The name.
        lane: StageName,
        /// Which limit.
        what: &'static str,
    },
    /// The mesh was shut down.
    #[error("the links of this node are closed")]
    Closed,
    /// A node of this name is on the hub already.
    #[error("node `{node}` is on this hub already")]
    NodeTaken {
        /// The name.
        node: NodeId,
    },
}

/// Whether a peer can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// There is an authenticated link.
    Up {
        /// Round-trip time when the link came up.
        rtt: Duration,
    },
    /// There is none.
    Down {
        /// The clock's moment when it went down, or when this node started.
        since: Duration,
        /// Why.
        reason: DownReason,
    },
}

/// Why there is no link to a peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DownReason {
    /// None was made yet.
    #[error("not connected yet")]
    NotYet,
    /// No answer, or none any more.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// The peer refused this node.
    #[error("refused by the peer: {0}")]
    Refused(Refusal),
    /// This node refused the peer.
    #[error("refused: {0}")]
    Distrusted(Refusal),
    /// The peer did what no correct peer does.
    #[error("protocol fault of the peer: {0}")]
    Fault(LinkFault),
    /// The peer says that this node did what no correct node does.
    #[error("the peer reports a protocol fault")]
    Accused,
    /// The peer made a new link in place of this one, as after a restart.
    #[error("replaced by a newer link")]
    Replaced,
    /// The peer shut down.
    #[error("the peer left")]
    Left,
    /// This node shut down.
    #[error("shut down")]
    ShutDown,
}

#[cfg(test)]
mod tests;
