//! How a node stops: begin, complete, force.
//!
//! The phases only go forward: *running*, *draining* (sources take no new work, what is in flight goes on), *completing*
//! (every stage ends its loop), *forced* (what still runs is aborted). A stage with work in flight takes a
//! [`DrainHold`]; completing begins when no hold is left, or when the drain deadline passes.
//!
//! Invariants: a phase, once entered, is never left backwards; a hold is released by dropping it, so no path of a stage
//! can forget to.
//!
//! It refuses to know deadlines and tasks: [`running`](crate::running) drives the phases.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Where a node is between running and stopped. The order is the order of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Work is accepted and done.
    Running,
    /// Sources accept no new work; work in flight goes on.
    Draining,
    /// Every stage ends its loop, whatever it still holds.
    Completing,
    /// What still runs is aborted.
    Forced,
}

/// What a stage sees of the shutdown. Clones share one shutdown.
#[derive(Debug, Clone)]
pub struct Shutdown {
    shared: Arc<Shared>,
}

/// What drives the shutdown: whoever runs the node. Clones share one shutdown.
#[derive(Debug, Clone)]
pub struct ShutdownController {
    shared: Arc<Shared>,
}

/// Keeps the node draining until dropped. Taken for work that must be finished before stages end.
#[derive(Debug)]
#[must_use = "a hold is released when it is dropped"]
pub struct DrainHold {
    shared: Arc<Shared>,
    id: u64,
}

#[derive(Debug)]
struct Shared {
    phase: watch::Sender<Phase>,
    holds: Mutex<Holds>,
    held: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Holds {
    next: u64,
    reasons: BTreeMap<u64, &'static str>,
}

impl Shutdown {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.shared.phase.borrow()
    }

    /// Whether new work may be taken.
    pub fn is_running(&self) -> bool {
        self.phase() == Phase::Running
    }

    /// Resolves when draining has begun (or a later phase). Safe to cancel.
    pub async fn draining(&self) {
        self.shared.reached(Phase::Draining).await;
    }

    /// Resolves when stages must end their loops. Safe to cancel.
    pub async fn completing(&self) {
        self.shared.reached(Phase::Completing).await;
    }

    /// Keeps the node in the draining phase while the hold lives. `why` is reported when the deadline cuts it short.
    ///
    /// A hold taken after completing has begun delays nothing.
    pub fn hold(&self, why: &'static str) -> DrainHold {
        let mut holds = self.shared.lock();
        let id = holds.next;
        holds.next += 1;
        holds.reasons.insert(id, why);
        let held = holds.reasons.len();
        // Sent under the lock, so that counts cannot overtake each other.
        self.shared.held.send_replace(held);
        drop(holds);
        DrainHold { shared: Arc::clone(&self.shared), id }
    }
}

impl ShutdownController {
    /// A shutdown in phase running.
    pub fn new() -> Self {
        let shared = Shared {
            phase: watch::Sender::new(Phase::Running),
            holds: Mutex::new(Holds::default()),
            held: watch::Sender::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The stages' view of this shutdown.
    pub fn shutdown(&self) -> Shutdown {
        Shutdown { shared: Arc::clone(&self.shared) }
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.shared.phase.borrow()
    }

    /// Begins draining. No effect in a later phase.
    pub fn begin(&self) {
        self.advance(Phase::Draining);
    }

    /// Tells every stage to end. No effect in a later phase.
    pub fn complete(&self) {
        self.advance(Phase::Completing);
    }

    /// Has what still runs aborted.
    pub fn force(&self) {
        self.advance(Phase::Forced);
    }

    /// Resolves when `phase` or a later one has been entered. Safe to cancel.
    pub async fn reached(&self, phase: Phase) {
        self.shared.reached(phase).await;
    }

    /// Resolves when no hold is left. Safe to cancel.
    pub async fn released(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.shared.held.subscribe().wait_for(|held| *held == 0).await;
    }

    /// Why the node is still held: each reason with the number of its holds.
    pub fn holds(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for why in self.shared.lock().reasons.values() {
            *counts.entry(*why).or_default() += 1;
        }
        counts
    }

    fn advance(&self, to: Phase) {
        self.shared.phase.send_if_modified(|phase| {
            let forward = *phase < to;
            if forward {
                *phase = to;
            }
            forward
        });
    }
}

impl Default for ShutdownController {
    fn default() -> Self {
        Self::new()
    }
}

impl Shared {
    async fn reached(&self, phase: Phase) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.phase.subscribe().wait_for(|now| *now >= phase).await;
    }

    fn lock(&self) -> MutexGuard<'_, Holds> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for DrainHold {
    fn drop(&mut self) {
        let mut holds = self.shared.lock();
        holds.reasons.remove(&self.id);
        let held = holds.reasons.len();
        self.shared.held.send_replace(held);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn phases_only_go_forward() {
        let controller = ShutdownController::new();
        let shutdown = controller.shutdown();
        assert!(shutdown.is_running());
        controller.complete();
        controller.begin();
        assert_eq!(shutdown.phase(), Phase::Completing);
        assert!(shutdown.draining().now_or_never().is_some(), "a later phase includes the earlier ones");
        controller.force();
        assert_eq!(controller.phase(), Phase::Forced);
    }

    #[test]
    fn released_waits_for_every_hold_and_names_those_left() {
        let controller = ShutdownController::new();
        let shutdown = controller.shutdown();
        let first = shutdown.hold("request in flight");
        let second = shutdown.hold("request in flight");
        let third = shutdown.hold("receipt not yet written");
        drop(first);
        assert_eq!(controller.holds(), BTreeMap::from([("receipt not yet written", 1), ("request in flight", 1)]));
        assert!(controller.released().now_or_never().is_none());
        drop((second, third));
        assert!(controller.released().now_or_never().is_some());
    }
}
