//! Cuts: where contiguous slices of layers end.
//!
//! A dynamic programme over (slices so far, layers so far) finds, for each number of slices, the cut whose slowest slice
//! is fastest, and of equally fast ones the cut with the least time in all. Slices go to replica sets in the order of the
//! sets. The search for a slice's first layer goes backwards and stops where the slice is too slow or too large, so with S
//! slices of L layers it takes about L² steps, not S·L².

use std::ops::Range;

use crate::cluster::NodeSpec;
use crate::plan::{Lack, LayerCost, PlanError, PlanInput};

/// Sums over the layers before each layer.
pub(super) struct Costs {
    work: Vec<f64>,
    memory: Vec<u64>,
}

impl Costs {
    pub(super) fn new(input: &PlanInput<'_>) -> Self {
        let layers = input.layers;
        let mut costs = Self { work: vec![0.0], memory: vec![0] };
        let (mut work, mut memory) = (0.0, 0_u64);
        for layer in layers {
            work += layer.work;
            memory = memory.saturating_add(layer_memory(layer, input.positions_max));
            costs.work.push(work);
            costs.memory.push(memory);
        }
        costs
    }

    /// Bytes of weights and caches of these layers.
    pub(super) fn memory(&self, layers: Range<usize>) -> u64 {
        let before = |at: usize| self.memory.get(at).copied().unwrap_or(0);
        before(layers.end).saturating_sub(before(layers.start))
    }

    /// Multiply-adds of these layers for each position.
    pub(super) fn work(&self, layers: Range<usize>) -> f64 {
        let before = |at: usize| self.work.get(at).copied().unwrap_or(0.0);
        before(layers.end) - before(layers.start)
    }
}

pub(super) fn layer_memory(layer: &LayerCost, positions_max: u64) -> u64 {
    layer.weight_bytes.saturating_add(layer.kv_bytes_per_position.saturating_mul(positions_max))
}

/// What a replica set offers to its slice. A set is as able as its least able node, because every replica computes every
/// position.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    /// Relative speed; a node that holds several slices gives each an equal part of it.
    pub(super) speed: f64,
    /// Memory in bytes, likewise; `u64::MAX` when unknown.
    pub(super) memory_bytes: u64,
    /// The node that bounds the memory, as a position in the input.
    pub(super) memory_node: usize,
    /// Bytes per second to the neighbouring slices, likewise; infinite when unknown.
    pub(super) bandwidth: f64,
}

/// What each of these replica sets offers.
pub(super) fn slots(nodes: &[NodeSpec], sets: &[Vec<usize>]) -> Vec<Slot> {
    let mut holds = vec![0_u32; nodes.len()];
    for node in sets.iter().flatten() {
        if let Some(holds) = holds.get_mut(*node) {
            *holds += 1;
        }
    }
    let slot = |set: &Vec<usize>| {
        let mut slot = Slot { speed: f64::INFINITY, memory_bytes: u64::MAX, memory_node: 0, bandwidth: f64::INFINITY };
        for &index in set {
            let (Some(node), Some(&holds)) = (nodes.get(index), holds.get(index)) else { continue };
            let part = f64::from(holds.max(1));
            slot.speed = slot.speed.min(node.compute.unwrap_or(1.0) / part);
            slot.bandwidth = slot.bandwidth.min(node.bandwidth.map_or(f64::INFINITY, |b| b as f64) / part);
            let memory = node.memory_bytes.map_or(u64::MAX, |memory| memory / u64::from(holds.max(1)));
            if memory < slot.memory_bytes {
                (slot.memory_bytes, slot.memory_node) = (memory, index);
            }
        }
        slot
    };
    sets.iter().map(slot).collect()
}

/// Seconds, or any unit that is the same for all: the slowest slice and the sum over all.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub(super) struct Pace {
    pub(super) slowest: f64,
    pub(super) total: f64,
}

/// The best cut into each number of slices.
pub(super) struct Cuts {
    layers: usize,
    /// `[slices - 1][layers]`: the pace of the best cut and where its last slice begins.
    best: Vec<Vec<Option<(Pace, usize)>>>,
}

/// Finds the best cuts into one to `slots.len()` slices. `time(slot, layers)` is what a slice takes; it is never less
/// than `floor(slot, layers)`, which must not fall when layers are added in front.
pub(super) fn best(
    costs: &Costs,
    layers: usize,
    slots: &[Slot],
    floor: impl Fn(&Slot, Range<usize>) -> f64,
    time: impl Fn(&Slot, Range<usize>) -> f64,
) -> Cuts {
    let mut best: Vec<Vec<Option<(Pace, usize)>>> = Vec::with_capacity(slots.len());
    for (index, slot) in slots.iter().enumerate() {
        let mut row: Vec<Option<(Pace, usize)>> = vec![None; layers + 1];
        for (end, cell) in row.iter_mut().enumerate().skip(index + 1) {
            for first in (index..end).rev() {
                let bounded = cell.as_ref().is_some_and(|(pace, _)| floor(slot, first..end) > pace.slowest);
                if bounded || costs.memory(first..end) > slot.memory_bytes {
                    break;
                }
                let before = match index.checked_sub(1).and_then(|before| best.get(before)) {
                    Some(row) => row.get(first).copied().flatten().map(|(pace, _)| pace),
                    None => (first == 0).then_some(Pace { slowest: 0.0, total: 0.0 }),
                };
                let Some(before) = before else { continue };
                let time = time(slot, first..end);
                let pace = Pace { slowest: before.slowest.max(time), total: before.total + time };
                if cell.as_ref().is_none_or(|(least, _)| pace < *least) {
                    *cell = Some((pace, first));
                }
            }
        }
        best.push(row);
    }
    Cuts { layers, best }
}

impl Cuts {
    /// The pace of the best cut into this many slices.
    pub(super) fn pace(&self, slices: usize) -> Option<Pace> {
        let row = slices.checked_sub(1).and_then(|row| self.best.get(row))?;
        row.get(self.layers).copied().flatten().map(|(pace, _)| pace)
    }

    /// The number of slices whose slowest one is fastest; of equals the smallest.
    pub(super) fn fastest(&self) -> Option<usize> {
        let paces = (1..=self.best.len()).filter_map(|slices| Some((self.pace(slices)?.slowest, slices)));
        paces.reduce(|least, next| if next.0 < least.0 { next } else { least }).map(|(_, slices)| slices)
    }

    /// Where the slices of the best cut end.
    pub(super) fn ends(&self, slices: usize) -> Option<Vec<usize>> {
        let mut ends = Vec::with_capacity(slices);
        let mut end = self.layers;
        for row in self.best.get(..slices)?.iter().rev() {
            ends.push(end);
            end = row.get(end).copied().flatten()?.1;
        }
        ends.reverse();
        (end == 0).then_some(ends)
    }
}

/// Why there is no cut: the memory of these slots is too little.
pub(super) fn lack(input: &PlanInput<'_>, costs: &Costs, slots: &[Slot]) -> PlanError {
    let largest = slots.iter().max_by_key(|slot| slot.memory_bytes);
    let layers = input.layers.iter().map(|layer| layer_memory(layer, input.positions_max));
    let heaviest = layers.enumerate().max_by_key(|(index, bytes)| (*bytes, std::cmp::Reverse(*index)));
    let needed_bytes = costs.memory(0..input.layers.len());
    let available_bytes = slots.iter().fold(0_u64, |sum, slot| sum.saturating_add(slot.memory_bytes));
    let slices = slots.len();
    let lack = match (largest, heaviest) {
        (Some(slot), Some((layer, bytes))) if bytes > slot.memory_bytes => match input.nodes.get(slot.memory_node) {
            Some(node) => Lack::LayerMemory {
                layer,
                needed_bytes: bytes,
                available_bytes: slot.memory_bytes,
                node: node.id.clone(),
            },
            None => Lack::TotalMemory { needed_bytes, available_bytes, slices },
        },
        _ if needed_bytes > available_bytes => Lack::TotalMemory { needed_bytes, available_bytes, slices },
        _ => Lack::Fragmented { needed_bytes, available_bytes, slices },
    };
    PlanError::InsufficientResources(lack)
}
