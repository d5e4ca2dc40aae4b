//! One load of a slice: where its weights are read from, where packed ones are kept, and how far it is.
//!
//! Invariants: only tensors that are asked for are read, and pages of the files leave memory once a tensor is packed, so
//! that a load never holds more than its packed weights and a tensor for each of its threads.
//!
//! It refuses to know which tensors a slice has.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use butterfly_engine::clock::{Clock, RealClock};
use butterfly_kernels::{Dtype, Matrix};

use super::packed::{PackedWeights, Packing};
use super::source::Part;

/// How often progress is told: after each of so many equal parts.
const TOLD: u64 = 10;
/// Slices smaller than this are loaded without telling how far it is.
const TOLD_BYTES_MIN: u64 = 256 << 20;

/// Layers that are loaded at once: enough for a fast disk, and few enough to share one.
const THREADS_MAX: usize = 8;

pub(super) struct Loading<'a> {
    /// The weight files.
    pub(super) parts: &'a [Part],
    root: [u8; 32],
    packed: Option<&'a PackedWeights>,
    clock: RealClock,
    /// Bytes of the slice's tensors, as they are stored.
    total: u64,
    done: AtomicU64,
}

impl<'a> Loading<'a> {
    /// A load of about `total` bytes of a model with this root.
    pub(super) fn new(parts: &'a [Part], root: [u8; 32], packed: Option<&'a PackedWeights>, total: u64) -> Self {
        Self { parts, root, packed, clock: RealClock::new(), total, done: AtomicU64::new(0) }
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
        let length = bytes.len() as u64;
        if let Some(part) = self.parts.get(file) {
            part.bytes.release(bytes);
        }
        let before = self.done.fetch_add(length, Ordering::Relaxed);
        let done = before.saturating_add(length);
        let part = |bytes: u64| bytes.saturating_mul(TOLD).checked_div(self.total).unwrap_or(TOLD);
        // Small models are there before anybody could read about it.
        if self.total >= TOLD_BYTES_MIN && part(before) != part(done) {
            tracing::info!(percent = part(done) * (100 / TOLD), "loading weights, {}", self.rate());
        }
    }

    /// Loads each layer of a range, several at once.
    ///
    /// # Errors
    ///
    /// Of the layers that cannot be loaded, that of the first.
    pub(super) fn layers<L: Send, E: Send>(
        range: Range<usize>,
        load: impl Fn(usize) -> Result<L, E> + Sync,
    ) -> Result<Vec<L>, E> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX).min(range.len());
        let next = AtomicUsize::new(range.start);
        let work = || {
            let mut loaded = Vec::new();
            loop {
                let layer = next.fetch_add(1, Ordering::Relaxed);
                if layer >= range.end {
                    return loaded;
                }
                let result = load(layer);
                if result.is_err() {
                    // All before it are taken already.
                    next.store(range.end, Ordering::Relaxed);
                }
                loaded.push((layer, result));
            }
        };
        let mut loaded = thread::scope(|scope| {
            let start = |_| thread::Builder::new().name("load".to_owned()).spawn_scoped(scope, work).ok();
            let others: Vec<_> = (1..threads).map_while(start).collect();
            let mut loaded = work();
            for other in others {
                loaded.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
            loaded
        });
        loaded.sort_by_key(|(layer, _)| *layer);
        loaded.into_iter().map(|(_, result)| result).collect()
    }

    /// Tells that all is loaded.
    pub(super) fn finish(&self) {
        tracing::info!(mb = self.done.load(Ordering::Relaxed) / 1_000_000, "weights loaded, {}", self.rate());
    }

    fn rate(&self) -> String {
        let seconds = self.clock.now().as_secs_f64().max(1e-6);
        format!("{:.2} GB/s", self.done.load(Ordering::Relaxed) as f64 / 1e9 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_come_in_order_and_the_first_failure_is_told() {
        let doubled = Loading::layers(3..40, |layer| Ok::<_, ()>(2 * layer));
        assert_eq!(doubled, Ok((3..40).map(|layer| 2 * layer).collect()));
        assert_eq!(Loading::layers(5..5, Ok::<_, ()>), Ok(Vec::new()));
        for _ in 0..100 {
            let failed = Loading::layers(0..50, |layer| if layer % 7 == 6 { Err(layer) } else { Ok(()) });
            assert_eq!(failed, Err(6));
        }
    }
}
