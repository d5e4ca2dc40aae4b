//! Taps: samples of the items that pass an edge, for whoever looks for a moment.
//!
//! Invariants: while nobody taps an edge an item costs one atomic read; a tap sees at most as many items as it asked for, and
//! at most one in each interval; one that does not keep up misses items, and is told how many. Nothing waits for a tap.
//!
//! It refuses to know what items show of themselves: that is the item's word, as JSON.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;

use super::graph::EdgeLabel;

/// The most taps of one edge at a time.
pub const TAPS_MAX: usize = 8;
/// The most items that wait for one tap.
const WAITING_MAX: usize = 256;

/// What a tap asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TapRequest {
    /// Items in all.
    pub limit: usize,
    /// At most one item in so long.
    pub interval: Duration,
    /// Whether items show what is in them, or only what it is about.
    pub payload: bool,
}

/// An item that passed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tapped {
    /// The edge, as `from -> to`.
    pub edge: String,
    /// Calendar time at the node, in milliseconds since 1970.
    pub unix_ms: u64,
    /// What the item weighs.
    pub bytes: usize,
    /// Items before this one that there was no room for.
    pub missed: u64,
    /// What it shows.
    pub item: Value,
}

/// The taps of one edge.
#[derive(Debug, Default)]
pub(crate) struct Taps {
    listening: AtomicUsize,
    taps: Mutex<Vec<Tap>>,
}

#[derive(Debug)]
struct Tap {
    request: TapRequest,
    sender: mpsc::Sender<Tapped>,
    /// Items that may still be shown, over all edges that the tap is on.
    left: Arc<AtomicUsize>,
    next: Duration,
    missed: u64,
}

/// A tap on one or more edges. Dropping it takes it off.
#[derive(Debug)]
pub struct TapStream {
    items: mpsc::Receiver<Tapped>,
    left: usize,
}

/// Why there is no tap.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TapError {
    /// No edge of this node begins or ends at the stage.
    #[error("no stage {0:?} of this node has an edge")]
    NoEdge(String),
    /// Others are there already.
    #[error("there are already {TAPS_MAX} taps")]
    TooMany,
}

impl TapStream {
    /// Puts a tap on these edges.
    pub(super) fn on<'a>(taps: impl Iterator<Item = &'a Taps>, request: TapRequest) -> Result<Self, TapError> {
        let (sender, items) = mpsc::channel(WAITING_MAX);
        let left = Arc::new(AtomicUsize::new(request.limit));
        for edge in taps {
            let mut open = edge.lock();
            open.retain(|tap| !tap.sender.is_closed());
            if open.len() >= TAPS_MAX {
                return Err(TapError::TooMany);
            }
            let left = Arc::clone(&left);
            open.push(Tap { request, sender: sender.clone(), left, next: Duration::ZERO, missed: 0 });
            edge.listening.store(open.len(), Ordering::Release);
        }
        Ok(Self { items, left: request.limit })
    }

    /// The next item; `None` when as many as were asked for have passed. Safe to cancel.
    pub async fn recv(&mut self) -> Option<Tapped> {
        // An edge on which nothing passes any more does not notice that the others have had enough.
        self.left = self.left.checked_sub(1)?;
        self.items.recv().await
    }
}

impl Taps {
    /// Whether anybody looks.
    pub(crate) fn is_open(&self) -> bool {
        self.listening.load(Ordering::Relaxed) > 0
    }

    /// Shows an item to every tap whose turn it is. `show` makes what is shown, with or without the payload.
    pub(crate) fn show(
        &self,
        label: &EdgeLabel,
        (now, unix_ms): (Duration, u64),
        bytes: usize,
        show: impl Fn(bool) -> Value,
    ) {
        let mut taps = self.lock();
        taps.retain_mut(|tap| {
            let left = tap.left.load(Ordering::Relaxed);
            if left == 0 || tap.sender.is_closed() {
                return false;
            }
            if now < tap.next {
                return true;
            }
            tap.next = now.saturating_add(tap.request.interval);
            let Ok(room) = tap.sender.try_reserve() else {
                tap.missed = tap.missed.saturating_add(1);
                return true;
            };
            let item = show(tap.request.payload);
            room.send(Tapped { edge: label.to_string(), unix_ms, bytes, missed: tap.missed, item });
            // Another edge may have shown the last one just now; the stream takes no more than were asked for.
            tap.left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                .is_ok_and(|left| left > 1)
        });
        self.listening.store(taps.len(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Tap>> {
        self.taps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label() -> EdgeLabel {
        EdgeLabel::new("a.out", "b.in")
    }

    #[tokio::test]
    async fn a_tap_sees_as_many_items_as_it_asked_for_and_no_more_often() {
        let taps = Taps::default();
        assert!(!taps.is_open());
        let request = TapRequest { limit: 2, interval: Duration::from_secs(1), payload: false };
        let mut stream = TapStream::on([&taps].into_iter(), request).unwrap();
        assert!(taps.is_open());
        for second in [0.0, 0.5, 1.0, 2.0, 3.0] {
            let now = (Duration::from_secs_f64(second), 7);
            taps.show(&label(), now, 8, |payload| serde_json::json!({ "at": second, "payload": payload }));
        }
        assert!(!taps.is_open(), "it has had all it wanted");
        let seen: Vec<f64> = [stream.recv().await, stream.recv().await]
            .into_iter()
            .map(|tapped| tapped.unwrap().item["at"].as_f64().unwrap())
            .collect();
        assert_eq!(seen, [0.0, 1.0]);
        assert!(stream.recv().await.is_none());
    }

    #[test]
    fn taps_are_bounded_and_leave_when_they_are_dropped() {
        let taps = Taps::default();
        let request = TapRequest { limit: usize::MAX, interval: Duration::ZERO, payload: false };
        let open: Vec<_> = (0..TAPS_MAX).map(|_| TapStream::on([&taps].into_iter(), request).unwrap()).collect();
        assert_eq!(TapStream::on([&taps].into_iter(), request).unwrap_err(), TapError::TooMany);
        for _ in 0..WAITING_MAX + 5 {
            taps.show(&label(), (Duration::ZERO, 0), 1, |_| Value::Null);
        }
        drop(open);
        taps.show(&label(), (Duration::ZERO, 0), 1, |_| Value::Null);
        assert!(!taps.is_open());
        assert!(TapStream::on([&taps].into_iter(), request).is_ok());
    }
}
