//! The report as files: `report.json`, `report.csv`, `requests.jsonl`, one `*.hgrm` for each latency, `report.html`.

use std::fmt::{self, Write as _};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::Context;
use hdrhistogram::Histogram;

use super::{Report, US_PER_MS};
use crate::html;

impl Report {
    /// Writes all files of a run into a folder, which is made if it is not there.
    pub(crate) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let put = |name: &str, text: String| {
            let path = folder.join(name);
            std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
        };
        put("report.json", serde_json::to_string_pretty(self)?)?;
        put("report.csv", csv(std::slice::from_ref(self)))?;
        put("report.html", html::run(self))?;
        for (name, histogram) in self.raw.histograms.iter().filter(|(_, histogram)| !histogram.is_empty()) {
            put(&format!("{name}.hgrm"), hgrm(histogram)?)?;
        }
        let mut rows = BufWriter::new(std::fs::File::create(folder.join("requests.jsonl"))?);
        for row in &self.raw.rows {
            serde_json::to_writer(&mut rows, row)?;
            rows.write_all(b"\n")?;
        }
        rows.flush()?;
        if self.raw.rows_left_out > 0 {
            eprintln!(
                "requests.jsonl has the first {} requests; {} are left out",
                self.raw.rows.len(),
                self.raw.rows_left_out
            );
        }
        Ok(())
    }
}

/// One line for each report, under one line of names.
pub(crate) fn csv(reports: &[Report]) -> String {
    let Some(first) = reports.first() else { return String::new() };
    let names: Vec<String> = first.columns().into_iter().map(|(name, _)| name).collect();
    let mut text = format!("workload,{},bottleneck\n", names.join(","));
    for report in reports {
        let cells =
            report.columns().into_iter().map(|(_, value)| value.map_or_else(String::new, |value| value.to_string()));
        let stage = report.bottleneck.as_ref().map_or("", |bottleneck| bottleneck.stage.as_str());
        let _ = writeln!(text, "{},{},{stage}", report.run.workload, cells.collect::<Vec<_>>().join(","));
    }
    text
}

/// The percentile distribution that HdrHistogram's plotters read, in milliseconds.
fn hgrm(histogram: &Histogram<u64>) -> Result<String, fmt::Error> {
    let mut text = String::new();
    writeln!(text, "{:>12} {:>14} {:>10} {:>14}\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)")?;
    let mut below = 0;
    for step in histogram.iter_quantiles(5) {
        below += step.count_since_last_iteration();
        let (value, quantile) = (step.value_iterated_to() as f64 / US_PER_MS, step.quantile_iterated_to());
        write!(text, "{value:>12.3} {quantile:>14.12} {below:>10}")?;
        if quantile < 1.0 {
            write!(text, " {:>14.2}", 1.0 / (1.0 - quantile))?;
        }
        text.push('\n');
    }
    let (mean, deviation) = (histogram.mean() / US_PER_MS, histogram.stdev() / US_PER_MS);
    writeln!(text, "#[Mean    = {mean:>12.3}, StdDeviation   = {deviation:>12.3}]")?;
    let (max, count) = (histogram.max() as f64 / US_PER_MS, histogram.len());
    writeln!(text, "#[Max     = {max:>12.3}, Total count    = {count:>12}]")?;
    writeln!(text, "#[Buckets = {:>12}, SubBuckets     = {:>12}]", histogram.buckets(), histogram.distinct_values())?;
    Ok(text)
}
