//! The requests of this gateway that run, and which replicas have them.
//!
//! A link that breaks loses what was on its way: the request itself, rows, votes. So when a peer's link comes up, it is sent
//! what it does not have, and a request that too few replicas have had without a break starts anew on all of them.
//!
//! Invariants: a replica whose link broke never counts again for that attempt; what has ended is forgotten before there is
//! more of it than of what lives.
//!
//! It refuses to know links and bodies of requests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use butterfly_topology::NodeId;

use crate::items::RequestId;

/// Requests that are kept before those that have ended are looked for.
const KEPT_MIN: usize = 256;

/// The requests that run.
pub(super) struct Running {
    requests: BTreeMap<RequestId, Sent>,
    /// When there are so many, those that have ended are looked for.
    look_at: usize,
}

/// A request as it was sent last.
struct Sent {
    attempt: u32,
    /// Requests that were sent together share this until something happens to one of them.
    replicas: Arc<BTreeMap<NodeId, Hold>>,
    /// It is sent to all again soon in any case.
    is_short: bool,
}

/// What is known of a replica that a request was sent to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// Its link has been up ever since.
    Whole,
    /// Its link has been down since.
    Broken,
}

/// What a peer lacks whose link has come up.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Lacking {
    /// Requests that go on elsewhere, with their attempts: this peer is sent them.
    pub(super) resend: Vec<(RequestId, u32)>,
    /// Requests that too few replicas have: they start anew.
    pub(super) restart: Vec<RequestId>,
}

impl Default for Running {
    fn default() -> Self {
        Self { requests: BTreeMap::new(), look_at: KEPT_MIN }
    }
}

impl Running {
    /// Requests were sent to these replicas; too few of them, if `is_short`. `is_living` says which of all requests still run.
    pub(super) fn sent(
        &mut self,
        requests: impl Iterator<Item = (RequestId, u32)>,
        reached: &BTreeSet<&NodeId>,
        is_short: bool,
        is_living: impl Fn(&RequestId) -> bool,
    ) {
        let replicas: BTreeMap<_, _> = reached.iter().map(|node| ((*node).clone(), Hold::Whole)).collect();
        let replicas = Arc::new(replicas);
        let sent = |(rd, attempt)| (rd, Sent { attempt, replicas: Arc::clone(&replicas), is_short });
        self.requests.extend(requests.map(sent));
        if self.requests.len() >= self.look_at {
            self.requests.retain(|rd, _| is_living(rd));
            self.look_at = self.requests.len().saturating_mul(2).max(KEPT_MIN);
        }
    }

    /// A peer's link broke.
    pub(super) fn down(&mut self, peer: &NodeId) {
        for sent in self.requests.values_mut() {
            if sent.replicas.get(peer) == Some(&Hold::Whole) {
                Arc::make_mut(&mut sent.replicas).insert(peer.clone(), Hold::Broken);
            }
        }
    }

    /// A peer's link has come up. `slices` are the replicas of each slice, of which `needed` must have a request.
    pub(super) fn up<'a>(
        &mut self,
        peer: &NodeId,
        slices: impl Iterator<Item = &'a [NodeId]> + Clone,
        needed: usize,
        is_living: impl Fn(&RequestId) -> bool,
    ) -> Lacking {
        let mut lacking = Lacking::default();
        self.requests.retain(|rd, _| is_living(rd));
        for (rd, sent) in &mut self.requests {
            if sent.is_short || sent.has(peer) {
                continue;
            }
            let is_enough = |slice: &[NodeId]| slice.iter().filter(|node| sent.has(node)).count() >= needed;
            if !slices.clone().all(is_enough) {
                lacking.restart.push(*rd);
                continue;
            }
            lacking.resend.push((*rd, sent.attempt));
            if !sent.replicas.contains_key(peer) {
                Arc::make_mut(&mut sent.replicas).insert(peer.clone(), Hold::Whole);
            }
        }
        lacking
    }
}

impl Sent {
    fn has(&self, node: &NodeId) -> bool {
        self.replicas.get(node) == Some(&Hold::Whole)
    }
}

#[cfg(test)]
mod tests {
    use butterfly_verify::Digest;

    use super::*;

    const RD: Digest = Digest([7; 32]);

    fn node(index: usize) -> NodeId {
        format!("n{index}").parse().unwrap()
    }

    /// One request, sent to some of three replicas of which two must have it.
    struct Case {
        running: Running,
        slice: Vec<NodeId>,
    }

    impl Case {
        fn sent_to(reached: &[usize], is_short: bool) -> Self {
            let nodes: Vec<NodeId> = reached.iter().map(|index| node(*index)).collect();
            let mut running = Running::default();
            running.sent([(RD, 1)].into_iter(), &nodes.iter().collect(), is_short, |_| true);
            Self { running, slice: (0..3).map(node).collect() }
        }

        fn up(&mut self, index: usize) -> Lacking {
            self.running.up(&node(index), std::iter::once(self.slice.as_slice()), 2, |_| true)
        }
    }

    fn nothing() -> Lacking {
        Lacking::default()
    }

    fn resend() -> Lacking {
        Lacking { resend: vec![(RD, 1)], ..Lacking::default() }
    }

    fn restart() -> Lacking {
        Lacking { restart: vec![RD], ..Lacking::default() }
    }

    #[test]
    fn a_replica_whose_link_comes_up_late_is_sent_what_runs_and_only_once() {
        let mut case = Case::sent_to(&[0, 1], false);
        assert_eq!(case.up(2), resend());
        assert_eq!(case.up(2), nothing());
        assert_eq!(case.up(1), nothing(), "it has it");
    }

    #[test]
    fn one_broken_link_is_made_good_and_more_than_f_start_the_request_anew() {
        let mut case = Case::sent_to(&[0, 1, 2], false);
        case.running.down(&node(2));
        assert_eq!(case.up(2), resend());
        // Rows and votes may have been lost, so it does not count any more.
        case.running.down(&node(1));
        assert_eq!(case.up(1), restart());
    }

    #[test]
    fn what_is_sent_to_all_again_anyhow_is_left_alone() {
        assert_eq!(Case::sent_to(&[0], true).up(1), nothing());
    }

    #[test]
    fn what_has_ended_is_forgotten() {
        let mut case = Case::sent_to(&[0, 1], false);
        assert_eq!(case.running.up(&node(2), std::iter::empty(), 2, |_| false), nothing());
        let nobody = BTreeSet::new();
        for index in 0..10 * KEPT_MIN as u64 {
            let mut rd = RD;
            rd.0[..8].copy_from_slice(&index.to_le_bytes());
            case.running.sent([(rd, 1)].into_iter(), &nobody, false, |living| *living == rd);
            assert!(case.running.requests.len() <= KEPT_MIN);
        }
    }
}
