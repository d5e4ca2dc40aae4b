//! Boundary values for peers whose lane is not up although they are expected to take them: at a start, and for a moment after a
//! link broke. They go out when it comes up.
//!
//! Invariants: what is held for a peer is bounded; it leaves in the order in which it came, once.
//!
//! It refuses to know who is expected.

use std::collections::{BTreeMap, VecDeque};

use butterfly_engine::frame::Frame;
use butterfly_topology::NodeId;

/// Bytes that are held for one peer.
const PEER_BYTES_MAX: usize = 8 << 20;

/// Frames by peer.
#[derive(Debug, Default)]
pub(super) struct Held {
    peers: BTreeMap<NodeId, Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Frame>,
    bytes: usize,
}

impl Held {
    /// Holds a frame for a peer. Beyond the bound the oldest are dropped, and with them the peer's vote on their requests.
    pub(super) fn hold(&mut self, peer: &NodeId, frame: Frame) {
        let queue = self.peers.entry(peer.clone()).or_default();
        queue.bytes += frame.size_bytes();
        queue.frames.push_back(frame);
        while queue.bytes > PEER_BYTES_MAX
            && let Some(oldest) = queue.frames.pop_front()
        {
            queue.bytes -= oldest.size_bytes();
        }
    }

    /// What was held for a peer, which is so no more.
    pub(super) fn take(&mut self, peer: &NodeId) -> VecDeque<Frame> {
        self.peers.remove(peer).unwrap_or_default().frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_bounded_and_leaves_once_in_order() {
        let (peer, other): (NodeId, NodeId) = ("n1".parse().unwrap(), "n2".parse().unwrap());
        let frame = |byte: u8| Frame::tensor(&(), &vec![byte; PEER_BYTES_MAX / 3]).unwrap();
        let mut held = Held::default();
        (0..5).for_each(|byte| held.hold(&peer, frame(byte)));
        assert!(held.take(&other).is_empty());
        let taken = held.take(&peer);
        assert_eq!(taken, [frame(3), frame(4)], "three and their headers are too many");
        assert!(held.take(&peer).is_empty());
    }
}
