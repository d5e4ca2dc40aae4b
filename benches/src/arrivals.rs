//! When requests leave: at a steady rate, as a Poisson process, or as a file says.
//!
//! Invariants: moments are fixed before the first request leaves, so nothing that the server does can move them.
//!
//! It refuses to know what is asked, but for a file that says both.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use serde::Deserialize;

use crate::draw::Draw;
use crate::workload::{Ask, Kind, Recipe};

/// Requests of one run at most: what their moments take in memory.
pub(crate) const REQUESTS_MAX: usize = 50_000_000;

/// How the gaps between requests are distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arrivals {
    /// All gaps are equal.
    Constant,
    /// Gaps as of many clients that know nothing of each other.
    Poisson,
}

impl Arrivals {
    /// The moments of a load, since its begin, ascending.
    pub(crate) fn schedule(self, rate: f64, duration: Duration, seed: u64) -> anyhow::Result<Vec<Duration>> {
        let expected = rate * duration.as_secs_f64();
        anyhow::ensure!(expected <= REQUESTS_MAX as f64, "{expected:.0} requests in one run; at most {REQUESTS_MAX}");
        if self == Self::Constant {
            let count = expected.ceil() as u64;
            return Ok((0..count).map(|slot| Duration::from_secs_f64(slot as f64 / rate)).collect());
        }
        let mut draw = Draw::new(seed, u64::MAX);
        let mut at = 0.0;
        let moments = std::iter::from_fn(|| {
            at += draw.exponential(1.0 / rate);
            (at < duration.as_secs_f64()).then(|| Duration::from_secs_f64(at))
        });
        Ok(moments.take(REQUESTS_MAX).collect())
    }
}

/// One line of a file to replay. The `requests.jsonl` of a run is one; so are traces with the other names.
#[derive(Debug, Deserialize)]
struct Line {
    #[serde(alias = "timestamp", alias = "timestamp_ms")]
    scheduled_ms: f64,
    kind: Option<Kind>,
    #[serde(alias = "input_length")]
    prompt_tokens: Option<u32>,
    #[serde(alias = "output_length")]
    output_tokens: Option<u32>,
}

/// Reads requests and their moments, moved so that the first leaves at once. What a line leaves open is drawn.
pub(crate) fn replay(path: &Path, recipe: &Recipe) -> anyhow::Result<(Vec<Duration>, Vec<Ask>)> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse(&text, recipe).with_context(|| format!("replaying {}", path.display()))
}

fn parse(text: &str, recipe: &Recipe) -> anyhow::Result<(Vec<Duration>, Vec<Ask>)> {
    let mut requests = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line: Line = serde_json::from_str(line).with_context(|| format!("line {}", index + 1))?;
        let at = line.scheduled_ms;
        anyhow::ensure!(at.is_finite() && at.abs() < 1e12, "line {}: the moment {at} ms makes no sense", index + 1);
        let drawn = recipe.ask(requests.len() as u64);
        let ask = Ask {
            kind: line.kind.unwrap_or(drawn.kind),
            prompt: line.prompt_tokens.unwrap_or(drawn.prompt).max(1),
            output: line.output_tokens.unwrap_or(drawn.output).max(1),
            ..drawn
        };
        requests.push((at, ask));
        anyhow::ensure!(requests.len() <= REQUESTS_MAX, "more than {REQUESTS_MAX} requests");
    }
    requests.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    let first = requests.first().context("there are no requests in it")?.0;
    Ok(requests.into_iter().map(|(at, ask)| (Duration::from_secs_f64((at - first) / 1000.0), ask)).unzip())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Workload;
    use crate::workload::tests::recipe;

    #[test]
    fn a_constant_load_has_equal_gaps() {
        let schedule = Arrivals::Constant.schedule(4.0, Duration::from_secs(2), 0).unwrap();
        let expected: Vec<Duration> = (0..8).map(|slot| Duration::from_millis(slot * 250)).collect();
        assert_eq!(schedule, expected);
    }

    #[test]
    fn a_poisson_load_has_the_rate_and_the_spread_of_one() {
        let schedule = Arrivals::Poisson.schedule(100.0, Duration::from_secs(200), 9).unwrap();
        assert!((19_400..20_600).contains(&schedule.len()), "{}", schedule.len());
        let gaps: Vec<f64> = schedule.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((deviation / mean - 1.0).abs() < 0.05, "gaps of a Poisson process deviate by their mean");
        assert_eq!(schedule, Arrivals::Poisson.schedule(100.0, Duration::from_secs(200), 9).unwrap());
    }

    #[test]
    fn a_file_is_replayed_in_order_from_its_first_moment() {
        let recipe = recipe(Workload::Completions);
        let text = "{\"timestamp\": 3500, \"input_length\": 12, \"output_length\": 3}\n\n\
                    {\"scheduled_ms\": 1000.5, \"kind\": \"whole\"}\n";
        let (moments, asks) = parse(text, &recipe).unwrap();
        assert_eq!(moments, [Duration::ZERO, Duration::from_micros(2_499_500)]);
        assert_eq!((asks[0].kind, asks[1].kind), (Kind::Whole, Kind::Stream));
        assert_eq!((asks[1].prompt, asks[1].output), (12, 3));
        for bad in ["", "{}", "{\"timestamp\": \"x\"}", "[1"] {
            assert!(parse(bad, &recipe).is_err(), "{bad}");
        }
    }
}
