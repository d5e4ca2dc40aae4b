//! Lets a value pass once enough replicas of the neighbouring slice sent the same.
//!
//! In mode `full` every replica of a slice computes, and hands its rows to every replica of the next one. A replica takes a
//! row when `need` of them (f+1, so at least one honest) agree on its bits. By induction over slices and positions an
//! honest replica therefore only ever computes on right inputs, however slow or silent up to f of the senders are, and
//! nothing has to be recomputed. With `need = 1` (mode `none`) the first value passes.
//!
//! The gate is bounded: positions lie in a window fixed at construction, each sender has one value for a position, and
//! senders are a closed set.

use std::collections::BTreeMap;

use butterfly_topology::NodeId;

/// Collects values by position, in order of position.
#[derive(Debug)]
pub(crate) struct Gate<T> {
    senders: Vec<NodeId>,
    need: usize,
    next: u32,
    end: u32,
    waiting: BTreeMap<u32, Vec<Candidate<T>>>,
}

#[derive(Debug)]
struct Candidate<T> {
    value: T,
    from: Vec<usize>,
}

/// What became of an offered value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// It was counted, and agrees with what was offered before for the position.
    Counted,
    /// It was counted, but another sender offered different bits for the same position.
    Differs,
    /// The position has passed already, or this sender offered a value for it before.
    Late,
    /// The sender is no replica of the neighbouring slice, or the position lies outside the window.
    Refused,
}

impl<T: PartialEq> Gate<T> {
    /// A gate for positions `[0, end)` that passes values `need` of `senders` agree on.
    pub(crate) fn new(senders: Vec<NodeId>, need: usize, end: u32) -> Self {
        Self { senders, need: need.max(1), next: 0, end, waiting: BTreeMap::new() }
    }

    /// The first position that has not passed.
    pub(crate) fn next(&self) -> u32 {
        self.next
    }

    /// Starts at `position`: what lies before needs no agreement (the prompt, which the request itself fixes).
    pub(crate) fn skip_to(&mut self, position: u32) {
        self.next = self.next.max(position);
        self.waiting = self.waiting.split_off(&self.next);
    }

    /// Offers the value `from` sent for `position`.
    pub(crate) fn offer(&mut self, from: &NodeId, position: u32, value: T) -> Offer {
        let Some(sender) = self.senders.iter().position(|node| node == from) else {
            return Offer::Refused;
        };
        if position >= self.end {
            return Offer::Refused;
        }
        if position < self.next {
            return Offer::Late;
        }
        let candidates = self.waiting.entry(position).or_default();
        if candidates.iter().any(|candidate| candidate.from.contains(&sender)) {
            return Offer::Late;
        }
        match candidates.iter_mut().find(|candidate| candidate.value == value) {
            Some(candidate) => candidate.from.push(sender),
            None => candidates.push(Candidate { value, from: vec![sender] }),
        }
        if candidates.len() > 1 { Offer::Differs } else { Offer::Counted }
    }

    /// Takes the value of the next position, if it may pass.
    pub(crate) fn take(&mut self) -> Option<T> {
        let candidates = self.waiting.get_mut(&self.next)?;
        let index = candidates.iter().position(|candidate| candidate.from.len() >= self.need)?;
        let value = candidates.swap_remove(index).value;
        self.waiting.remove(&self.next);
        self.next += 1;
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nodes(count: usize) -> Vec<NodeId> {
        (0..count).map(|i| format!("n{i}").parse().unwrap()).collect()
    }

    #[test]
    fn a_single_liar_neither_passes_nor_stops_a_value() {
        let senders = nodes(3);
        let mut gate = Gate::new(senders.clone(), 2, 4);
        assert_eq!(gate.offer(&senders[0], 0, 13), Offer::Counted);
        assert_eq!(gate.take(), None);
        assert_eq!(gate.offer(&senders[0], 0, 13), Offer::Late, "one sender counts once");
        assert_eq!(gate.take(), None);
        assert_eq!(gate.offer(&senders[1], 0, 7), Offer::Differs);
        assert_eq!(gate.offer(&senders[2], 0, 7), Offer::Differs);
        assert_eq!(gate.take(), Some(7));
        assert_eq!(gate.next(), 1);
    }

    #[test]
    fn strangers_and_positions_outside_the_window_are_refused() {
        let senders = nodes(3);
        let mut gate = Gate::new(senders.clone(), 1, 2);
        assert_eq!(gate.offer(&"x".parse().unwrap(), 0, 1), Offer::Refused);
        assert_eq!(gate.offer(&senders[0], 2, 1), Offer::Refused);
        assert_eq!(gate.offer(&senders[0], 1, 1), Offer::Counted);
        assert_eq!(gate.take(), None, "position 0 comes first");
    }

    proptest! {
        /// Whatever up to f senders offer and in whatever order, the honest values pass, in order, and nothing else.
        #[test]
        fn honest_values_pass_in_order(f in 1usize..3, length in 1u32..12, order in prop::collection::vec(any::<u32>(), 0..200), lies in prop::collection::vec(any::<u8>(), 24)) {
            let senders = nodes(2 * f + 1);
            let mut offers: Vec<(usize, u32)> = (0..senders.len()).flat_map(|s| (0..length).map(move |p| (s, p))).collect();
            for (i, swap) in order.iter().enumerate() {
                let (a, b) = (i % offers.len(), *swap as usize % offers.len());
                offers.swap(a, b);
            }
            let mut gate = Gate::new(senders.clone(), f + 1, length);
            let mut passed = Vec::new();
            for (sender, position) in offers {
                let value = if sender < f { u32::from(lies[position as usize]) + 1000 } else { position };
                gate.offer(&senders[sender], position, value);
                while let Some(value) = gate.take() {
                    passed.push(value);
                }
            }
            prop_assert_eq!(passed, (0..length).collect::<Vec<_>>());
        }
    }
}
