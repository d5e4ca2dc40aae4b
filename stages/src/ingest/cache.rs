//! The result cache: a repeat of a request that can have one answer only is given the answer it had.
//!
//! A request can have one answer only when nothing in it is left to chance: a vector, greedy decoding, or a seed of the
//! client's. Whatever else the answer may depend on is in the key, the client too; its time and its nonce are not. A client
//! that sends a nonce of its own wants an answer of its own.
//!
//! Invariants: what is kept is bounded in bytes; an answer is kept with the receipt that proves it, and says that it is kept.
//!
//! It refuses to know routes.

use std::sync::Arc;

use butterfly_engine::telemetry::HitRatio;
use butterfly_verify::{Answer, Digest, Request, RequestParts};
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::board::Completed;
use crate::items::answer_bytes;

/// What an entry weighs besides its answer and its prompt: the receipt above all.
const ENTRY_BYTES: u64 = 4096;

/// The cache of a gateway; one without room keeps nothing.
#[derive(Debug)]
pub(super) struct ResultCache {
    kept: Option<Cache<Digest, Arc<Completed>, ByBytes>>,
    ratio: HitRatio,
}

#[derive(Debug, Clone)]
struct ByBytes;

impl Weighter<Digest, Arc<Completed>> for ByBytes {
    fn weight(&self, _: &Digest, completed: &Arc<Completed>) -> u64 {
        let prompt = completed.request.input.tokens().map_or(0, size_of_val);
        ENTRY_BYTES + (answer_bytes(&completed.answer) + 2 * prompt) as u64
    }
}

impl ResultCache {
    /// A cache of so many bytes.
    #[must_use]
    pub(super) fn new(bytes_max: u64, ratio: HitRatio) -> Self {
        let items = usize::try_from(bytes_max / (2 * ENTRY_BYTES)).unwrap_or(usize::MAX).max(1);
        let kept = (bytes_max > 0).then(|| Cache::with_weighter(items, bytes_max, ByBytes));
        Self { kept, ratio }
    }

    /// The name under which the answer to a request is kept; `None` when nothing is kept.
    #[must_use]
    pub(super) fn key(&self, request: &Request) -> Option<Digest> {
        self.kept.as_ref()?;
        let mut parts = RequestParts { nonce: [0; 32], now_ms: 0, expires_ms: 0, ..RequestParts::clone(request) };
        if parts.params.temperature == 0.0 {
            parts.params.seed = [0; 32];
        }
        Request::new(parts).ok().map(|request| request.digest())
    }

    /// The answer that is kept.
    #[must_use]
    pub(super) fn get(&self, key: &Digest) -> Option<Arc<Completed>> {
        let found = self.kept.as_ref()?.get(key);
        match &found {
            Some(_) => self.ratio.hit(),
            None => self.ratio.miss(),
        }
        found
    }

    /// Keeps an answer, if it is one.
    pub(super) fn keep(&self, key: Digest, completed: &Completed) {
        let Some(kept) = &self.kept else { return };
        if !matches!(completed.answer, Answer::Numeric { .. }) {
            kept.insert(key, Arc::new(Completed { cached: true, ..completed.clone() }));
        }
    }
}

#[cfg(test)]
mod tests {
    use butterfly_verify::Params;

    use super::*;
    use crate::ingest::fixture::{completed, request};

    #[test]
    fn only_what_cannot_change_the_answer_is_left_out_of_the_name() {
        let cache = ResultCache::new(1 << 20, HitRatio::default());
        let key = |request: &Request| cache.key(request).unwrap();
        let one = request(1, "alice");
        assert_eq!(key(&one), key(&request(2, "alice")), "another nonce");
        assert_ne!(key(&one), key(&request(1, "bob")), "another client");
        let with = |params: Params| key(&Request::new(RequestParts { params, ..RequestParts::clone(&one) }).unwrap());
        let params = one.params.clone();
        assert_eq!(with(Params { seed: [9; 32], ..params.clone() }), key(&one), "a greedy answer has no seed");
        let warm = Params { temperature: 1.0, ..params.clone() };
        assert_ne!(with(Params { seed: [9; 32], ..warm.clone() }), with(warm));
        assert_ne!(with(Params { max_tokens: 9, ..params }), key(&one));
    }

    #[test]
    fn what_is_kept_is_bounded_in_bytes_and_says_that_it_is_kept() {
        let ratio = HitRatio::default();
        let cache = ResultCache::new(20 * ENTRY_BYTES, ratio.clone());
        for number in 0..100 {
            let mut parts = RequestParts::clone(&request(1, "alice"));
            parts.params.max_tokens = number + 1;
            let request = Request::new(parts).unwrap();
            cache.keep(cache.key(&request).unwrap(), &completed(&request).unwrap());
        }
        let kept = cache.kept.as_ref().unwrap();
        assert!(!kept.is_empty() && kept.weight() <= 20 * ENTRY_BYTES, "{} in {}", kept.len(), kept.weight());
        let request = request(1, "alice");
        let key = cache.key(&request).unwrap();
        cache.keep(key, &completed(&request).unwrap());
        assert!(cache.get(&key).unwrap().cached);
        assert!(cache.get(&Digest::default()).is_none());
        assert!((ratio.ratio() - 0.5).abs() < f64::EPSILON);
        assert!(ResultCache::new(0, ratio).key(&request).is_none(), "switched off");
    }
}
