//! What a node tells at intervals where nobody scrapes it: a block to read, or a line of JSON.
//!
//! It refuses to know when it is asked, and where the text goes.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::time::Duration;

use serde::Serialize;

use super::catalogue::TaskStatus;
use super::text::{Sample, TextFormat, samples};
use super::{Quantiles, Telemetry};

/// How a report looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportForm {
    /// Several lines for people.
    Console,
    /// One line: every sample of the catalogue but the buckets of histograms, whose quantiles are there.
    Json,
}

/// A report as one JSON document.
#[derive(Serialize)]
struct Document<'a> {
    node: &'a str,
    unix_ms: u64,
    metrics: Vec<Metric>,
}

#[derive(Serialize)]
struct Metric {
    name: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Telemetry {
    /// What there is to tell now, ending in a newline.
    pub fn report(&self, form: ReportForm) -> String {
        match form {
            ReportForm::Json => self.json_line(),
            ReportForm::Console => {
                let mut text = String::new();
                // Writing into a string cannot fail.
                let _ = self.write_block(&mut text);
                text
            }
        }
    }

    fn json_line(&self) -> String {
        let text = self.render(TextFormat::Classic);
        let metrics = samples(&text).filter(|sample| !sample.name.ends_with("_bucket"));
        let metric =
            |Sample { name, labels, value }: Sample| Metric { name, labels: labels.into_iter().collect(), value };
        let document = Document {
            node: self.node().as_str(),
            unix_ms: self.clock().unix_ms(),
            metrics: metrics.map(metric).collect(),
        };
        serde_json::to_string(&document).map(|line| line + "\n").unwrap_or_default()
    }

    fn write_block(&self, text: &mut String) -> fmt::Result {
        let metrics = self.metrics();
        writeln!(text, "node {} at {}", self.node(), self.clock().unix_ms() / 1000)?;
        let mut ended: BTreeMap<&str, u64> = TaskStatus::ALL.map(|status| (status.name(), 0)).into();
        for (labels, count) in metrics.tasks_total.all() {
            *ended.entry(labels.status.name()).or_default() += count.get();
        }
        let ended: Vec<String> = ended.iter().map(|(status, count)| format!("{count} {status}")).collect();
        let (running, waiting) = (metrics.tasks_running.get(), metrics.tasks_waiting.get());
        writeln!(text, "  tasks    {running} running, {waiting} waiting; {}", ended.join(", "))?;
        for (label, latency) in metrics.task_latency_seconds.all() {
            writeln!(text, "  latency  {}: {}", label.model, spread(&latency.quantiles()))?;
        }
        let (read, written) = (metrics.prompt_tokens_total.get(), metrics.generation_tokens_total.get());
        writeln!(text, "  tokens   {read} of prompts, {written} generated")?;
        let profile = self.profile();
        for stage in &profile.stages {
            let total = (stage.busy + stage.starved + stage.blocked + stage.verifying).max(f64::MIN_POSITIVE);
            let share = |seconds: f64| 100.0 * seconds / total;
            writeln!(
                text,
                "  stage    {:<12} busy {:>3.0} %, verifying {:>3.0} %, blocked {:>3.0} %, starved {:>3.0} %; {} items, {}",
                stage.name,
                share(stage.busy),
                share(stage.verifying),
                share(stage.blocked),
                share(stage.starved),
                stage.items,
                spread(&stage.service),
            )?;
        }
        for edge in &profile.edges {
            writeln!(
                text,
                "  edge     {} -> {}: {}/{} queued, {} items, {} bytes; sends {}",
                edge.from,
                edge.to,
                edge.queued_items,
                edge.capacity_items,
                edge.items,
                edge.bytes,
                spread(&edge.send),
            )?;
        }
        for (label, rtt) in
            metrics.peer_rtt_seconds.all().iter().filter(|(label, _)| label.node != self.node().as_str())
        {
            let sent = metrics.messages_sent_total.of(label).get();
            let received = metrics.messages_received_total.of(label).get();
            let rtt = span(rtt.get());
            writeln!(text, "  peer     {}: rtt {rtt}, {sent} sent, {received} received", label.node)?;
        }
        Ok(())
    }
}

/// Quantiles for people.
fn spread(quantiles: &Quantiles) -> String {
    if quantiles.count == 0 {
        return "none yet".to_owned();
    }
    format!("p50 {}, p95 {}, p99 {}", span(quantiles.p50), span(quantiles.p95), span(quantiles.p99))
}

fn span(seconds: f64) -> String {
    format!("{:.1?}", Duration::try_from_secs_f64(seconds).unwrap_or_default())
}
