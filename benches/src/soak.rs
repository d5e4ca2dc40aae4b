//! Whether memory stays flat: many vectors, then many streams of which some are cancelled, all in this process.
//!
//! What is kept by design (plans, finished tasks, pages of the log) has limits and is full after a while; that is the
//! warm-up. What still grows afterwards is a leak.
//!
//! Invariants: the load generator itself keeps nothing of a request that is done.
//!
//! It refuses to guess: without `/proc` there is no verdict.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use butterfly_engine::clock::{Clock, RealClock};
use clap::Args;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::client::Asker;
use crate::draw::Draw;
use crate::load::Server;
use crate::target::{Own, Target};
use crate::workload::{Length, Recipe, Workload};

/// Memory is read this often while requests are sent, in parts of the whole.
const READINGS: u64 = 100;
/// How long what was cancelled may take to be gone.
const SETTLE_MAX: Duration = Duration::from_secs(30);

/// `butterfly bench soak`.
#[derive(Args, Debug, Clone)]
pub(crate) struct SoakArgs {
    /// Vectors to send.
    #[arg(long, default_value_t = 200_000)]
    requests: u64,
    /// Streams to open.
    #[arg(long, default_value_t = 2_000)]
    streams: u64,
    /// Share of the streams whose client hangs up in the middle.
    #[arg(long, default_value_t = 0.5)]
    cancel: f64,
    /// Requests under way at once.
    #[arg(long, default_value_t = 64)]
    concurrency: usize,
    /// Streams under way at once.
    #[arg(long, default_value_t = 16)]
    concurrent_streams: usize,
    /// Tokens of each stream.
    #[arg(long, default_value_t = 24)]
    output_tokens: u32,
    /// Share of a phase that is its warm-up.
    #[arg(long, default_value_t = 0.4)]
    warm_up: f64,
    /// Growth over the rest of a phase that is too much, in percent of the memory at its begin.
    #[arg(long, default_value_t = 5.0, value_name = "PERCENT")]
    growth_max: f64,
    /// Where to write soak.json.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Soak {
    phases: Vec<Phase>,
}

/// One phase.
#[derive(Debug, Clone, Serialize)]
struct Phase {
    name: &'static str,
    done: u64,
    cancelled: u64,
    failed: u64,
    first_error: Option<String>,
    seconds: f64,
    /// Tasks that the gateway still held after the last one: must be none.
    left_over: i64,
    readings: Vec<Reading>,
    /// Fitted through the readings after the warm-up.
    bytes_per_request: f64,
    growth_percent: f64,
    holds: bool,
}

/// Memory after so many requests.
#[derive(Debug, Clone, Copy, Serialize)]
struct Reading {
    done: u64,
    resident_bytes: u64,
}

/// What the workers of a phase share.
struct Shared {
    next: AtomicU64,
    done: AtomicU64,
    cancelled: AtomicU64,
    failed: AtomicU64,
    error: std::sync::OnceLock<String>,
    total: u64,
    cancel: f64,
    recipe: Arc<Recipe>,
}

impl Soak {
    pub(crate) fn holds(&self) -> bool {
        self.phases.iter().all(|phase| phase.holds)
    }
}

impl SoakArgs {
    /// Runs both phases, each on a cluster of its own.
    pub(crate) async fn run(&self) -> anyhow::Result<Soak> {
        anyhow::ensure!((0.0..=1.0).contains(&self.cancel), "--cancel is a share, from 0 to 1");
        anyhow::ensure!((0.0..0.9).contains(&self.warm_up), "--warm-up is a share, from 0 to 0.9");
        resident_bytes()?;
        let mut phases = Vec::new();
        if self.requests > 0 {
            phases.push(self.phase("vectors", Workload::Mlp, self.requests, self.concurrency, 0.0).await?);
        }
        if self.streams > 0 {
            let streams =
                self.phase("streams", Workload::Completions, self.streams, self.concurrent_streams, self.cancel);
            phases.push(streams.await?);
        }
        Ok(Soak { phases })
    }

    async fn phase(
        &self,
        name: &'static str,
        workload: Workload,
        total: u64,
        concurrency: usize,
        cancel: f64,
    ) -> anyhow::Result<Phase> {
        let model = workload.model().context("the workload has a built-in model")?;
        let target = Target::start(&Own { model: model.into(), max_byzantine: 1, slices: 1, threads: 1 }).await?;
        let recipe = Recipe {
            workload,
            model: target.model().await?,
            seed: 1,
            prompt: Length::Between(4, 24),
            output: Length::Fixed(self.output_tokens),
            token_ids: (100, 500),
            input_width: 64,
        };
        let shared = Arc::new(Shared {
            next: AtomicU64::new(0),
            done: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            error: std::sync::OnceLock::new(),
            total,
            cancel,
            recipe: Arc::new(recipe),
        });
        let clock = RealClock::shared();
        let begin = clock.now();
        let mut workers = JoinSet::new();
        for _ in 0..concurrency.max(1) {
            let asker = Asker {
                client: target.gateway().client(),
                recipe: Arc::clone(&shared.recipe),
                clock: Arc::clone(&clock),
            };
            workers.spawn(Arc::clone(&shared).work(asker));
        }
        let readings = readings(&shared, &*clock, &mut workers).await?;
        let seconds = clock.now().saturating_sub(begin).as_secs_f64();
        let left_over = left_over(&target, &*clock).await;
        target.stop().await?;
        let (bytes_per_request, growth_percent) = growth(&readings, self.warm_up);
        let failed = shared.failed.load(Ordering::Relaxed);
        let phase = Phase {
            name,
            done: shared.done.load(Ordering::Relaxed),
            cancelled: shared.cancelled.load(Ordering::Relaxed),
            failed,
            first_error: shared.error.get().cloned(),
            seconds,
            left_over,
            holds: growth_percent <= self.growth_max && left_over == 0 && failed == 0,
            bytes_per_request,
            growth_percent,
            readings,
        };
        Ok(phase)
    }
}

impl Shared {
    async fn work(self: Arc<Self>, mut asker: Asker) {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.total {
                return;
            }
            let ask = self.recipe.ask(number);
            let mut draw = Draw::new(0x736f_616b, number);
            let failure = if draw.unit() < self.cancel {
                self.cancelled.fetch_add(1, Ordering::Relaxed);
                // Some before the first token, some late.
                let tokens = draw.within(0, ask.output.saturating_sub(1));
                let body = self.recipe.body(&ask);
                match asker.client.hang_up_after(ask.kind.path(), body, tokens).await {
                    Ok(200) => None,
                    Ok(status) => Some(format!("status {status}")),
                    Err(error) => Some(format!("{error:#}")),
                }
            } else {
                asker.answer(&ask).await.fault.map(|fault| format!("{}: {}", fault.code, fault.message))
            };
            if let Some(failure) = failure {
                self.failed.fetch_add(1, Ordering::Relaxed);
                self.error.get_or_init(|| failure);
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Reads the memory whenever another part of the requests is done, until all are.
async fn readings(shared: &Shared, clock: &dyn Clock, workers: &mut JoinSet<()>) -> anyhow::Result<Vec<Reading>> {
    let part = (shared.total / READINGS).max(1);
    let mut readings = Vec::new();
    let mut due = 0;
    loop {
        let done = shared.done.load(Ordering::Relaxed);
        if done >= due || done >= shared.total {
            readings.push(Reading { done, resident_bytes: resident_bytes()? });
            due = done + part;
        }
        if done >= shared.total {
            break;
        }
        clock.sleep(Duration::from_millis(20)).await;
    }
    while let Some(worker) = workers.join_next().await {
        worker?;
    }
    Ok(readings)
}

/// How many tasks the gateway still holds, once it had the time to let go of all.
async fn left_over(target: &Target, clock: &dyn Clock) -> i64 {
    let tasks = || {
        let nodes = target.cluster().into_iter().flat_map(|cluster| &cluster.nodes);
        let metrics = nodes.map(|node| &node.services().telemetry);
        metrics.map(|telemetry| telemetry.metrics().tasks_running.get() + telemetry.metrics().tasks_waiting.get()).sum()
    };
    let begin = clock.now();
    while tasks() != 0 && clock.now().saturating_sub(begin) < SETTLE_MAX {
        clock.sleep(Duration::from_millis(50)).await;
    }
    tasks()
}

/// The slope through the readings after the warm-up, by least squares, in bytes per request; and what it comes to over
/// those requests, in percent of the memory that the line begins with.
fn growth(readings: &[Reading], warm_up: f64) -> (f64, f64) {
    let all = readings.last().map_or(0, |last| last.done) as f64;
    let steady: Vec<(f64, f64)> = readings
        .iter()
        .map(|reading| (reading.done as f64, reading.resident_bytes as f64))
        .filter(|(done, _)| *done >= all * warm_up)
        .collect();
    let count = steady.len() as f64;
    let (mean_done, mean_bytes) =
        steady.iter().fold((0.0, 0.0), |(done, bytes), at| (done + at.0 / count, bytes + at.1 / count));
    let spread: f64 = steady.iter().map(|(done, _)| (done - mean_done).powi(2)).sum();
    if spread == 0.0 {
        return (0.0, 0.0);
    }
    let slope = steady.iter().map(|(done, bytes)| (done - mean_done) * (bytes - mean_bytes)).sum::<f64>() / spread;
    let (first, last) = (steady.first().map_or(0.0, |at| at.0), steady.last().map_or(0.0, |at| at.0));
    let start = mean_bytes - slope * (mean_done - first);
    (slope, slope * (last - first) / start * 100.0)
}

/// Memory of this process that is in RAM.
fn resident_bytes() -> anyhow::Result<u64> {
    let status =
        std::fs::read_to_string("/proc/self/status").context("memory is read from /proc, which is not here")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("/proc/self/status has no VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).context("VmRSS is no number")?;
    Ok(kib * 1024)
}

impl Display for Soak {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for phase in &self.phases {
            writeln!(
                f,
                "{}: {} done in {:.0} s, {} of them cancelled, {} failed, {} left over",
                phase.name, phase.done, phase.seconds, phase.cancelled, phase.failed, phase.left_over
            )?;
            if let Some(error) = &phase.first_error {
                writeln!(f, "  first failure: {error}")?;
            }
            let step = (phase.readings.len() / 10).max(1);
            for reading in phase.readings.iter().step_by(step).chain(phase.readings.last()) {
                writeln!(f, "{:>10} requests {:>10.1} MiB", reading.done, reading.resident_bytes as f64 / 1_048_576.0)?;
            }
            writeln!(
                f,
                "  {}: {:+.1} bytes per request after the warm-up, {:+.2} % in all\n",
                if phase.holds { "flat" } else { "NOT FLAT" },
                phase.bytes_per_request,
                phase.growth_percent
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readings(bytes: impl Fn(u64) -> u64) -> Vec<Reading> {
        (0..=100).map(|part| Reading { done: part * 2000, resident_bytes: bytes(part * 2000) }).collect()
    }

    #[test]
    fn what_fills_up_is_no_leak_and_what_goes_on_is_one() {
        let fills = readings(|done| 100_000_000 + done.min(60_000) * 500);
        assert!(growth(&fills, 0.4).1.abs() < 0.1, "{:?}", growth(&fills, 0.4));
        let leaks = readings(|done| 100_000_000 + done * 64);
        let (slope, percent) = growth(&leaks, 0.4);
        assert!((slope - 64.0).abs() < 1e-6 && (percent - 7.3).abs() < 0.1, "{slope} {percent}");
    }

    #[test]
    fn noise_is_no_slope() {
        let mut draw = Draw::new(1, 1);
        let noise: Vec<u64> = (0..=100).map(|_| draw.next() % 4_000_000).collect();
        let noisy = readings(|done| 100_000_000 + noise[(done / 2000) as usize]);
        assert!(growth(&noisy, 0.4).1.abs() < 2.0, "{:?}", growth(&noisy, 0.4));
        assert_eq!(growth(&[], 0.4), (0.0, 0.0));
    }
}
