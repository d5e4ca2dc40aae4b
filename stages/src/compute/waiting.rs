//! Values that cannot be taken yet: their request has not been opened, or a pass has its session.
//!
//! Links to the gateway and to replicas are not in step, so an honest peer's values may come early. Each peer has a share of
//! its own; one that exceeds it loses its own values and nobody else's, so a hostile peer cannot drop what honest ones sent.

use std::collections::BTreeMap;

use butterfly_engine::channel::Item;
use butterfly_topology::NodeId;

use crate::compute::Key;
use crate::items::Boundary;

/// Bytes that may wait from one peer.
const PEER_BYTES_MAX: usize = 64 << 20;

/// Values by request and slice, in the order they came.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    values: BTreeMap<Key, Vec<(NodeId, Boundary)>>,
    bytes: BTreeMap<NodeId, usize>,
}

impl Waiting {
    /// Keeps values until they are taken.
    pub(crate) fn keep(&mut self, from: NodeId, boundary: Boundary) {
        let weight = boundary.size_bytes();
        if self.bytes_of(&from).saturating_add(weight) > PEER_BYTES_MAX {
            tracing::warn!(%from, "a peer's values wait beyond its share and are dropped");
            self.forget(&from);
        }
        if weight <= PEER_BYTES_MAX {
            *self.bytes.entry(from.clone()).or_default() += weight;
            self.values.entry(Key::of(&boundary)).or_default().push((from, boundary));
        }
    }

    /// Takes all that waits for a slice of a request.
    pub(crate) fn take(&mut self, key: &Key) -> Vec<(NodeId, Boundary)> {
        let taken = self.values.remove(key).unwrap_or_default();
        for (from, boundary) in &taken {
            if let Some(bytes) = self.bytes.get_mut(from) {
                *bytes = bytes.saturating_sub(boundary.size_bytes());
            }
        }
        taken
    }

    fn bytes_of(&self, peer: &NodeId) -> usize {
        self.bytes.get(peer).copied().unwrap_or(0)
    }

    fn forget(&mut self, peer: &NodeId) {
        self.values.retain(|_, values| {
            values.retain(|(from, _)| from != peer);
            !values.is_empty()
        });
        self.bytes.remove(peer);
    }
}

#[cfg(test)]
mod tests {
    use butterfly_verify::{Digest, NodeIndex};

    use super::*;
    use crate::items::BoundaryValues;

    fn rows(request: u8, bytes: usize) -> Boundary {
        let values = BoundaryValues::Rows { width: 1, rows: vec![0.0; bytes / 4].into() };
        Boundary { rd: Digest([request; 32]), gateway: NodeIndex(0), attempt: 1, slice: 1, position: 0, values }
    }

    fn senders(taken: &[(NodeId, Boundary)]) -> Vec<&str> {
        taken.iter().map(|(from, _)| from.as_ref()).collect()
    }

    #[test]
    fn a_peer_that_floods_loses_its_own_values_and_nobody_elses() {
        let (honest, hostile): (NodeId, NodeId) = ("honest".parse().unwrap(), "hostile".parse().unwrap());
        let mut waiting = Waiting::default();
        waiting.keep(honest.clone(), rows(1, 64));
        waiting.keep(hostile.clone(), rows(1, 64));
        for request in 2..6 {
            waiting.keep(hostile.clone(), rows(request, PEER_BYTES_MAX / 2));
            assert!(waiting.bytes_of(&hostile) <= PEER_BYTES_MAX);
        }
        waiting.keep(hostile.clone(), rows(9, 2 * PEER_BYTES_MAX));
        let kept = waiting.take(&Key::of(&rows(1, 0)));
        assert_eq!(senders(&kept), ["honest"]);
        assert_eq!((waiting.bytes_of(&honest), waiting.bytes_of(&hostile)), (0, 0));
        assert!(waiting.values.is_empty());
    }

    #[test]
    fn values_are_taken_once_and_in_their_order() {
        let peer: NodeId = "peer".parse().unwrap();
        let mut waiting = Waiting::default();
        for position in 0..3 {
            waiting.keep(peer.clone(), Boundary { position, ..rows(1, 8) });
        }
        let taken = waiting.take(&Key::of(&rows(1, 0)));
        assert_eq!(taken.iter().map(|(_, boundary)| boundary.position).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(waiting.take(&Key::of(&rows(1, 0))).is_empty());
        assert_eq!(waiting.bytes_of(&peer), 0);
    }
}
