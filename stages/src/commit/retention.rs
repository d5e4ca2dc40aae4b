//! How long finished tasks are kept: the log is bounded in age and in number.
//!
//! Invariants: nothing goes that is younger than a request can live, so that one that is sent again is known; letting go never
//! holds up an answer for longer than one bounded transaction.
//!
//! It refuses to know what is kept.

use std::time::Duration;

use butterfly_engine::stage::{StageContext, StageError};
use butterfly_topology::Topology;

use super::Window;
use crate::services::Services;
use crate::transfer::{LIFE_MS_MAX, SKEW_MS};

/// How often the log is looked through.
const EVERY: Duration = Duration::from_secs(60);
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// What the table of the commit stage says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retention {
    age_ms: u64,
    records_max: u64,
}

impl Retention {
    pub(super) fn of(topology: &Topology) -> Self {
        let commit = topology.graph.of_kind("commit").next();
        let number = |key| commit.and_then(|stage| u64::try_from(stage.config.integer(key)?).ok()).unwrap_or(u64::MAX);
        Self { age_ms: number("keep_days").saturating_mul(DAY_MS), records_max: number("keep_tasks") }
    }

    /// What stays at this time.
    pub(super) fn window(self, now_ms: u64) -> Window {
        Window {
            old_ms: now_ms.saturating_sub(self.age_ms),
            records_max: self.records_max,
            young_ms: now_ms.saturating_sub(LIFE_MS_MAX + SKEW_MS),
        }
    }
}

/// Lets the log go of what is too old or too much, for ever.
pub(super) async fn keep_within(services: &Services, context: &StageContext) -> StageError {
    let retention = Retention::of(&services.topology);
    loop {
        context.clock.sleep(EVERY).await;
        loop {
            match services.journal.prune(retention.window(context.clock.unix_ms())).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => return StageError::environment("write the log", error),
            }
        }
    }
}
