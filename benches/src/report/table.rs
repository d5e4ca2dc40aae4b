//! The report for a terminal.

use std::fmt::{self, Display, Formatter};

use super::{Quantiles, Report};
use crate::bottleneck::percent;
use crate::observe::{Edge, Node};

/// The latencies in the order of a request's life, with what they are for people.
pub(crate) const LATENCIES: [(&str, &str); 6] = [
    ("send_delay", "send delay"),
    ("ttft", "first token (TTFT)"),
    ("itl", "between tokens (ITL)"),
    ("tpot", "per token (TPOT)"),
    ("proof_wait", "last token to receipt"),
    ("e2e", "end to end"),
];

/// A name and its value.
fn line(f: &mut Formatter<'_>, name: &str, value: impl Display) -> fmt::Result {
    writeln!(f, "{name:<24}{value}")
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        line(f, "workload", format_args!("{} ({}), {}", self.run.workload, self.run.model, self.run.arrivals))?;
        line(f, "on", &self.run.target)?;
        let target = self.target_rate.map_or_else(|| "-".into(), |rate| format!("{rate:.1}"));
        line(f, "target, sent, done /s", format_args!("{target}, {:.1}, {:.1}", self.sent_rate, self.done_rate))?;
        line(f, "sent, ok, failed", format_args!("{}, {}, {}", self.sent, self.ok, self.failed()))?;
        for (code, count) in &self.errors {
            line(f, &format!("  {code}"), count)?;
        }
        if let Some(error) = &self.first_error {
            line(f, "first failure", error)?;
        }
        if self.tokens_in + self.tokens_out > 0 {
            let rate = format!("{}, {} ({:.1}/s)", self.tokens_in, self.tokens_out, self.tokens_out_rate);
            line(f, "tokens in, out", rate)?;
        }
        if let (Some(goodput), Some(slo)) = (&self.goodput, &self.run.slo) {
            let share =
                format_args!("{:.1}/s, {:.1} % of sent, under {slo}", goodput.rate, goodput.share * 100.0).to_string();
            line(f, "goodput", share)?;
        }
        self.fmt_verification(f)?;
        if let Some(ratio) = self.partition_cache_hit_ratio {
            line(f, "partition cache hits", format_args!("{:.2} %", ratio * 100.0))?;
        }
        if let Some(bottleneck) = &self.bottleneck {
            line(f, "bottleneck", &bottleneck.sentence)?;
        }
        writeln!(f, "\n{:<24}{}", "milliseconds", heads(&["p50", "p90", "p95", "p99", "p99.9", "max"]))?;
        for (name, title) in LATENCIES {
            if let Some(q) = self.latency_ms.get(name) {
                write!(f, "{title:<24}")?;
                writeln!(f, "{}", cells(&[q.p50, q.p90, q.p95, q.p99, q.p99_9, q.max]))?;
            }
        }
        if self.itl_is_per_chunk {
            writeln!(f, "the server does not tell how many tokens a chunk has: ITL and TPOT are per chunk")?;
        }
        if self.target_rate.is_none() {
            writeln!(f, "a closed loop waits for the server: a stall hides behind the requests that were not sent")?;
        }
        if self.shows_stages {
            self.nodes.iter().try_for_each(|node| fmt_node(f, node))?;
            if !self.nodes.is_empty() && self.nodes.iter().all(Node::is_from_afar) {
                let note = "\nmetrics of a gateway tell of itself alone, and no distributions: for those, and for all nodes, \
                            leave out --url, which makes a cluster in this process";
                writeln!(f, "{note}")?;
            }
        }
        Ok(())
    }
}

impl Report {
    fn fmt_verification(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let verification = &self.verification;
        let mut parts = vec![format!("{} receipts verified offline", verification.receipts_checked)];
        parts.extend(verification.share_of_work.map(|share| format!("{} of the stages' work", percent(share))));
        parts.extend(
            verification.overhead_ratio.map(|ratio| format!("{ratio:.2} x the median latency of one unchecked node")),
        );
        line(f, "verification", parts.join(", "))
    }
}

fn fmt_node(f: &mut Formatter<'_>, node: &Node) -> fmt::Result {
    let quantiles = ["p50", "p90", "p99", "p99.9"];
    let states = heads(&["items", "busy %", "starved %", "blocked %", "verif. %"]);
    writeln!(f, "\n{:<46}{states}  service ms{}", format!("{}: stages", node.name), heads(&quantiles))?;
    for stage in &node.stages {
        let shares =
            if node.accounts_for(stage) { cells(&stage.shares().map(|share| share * 100.0)) } else { heads(&["-"; 4]) };
        writeln!(f, "{:<46}{:>10}{shares}  {:>10}{}", stage.name, stage.items, "", four(stage.service_ms))?;
    }
    let counts = heads(&["items", "KiB", "room", "fill %", "most %"]);
    writeln!(
        f,
        "{:<46}{counts}  queue ms  {}  send ms{}",
        format!("{}: edges", node.name),
        heads(&quantiles),
        heads(&quantiles)
    )?;
    for edge in node.edges.iter().filter(|edge| edge.bytes > 0) {
        fmt_edge(f, edge)?;
    }
    Ok(())
}

fn fmt_edge(f: &mut Formatter<'_>, edge: &Edge) -> fmt::Result {
    let items = edge.items.map_or_else(|| "-".into(), |items| items.to_string());
    writeln!(
        f,
        "{:<46}{items:>10}{:>10.1}{:>10}{}  {:>10}{}{:>9}{}",
        format!("{} -> {}", edge.from, edge.to),
        edge.bytes as f64 / 1024.0,
        edge.capacity_items,
        cells(&[edge.fill_mean * 100.0, edge.fill_max * 100.0]),
        "",
        four(edge.queue_ms),
        "",
        four(edge.send_ms),
    )
}

fn four(quantiles: Option<Quantiles>) -> String {
    quantiles.map_or_else(
        || heads(&["-"; 4]),
        |q| [q.p50, q.p90, q.p99, q.p99_9].iter().map(|value| format!("{value:>10.3}")).collect(),
    )
}

fn heads(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name:>10}")).collect()
}

fn cells(values: &[f64]) -> String {
    values.iter().map(|value| format!("{value:>10.2}")).collect()
}
