//! Replica sets: which nodes hold a slice together.
//!
//! The nodes of a set are distinct, and as few of them as possible share a trust domain: an operator with f+1 nodes of a
//! set could forge its results. A node without a domain counts as a domain of its own. Within that, nodes come in the
//! order of the caller's preference, so nodes alike in speed end up together.

use std::collections::BTreeMap;

use crate::cluster::NodeSpec;

/// The domains of the nodes, as small numbers.
pub(crate) struct Domains {
    /// The domain of each node.
    of: Vec<usize>,
    /// How many nodes each domain has.
    sizes: Vec<usize>,
}

impl Domains {
    pub(crate) fn new(nodes: &[NodeSpec]) -> Self {
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut sizes: Vec<usize> = Vec::new();
        let mut of = Vec::with_capacity(nodes.len());
        for node in nodes {
            let fresh = sizes.len();
            let number = match &node.domain {
                Some(domain) => *numbers.entry(domain).or_insert(fresh),
                None => fresh,
            };
            if number == fresh {
                sizes.push(0);
            }
            if let Some(size) = sizes.get_mut(number) {
                *size += 1;
            }
            of.push(number);
        }
        Self { of, sizes }
    }

    /// How many domains there are.
    pub(super) fn count(&self) -> usize {
        self.sizes.len()
    }

    /// Whether `sets` disjoint sets of `size` nodes exist with at most `share` nodes of one domain in each. Dealing the
    /// nodes out domain by domain, set after set, shows that counting is enough.
    pub(super) fn allow(&self, sets: usize, size: usize, share: usize) -> bool {
        let usable: usize = self.sizes.iter().map(|nodes| (*nodes).min(share.saturating_mul(sets))).sum();
        usable >= sets.saturating_mul(size)
    }

    /// The least share of one domain with which `sets` disjoint sets of `size` nodes exist.
    pub(crate) fn least_share(&self, sets: usize, size: usize) -> Option<usize> {
        (1..=size).find(|share| self.allow(sets, size, *share))
    }

    /// The most disjoint sets, at most `limit`, with at most `share` nodes of one domain in each.
    pub(super) fn most_sets(&self, limit: usize, size: usize, share: usize) -> usize {
        (1..=limit).rev().find(|sets| self.allow(*sets, size, share)).unwrap_or(0)
    }
}

/// As many sets as are asked for, or as the nodes allow without trading the spread over domains for more sets, at most
/// `sets_max`. Sets are disjoint where there are nodes enough.
pub(super) fn form(
    domains: &Domains,
    preference: &[usize],
    size: usize,
    sets: Option<usize>,
    sets_max: usize,
) -> Vec<Vec<usize>> {
    let possible = preference.len() / size.max(1);
    let sets = match sets {
        Some(sets) if sets > possible => return shared(domains, preference, size, sets),
        Some(sets) => sets,
        None => {
            let share = domains.least_share(1, size).unwrap_or(size);
            domains.most_sets(possible.min(sets_max), size, share)
        }
    };
    let share = domains.least_share(sets, size).unwrap_or(size);
    disjoint(domains, preference, size, sets, share)
}

/// Disjoint sets, each filled with the most preferred nodes that leave enough for the sets after it.
fn disjoint(domains: &Domains, preference: &[usize], size: usize, sets: usize, share: usize) -> Vec<Vec<usize>> {
    let mut left = domains.sizes.clone();
    let mut waiting: Vec<usize> = preference.to_vec();
    let mut formed = Vec::with_capacity(sets);
    for index in 0..sets {
        let rest = sets - index - 1;
        let mut used = vec![0_usize; left.len()];
        let mut set: Vec<usize> = Vec::with_capacity(size);
        while set.len() < size {
            let fits = |node: &usize| {
                let Some(&domain) = domains.of.get(*node) else { return false };
                used.get(domain).is_some_and(|used| *used < share)
                    && completes(&left, &used, domain, size - set.len() - 1, rest, size, share)
            };
            let Some(at) = waiting.iter().position(fits) else { break };
            let node = waiting.remove(at);
            if let Some(&domain) = domains.of.get(node) {
                if let Some(used) = used.get_mut(domain) {
                    *used += 1;
                }
                if let Some(left) = left.get_mut(domain) {
                    *left -= 1;
                }
            }
            set.push(node);
        }
        formed.push(set);
    }
    formed
}

/// Whether, after taking a node of `taken`, the set can be filled with `missing` more nodes so that `rest` further sets
/// remain possible. Nodes that a domain has beyond its share of the further sets are free to use; every other one costs
/// the further sets a node.
fn completes(
    left: &[usize],
    used: &[usize],
    taken: usize,
    missing: usize,
    rest: usize,
    size: usize,
    share: usize,
) -> bool {
    let (mut fill, mut free, mut usable) = (0_usize, 0_usize, 0_usize);
    for (domain, (left, used)) in left.iter().zip(used).enumerate() {
        let mine = usize::from(domain == taken);
        let left = left - mine.min(*left);
        let room = share.saturating_sub(used + mine);
        let kept = left.min(share.saturating_mul(rest));
        fill += left.min(room);
        free += (left - kept).min(room);
        usable += kept;
    }
    fill >= missing && usable.saturating_sub(missing.saturating_sub(free)) >= rest.saturating_mul(size)
}

/// Sets that share nodes: each takes, of the domains it has least of, the nodes that hold the fewest slices so far.
fn shared(domains: &Domains, preference: &[usize], size: usize, sets: usize) -> Vec<Vec<usize>> {
    let mut holds = vec![0_usize; domains.of.len()];
    let mut formed = Vec::with_capacity(sets);
    for _ in 0..sets {
        let mut used = vec![0_usize; domains.sizes.len()];
        let mut set: Vec<usize> = Vec::with_capacity(size);
        for _ in 0..size {
            let burden = |node: usize| {
                let used = domains.of.get(node).and_then(|domain| used.get(*domain)).copied();
                (used.unwrap_or(0), holds.get(node).copied().unwrap_or(0))
            };
            // Of equal nodes the most preferred one, which comes first.
            let next = preference.iter().copied().filter(|node| !set.contains(node)).min_by_key(|node| burden(*node));
            let Some(node) = next else { break };
            if let Some(used) = domains.of.get(node).and_then(|domain| used.get_mut(*domain)) {
                *used += 1;
            }
            if let Some(holds) = holds.get_mut(node) {
                *holds += 1;
            }
            set.push(node);
        }
        formed.push(set);
    }
    formed
}
