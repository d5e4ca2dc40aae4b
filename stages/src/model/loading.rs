//! One load of a slice: where its weights are read from, where packed ones are kept, and how far it is.
//!
//! Invariants: only tensors that are asked for are read, and pages of the files leave memory once a tensor is packed, so
//! that a load never holds more than its packed weights and one tensor.
//!
//! It refuses to know which tensors a slice has.

use std::cell::Cell;
use std::ops::Range;

use butterfly_engine::clock::{Clock, RealClock};
use butterfly_kernels::{Dtype, Matrix};

use super::packed::{PackedWeights, Packing};
use super::source::Part;

/// How often progress is told: after each of so many equal parts.
const TOLD: u64 = 10;
/// Slices smaller than this are loaded without telling how far it is.
const TOLD_BYTES_MIN: u64 = 256 << 20;

pub(super) struct Loading<'a> {
    /// The weight files.
    pub(super) parts: &'a [Part],
    root: [u8; 32],
    packed: Option<&'a PackedWeights>,
    clock: RealClock,
    /// Bytes of the slice's tensors, as they are stored.
    total: u64,
    done: Cell<u64>,
}

impl<'a> Loading<'a> {
    /// A load of about `total` bytes of a model with this root.
    pub(super) fn new(parts: &'a [Part], root: [u8; 32], packed: Option<&'a PackedWeights>, total: u64) -> Self {
        Self { parts, root, packed, clock: RealClock::new(), total, done: Cell::new(0) }
    }

    /// A matrix that was packed by an earlier load. Of weights inside this program none are kept.
    pub(super) fn find(&self, file: usize, tensor: &str, dtype: Dtype, [rows, columns]: [usize; 2]) -> Option<Matrix> {
        let packed = self.packed.filter(|_| self.parts.get(file).is_some_and(|part| part.bytes.is_mapped()))?;
        packed.find(Packing { root: &self.root, tensor, dtype, rows, columns })
    }

    /// Keeps a matrix for later loads.
    pub(super) fn keep(&self, file: usize, tensor: &str, matrix: &Matrix) {
        if let Some(packed) = self.packed.filter(|_| self.parts.get(file).is_some_and(|part| part.bytes.is_mapped())) {
            let (dtype, rows, columns) = (matrix.dtype(), matrix.rows(), matrix.columns());
            packed.keep(Packing { root: &self.root, tensor, dtype, rows, columns }, matrix);
        }
    }

    /// Counts a tensor that is in memory as it will be used, and gives its pages of the file back.
    pub(super) fn done_with(&self, file: usize, bytes: Range<usize>) {
        let (before, length) = (self.done.get(), bytes.len() as u64);
        if let Some(part) = self.parts.get(file) {
            part.bytes.release(bytes);
        }
        let done = before.saturating_add(length);
        self.done.set(done);
        let part = |bytes: u64| bytes.saturating_mul(TOLD).checked_div(self.total).unwrap_or(TOLD);
        // Small models are there before anybody could read about it.
        if self.total >= TOLD_BYTES_MIN && part(before) != part(done) {
            tracing::info!(percent = part(done) * (100 / TOLD), "loading weights, {}", self.rate());
        }
    }

    /// Tells that all is loaded.
    pub(super) fn finish(&self) {
        tracing::info!(mb = self.done.get() / 1_000_000, "weights loaded, {}", self.rate());
    }

    fn rate(&self) -> String {
        let seconds = self.clock.now().as_secs_f64().max(1e-6);
        format!("{:.2} GB/s", self.done.get() as f64 / 1e9 / seconds)
    }
}
