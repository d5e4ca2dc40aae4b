//! The order in which waiting requests get their permits. Pure: no clock, no channel.
//!
//! | policy | order |
//! | --- | --- |
//! | fifo | as they came |
//! | priority | by level, earliest deadline first within a level; waiting raises a level |
//! | fair | clients in turn, each by as much work in a turn as any other; within a client as in priority |
//!
//! Invariants: nothing starves. Under fifo nobody is overtaken. Under priority a request of level `p` is overtaken by at most
//! `(Priority::MAX + 1 - p) · AGEING` that came later, because each [`AGEING`] arrivals are worth a level. Under fair (deficit
//! round robin) the work of two clients that both wait never differs by more than [`QUANTUM`] and two requests.
//!
//! It refuses to know who is alive and what is out of time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

use crate::items::Priority;

/// Arrivals that one level of priority is worth.
pub(crate) const AGEING: u64 = 128;
/// Work that a client may do in one turn, in tokens, before unused work of earlier turns is added.
pub(crate) const QUANTUM: u64 = 256;

/// How the next request is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// As they came.
    Fifo,
    /// By level.
    Priority,
    /// By client.
    Fair,
}

impl Policy {
    /// The names in topology files.
    pub const NAMES: [&'static str; 3] = ["fifo", "priority", "fair"];

    /// The policy of a name; fifo for any other.
    #[must_use]
    pub fn named(name: Option<&str>) -> Self {
        match name {
            Some("priority") => Self::Priority,
            Some("fair") => Self::Fair,
            _ => Self::Fifo,
        }
    }
}

/// What a request's place in the queue depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// Who asked.
    pub(crate) client: String,
    /// How urgent it is.
    pub(crate) priority: Priority,
    /// When it is worth nothing any more, in milliseconds since 1970.
    pub(crate) deadline_ms: u64,
    /// What it costs, in tokens; at least 1.
    pub(crate) work: u64,
}

/// Requests that wait. Its owner bounds it.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    policy: Policy,
    ageing: u64,
    quantum: u64,
    /// By client under fair, else all under the empty name. None is empty.
    flows: BTreeMap<String, Flow<T>>,
    /// The turns of the clients; the first is being served.
    turns: VecDeque<String>,
    /// Whether the first has got its quantum for this turn.
    is_credited: bool,
    length: usize,
}

#[derive(Debug)]
struct Flow<T> {
    arrivals: u64,
    deficit: u64,
    waiting: BTreeMap<Rank, (u64, T)>,
}

impl<T> Default for Flow<T> {
    fn default() -> Self {
        Self { arrivals: 0, deficit: 0, waiting: BTreeMap::new() }
    }
}

/// A place in a flow: the least goes first. It never changes, so waiting costs nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// Which [`AGEING`] arrivals it belongs to, less its level.
    era: i128,
    level: Reverse<Priority>,
    deadline_ms: u64,
    arrival: u64,
}

impl<T> Flow<T> {
    fn head_work(&self) -> u64 {
        self.waiting.first_key_value().map_or(0, |(_, (work, _))| *work)
    }
}

impl<T> Queue<T> {
    pub(crate) fn new(policy: Policy) -> Self {
        Self::with_steps(policy, AGEING, QUANTUM)
    }

    fn with_steps(policy: Policy, ageing: u64, quantum: u64) -> Self {
        Self { policy, ageing, quantum, flows: BTreeMap::new(), turns: VecDeque::new(), is_credited: false, length: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Puts a request in its place.
    pub(crate) fn push(&mut self, ticket: Ticket, item: T) {
        let Ticket { client, priority, deadline_ms, work } = ticket;
        let client = if self.policy == Policy::Fair { client } else { String::new() };
        let flow = self.flows.entry(client.clone()).or_insert_with(|| {
            self.turns.push_back(client);
            Flow::default()
        });
        let arrival = flow.arrivals;
        flow.arrivals += 1;
        let rank = match self.policy {
            Policy::Fifo => Rank { era: 0, level: Reverse(Priority::default()), deadline_ms: 0, arrival },
            Policy::Priority | Policy::Fair => Rank {
                era: i128::from(arrival / self.ageing) - i128::from(priority.level()),
                level: Reverse(priority),
                deadline_ms,
                arrival,
            },
        };
        flow.waiting.insert(rank, (work.max(1), item));
        self.length += 1;
    }

    /// Takes the request whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let client = self.next_client()?;
        let flow = self.flows.get_mut(&client)?;
        let (_, (work, item)) = flow.waiting.pop_first()?;
        flow.deficit = flow.deficit.saturating_sub(work);
        self.length -= 1;
        if flow.waiting.is_empty() {
            // Whoever does not wait saves nothing up.
            self.flows.remove(&client);
            self.turns.pop_front();
            self.is_credited = false;
        }
        Some(item)
    }

    /// Drops every request that `keeps` does not keep.
    pub(crate) fn retain(&mut self, mut keeps: impl FnMut(&T) -> bool) {
        let served = self.turns.front().cloned();
        for flow in self.flows.values_mut() {
            flow.waiting.retain(|_, (_, item)| keeps(item));
        }
        self.flows.retain(|_, flow| !flow.waiting.is_empty());
        self.turns.retain(|client| self.flows.contains_key(client));
        self.is_credited &= self.turns.front() == served.as_ref();
        self.length = self.flows.values().map(|flow| flow.waiting.len()).sum();
    }

    /// Whose turn it is, with enough credit for its first request. Takes at most two rounds, however large a request is.
    fn next_client(&mut self) -> Option<String> {
        for _ in 0..2 {
            for _ in 0..self.turns.len() {
                let client = self.turns.front()?;
                let flow = self.flows.get_mut(client)?;
                if !std::mem::replace(&mut self.is_credited, true) {
                    flow.deficit = flow.deficit.saturating_add(self.quantum);
                }
                if flow.head_work() <= flow.deficit {
                    return Some(client.clone());
                }
                self.turns.rotate_left(1);
                self.is_credited = false;
            }
            // Nobody's credit is enough. The rounds until somebody's is are given at once; the last of them is the next pass.
            let needed = |flow: &Flow<T>| flow.head_work().saturating_sub(flow.deficit).div_ceil(self.quantum);
            let rounds = self.flows.values().map(needed).min()?.saturating_sub(1);
            for flow in self.flows.values_mut() {
                flow.deficit = flow.deficit.saturating_add(rounds.saturating_mul(self.quantum));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn ticket(client: u8, level: u8, deadline_ms: u64, work: u64) -> Ticket {
        Ticket { client: client.to_string(), priority: Priority::new(level).unwrap(), deadline_ms, work }
    }

    fn policy() -> impl Strategy<Value = Policy> {
        prop_oneof![Just(Policy::Fifo), Just(Policy::Priority), Just(Policy::Fair)]
    }

    /// What is done to a queue: `Some` puts a request in, `None` takes one out.
    fn moves() -> impl Strategy<Value = Vec<Option<Ticket>>> {
        let arrives = (0u8..4, 0..=Priority::MAX, 0u64..5, 0u64..900).prop_map(|(c, l, d, w)| Some(ticket(c, l, d, w)));
        prop::collection::vec(prop_oneof![3 => arrives, 2 => Just(None)], 0..200)
    }

    proptest! {
        /// What goes in comes out once, whatever the policy, and what is dropped does not.
        #[test]
        fn nothing_is_lost_or_doubled(policy in policy(), moves in moves(), drops in 2usize..7) {
            let mut queue = Queue::with_steps(policy, 3, 50);
            let (mut inside, mut number) = (BTreeSet::new(), 0usize);
            for (at, one) in moves.into_iter().enumerate() {
                match one {
                    Some(ticket) => {
                        queue.push(ticket, number);
                        inside.insert(number);
                        number += 1;
                    }
                    None => match queue.pop() {
                        Some(item) => prop_assert!(inside.remove(&item)),
                        None => prop_assert!(inside.is_empty()),
                    },
                }
                if at % 17 == 16 {
                    queue.retain(|item| item % drops != 0);
                    inside.retain(|item| item % drops != 0);
                }
                prop_assert_eq!((queue.len(), queue.is_empty()), (inside.len(), inside.is_empty()));
            }
            while let Some(item) = queue.pop() {
                prop_assert!(inside.remove(&item));
            }
            prop_assert!(inside.is_empty());
        }

        #[test]
        fn fifo_keeps_the_order_of_arrival(moves in moves()) {
            let mut queue = Queue::new(Policy::Fifo);
            let (mut came, mut went) = (0, 0);
            for one in moves {
                match one {
                    Some(ticket) => {
                        queue.push(ticket, came);
                        came += 1;
                    }
                    None => if let Some(item) = queue.pop() {
                        prop_assert_eq!(item, went);
                        went += 1;
                    },
                }
            }
        }

        /// Among requests that came about together: the highest level first, then the earliest deadline, then the first.
        #[test]
        fn priority_goes_by_level_then_deadline_then_arrival(requests in prop::collection::vec((0..=Priority::MAX, 0u64..4), 0..100)) {
            let mut queue = Queue::new(Policy::Priority);
            for (arrival, (level, deadline_ms)) in requests.iter().enumerate() {
                queue.push(ticket(0, *level, *deadline_ms, 1), (Reverse(*level), *deadline_ms, arrival));
            }
            let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
            prop_assert!(order.is_sorted());
            prop_assert_eq!(order.len(), requests.len());
        }

        /// However many urgent requests come, one that waits is overtaken by so many and no more.
        #[test]
        fn priority_starves_nobody(moves in moves(), ageing in 1u64..9) {
            let mut queue = Queue::with_steps(Policy::Priority, ageing, QUANTUM);
            let mut waiting: BTreeMap<u64, (u8, u64)> = BTreeMap::new();
            let mut arrival = 0;
            for one in moves {
                match one {
                    Some(ticket) => {
                        waiting.insert(arrival, (ticket.priority.level(), 0));
                        queue.push(ticket, arrival);
                        arrival += 1;
                    }
                    None => if let Some(next) = queue.pop() {
                        waiting.remove(&next);
                        for (level, overtaken) in waiting.range_mut(..next).map(|(_, one)| one) {
                            *overtaken += 1;
                            let most = (u64::from(Priority::MAX + 1 - *level)) * ageing;
                            prop_assert!(*overtaken <= most, "level {} was overtaken {} times", level, overtaken);
                        }
                    },
                }
                if queue.is_empty() {
                    // The eras begin anew with an empty queue.
                    arrival = 0;
                    waiting.clear();
                }
            }
        }

        /// Two clients that both wait get the same work, but for a quantum and two requests, whatever their requests cost and
        /// however many each has.
        #[test]
        fn fair_shares_work_and_not_requests(
            works in prop::collection::vec((0u8..4, 1u64..1000), 1..150),
            quantum in 1u64..400,
        ) {
            let mut queue = Queue::with_steps(Policy::Fair, AGEING, quantum);
            let mut left: BTreeMap<u8, usize> = BTreeMap::new();
            for (client, work) in &works {
                queue.push(ticket(*client, 5, 0, *work), (*client, *work));
                *left.entry(*client).or_default() += 1;
            }
            let mut done: BTreeMap<u8, u64> = left.keys().map(|client| (*client, 0)).collect();
            let largest = works.iter().map(|(_, work)| *work).max().unwrap_or(0);
            while let Some((client, work)) = queue.pop() {
                *done.entry(client).or_default() += work;
                let rest = left.get_mut(&client).unwrap();
                *rest -= 1;
                if *rest == 0 {
                    left.remove(&client);
                    done.remove(&client);
                }
                let (least, most) = (done.values().min().unwrap_or(&0), done.values().max().unwrap_or(&0));
                prop_assert!(most - least <= quantum + 2 * largest, "{:?}", done);
            }
        }

        /// A client that keeps the queue full of its own does not hold up another's one request for longer than that
        /// request's own work, a quantum and two requests.
        #[test]
        fn fair_starves_nobody(flood in prop::collection::vec(1u64..500, 1..60), work in 1u64..2000, quantum in 1u64..400) {
            let mut queue = Queue::with_steps(Policy::Fair, AGEING, quantum);
            let mut flood = flood.into_iter().cycle();
            for _ in 0..50 {
                let work = flood.next().unwrap_or(1);
                queue.push(ticket(1, Priority::MAX, 0, work), (1, work));
            }
            queue.push(ticket(2, 0, u64::MAX, work), (2, work));
            let mut before = 0;
            loop {
                let Some((client, done)) = queue.pop() else { panic!("the request is lost") };
                if client == 2 {
                    break;
                }
                before += done;
                prop_assert!(before <= work + quantum + 2 * 500, "{} before {}", before, work);
                let more = flood.next().unwrap_or(1);
                queue.push(ticket(1, Priority::MAX, 0, more), (1, more));
            }
        }
    }

    #[test]
    fn a_request_larger_than_any_credit_costs_two_rounds_and_not_a_million() {
        let mut queue = Queue::with_steps(Policy::Fair, AGEING, 1);
        queue.push(ticket(1, 5, 0, u64::MAX), 1);
        queue.push(ticket(2, 5, 0, u64::MAX - 7), 2);
        assert_eq!((queue.pop(), queue.pop(), queue.pop()), (Some(2), Some(1), None));
    }
}
