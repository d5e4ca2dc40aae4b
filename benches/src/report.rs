//! What a run found, as a table, as JSON and as percentile distributions (hgrm).

use std::fmt::{self, Display, Formatter, Write as _};
use std::path::Path;

use butterfly_engine::telemetry::Profile;
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::load::{Load, Measured};

/// A run. Times in milliseconds, rates per second.
#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) workload: &'static str,
    pub(crate) target_rate: f64,
    pub(crate) sent_rate: f64,
    pub(crate) done_rate: f64,
    pub(crate) sent: u64,
    pub(crate) ok: u64,
    pub(crate) refused: u64,
    pub(crate) errors: u64,
    pub(crate) first_error: Option<String>,
    pub(crate) tokens_rate: f64,
    pub(crate) receipts_checked: usize,
    pub(crate) latency_ms: Quantiles,
    pub(crate) first_token_ms: Option<Quantiles>,
    pub(crate) inter_token_ms: Option<Quantiles>,
    pub(crate) send_delay_ms: Quantiles,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) profiles: Vec<Profile>,
    #[serde(skip)]
    histograms: Vec<(&'static str, Histogram<u64>)>,
}

#[derive(Serialize)]
pub(crate) struct Quantiles {
    p50: f64,
    p90: f64,
    p95: f64,
    p99: f64,
    p99_9: f64,
    max: f64,
}

impl Quantiles {
    fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        Self { p50: at(0.5), p90: at(0.9), p95: at(0.95), p99: at(0.99), p99_9: at(0.999), max: at(1.0) }
    }
}

impl Report {
    pub(crate) fn new(load: &Load, measured: &Measured, receipts_checked: usize, profiles: Vec<Profile>) -> Self {
        let seconds = measured.elapsed.as_secs_f64();
        let some = |histogram: &Histogram<u64>| (!histogram.is_empty()).then(|| Quantiles::of(histogram));
        Self {
            workload: load.workload.name(),
            target_rate: load.rate,
            sent_rate: measured.sent as f64 / seconds,
            done_rate: measured.ok as f64 / seconds,
            sent: measured.sent,
            ok: measured.ok,
            refused: measured.refused,
            errors: measured.errors,
            first_error: measured.first_error.clone(),
            tokens_rate: measured.tokens as f64 / seconds,
            receipts_checked,
            latency_ms: Quantiles::of(&measured.latency),
            first_token_ms: some(&measured.first_token),
            inter_token_ms: some(&measured.inter_token),
            send_delay_ms: Quantiles::of(&measured.send_delay),
            profiles,
            histograms: vec![
                ("latency", measured.latency.clone()),
                ("first_token", measured.first_token.clone()),
                ("inter_token", measured.inter_token.clone()),
                ("send_delay", measured.send_delay.clone()),
            ],
        }
    }

    /// Writes report.json and one hgrm file for each histogram.
    pub(crate) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join("report.json"), serde_json::to_string_pretty(self)?)?;
        for (name, histogram) in self.histograms.iter().filter(|(_, histogram)| !histogram.is_empty()) {
            std::fs::write(folder.join(format!("{name}.hgrm")), hgrm(histogram)?)?;
        }
        Ok(())
    }
}

/// The percentile distribution that HdrHistogram's plotters read, in milliseconds.
fn hgrm(histogram: &Histogram<u64>) -> Result<String, fmt::Error> {
    let mut text = String::new();
    writeln!(text, "{:>12} {:>14} {:>10} {:>14}\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)")?;
    let mut below = 0;
    for step in histogram.iter_quantiles(5) {
        below += step.count_since_last_iteration();
        let (value, quantile) = (step.value_iterated_to() as f64 / 1000.0, step.quantile_iterated_to());
        write!(text, "{value:>12.3} {quantile:>14.12} {below:>10}")?;
        if quantile < 1.0 {
            write!(text, " {:>14.2}", 1.0 / (1.0 - quantile))?;
        }
        text.push('\n');
    }
    writeln!(text, "#[Mean = {:.3}, StdDeviation = {:.3}]", histogram.mean() / 1000.0, histogram.stdev() / 1000.0)?;
    writeln!(text, "#[Max = {:.3}, TotalCount = {}]", histogram.max() as f64 / 1000.0, histogram.len())?;
    Ok(text)
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} at {:.0}/s: sent {:.1}/s, verified {:.1}/s",
            self.workload, self.target_rate, self.sent_rate, self.done_rate
        )?;
        writeln!(
            f,
            "{} sent, {} ok, {} refused (429), {} errors; {} receipts checked offline",
            self.sent, self.ok, self.refused, self.errors, self.receipts_checked
        )?;
        if let Some(error) = &self.first_error {
            writeln!(f, "first error: {error}")?;
        }
        if self.tokens_rate > 0.0 {
            writeln!(f, "{:.1} tokens/s", self.tokens_rate)?;
        }
        writeln!(
            f,
            "\n{:<24}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "milliseconds", "p50", "p90", "p95", "p99", "p99.9", "max"
        )?;
        row(f, "latency", &self.latency_ms)?;
        for (name, quantiles) in
            [("time to first token", &self.first_token_ms), ("between tokens", &self.inter_token_ms)]
        {
            if let Some(quantiles) = quantiles {
                row(f, name, quantiles)?;
            }
        }
        row(f, "send delay", &self.send_delay_ms)?;
        self.profiles.iter().try_for_each(|profile| profile_table(f, profile))
    }
}

fn row(f: &mut Formatter<'_>, name: &str, q: &Quantiles) -> fmt::Result {
    writeln!(
        f,
        "{name:<24}{:>10.2}{:>10.2}{:>10.2}{:>10.2}{:>10.2}{:>10.2}",
        q.p50, q.p90, q.p95, q.p99, q.p99_9, q.max
    )
}

fn profile_table(f: &mut Formatter<'_>, profile: &Profile) -> fmt::Result {
    writeln!(f, "\nnode {}", profile.node)?;
    writeln!(
        f,
        "{:<12}{:>9}{:>8}{:>9}{:>9}{:>10}{:>11}{:>11}{:>11}",
        "stage", "items", "busy s", "starved", "blocked", "verifying", "p50 ms", "p99 ms", "p99.9 ms"
    )?;
    for stage in &profile.stages {
        writeln!(
            f,
            "{:<12}{:>9}{:>8.2}{:>9.2}{:>9.2}{:>10.2}{:>11.3}{:>11.3}{:>11.3}",
            stage.name,
            stage.items,
            stage.busy,
            stage.starved,
            stage.blocked,
            stage.verifying,
            stage.service.p50 * 1000.0,
            stage.service.p99 * 1000.0,
            stage.service.p999 * 1000.0
        )?;
    }
    writeln!(
        f,
        "{:<44}{:>9}{:>12}{:>12}{:>12}{:>12}{:>12}",
        "edge", "items", "KiB", "queue p50", "queue p99", "send p50", "send p99"
    )?;
    for edge in profile.edges.iter().filter(|edge| edge.items > 0) {
        writeln!(
            f,
            "{:<44}{:>9}{:>12.1}{:>12.3}{:>12.3}{:>12.3}{:>12.3}",
            format!("{} -> {}", edge.from, edge.to),
            edge.items,
            edge.bytes as f64 / 1024.0,
            edge.queue.p50 * 1000.0,
            edge.queue.p99 * 1000.0,
            edge.send.p50 * 1000.0,
            edge.send.p99 * 1000.0
        )?;
    }
    Ok(())
}
