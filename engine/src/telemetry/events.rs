//! What happened, for whoever wants to watch: a bounded bus that never makes its emitters wait.
//!
//! Invariants: emitting does not block and allocates nothing while nobody listens; a subscriber that does not keep up
//! loses the newest events, and every loss is counted.
//!
//! It refuses to know what events mean. Nothing may depend on an event having been delivered.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use butterfly_topology::{NodeId, StageName};
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;
use tokio::sync::mpsc;

/// The most events that wait for one subscriber.
pub const EVENTS_WAITING_MAX: usize = 4096;

/// The most subscribers at a time.
pub const SUBSCRIBERS_MAX: usize = 64;

/// Something that happened. Built with [`Event::new`] and the `with` methods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Event {
    /// What happened, in snake case.
    pub name: &'static str,
    /// Calendar time at the emitter, in milliseconds since 1970; set by the bus.
    pub unix_ms: u64,
    /// The node whom the event concerns, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    /// The stage that emitted it, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<StageName>,
    /// The request it belongs to, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// Further facts.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<&'static str, String>,
}

impl Event {
    /// An event without particulars.
    pub fn new(name: &'static str) -> Self {
        Self { name, unix_ms: 0, node: None, stage: None, request: None, details: BTreeMap::new() }
    }

    /// Names the node whom the event concerns.
    #[must_use]
    pub fn node(mut self, node: &NodeId) -> Self {
        self.node = Some(node.clone());
        self
    }

    /// Names the stage that emits the event.
    #[must_use]
    pub fn stage(mut self, stage: &StageName) -> Self {
        self.stage = Some(stage.clone());
        self
    }

    /// Names the request.
    #[must_use]
    pub fn request(mut self, request: impl ToString) -> Self {
        self.request = Some(request.to_string());
        self
    }

    /// Adds a fact.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl ToString) -> Self {
        self.details.insert(key, value.to_string());
        self
    }
}

/// The bus. One for each node, reached through [`Telemetry::events`](super::Telemetry::events).
#[derive(Debug)]
pub struct EventBus {
    clock: Arc<dyn crate::clock::Clock>,
    subscribers: Mutex<Vec<mpsc::Sender<Arc<Event>>>>,
    listening: AtomicUsize,
    dropped: Counter,
}

/// One listener on the bus. Dropping it unsubscribes.
#[derive(Debug)]
pub struct Subscriber {
    events: mpsc::Receiver<Arc<Event>>,
}

/// Why a subscription was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there are already {SUBSCRIBERS_MAX} subscribers to events")]
pub struct TooManySubscribers;

impl EventBus {
    pub(super) fn new(clock: Arc<dyn crate::clock::Clock>, dropped: Counter) -> Self {
        Self { clock, subscribers: Mutex::new(Vec::new()), listening: AtomicUsize::new(0), dropped }
    }

    /// Tells every subscriber that has room. Never waits.
    pub fn emit(&self, event: Event) {
        self.emit_with(|| event);
    }

    /// Like [`emit`](Self::emit), but builds the event only if someone listens.
    pub fn emit_with(&self, event: impl FnOnce() -> Event) {
        if self.listening.load(Ordering::Acquire) == 0 {
            return;
        }
        let event = Arc::new(Event { unix_ms: self.clock.unix_ms(), ..event() });
        let mut subscribers = self.lock();
        subscribers.retain(|subscriber| match subscriber.try_send(Arc::clone(&event)) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.dropped.inc();
                true
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        });
        self.listening.store(subscribers.len(), Ordering::Release);
    }

    /// A new listener, who hears every event emitted from now on, as long as it keeps up.
    pub fn subscribe(&self) -> Result<Subscriber, TooManySubscribers> {
        let mut subscribers = self.lock();
        subscribers.retain(|subscriber| !subscriber.is_closed());
        if subscribers.len() >= SUBSCRIBERS_MAX {
            return Err(TooManySubscribers);
        }
        let (sender, events) = mpsc::channel(EVENTS_WAITING_MAX);
        subscribers.push(sender);
        self.listening.store(subscribers.len(), Ordering::Release);
        Ok(Subscriber { events })
    }

    /// How many deliveries were given up because a subscriber was full.
    pub fn dropped(&self) -> u64 {
        self.dropped.get()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<mpsc::Sender<Arc<Event>>>> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscriber {
    /// The next event; `None` once the bus is gone. Safe to cancel.
    pub async fn recv(&mut self) -> Option<Arc<Event>> {
        self.events.recv().await
    }

    /// The next event, if one is waiting.
    pub fn try_recv(&mut self) -> Option<Arc<Event>> {
        self.events.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    #[test]
    fn a_slow_subscriber_loses_the_newest_and_each_loss_is_counted() {
        let bus = EventBus::new(Arc::new(ManualClock::new(5)), Counter::default());
        bus.emit(Event::new("unheard"));
        let mut slow = bus.subscribe().unwrap();
        for number in 0..EVENTS_WAITING_MAX + 3 {
            bus.emit(Event::new("tick").with("number", number));
        }
        assert_eq!(bus.dropped(), 3);
        let first = slow.try_recv().unwrap();
        assert_eq!((first.name, first.unix_ms, first.details["number"].as_str()), ("tick", 5, "0"));
        let heard = 1 + std::iter::from_fn(|| slow.try_recv()).count();
        assert_eq!(heard, EVENTS_WAITING_MAX);
        drop(slow);
        bus.emit(Event::new("tick"));
        assert_eq!(bus.dropped(), 3, "nobody listens, so nothing is lost");
    }

    #[test]
    fn subscribers_are_bounded_and_leaving_makes_room() {
        let bus = EventBus::new(Arc::new(ManualClock::new(0)), Counter::default());
        let mut all: Vec<_> = (0..SUBSCRIBERS_MAX).map(|_| bus.subscribe().unwrap()).collect();
        assert_eq!(bus.subscribe().unwrap_err(), TooManySubscribers);
        all.pop();
        assert!(bus.subscribe().is_ok());
    }
}
