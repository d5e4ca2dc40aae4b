//! Sends requests: on schedule, whatever became of those before (open loop), or each when one before it is answered
//! (closed loop).
//!
//! Invariants: in an open loop a request's moment is fixed beforehand. When every connection is busy it leaves late, and its
//! latency still counts from its moment, so a server that stalls shows in the figures instead of slowing the load down.
//!
//! It refuses to know the protocol, and how time passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use butterfly_engine::clock::{Clock, timeout};
use tokio::task::JoinSet;

use crate::record::{Answered, ROWS_MAX, Record, Sample, Slo};
use crate::workload::{Ask, Recipe};

/// Whoever answers requests, as one connection sees it.
pub(crate) trait Server: Send + 'static {
    /// Sends a request and waits for the end of its answer. Dropping the future gives the request up.
    fn answer(&mut self, ask: &Ask) -> impl Future<Output = Answered> + Send;
}

/// When requests leave.
#[derive(Debug, Clone)]
pub(crate) enum Pace {
    /// At these moments since the begin, ascending.
    Open(Vec<Duration>),
    /// As answers come, for so long.
    Closed(Duration),
}

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) enum Asks {
    /// Drawn, from this number on.
    Drawn(Recipe, u64),
    /// As a file says, in its order.
    Listed(Vec<Ask>),
}

/// A load.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) pace: Pace,
    pub(crate) asks: Asks,
    /// Connections, and so requests under way at once.
    pub(crate) connections: usize,
    /// How long a request may take.
    pub(crate) patience: Duration,
    pub(crate) slo: Slo,
}

impl Load {
    /// Sends the load and waits for every answer. `connect` makes a connection for each worker.
    pub(crate) async fn run<S: Server>(
        self,
        clock: &Arc<dyn Clock>,
        connect: impl Fn() -> S,
    ) -> anyhow::Result<Record> {
        let slo = self.slo;
        let shared = Arc::new(Shared {
            begin: clock.now(),
            clock: Arc::clone(clock),
            next: AtomicU64::new(0),
            rows: AtomicUsize::new(0),
            load: self,
        });
        let mut workers = JoinSet::new();
        for _ in 0..shared.load.connections {
            workers.spawn(Arc::clone(&shared).work(connect()));
        }
        let mut record = Record::new(slo)?;
        while let Some(worker) = workers.join_next().await {
            record.merge(worker??)?;
        }
        record.rows.sort_by(|one, other| one.scheduled_ms.total_cmp(&other.scheduled_ms));
        Ok(record)
    }

    fn ask(&self, slot: u64) -> Option<Ask> {
        match &self.asks {
            Asks::Drawn(recipe, from) => Some(recipe.ask(from + slot)),
            Asks::Listed(asks) => asks.get(usize::try_from(slot).ok()?).copied(),
        }
    }
}

/// What the workers of a load share.
struct Shared {
    load: Load,
    clock: Arc<dyn Clock>,
    begin: Duration,
    next: AtomicU64,
    rows: AtomicUsize,
}

impl Shared {
    async fn work<S: Server>(self: Arc<Self>, mut server: S) -> anyhow::Result<Record> {
        let mut record = Record::new(self.load.slo)?;
        while let Some((ask, scheduled)) = self.next().await {
            let sent = self.now();
            let mut answered = Answered::default();
            match timeout(&*self.clock, self.load.patience, server.answer(&ask)).await {
                Some(answer) => answered = answer,
                None => answered.fails("timeout", format!("no answer within {:?}", self.load.patience)),
            }
            let scheduled = scheduled.unwrap_or(sent);
            let is_kept = self.rows.fetch_add(1, Ordering::Relaxed) < ROWS_MAX;
            let sample = Sample { ask, scheduled, sent, done: self.now(), answered: self.relative(answered) };
            record.count(sample, if is_kept { ROWS_MAX } else { 0 });
        }
        Ok(record)
    }

    /// The next request, once its moment has come. In a closed loop it has no moment but now.
    async fn next(&self) -> Option<(Ask, Option<Duration>)> {
        let slot = self.next.fetch_add(1, Ordering::Relaxed);
        match &self.load.pace {
            Pace::Open(moments) => {
                let moment = *moments.get(usize::try_from(slot).ok()?)?;
                let ask = self.load.ask(slot)?;
                let wait = moment.saturating_sub(self.now());
                if !wait.is_zero() {
                    self.clock.sleep(wait).await;
                }
                Some((ask, Some(moment)))
            }
            Pace::Closed(duration) if self.now() < *duration => Some((self.load.ask(slot)?, None)),
            Pace::Closed(_) => None,
        }
    }

    /// Moments of a server are the clock's; those of a record count from the begin.
    fn relative(&self, mut answered: Answered) -> Answered {
        for piece in &mut answered.pieces {
            piece.at = piece.at.saturating_sub(self.begin);
        }
        answered
    }

    fn now(&self) -> Duration {
        self.clock.now().saturating_sub(self.begin)
    }
}

#[cfg(test)]
mod tests;
