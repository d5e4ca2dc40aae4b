//! Finds how much a cluster takes: raises the rate until it no longer keeps up, then halves the gap between the last rate
//! that it kept up with and the first that it did not.
//!
//! It refuses to know how a rate is tried.

use std::fmt::{self, Display, Formatter};
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::html;
use crate::report::{Report, csv};

/// Answers per request sent, and requests sent per request due, below which a cluster does not keep up.
const KEPT_UP_MIN: f64 = 0.95;
/// With objectives, the share of requests that must meet them.
const GOOD_MIN: f64 = 0.95;
/// Requests that may fail.
const FAILED_MAX: f64 = 0.01;
/// Rates that are tried while rising, at most.
const RISES_MAX: u32 = 24;

/// How rates are chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Search {
    pub(crate) from: f64,
    /// Each step's rate over the one before; more than 1.
    pub(crate) factor: f64,
    /// How often the gap is halved.
    pub(crate) halvings: u32,
}

/// One rate that was tried.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Step {
    pub(crate) keeps_up: bool,
    pub(crate) report: Report,
}

/// What a search found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Sweep {
    pub(crate) schema: String,
    /// The highest rate that was kept up with; `None` if not even the first was.
    pub(crate) knee: Option<f64>,
    /// The lowest that was not; `None` if every rate was kept up with.
    pub(crate) saturated: Option<f64>,
    /// In the order they were tried.
    pub(crate) steps: Vec<Step>,
}

impl Search {
    /// Tries rates with `attempt`.
    pub(crate) async fn run<F>(&self, mut attempt: impl FnMut(f64) -> F) -> anyhow::Result<Sweep>
    where
        F: Future<Output = anyhow::Result<Report>>,
    {
        let mut sweep =
            Sweep { schema: "butterfly-bench-sweep/1".into(), knee: None, saturated: None, steps: Vec::new() };
        let mut rate = self.from;
        for _ in 0..RISES_MAX {
            if !sweep.add(rate, attempt(rate).await?) {
                break;
            }
            rate *= self.factor;
        }
        if let (Some(mut low), Some(mut high)) = (sweep.knee, sweep.saturated) {
            for _ in 0..self.halvings {
                let middle = f64::midpoint(low, high);
                let keeps_up = sweep.add(middle, attempt(middle).await?);
                *(if keeps_up { &mut low } else { &mut high }) = middle;
            }
        }
        Ok(sweep)
    }
}

impl Sweep {
    /// Adds a step; returns whether the cluster kept up.
    fn add(&mut self, rate: f64, report: Report) -> bool {
        let keeps_up = keeps_up(&report);
        if keeps_up {
            self.knee = Some(self.knee.map_or(rate, |knee| knee.max(rate)));
        } else {
            self.saturated = Some(self.saturated.map_or(rate, |saturated| saturated.min(rate)));
        }
        self.steps.push(Step { keeps_up, report });
        keeps_up
    }

    /// The report of the knee.
    pub(crate) fn knee_report(&self) -> Option<&Report> {
        let knee = self.steps.iter().filter(|step| step.keeps_up);
        let rate = |step: &&Step| step.report.target_rate.unwrap_or(0.0);
        knee.max_by(|one, other| rate(one).total_cmp(&rate(other))).map(|step| &step.report)
    }

    /// What was found, in a sentence.
    pub(crate) fn verdict(&self) -> String {
        let limit = self.steps.iter().rev().filter(|step| !step.keeps_up);
        let limit = limit.filter_map(|step| step.report.bottleneck.as_ref()).find(|bottleneck| bottleneck.is_limit);
        let limit = limit.map_or_else(String::new, |bottleneck| format!(" Above it, {}", bottleneck.sentence));
        match (self.knee, self.saturated) {
            (Some(knee), Some(saturated)) => {
                format!("It keeps up with {knee:.1} requests per second, and no longer with {saturated:.1}.{limit}")
            }
            (Some(knee), None) => format!("It kept up with every rate that was tried, up to {knee:.1} per second."),
            (None, Some(first)) => {
                format!("It does not keep up with {first:.1} per second, the first rate tried.{limit}")
            }
            (None, None) => "Nothing was tried.".into(),
        }
    }

    /// Writes report.json, report.csv and report.html.
    pub(crate) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let reports: Vec<Report> = self.steps.iter().map(|step| step.report.clone()).collect();
        std::fs::write(folder.join("report.json"), serde_json::to_string_pretty(self)?)?;
        std::fs::write(folder.join("report.csv"), csv(&reports))?;
        std::fs::write(folder.join("report.html"), html::sweep(self))?;
        Ok(())
    }
}

/// Whether a cluster kept up with a load: it answered as fast as requests came, failed hardly any, and met the objectives if
/// there are some.
fn keeps_up(report: &Report) -> bool {
    let target = report.target_rate.unwrap_or(report.sent_rate);
    let failed = report.failed() as f64 / report.sent.max(1) as f64;
    report.ok > 0
        && failed <= FAILED_MAX
        && report.sent_rate >= target * KEPT_UP_MIN
        && report.done_rate >= report.sent_rate.min(target) * KEPT_UP_MIN
        && report.goodput.is_none_or(|goodput| goodput.share >= GOOD_MIN)
}

impl Display for Sweep {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:>10}{:>10}{:>10}{:>10}{:>9}{:>12}{:>12}{:>12}  kept up",
            "target /s", "sent", "done", "goodput", "failed", "e2e p50 ms", "e2e p99 ms", "ttft p99 ms"
        )?;
        for step in &self.steps {
            let report = &step.report;
            let quantile = |name: &str, of: fn(&crate::report::Quantiles) -> f64| {
                report.latency_ms.get(name).map_or_else(|| "-".into(), |q| format!("{:.2}", of(q)))
            };
            let goodput = report.goodput.map_or_else(|| "-".into(), |goodput| format!("{:.1}", goodput.rate));
            writeln!(
                f,
                "{:>10.1}{:>10.1}{:>10.1}{goodput:>10}{:>9}{:>12}{:>12}{:>12}  {}",
                report.target_rate.unwrap_or(0.0),
                report.sent_rate,
                report.done_rate,
                report.failed(),
                quantile("e2e", |q| q.p50),
                quantile("e2e", |q| q.p99),
                quantile("ttft", |q| q.p99),
                if step.keeps_up { "yes" } else { "no" },
            )?;
        }
        writeln!(f, "\n{}", self.verdict())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::report::tests::report;

    /// A server that answers up to `capacity` requests per second.
    fn answer(capacity: f64, rate: f64) -> Report {
        static REPORT: std::sync::LazyLock<Report> = std::sync::LazyLock::new(|| {
            let mut report = report();
            report.raw = crate::report::Raw::default();
            report
        });
        let mut report = REPORT.clone();
        report.errors.clear();
        report.goodput = None;
        report.target_rate = Some(rate);
        report.sent_rate = rate;
        report.done_rate = rate.min(capacity);
        report
    }

    fn search(from: f64, capacity: f64, halvings: u32) -> Sweep {
        let search = Search { from, factor: 2.0, halvings };
        futures::executor::block_on(search.run(|rate| std::future::ready(Ok(answer(capacity, rate))))).unwrap()
    }

    proptest! {
        #[test]
        fn the_knee_is_where_the_server_stops_keeping_up(capacity in 10.0f64..5000.0) {
            let sweep = search(10.0, capacity, 8);
            let (knee, saturated) = (sweep.knee.unwrap(), sweep.saturated.unwrap());
            let limit = capacity / KEPT_UP_MIN;
            prop_assert!(knee <= limit && limit <= saturated, "{knee} {limit} {saturated}");
            prop_assert!(saturated - knee <= knee / 200.0, "{knee} {saturated}");
            prop_assert_eq!(sweep.knee_report().unwrap().target_rate, Some(knee));
        }
    }

    #[test]
    fn a_first_rate_that_is_too_much_is_told_and_nothing_is_halved() {
        let sweep = search(100.0, 10.0, 5);
        assert_eq!((sweep.knee, sweep.saturated, sweep.steps.len()), (None, Some(100.0), 1));
        assert!(sweep.verdict().contains("does not keep up with 100.0"));
    }

    #[test]
    fn failures_and_missed_objectives_are_no_keeping_up() {
        let mut failing = answer(1e9, 100.0);
        failing.errors.insert("queue_full".into(), 5);
        assert!(keeps_up(&answer(1e9, 100.0)) && !keeps_up(&failing));
        let mut late = answer(1e9, 100.0);
        late.goodput = Some(crate::report::Goodput { rate: 90.0, share: 0.9 });
        assert!(!keeps_up(&late));
    }

    #[test]
    fn a_sweep_is_written_with_all_its_steps() {
        let folder = tempfile::tempdir().unwrap();
        let sweep = search(10.0, 100.0, 2);
        sweep.write(folder.path()).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let back: Sweep = serde_json::from_str(&read("report.json")).unwrap();
        assert_eq!((back.steps.len(), back.knee), (sweep.steps.len(), sweep.knee));
        assert_eq!(read("report.csv").lines().count(), sweep.steps.len() + 1);
        assert!(read("report.html").contains("Throughput by target"));
    }
}
