//! Keys and values of the positions so far, for one layer of one sequence.
//!
//! Invariants:
//! - Numbers are rounded to the storage format (f16, to nearest even) before any use. One that is then not finite is
//!   [`Numeric`], and the cache is as it was.
//! - Memory grows by pages of sixteen positions. In a page, keys are panels of sixteen positions that step through the
//!   head's dimensions, values are panels of sixteen dimensions that step through the positions: both are chains that
//!   vectorise without being split.
//! - Lanes at or beyond `len` may hold anything finite. Readers must not use them.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::Numeric;
use crate::element::{F16, F32, Format, Step};
use crate::lanes::all_finite;
use crate::simd::LANES;

/// Positions of a page.
pub(crate) const PAGE: usize = LANES;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheStorage {
    /// As the profile has it.
    F16,
    /// Unrounded. Not the profile: for comparison with references that keep f32.
    F32,
}

/// Keys and values of one layer of one sequence.
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    len: usize,
    pages: Pages,
}

pub(crate) enum Pages {
    F16(Vec<Page<F16>>),
    F32(Vec<Page<F32>>),
}

/// Sixteen positions.
pub(crate) struct Page<F: Format> {
    /// `[kv_heads, head_dim]` steps of sixteen positions.
    keys: Box<[Step<F::Stored>]>,
    /// `[kv_heads, groups, 16]` steps of sixteen dimensions; the last group of a head is padded with zeros.
    values: Box<[Step<F::Stored>]>,
}

impl KvCache {
    /// An empty cache for at most `capacity` positions of `kv_heads` heads of `head_dim`, stored as the profile has it.
    pub fn new(kv_heads: usize, head_dim: usize, capacity: usize) -> KvCache {
        KvCache::with_storage(kv_heads, head_dim, capacity, CacheStorage::F16)
    }

    /// [`KvCache::new`] with a choice of storage.
    ///
    /// # Panics
    /// If there are no heads or they have no elements.
    pub fn with_storage(kv_heads: usize, head_dim: usize, capacity: usize, storage: CacheStorage) -> KvCache {
        assert!(kv_heads > 0 && head_dim > 0, "a cache has heads, and they have elements");
        KvCache {
            kv_heads,
            head_dim,
            capacity,
            len: 0,
            pages: match storage {
                CacheStorage::F16 => Pages::F16(Vec::new()),
                CacheStorage::F32 => Pages::F32(Vec::new()),
            },
        }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most positions it takes.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Elements of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Memory that the positions take, unused ends of pages included.
    pub fn bytes(&self) -> usize {
        let steps = self.kv_heads * (self.head_dim + self.head_dim.div_ceil(LANES) * PAGE);
        match &self.pages {
            Pages::F16(pages) => pages.len() * steps * size_of::<Step<u16>>(),
            Pages::F32(pages) => pages.len() * steps * size_of::<Step<f32>>(),
        }
    }

    /// Adds the key and the value, each `[kv_heads, head_dim]`, of the next position.
    ///
    /// # Errors
    /// [`Numeric`] if an element is not finite once rounded to the storage format. The cache is then unchanged.
    ///
    /// # Panics
    /// If the cache is full, or a shape does not fit.
    pub fn push(&mut self, key: &[f32], value: &[f32]) -> Result<(), Numeric> {
        let width = self.kv_heads * self.head_dim;
        assert!(self.len < self.capacity, "the cache is full");
        assert_eq!(key.len(), width, "a key has {width} elements");
        assert_eq!(value.len(), width, "a value has {width} elements");
        let (position, head_dim, kv_heads) = (self.len, self.head_dim, self.kv_heads);
        match &mut self.pages {
            Pages::F16(pages) => {
                let (key, value) = (rounded(key)?, rounded(value)?);
                page_for(pages, position, kv_heads, head_dim).set(position, head_dim, &key, &value);
            }
            Pages::F32(pages) => {
                if !(all_finite(key) && all_finite(value)) {
                    return Err(Numeric);
                }
                page_for(pages, position, kv_heads, head_dim).set(position, head_dim, key, value);
            }
        }
        self.len += 1;
        Ok(())
    }

    /// Forgets all but the first `len` positions. A no-op if there are no more.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        let used = self.len.div_ceil(PAGE);
        match &mut self.pages {
            Pages::F16(pages) => pages.truncate(used),
            Pages::F32(pages) => pages.truncate(used),
        }
    }

    pub(crate) fn pages(&self) -> &Pages {
        &self.pages
    }
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "KvCache {} of {} positions x {} heads x {}",
            self.len, self.capacity, self.kv_heads, self.head_dim
        )
    }
}

impl<F: Format> Page<F> {
    fn new(kv_heads: usize, head_dim: usize) -> Page<F> {
        let value_steps = head_dim.div_ceil(LANES) * PAGE;
        Page {
            keys: vec![Step::default(); kv_heads * head_dim].into(),
            values: vec![Step::default(); kv_heads * value_steps].into(),
        }
    }

    fn set(&mut self, position: usize, head_dim: usize, key: &[F::Stored], value: &[F::Stored]) {
        let lane = position % PAGE;
        for (step, element) in self.keys.iter_mut().zip(key) {
            step.0[lane] = *element;
        }
        let head_steps = head_dim.div_ceil(LANES) * PAGE;
        let heads = self.values.chunks_exact_mut(head_steps);
        for (head, value) in heads.zip(value.chunks_exact(head_dim)) {
            let groups = head.chunks_exact_mut(PAGE);
            for (group, value) in groups.zip(value.chunks(LANES)) {
                group[lane].0[..value.len()].copy_from_slice(value);
            }
        }
    }

    /// The keys of one head: a panel of sixteen positions.
    #[inline(always)]
    pub(crate) fn keys(&self, kv_head: usize, head_dim: usize) -> &[Step<F::Stored>] {
        &self.keys[kv_head * head_dim..][..head_dim]
    }

    /// The values of one head in the sixteen dimensions from `16 * group` on: a panel of sixteen dimensions.
    #[inline(always)]
    pub(crate) fn values(&self, kv_head: usize, head_dim: usize, group: usize) -> &[Step<F::Stored>] {
        let groups = head_dim.div_ceil(LANES);
        &self.values[(kv_head * groups + group) * PAGE..][..PAGE]
    }
}

/// Rounds to f16, to nearest even.
fn rounded(values: &[f32]) -> Result<Vec<u16>, Numeric> {
    /// An f16 of this exponent is a NaN or an infinity.
    const EXPONENT: u16 = 0x7c00;
    let mut bits = vec![0; values.len()];
    bits.reinterpret_cast_mut::<half::f16>().convert_from_f32_slice(values);
    if bits.iter().any(|bits| bits & EXPONENT == EXPONENT) {
        return Err(Numeric);
    }
    Ok(bits)
}

/// The page of a position, which is in the last page or the one after.
fn page_for<F: Format>(pages: &mut Vec<Page<F>>, position: usize, kv_heads: usize, head_dim: usize) -> &mut Page<F> {
    let index = position / PAGE;
    if index == pages.len() {
        pages.push(Page::new(kv_heads, head_dim));
    }
    &mut pages[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounding differs between machines only if one of them is wrong about a tie or a neighbour of one, so those are
    /// what this test looks at.
    #[test]
    fn rounding_is_to_nearest_even_everywhere_ties_are() {
        const LARGEST: u16 = 0x7bff;
        for low in 0..LARGEST {
            let (a, b) = (F16::widen(low), F16::widen(low + 1));
            let tie = a + (b - a) / 2.0;
            let even = low + low % 2;
            for sign in [0, 0x8000] {
                let signed = |bits: u16| bits | sign;
                let value = |x: f32| if sign == 0 { x } else { -x };
                let inputs = [a, tie.next_down(), tie, tie.next_up(), b].map(value);
                let expected = [low, low, even, low + 1, low + 1].map(signed);
                assert_eq!(rounded(&inputs).unwrap(), expected, "{low:#x}");
            }
        }
        let beyond = F16::widen(LARGEST) + 16.0;
        assert_eq!(rounded(&[beyond.next_down()]).unwrap(), [LARGEST]);
        for bad in [beyond, -beyond, f32::INFINITY, f32::NAN] {
            assert_eq!(rounded(&[0.0, bad]), Err(Numeric));
        }
    }

    #[test]
    fn what_cannot_be_stored_changes_nothing() {
        for (storage, bad) in
            [(CacheStorage::F16, 65520.0), (CacheStorage::F16, f32::NAN), (CacheStorage::F32, f32::NEG_INFINITY)]
        {
            let mut cache = KvCache::with_storage(1, 2, 40, storage);
            assert_eq!(cache.bytes(), 0);
            for _ in 0..16 {
                cache.push(&[1.0, 2.0], &[3.0, 4.0]).unwrap();
            }
            let bytes = cache.bytes();
            assert_eq!(cache.push(&[1.0, bad], &[1.0, 1.0]), Err(Numeric));
            assert_eq!(cache.push(&[1.0, 1.0], &[bad, 1.0]), Err(Numeric));
            assert_eq!((cache.len(), cache.bytes()), (16, bytes));
            cache.push(&[1.0, 2.0], &[3.0, 4.0]).unwrap();
            assert_eq!((cache.len(), cache.bytes()), (17, 2 * bytes));
            cache.truncate(16);
            cache.truncate(30);
            assert_eq!((cache.len(), cache.bytes()), (16, bytes));
        }
    }
}
