//! What a run found: the document that everything else is made of.
//!
//! `report.json` is the authority; the table, the CSV, the page and a comparison are views of it. Times are milliseconds,
//! rates are per second.
//!
//! It refuses to know how anything was measured.

mod files;
mod table;

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::bottleneck::{self, Bottleneck};
use crate::environment::Environment;
use crate::observe::{self, Node};
use crate::record::{Record, Row};

pub(crate) use files::csv;
pub(crate) use table::LATENCIES;

/// The form of `report.json`. Fields may be added within one version; a field that changes its meaning makes a new one.
pub(crate) const SCHEMA: &str = "butterfly-bench/1";
/// Milliseconds have this many of the units of [`Latencies`](crate::record::Latencies).
const US_PER_MS: f64 = 1000.0;

/// A run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) schema: String,
    pub(crate) environment: Environment,
    pub(crate) run: Run,
    /// The load's rate; `None` in a closed loop, which has none.
    pub(crate) target_rate: Option<f64>,
    pub(crate) sent_rate: f64,
    pub(crate) done_rate: f64,
    pub(crate) sent: u64,
    pub(crate) ok: u64,
    /// Failures by the server's code, or by what broke.
    pub(crate) errors: BTreeMap<String, u64>,
    pub(crate) first_error: Option<String>,
    pub(crate) tokens_in: u64,
    pub(crate) tokens_out: u64,
    pub(crate) tokens_out_rate: f64,
    /// By name: ttft, itl, tpot, e2e, proof_wait, send_delay. Those without a value are not there.
    pub(crate) latency_ms: BTreeMap<String, Quantiles>,
    /// Whether the server did not tell how many tokens a piece of a stream had, so that gaps are between pieces.
    pub(crate) itl_is_per_chunk: bool,
    pub(crate) goodput: Option<Goodput>,
    pub(crate) verification: Verification,
    pub(crate) bottleneck: Option<Bottleneck>,
    /// Of the gateways, since they started.
    pub(crate) partition_cache_hit_ratio: Option<f64>,
    pub(crate) seconds: Vec<Second>,
    pub(crate) nodes: Vec<Node>,
    /// Whether the terminal shows every stage and edge.
    #[serde(skip)]
    pub(crate) shows_stages: bool,
    #[serde(skip)]
    pub(crate) raw: Raw,
}

/// What only files show.
#[derive(Debug, Clone, Default)]
pub(crate) struct Raw {
    pub(crate) histograms: Vec<(&'static str, Histogram<u64>)>,
    pub(crate) rows: Vec<Row>,
    pub(crate) rows_left_out: u64,
}

/// What was run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) target: String,
    pub(crate) workload: String,
    pub(crate) model: String,
    /// `constant`, `poisson`, `replay` or `closed`.
    pub(crate) arrivals: String,
    pub(crate) duration_s: f64,
    pub(crate) warm_up_s: f64,
    pub(crate) connections: usize,
    pub(crate) prompt_tokens: String,
    pub(crate) output_tokens: String,
    pub(crate) seed: u64,
    pub(crate) slo: Option<String>,
}

/// A distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Quantiles {
    pub(crate) count: u64,
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) p99_9: f64,
    pub(crate) max: f64,
}

/// Requests that met every objective.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Goodput {
    pub(crate) rate: f64,
    /// Of those that were sent.
    pub(crate) share: f64,
}

/// What proving the answers costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Verification {
    /// Receipts of this run that were fetched and verified offline.
    pub(crate) receipts_checked: usize,
    /// Share of the stages' work that went into checking others.
    pub(crate) share_of_work: Option<f64>,
    /// Median end-to-end latency over that of the same load on one node that nobody checks.
    pub(crate) overhead_ratio: Option<f64>,
}

/// What was scheduled in one second of the load.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Second {
    pub(crate) second: u64,
    pub(crate) scheduled: u64,
    pub(crate) failed: u64,
    /// Answers that came in this second, whenever they were scheduled.
    pub(crate) done: u64,
    /// End to end, of those scheduled in it.
    pub(crate) p50_ms: Option<f64>,
    pub(crate) p99_ms: Option<f64>,
    pub(crate) max_ms: Option<f64>,
}

impl Quantiles {
    /// Of a histogram whose values are `per_unit` times as large as those reported; `None` of an empty one.
    pub(crate) fn of(histogram: &Histogram<u64>, per_unit: f64) -> Option<Self> {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / per_unit;
        (!histogram.is_empty()).then(|| Self {
            count: histogram.len(),
            mean: histogram.mean() / per_unit,
            p50: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            p99: at(0.99),
            p99_9: at(0.999),
            max: at(1.0),
        })
    }

    fn named(&self) -> [(&'static str, f64); 7] {
        [
            ("mean", self.mean),
            ("p50", self.p50),
            ("p90", self.p90),
            ("p95", self.p95),
            ("p99", self.p99),
            ("p99_9", self.p99_9),
            ("max", self.max),
        ]
    }
}

impl Report {
    /// The report of a load.
    pub(crate) fn new(run: Run, target_rate: Option<f64>, record: Record, nodes: Vec<Node>) -> Self {
        let named = record.latencies.named();
        let latency_ms =
            named.iter().filter_map(|(name, of)| Some(((*name).to_owned(), Quantiles::of(of, US_PER_MS)?)));
        let share = record.met_slo as f64 / record.sent.max(1) as f64;
        let goodput = Goodput { rate: record.done_rate() * record.met_slo as f64 / record.ok.max(1) as f64, share };
        let tokens_out_rate = record.done_rate() * record.tokens_out as f64 / record.ok.max(1) as f64;
        Self {
            schema: SCHEMA.into(),
            environment: Environment::now(),
            target_rate,
            sent_rate: record.sent_rate(),
            done_rate: record.done_rate(),
            sent: record.sent,
            ok: record.ok,
            tokens_in: record.tokens_in,
            tokens_out: record.tokens_out,
            tokens_out_rate,
            latency_ms: latency_ms.collect(),
            itl_is_per_chunk: record.are_pieces_guessed,
            goodput: (!record.slo.is_empty()).then_some(goodput),
            verification: Verification { share_of_work: observe::verifying_share(&nodes), ..Verification::default() },
            bottleneck: bottleneck::find(&nodes),
            partition_cache_hit_ratio: nodes.iter().find_map(|node| {
                let is_gateway = node.stages.iter().any(|stage| stage.name == "partition" && stage.items > 0);
                node.partition_cache_hit_ratio.filter(|_| is_gateway)
            }),
            seconds: seconds(&record.rows),
            nodes,
            shows_stages: false,
            raw: Raw {
                histograms: named.iter().map(|(name, of)| (*name, (*of).clone())).collect(),
                rows: record.rows,
                rows_left_out: record.rows_left_out,
            },
            errors: record.errors,
            first_error: record.first_error,
            run,
        }
    }

    /// Failures, of any code.
    pub(crate) fn failed(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Every figure by its name: the columns of the CSV, and what a comparison can be about.
    pub(crate) fn columns(&self) -> Vec<(String, Option<f64>)> {
        let mut columns: Vec<(String, Option<f64>)> = vec![
            ("target_rate".into(), self.target_rate),
            ("sent_rate".into(), Some(self.sent_rate)),
            ("done_rate".into(), Some(self.done_rate)),
            ("sent".into(), Some(self.sent as f64)),
            ("ok".into(), Some(self.ok as f64)),
            ("errors".into(), Some(self.failed() as f64)),
            ("error_share".into(), Some(self.failed() as f64 / self.sent.max(1) as f64)),
            ("tokens_in".into(), Some(self.tokens_in as f64)),
            ("tokens_out".into(), Some(self.tokens_out as f64)),
            ("tokens_out_rate".into(), Some(self.tokens_out_rate)),
            ("goodput".into(), self.goodput.map(|goodput| goodput.rate)),
            ("goodput_share".into(), self.goodput.map(|goodput| goodput.share)),
            ("verification.share_of_work".into(), self.verification.share_of_work),
            ("verification.overhead_ratio".into(), self.verification.overhead_ratio),
            ("partition_cache_hit_ratio".into(), self.partition_cache_hit_ratio),
        ];
        for name in ["ttft", "itl", "tpot", "e2e", "proof_wait", "send_delay"] {
            let found = self.latency_ms.get(name);
            let none = Quantiles { count: 0, mean: 0.0, p50: 0.0, p90: 0.0, p95: 0.0, p99: 0.0, p99_9: 0.0, max: 0.0 };
            for (quantile, value) in found.unwrap_or(&none).named() {
                columns.push((format!("{name}.{quantile}"), found.map(|_| value)));
            }
        }
        columns
    }
}

/// The load second by second, by when requests were scheduled.
fn seconds(rows: &[Row]) -> Vec<Second> {
    #[derive(Default)]
    struct Open {
        scheduled: u64,
        failed: u64,
        done: u64,
        latencies: Vec<f64>,
    }
    let mut open: BTreeMap<u64, Open> = BTreeMap::new();
    let second = |ms: f64| (ms / 1000.0) as u64;
    for row in rows {
        let entry = open.entry(second(row.scheduled_ms)).or_default();
        entry.scheduled += 1;
        if row.error.is_some() {
            entry.failed += 1;
            continue;
        }
        entry.latencies.push(row.done_ms - row.scheduled_ms);
        open.entry(second(row.done_ms)).or_default().done += 1;
    }
    let close = |(second, mut open): (u64, Open)| {
        open.latencies.sort_by(f64::total_cmp);
        let at = |quantile: f64| {
            let place = (open.latencies.len() as f64 * quantile).ceil() as usize;
            open.latencies.get(place.saturating_sub(1)).copied()
        };
        let (p50_ms, p99_ms, max_ms) = (at(0.5), at(0.99), at(1.0));
        Second { second, scheduled: open.scheduled, failed: open.failed, done: open.done, p50_ms, p99_ms, max_ms }
    };
    open.into_iter().map(close).collect()
}

#[cfg(test)]
pub(crate) mod tests;
