//! What a stage does with its time: busy, starved, blocked, or verifying, exclusively, and its service times.
//!
//! Channels record *starved* (a receive that waits) and *blocked* (a send that waits) by themselves; a stage marks work of
//! its own with guards. At any moment several marks may be set, since a stage may run several tasks; the state is then the
//! first of this order: verifying, busy (marked), blocked, starved. A stage without any mark is busy: it is between a
//! receive and a send. So hold the guards of [`StageStates::busy`] and [`StageStates::verifying`] over work only, never
//! over a send or a receive.
//!
//! *Service* is counted in batches: a batch opens when a waiting receive ([`recv`](crate::channel::Receiver::recv),
//! [`recv_many`](crate::channel::Receiver::recv_many)) returns items, is joined by items from
//! [`try_recv`](crate::channel::Receiver::try_recv), and closes at the next waiting receive or at
//! [`StageStates::served`]. Its time, without what was starved or blocked, is shared evenly by its items.
//!
//! Invariants: between [`begin`](StageStates::begin) and [`end`](StageStates::end) the four times add up to the time that
//! passed.
//!
//! It refuses to know what the stage does.

use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use super::timing::Timing;
use crate::clock::Clock;

/// What a stage does at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StageState {
    /// Doing its work.
    Busy,
    /// Waiting for input.
    Starved,
    /// Waiting for room in an output.
    Blocked,
    /// Checking the work of others.
    Verifying,
}

impl StageState {
    /// All states, in the order in which they are reported.
    pub const ALL: [Self; 4] = [Self::Busy, Self::Starved, Self::Blocked, Self::Verifying];

    /// The name used in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Starved => "starved",
            Self::Blocked => "blocked",
            Self::Verifying => "verifying",
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Busy => 0,
            Self::Starved => 1,
            Self::Blocked => 2,
            Self::Verifying => 3,
        }
    }
}

/// Time spent in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StateTimes([Duration; 4]);

impl StateTimes {
    /// Time in one state.
    pub fn of(&self, state: StageState) -> Duration {
        self.0[state.index()]
    }

    /// Time in all states.
    pub fn total(&self) -> Duration {
        self.0.iter().sum()
    }

    fn worked(&self) -> Duration {
        self.of(StageState::Busy) + self.of(StageState::Verifying)
    }
}

/// The account of one stage. Clones share it.
#[derive(Debug, Clone)]
pub struct StageStates {
    account: Arc<Account>,
}

#[derive(Debug)]
struct Account {
    clock: Arc<dyn Clock>,
    service: Timing,
    ledger: Mutex<Ledger>,
}

#[derive(Debug, Default)]
struct Ledger {
    /// The moment up to which the times are settled; `None` while the stage does not run.
    settled: Option<Duration>,
    times: StateTimes,
    marks: [u32; 4],
    items: u64,
    batch: Option<Batch>,
}

#[derive(Debug, Clone, Copy)]
struct Batch {
    items: u64,
    worked_before: Duration,
}

/// Marks a state until dropped.
#[derive(Debug)]
#[must_use = "the state lasts until the guard is dropped"]
pub struct StateGuard {
    account: Arc<Account>,
    state: StageState,
}

impl StageStates {
    /// An account that belongs to no telemetry, for channels of tests and examples.
    pub fn detached(clock: Arc<dyn Clock>) -> Self {
        Self { account: Arc::new(Account { clock, service: Timing::new(), ledger: Mutex::default() }) }
    }

    /// Marks work of this stage. Needed only where the stage works while it also waits, say in a thread of its own.
    pub fn busy(&self) -> StateGuard {
        self.mark(StageState::Busy)
    }

    /// Marks checking the work of others.
    pub fn verifying(&self) -> StateGuard {
        self.mark(StageState::Verifying)
    }

    /// Marks waiting for input that does not come from a channel of the graph.
    pub fn starved(&self) -> StateGuard {
        self.mark(StageState::Starved)
    }

    /// Marks waiting for room that is not in a channel of the graph.
    pub fn blocked(&self) -> StateGuard {
        self.mark(StageState::Blocked)
    }

    /// Runs `future`, starved while it is pending. As safe to cancel as `future` is.
    pub async fn while_starved<F: Future>(&self, future: F) -> F::Output {
        self.while_pending(StageState::Starved, future).await
    }

    /// Runs `future`, blocked while it is pending. As safe to cancel as `future` is.
    pub async fn while_blocked<F: Future>(&self, future: F) -> F::Output {
        self.while_pending(StageState::Blocked, future).await
    }

    /// Closes the open batch, if any: what was taken is served. For stages that poll with `try_recv` and seldom wait.
    pub fn served(&self) {
        let mut ledger = self.account.lock();
        if ledger.batch.is_some() {
            ledger.settle(self.account.clock.now());
            self.account.close(&mut ledger);
        }
    }

    /// The stage begins to run: its time counts from now.
    pub fn begin(&self) {
        let mut ledger = self.account.lock();
        if ledger.settled.is_none() {
            ledger.settled = Some(self.account.clock.now());
        }
    }

    /// The stage ends: its time no longer counts.
    pub fn end(&self) {
        let mut ledger = self.account.lock();
        ledger.settle(self.account.clock.now());
        self.account.close(&mut ledger);
        ledger.settled = None;
    }

    /// Time in each state up to now.
    pub fn times(&self) -> StateTimes {
        let mut ledger = self.account.lock();
        ledger.settle(self.account.clock.now());
        ledger.times
    }

    /// The state now.
    pub fn state(&self) -> StageState {
        self.account.lock().state()
    }

    /// How many items the stage has taken from its inputs.
    pub fn items(&self) -> u64 {
        self.account.lock().items
    }

    /// Service time for each item.
    pub fn service(&self) -> &Timing {
        &self.account.service
    }

    /// The clock of the account.
    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.account.clock
    }

    /// A waiting receive returned `items` items: closes the batch before, opens the next. Returns the moment.
    pub(crate) fn took(&self, items: u64) -> Duration {
        let now = self.account.clock.now();
        let mut ledger = self.account.lock();
        ledger.settle(now);
        self.account.close(&mut ledger);
        ledger.items += items;
        ledger.batch = Some(Batch { items, worked_before: ledger.times.worked() });
        now
    }

    /// A receive that does not wait returned an item: it joins the open batch, or opens one. Returns the moment.
    pub(crate) fn took_also(&self) -> Duration {
        let now = self.account.clock.now();
        let mut ledger = self.account.lock();
        ledger.items += 1;
        if let Some(batch) = &mut ledger.batch {
            batch.items += 1;
        } else {
            ledger.settle(now);
            ledger.batch = Some(Batch { items: 1, worked_before: ledger.times.worked() });
        }
        now
    }

    fn mark(&self, state: StageState) -> StateGuard {
        self.account.change(|marks| marks[state.index()] += 1);
        StateGuard { account: Arc::clone(&self.account), state }
    }

    async fn while_pending<F: Future>(&self, state: StageState, future: F) -> F::Output {
        let mut future = pin!(future);
        let mut guard = None;
        std::future::poll_fn(|context| match future.as_mut().poll(context) {
            Poll::Ready(output) => {
                guard = None;
                Poll::Ready(output)
            }
            Poll::Pending => {
                guard.get_or_insert_with(|| self.mark(state));
                Poll::Pending
            }
        })
        .await
    }
}

impl Drop for StateGuard {
    fn drop(&mut self) {
        self.account.change(|marks| marks[self.state.index()] -= 1);
    }
}

impl Account {
    /// Changes the marks at this moment.
    fn change(&self, change: impl FnOnce(&mut [u32; 4])) {
        let mut ledger = self.lock();
        ledger.settle(self.clock.now());
        change(&mut ledger.marks);
    }

    /// Closes the open batch. The ledger must be settled.
    fn close(&self, ledger: &mut Ledger) {
        let Some(batch) = ledger.batch.take() else { return };
        let worked = ledger.times.worked().saturating_sub(batch.worked_before);
        let each = worked / u32::try_from(batch.items).unwrap_or(u32::MAX).max(1);
        self.service.record_many(each, batch.items);
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    fn state(&self) -> StageState {
        const BY_RANK: [StageState; 4] =
            [StageState::Verifying, StageState::Busy, StageState::Blocked, StageState::Starved];
        let marked = BY_RANK.into_iter().find(|state| self.marks[state.index()] > 0);
        marked.unwrap_or(StageState::Busy)
    }

    fn settle(&mut self, now: Duration) {
        let Some(settled) = self.settled else { return };
        let state = self.state();
        self.times.0[state.index()] += now.saturating_sub(settled);
        self.settled = Some(now.max(settled));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    fn account() -> (ManualClock, StageStates) {
        let clock = ManualClock::new(0);
        (clock.clone(), StageStates::detached(Arc::new(clock)))
    }

    fn ms(duration: Duration) -> u128 {
        duration.as_millis()
    }

    #[test]
    fn states_are_exclusive_and_add_up() {
        let (clock, states) = account();
        let step = || clock.advance(Duration::from_millis(1));
        step();
        states.begin();
        step();
        let starved = states.starved();
        step();
        let blocked = states.blocked();
        step();
        let verifying = states.verifying();
        step();
        drop(starved);
        step();
        drop(verifying);
        step();
        let busy = states.busy();
        step();
        drop((busy, blocked));
        step();
        states.end();
        step();
        let times = states.times();
        assert_eq!(StageState::ALL.map(|state| ms(times.of(state))), [3, 1, 2, 2]);
        assert_eq!(ms(times.total()), 8, "time before the begin and after the end does not count");
    }

    #[test]
    fn service_excludes_waiting_and_is_shared_by_the_batch() {
        let (clock, states) = account();
        states.begin();
        states.took(2);
        clock.advance(Duration::from_millis(10));
        let blocked = states.blocked();
        clock.advance(Duration::from_millis(50));
        drop(blocked);
        states.took_also();
        states.took_also();
        clock.advance(Duration::from_millis(10));
        states.served();
        clock.advance(Duration::from_millis(500));
        states.served();
        let service = states.service().quantiles();
        assert_eq!((service.count, states.items()), (4, 4));
        assert!((service.mean - 0.005).abs() < 1e-9);
    }

    #[test]
    fn a_cancelled_wait_ends_its_state() {
        use futures::FutureExt;
        let (clock, states) = account();
        states.begin();
        let mut waiting = Box::pin(states.while_blocked(std::future::pending::<()>()));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert_eq!(states.state(), StageState::Blocked);
        clock.advance(Duration::from_millis(3));
        drop(waiting);
        assert_eq!(states.state(), StageState::Busy);
        clock.advance(Duration::from_millis(4));
        assert_eq!(StageState::ALL.map(|state| ms(states.times().of(state))), [4, 0, 3, 0]);
        assert_eq!(states.while_starved(async { 1 }).now_or_never(), Some(1));
        assert_eq!(ms(states.times().of(StageState::Starved)), 0, "what is ready does not wait");
    }
}
