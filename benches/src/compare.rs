//! Two runs side by side, and whether one is worse than allowed.
//!
//! Figures of two documents are of two moments, and perhaps of two machines: what differs besides the figures is told.
//!
//! It refuses to judge without being told what is too much.

use std::fmt::{self, Display, Formatter};
use std::path::Path;
use std::str::FromStr;

use anyhow::Context;
use serde::Serialize;

use crate::report::{Report, SCHEMA};

/// What is too much: `ttft.p99>+5%`, `done_rate<-3%`, `errors>+0`, `e2e.p99>200`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Threshold {
    text: String,
    column: String,
    is_above: bool,
    bound: Bound,
}

/// What a column is held against.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bound {
    /// Percent of the first run's value, as a change from it.
    Percent(f64),
    /// In the column's unit, as a change from the first run's value.
    Change(f64),
    /// In the column's unit.
    Value(f64),
}

/// One column of two runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Pair {
    pub(crate) column: String,
    pub(crate) before: Option<f64>,
    pub(crate) after: Option<f64>,
    /// Change in percent of `before`; `None` if either is missing, or `before` is zero and `after` is not.
    pub(crate) percent: Option<f64>,
}

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Comparison {
    pub(crate) pairs: Vec<Pair>,
    /// Why the figures may not be comparable.
    pub(crate) warnings: Vec<String>,
    /// Thresholds that were crossed, with what was found.
    pub(crate) breaches: Vec<String>,
}

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form =
            || format!("`{text}`: expected a column, > or <, and a bound, such as `ttft.p99>+5%` or `e2e.p99>200`");
        let at = text.find(['>', '<']).ok_or_else(form)?;
        let (column, bound) = (text[..at].trim(), text[at + 1..].trim());
        let is_change = bound.starts_with(['+', '-']);
        let number = |text: &str| text.trim().parse::<f64>().ok().filter(|value| value.is_finite());
        let bound = match bound.strip_suffix('%') {
            Some(percent) => Bound::Percent(number(percent).ok_or_else(form)?),
            None if is_change => Bound::Change(number(bound).ok_or_else(form)?),
            None => Bound::Value(number(bound).ok_or_else(form)?),
        };
        if column.is_empty() {
            return Err(form());
        }
        let is_above = text.as_bytes().get(at) == Some(&b'>');
        Ok(Self { text: text.to_owned(), column: column.to_owned(), is_above, bound })
    }
}

impl Threshold {
    /// What was found, if it is beyond the threshold.
    ///
    /// # Errors
    /// When the column does not exist, or a run has no value in it: a threshold that cannot be checked does not hold.
    fn breach(&self, pairs: &[Pair]) -> anyhow::Result<Option<String>> {
        let pair = pairs.iter().find(|pair| pair.column == self.column).with_context(|| {
            let known: Vec<&str> = pairs.iter().map(|pair| pair.column.as_str()).collect();
            format!("`{}`: there is no column `{}`; there are {}", self.text, self.column, known.join(", "))
        })?;
        let (before, after) = pair.before.zip(pair.after).with_context(|| {
            format!(
                "`{}`: `{}` was not measured in both runs, so it cannot be held to anything",
                self.text, self.column
            )
        })?;
        let (found, bound, unit) = match self.bound {
            Bound::Percent(bound) if before == 0.0 && after == 0.0 => (0.0, bound, "%"),
            // From nothing to something is more than any percentage.
            Bound::Percent(bound) => {
                (if before == 0.0 { f64::INFINITY.copysign(after) } else { (after / before - 1.0) * 100.0 }, bound, "%")
            }
            Bound::Change(bound) => (after - before, bound, ""),
            Bound::Value(bound) => (after, bound, ""),
        };
        let is_breach = if self.is_above { found > bound } else { found < bound };
        Ok(is_breach.then(|| format!("{}: from {before:.3} to {after:.3} is {found:+.2}{unit}", self.text)))
    }
}

/// Reads a run: a `report.json`, or the folder it lies in.
pub(crate) fn read(path: &Path) -> anyhow::Result<Report> {
    let file = if path.is_dir() { path.join("report.json") } else { path.to_owned() };
    let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let document: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("{} is no JSON", file.display()))?;
    let schema = document["schema"].as_str().unwrap_or("none");
    anyhow::ensure!(schema == SCHEMA, "{}: the schema is {schema}, expected {SCHEMA}", file.display());
    serde_json::from_value(document).with_context(|| format!("{} is no report", file.display()))
}

/// Compares two runs.
///
/// # Errors
/// When a threshold names a column that is not there or has no value.
pub(crate) fn compare(before: &Report, after: &Report, thresholds: &[Threshold]) -> anyhow::Result<Comparison> {
    let pairs: Vec<Pair> = before
        .columns()
        .into_iter()
        .zip(after.columns())
        .map(|((column, before), (_, after))| {
            let percent = before.zip(after).and_then(|(before, after)| match before {
                _ if before == after => Some(0.0),
                0.0 => None,
                _ => Some((after / before - 1.0) * 100.0),
            });
            Pair { column, before, after, percent }
        })
        .collect();
    let mut breaches = Vec::new();
    for threshold in thresholds {
        breaches.extend(threshold.breach(&pairs)?);
    }
    Ok(Comparison { warnings: warnings(before, after), pairs, breaches })
}

fn rate(rate: Option<f64>) -> String {
    rate.map_or_else(|| "none".into(), |rate| format!("{rate:.1}/s"))
}

fn objectives(slo: Option<&String>) -> String {
    slo.cloned().unwrap_or_else(|| "none".into())
}

fn warnings(before: &Report, after: &Report) -> Vec<String> {
    let (one, other) = (&before.run, &after.run);
    let pairs = [
        ("workload", one.workload.clone(), other.workload.clone()),
        ("model", one.model.clone(), other.model.clone()),
        ("arrivals", one.arrivals.clone(), other.arrivals.clone()),
        ("target rate", rate(before.target_rate), rate(after.target_rate)),
        ("connections", one.connections.to_string(), other.connections.to_string()),
        ("prompt tokens", one.prompt_tokens.clone(), other.prompt_tokens.clone()),
        ("output tokens", one.output_tokens.clone(), other.output_tokens.clone()),
        ("objectives", objectives(one.slo.as_ref()), objectives(other.slo.as_ref())),
    ];
    let differ = pairs.into_iter().filter(|(_, one, other)| one != other);
    let mut warnings: Vec<String> =
        differ.map(|(name, one, other)| format!("the runs differ in {name}: {one} and {other}")).collect();
    let machines = before.environment.differences(&after.environment);
    warnings.extend(machines.into_iter().map(|difference| format!("the machines differ in {difference}")));
    warnings
}

impl Display for Comparison {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        writeln!(f, "{:<30}{:>14}{:>14}{:>10}", "rates /s, times ms", "before", "after", "change")?;
        for pair in self.pairs.iter().filter(|pair| pair.before.is_some() || pair.after.is_some()) {
            let cell = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.3}"));
            let change = pair.percent.map_or_else(|| "-".into(), |percent| format!("{percent:+.1} %"));
            writeln!(f, "{:<30}{:>14}{:>14}{change:>10}", pair.column, cell(pair.before), cell(pair.after))?;
        }
        for breach in &self.breaches {
            writeln!(f, "breached: {breach}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    fn slower(factor: f64) -> Report {
        let mut slower = report();
        let e2e = slower.latency_ms.get_mut("e2e").unwrap();
        e2e.p99 *= factor;
        slower
    }

    fn breaches(after: &Report, threshold: &str) -> anyhow::Result<usize> {
        let comparison = compare(&report(), after, &[threshold.parse().map_err(anyhow::Error::msg)?])?;
        Ok(comparison.breaches.len())
    }

    #[test]
    fn a_threshold_is_crossed_only_beyond_it() {
        for (threshold, factor, expected) in [
            ("e2e.p99>+5%", 1.06, 1),
            ("e2e.p99>+5%", 1.04, 0),
            ("e2e.p99>5%", 1.06, 1),
            ("e2e.p99<-5%", 0.94, 1),
            ("e2e.p99<-5%", 1.5, 0),
            ("e2e.p99>+10", 1.04, 0),
            ("e2e.p99>+10", 1.07, 1),
            ("e2e.p99>200", 1.0, 0),
            ("e2e.p99>200", 1.2, 1),
            ("errors>+0", 1.0, 0),
            ("done_rate<-3%", 1.0, 0),
        ] {
            assert_eq!(breaches(&slower(factor), threshold).unwrap(), expected, "{threshold} at {factor}");
        }
    }

    #[test]
    fn from_nothing_to_something_is_more_than_any_percentage() {
        let mut clean = report();
        clean.errors.clear();
        let threshold: Threshold = "errors>+500%".parse().unwrap();
        assert_eq!(compare(&clean, &report(), std::slice::from_ref(&threshold)).unwrap().breaches.len(), 1);
        assert!(compare(&clean, &clean, &[threshold]).unwrap().breaches.is_empty());
    }

    #[test]
    fn what_cannot_be_checked_does_not_hold() {
        let unknown = breaches(&report(), "ttft.p98>+5%").unwrap_err().to_string();
        assert!(unknown.contains("there is no column `ttft.p98`") && unknown.contains("ttft.p99"), "{unknown}");
        let unmeasured = breaches(&report(), "verification.overhead_ratio>+5%").unwrap_err().to_string();
        assert!(unmeasured.contains("was not measured"), "{unmeasured}");
        for bad in ["", "ttft.p99", ">5%", "ttft.p99>", "ttft.p99>x%", "ttft.p99>+nan"] {
            assert!(bad.parse::<Threshold>().is_err(), "{bad}");
        }
    }

    #[test]
    fn runs_that_are_not_alike_are_told_to_be_so() {
        assert!(compare(&report(), &report(), &[]).unwrap().warnings.is_empty());
        let mut other = report();
        other.run.workload = "mlp".into();
        other.environment.cpu = "another".into();
        let warnings = compare(&report(), &other, &[]).unwrap().warnings.join("\n");
        assert!(warnings.contains("workload: completions and mlp") && warnings.contains("cpu"), "{warnings}");
    }

    #[test]
    fn a_document_of_another_form_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        report().write(folder.path()).unwrap();
        assert_eq!(read(folder.path()).unwrap().ok, read(&folder.path().join("report.json")).unwrap().ok);
        std::fs::write(folder.path().join("report.json"), "{\"schema\": \"other/3\"}").unwrap();
        let error = read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("other/3"), "{error}");
    }
}
