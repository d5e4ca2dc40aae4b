//! Time, as the engine and the stages read it: a monotonic moment, the calendar, and waiting.
//!
//! Invariants: no other module of the workspace reads a system clock; a [`ManualClock`] moves only when told to, so a
//! test over it has no races with the wall.
//!
//! It refuses to know what is timed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use futures::future::{BoxFuture, Either, select};
use tokio::sync::{oneshot, watch};

/// A source of time. Moments are durations since an origin that is fixed for the life of the clock.
pub trait Clock: std::fmt::Debug + Send + Sync + 'static {
    /// The monotonic moment: time since the clock's origin.
    fn now(&self) -> Duration;

    /// Calendar time in milliseconds since 1970-01-01 UTC. It may jump; never subtract two of these.
    fn unix_ms(&self) -> u64;

    /// Resolves once `duration` has passed from the moment of the call. Dropping the future cancels the wait.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;
}

/// Runs `future` for at most `limit`; `None` if the limit passed first, in which case the future is dropped.
///
/// When both are ready, the future wins.
pub async fn timeout<F: Future>(clock: &dyn Clock, limit: Duration, future: F) -> Option<F::Output> {
    match select(std::pin::pin!(future), clock.sleep(limit)).await {
        Either::Left((output, _)) => Some(output),
        Either::Right(((), _)) => None,
    }
}

/// The machine's clocks. Sleeping needs a tokio runtime with its time driver.
#[derive(Debug, Clone)]
pub struct RealClock {
    origin: Instant,
}

impl RealClock {
    /// A clock whose origin is now.
    pub fn new() -> Self {
        Self { origin: Instant::now() }
    }

    /// The same, shared, as most users want it.
    pub fn shared() -> Arc<dyn Clock> {
        Arc::new(Self::new())
    }
}

impl Default for RealClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for RealClock {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn unix_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        tokio::time::sleep(duration).boxed()
    }
}

/// A clock for tests: it stands still until [`advance`](ManualClock::advance)d. Clones share the time.
#[derive(Debug, Clone)]
pub struct ManualClock {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    sleepers: watch::Sender<usize>,
}

#[derive(Debug)]
struct State {
    now: Duration,
    unix_ms_at_origin: u64,
    next_sleeper: u64,
    sleepers: BTreeMap<(Duration, u64), oneshot::Sender<()>>,
}

impl ManualClock {
    /// A clock at moment zero, whose calendar begins at `unix_ms`.
    pub fn new(unix_ms: u64) -> Self {
        let state =
            State { now: Duration::ZERO, unix_ms_at_origin: unix_ms, next_sleeper: 0, sleepers: BTreeMap::new() };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), sleepers: watch::Sender::new(0) }) }
    }

    /// Sets the calendar, as when somebody corrects the machine's clock. Moments do not change, and nobody is woken.
    pub fn correct(&self, unix_ms: u64) {
        let mut state = self.shared.lock();
        let since_origin = u64::try_from(state.now.as_millis()).unwrap_or(u64::MAX);
        state.unix_ms_at_origin = unix_ms.saturating_sub(since_origin);
    }

    /// Moves time forward and wakes every sleeper whose moment has come, earliest first.
    pub fn advance(&self, duration: Duration) {
        let mut state = self.shared.lock();
        state.now = state.now.saturating_add(duration);
        let now = state.now;
        while let Some(entry) = state.sleepers.first_entry() {
            if entry.key().0 > now {
                break;
            }
            // A sleeper that is gone does not need its wake-up.
            let _ = entry.remove().send(());
        }
        let left = state.sleepers.len();
        drop(state);
        self.shared.sleepers.send_replace(left);
    }

    /// Waits until at least `count` sleeps are pending: the condition a test waits for before it advances.
    pub async fn sleepers(&self, count: usize) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.shared.sleepers.subscribe().wait_for(|pending| *pending >= count).await;
    }

    /// How long until the next pending sleep is due, if there is one.
    pub fn until_next(&self) -> Option<Duration> {
        let state = self.shared.lock();
        state.sleepers.keys().next().map(|(due, _)| due.saturating_sub(state.now))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        self.shared.lock().now
    }

    fn unix_ms(&self) -> u64 {
        let state = self.shared.lock();
        let passed_ms = u64::try_from(state.now.as_millis()).unwrap_or(u64::MAX);
        state.unix_ms_at_origin.saturating_add(passed_ms)
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let mut state = self.shared.lock();
        let key = (state.now.saturating_add(duration), state.next_sleeper);
        if duration.is_zero() {
            return futures::future::ready(()).boxed();
        }
        state.next_sleeper += 1;
        let (wake, woken) = oneshot::channel();
        state.sleepers.insert(key, wake);
        let pending = state.sleepers.len();
        drop(state);
        self.shared.sleepers.send_replace(pending);
        let sleeper = Sleeper { shared: Arc::clone(&self.shared), key };
        async move {
            let _sleeper = sleeper;
            let _ = woken.await;
        }
        .boxed()
    }
}

/// Takes a cancelled sleep off the clock's list.
struct Sleeper {
    shared: Arc<Shared>,
    key: (Duration, u64),
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if state.sleepers.remove(&self.key).is_some() {
            let pending = state.sleepers.len();
            drop(state);
            self.shared.sleepers.send_replace(pending);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_manual_sleep_ends_exactly_when_its_moment_comes() {
        let clock = ManualClock::new(1_000);
        let mut sleep = clock.sleep(Duration::from_millis(10));
        clock.advance(Duration::from_millis(9));
        assert!(sleep.as_mut().now_or_never().is_none());
        clock.advance(Duration::from_millis(1));
        assert!(sleep.now_or_never().is_some());
        assert_eq!(clock.unix_ms(), 1_010);
    }

    #[tokio::test]
    async fn a_cancelled_sleep_leaves_nothing_behind() {
        let clock = ManualClock::new(0);
        let sleep = clock.sleep(Duration::from_secs(1));
        clock.sleepers(1).await;
        drop(sleep);
        assert_eq!(clock.until_next(), None);
    }

    #[tokio::test]
    async fn timeout_prefers_a_ready_future_and_cuts_a_pending_one() {
        let clock = ManualClock::new(0);
        assert_eq!(timeout(&clock, Duration::ZERO, async { 7 }).await, Some(7));
        let limited = timeout(&clock, Duration::from_secs(1), std::future::pending::<()>());
        let advance = async {
            clock.sleepers(1).await;
            clock.advance(Duration::from_secs(1));
        };
        assert_eq!(futures::join!(limited, advance).0, None);
    }
}
