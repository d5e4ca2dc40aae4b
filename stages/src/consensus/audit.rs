//! Audits of work tags: did a node do the work whose result it voted for?
//!
//! Whoever computed a slice knows its interior and so the tag that every honest vote must carry. Where the gateway does
//! not hold a slice, its replicas audit each other and report to the gateway. What is kept is bounded, oldest out first; an
//! audit that can no longer be made is not made.

use std::collections::{BTreeMap, VecDeque};

use butterfly_topology::NodeId;
use butterfly_verify::{Digest, NodeIndex, Vote, work_tag};

use crate::consensus::wire::BadTag;
use crate::items::{Finished, RequestId};

/// Own outcomes that are remembered.
const OUTCOMES_MAX: usize = 8192;
/// Votes of others that wait for the own outcome.
const WAITING_MAX: usize = 8192;

type Key = (RequestId, u16);

#[derive(Debug)]
struct Own {
    gateway: NodeId,
    positions: u32,
    input_root: Digest,
    output_root: Digest,
    interior: Digest,
}

/// Own outcomes, and votes of others that wait for them.
#[derive(Debug, Default)]
pub(crate) struct Audits {
    own: BTreeMap<Key, Own>,
    order: VecDeque<Key>,
    waiting: BTreeMap<Key, Vec<(NodeIndex, Vote)>>,
    waiting_count: usize,
}

impl Audits {
    /// Remembers an own outcome. Returns the audits that waited for it and failed.
    pub(crate) fn finished(&mut self, finished: &Finished) -> Vec<BadTag> {
        let key = (finished.rd, finished.slice);
        let own = Own {
            gateway: finished.gateway.clone(),
            positions: finished.positions,
            input_root: finished.input_root,
            output_root: finished.output_root,
            interior: finished.interior,
        };
        let waiting = self.waiting.remove(&key).unwrap_or_default();
        self.waiting_count -= waiting.len();
        let failed = waiting.iter().filter_map(|(node, vote)| own.audit(*node, vote)).collect();
        if self.own.insert(key, own).is_none() {
            self.order.push_back(key);
        }
        if self.order.len() > OUTCOMES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.own.remove(&oldest);
        }
        failed
    }

    /// Audits another's vote, at once or when the own outcome is there. Returns whom to tell about a failure.
    pub(crate) fn vote(&mut self, node: NodeIndex, vote: &Vote) -> Option<(NodeId, BadTag)> {
        let key = (vote.rd, vote.slice);
        if let Some(own) = self.own.get(&key) {
            return own.audit(node, vote).map(|failed| (own.gateway.clone(), failed));
        }
        if self.waiting_count >= WAITING_MAX {
            self.waiting.clear();
            self.waiting_count = 0;
        }
        self.waiting_count += 1;
        self.waiting.entry(key).or_default().push((node, *vote));
        None
    }

    /// What came out of the own computation of a slice.
    pub(crate) fn output_root(&self, rd: &RequestId, slice: u16) -> Option<Digest> {
        self.own.get(&(*rd, slice)).map(|own| own.output_root)
    }

    /// The interior of the own outcome, for the tally's audit.
    pub(crate) fn interior(&self, rd: &RequestId, slice: u16) -> Option<&Digest> {
        self.own.get(&(*rd, slice)).map(|own| &own.interior)
    }
}

impl Own {
    /// A vote that claims something else is a matter of counting, not of tags.
    fn audit(&self, node: NodeIndex, vote: &Vote) -> Option<BadTag> {
        let same = vote.positions == self.positions
            && vote.input_root == self.input_root
            && vote.output_root == self.output_root;
        let tag = work_tag(node, &vote.rd, vote.slice, vote.positions, &self.interior);
        (same && tag != vote.tag).then_some(BadTag { rd: vote.rd, slice: vote.slice, accused: node })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(byte: u8) -> Finished {
        Finished {
            rd: Digest([byte; 32]),
            gateway: "g".parse().unwrap(),
            slice: 1,
            positions: 3,
            input_root: Digest([1; 32]),
            output_root: Digest([2; 32]),
            interior: Digest([3; 32]),
            answer: None,
        }
    }

    fn vote(of: &Finished, node: NodeIndex, interior: &Digest) -> Vote {
        Vote {
            rd: of.rd,
            slice: of.slice,
            positions: of.positions,
            input_root: of.input_root,
            output_root: of.output_root,
            tag: work_tag(node, &of.rd, of.slice, of.positions, interior),
        }
    }

    #[test]
    fn a_copied_vote_fails_whether_it_comes_before_or_after_the_own_outcome() {
        let own = finished(7);
        let (honest, copier) = (NodeIndex(1), NodeIndex(2));
        let copied = vote(&own, honest, &own.interior);
        let failed = BadTag { rd: own.rd, slice: 1, accused: copier };

        let mut audits = Audits::default();
        assert!(audits.vote(honest, &vote(&own, honest, &own.interior)).is_none());
        assert!(audits.vote(copier, &copied).is_none());
        assert_eq!(audits.finished(&own), vec![failed.clone()]);
        assert_eq!(audits.vote(copier, &copied), Some((own.gateway.clone(), failed)));
        assert_eq!(audits.vote(honest, &vote(&own, honest, &own.interior)), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut audits = Audits::default();
        for index in 0..(OUTCOMES_MAX as u32 + 10) {
            let mut own = finished(0);
            own.rd.0[..4].copy_from_slice(&index.to_le_bytes());
            audits.finished(&own);
            own.rd.0[4] = 1;
            audits.vote(NodeIndex(1), &vote(&own, NodeIndex(1), &own.interior));
        }
        assert_eq!(audits.own.len(), OUTCOMES_MAX);
        assert!(audits.waiting_count <= WAITING_MAX);
    }
}
