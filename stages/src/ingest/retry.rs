//! `Idempotency-Key`: a client that asks again under the same key joins the task it has, or gets the answer that it had.
//!
//! What a key stands for is in the log, written together with the request, so that neither two retries at once nor a crash
//! make one request into two. An answer is found under its key for a day. A key is one client's; used for another request
//! it is refused. A task that ended in a way that a retry may better (no quorum, a restart, a cancellation) is run anew.
//!
//! A client that goes away is expected back for a while before its task is cancelled; without a key it is cancelled at once.
//! A stream that joins late brings what it missed at its end.
//!
//! Invariants: of two requests under one key at most one is admitted at a time; nothing here grows with the number of keys.
//!
//! It refuses to know what is asked.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use axum::http::header::HeaderName;
use axum::http::{HeaderMap, Method};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Mutex, MutexGuard};

use super::errors::Failure;
use crate::commit::RetryKey;

/// The header of the key.
const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Says that what a response brings was asked for before.
pub(super) const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// Longest key, in bytes.
const KEY_BYTES_MAX: usize = 255;
/// How long an answer is found under its key.
pub(super) const KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// How long a client that went away is expected back.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Keys that can be looked at side by side, if they do not meet.
const TURNS: usize = 256;

/// The key of one HTTP request. Where that asks for several answers, each has a number.
#[derive(Debug)]
pub(super) struct Retry {
    key: [u8; 32],
    fingerprint: OnceLock<[u8; 32]>,
    asked: AtomicU32,
    replayed: AtomicBool,
}

impl Retry {
    /// The key in the headers of a request that has one.
    ///
    /// # Errors
    /// When it cannot be a key.
    pub(super) fn read(client: &str, method: &Method, headers: &HeaderMap) -> Result<Option<Self>, Failure> {
        let mut keys = headers.get_all(KEY).iter();
        let Some(key) = keys.next().filter(|_| *method == Method::POST) else { return Ok(None) };
        let fits = !key.is_empty() && key.len() <= KEY_BYTES_MAX && key.as_bytes().iter().all(u8::is_ascii_graphic);
        if !fits || keys.next().is_some() {
            let message = format!("Idempotency-Key must be one word of 1 to {KEY_BYTES_MAX} visible ASCII characters");
            return Err(Failure::invalid_value("idempotency-key", message));
        }
        let hasher = Sha256::new_with_prefix(b"butterfly/1 retry\0");
        let hasher = hasher.chain_update((client.len() as u64).to_le_bytes()).chain_update(client);
        Ok(Some(Self {
            key: hasher.chain_update(key).finalize().into(),
            fingerprint: OnceLock::new(),
            asked: AtomicU32::new(0),
            replayed: AtomicBool::new(false),
        }))
    }

    /// Says what the key came with.
    pub(super) fn bind(&self, path: &str, body: &[u8]) {
        self.fingerprint.get_or_init(|| {
            let hasher = Sha256::new_with_prefix((path.len() as u64).to_le_bytes());
            hasher.chain_update(path).chain_update(body).finalize().into()
        });
    }

    /// The key of the next answer that this request asks for.
    #[must_use]
    pub(super) fn next(&self) -> RetryKey {
        let number = self.asked.fetch_add(1, Ordering::Relaxed);
        let key = Sha256::new_with_prefix(self.key).chain_update(number.to_le_bytes()).finalize().into();
        RetryKey { key, fingerprint: self.fingerprint.get().copied().unwrap_or_default() }
    }

    /// Notes that an answer was asked for before.
    pub(super) fn set_replayed(&self) {
        self.replayed.store(true, Ordering::Relaxed);
    }

    /// Whether any of the answers was asked for before.
    #[must_use]
    pub(super) fn is_replayed(&self) -> bool {
        self.replayed.load(Ordering::Relaxed)
    }
}

/// Lets requests under the same key in one after another.
#[derive(Debug)]
pub(super) struct Turns(Vec<Mutex<()>>);

impl Turns {
    pub(super) fn new() -> Self {
        Self((0..TURNS).map(|_| Mutex::new(())).collect())
    }

    /// Waits for the turn of a key. Safe to cancel.
    pub(super) async fn of(&self, key: &RetryKey) -> Option<MutexGuard<'_, ()>> {
        // A digest is spread evenly over its first byte, of which there are as many as turns.
        let turn = self.0.get(usize::from(key.key[0]))?;
        Some(turn.lock().await)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn key(client: &str, keys: &[&'static str]) -> Result<Option<Retry>, Failure> {
        let headers = keys.iter().map(|key| (KEY, HeaderValue::from_static(key))).collect();
        Retry::read(client, &Method::POST, &headers)
    }

    #[test]
    fn a_key_is_one_clients_and_each_answer_has_its_own() {
        let named = |client: &str| key(client, &["retry-1"]).unwrap().unwrap();
        let (alice, again, bob) = (named("alice"), named("alice"), named("bob"));
        let first = alice.next();
        assert_eq!(first, again.next());
        assert_ne!(first.key, alice.next().key);
        assert_ne!(first.key, bob.next().key);
        again.bind("/inference", b"{}");
        alice.bind("/inference", b"{ }");
        assert_ne!(again.next().fingerprint, alice.next().fingerprint);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for keys in [&[""][..], &["two words"], &["one", "two"]] {
            assert_eq!(key("", keys).unwrap_err().body.param.as_deref(), Some("idempotency-key"), "{keys:?}");
        }
        assert!(key("", &[]).unwrap().is_none());
    }
}
