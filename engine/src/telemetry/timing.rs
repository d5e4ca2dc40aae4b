//! Durations as distributions: one record serves exact quantiles, a Prometheus histogram, and a profile.
//!
//! Invariants: memory is fixed at creation; a recorded duration keeps two significant digits and is clamped to one hour.
//!
//! It refuses to know what is timed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};
use serde::{Deserialize, Serialize};

/// Longer durations are recorded as this.
pub const DURATION_MAX: Duration = Duration::from_secs(3600);

/// Two digits: 35 KB for each histogram, and at most 1 % off.
const SIGNIFICANT_DIGITS: u8 = 2;

/// Upper bounds of the exported buckets, in seconds. The last one must stay infinite.
const BUCKETS_SECONDS: [f64; 20] = [
    0.000_01,
    0.000_05,
    0.000_1,
    0.000_5,
    0.001,
    0.002_5,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    120.0,
    f64::INFINITY,
];

/// A distribution of durations. Clones share it.
#[derive(Debug, Clone)]
pub struct Timing {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    /// Nanoseconds. Absent only if its constant bounds were refused, in which case nothing but the sum is kept.
    histogram: Option<Histogram<u64>>,
    sum_seconds: f64,
    count: u64,
}

/// Quantiles of a [`Timing`], in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Quantiles {
    /// Number of durations recorded.
    pub count: u64,
    /// Exact mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Largest.
    pub max: f64,
}

impl Timing {
    /// An empty distribution.
    pub fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, nanoseconds(DURATION_MAX), SIGNIFICANT_DIGITS).ok();
        Self { inner: Arc::new(Mutex::new(Inner { histogram, sum_seconds: 0.0, count: 0 })) }
    }

    /// Records one duration.
    pub fn record(&self, duration: Duration) {
        self.record_many(duration, 1);
    }

    /// Records the same duration `count` times.
    pub fn record_many(&self, duration: Duration, count: u64) {
        let mut inner = self.lock();
        if let Some(histogram) = &mut inner.histogram {
            histogram.saturating_record_n(nanoseconds(duration), count);
        }
        inner.sum_seconds += duration.as_secs_f64() * count as f64;
        inner.count = inner.count.saturating_add(count);
    }

    /// The quantiles so far; all zero if nothing was recorded.
    pub fn quantiles(&self) -> Quantiles {
        let inner = self.lock();
        let Some(histogram) = inner.histogram.as_ref().filter(|histogram| !histogram.is_empty()) else {
            return Quantiles::default();
        };
        let at = |quantile: f64| seconds(histogram.value_at_quantile(quantile));
        Quantiles {
            count: inner.count,
            mean: inner.sum_seconds / inner.count as f64,
            p50: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            p99: at(0.99),
            p999: at(0.999),
            max: seconds(histogram.max()),
        }
    }

    /// A copy of the underlying histogram, in nanoseconds, for reports that want every bucket.
    pub fn histogram(&self) -> Option<Histogram<u64>> {
        self.lock().histogram.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self::new()
    }
}

impl TypedMetric for Timing {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Timing {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let inner = self.lock();
        let mut buckets = BUCKETS_SECONDS.map(|bound| (bound, 0u64));
        for value in inner.histogram.iter().flat_map(|histogram| histogram.iter_recorded()) {
            let seconds = seconds(value.value_iterated_to());
            let bucket = buckets.iter_mut().find(|(bound, _)| seconds <= *bound);
            if let Some((_, count)) = bucket {
                *count += value.count_since_last_iteration();
            }
        }
        let (sum, count) = (inner.sum_seconds, inner.count);
        drop(inner);
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.min(DURATION_MAX).as_nanos()).unwrap_or(u64::MAX)
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_keep_two_digits() {
        let timing = Timing::new();
        for ms in 1..=1000 {
            timing.record(Duration::from_millis(ms));
        }
        let quantiles = timing.quantiles();
        let near =
            |value: f64, expected: f64| assert!((value - expected).abs() <= expected * 0.01, "{value} {expected}");
        near(quantiles.p50, 0.5);
        near(quantiles.p90, 0.9);
        near(quantiles.p99, 0.99);
        near(quantiles.p999, 0.999);
        near(quantiles.max, 1.0);
        assert!((quantiles.mean - 0.5005).abs() < 1e-9);
        assert_eq!(quantiles.count, 1000);
    }

    #[test]
    fn an_absurd_duration_is_clamped_and_nothing_is_all_zero() {
        let timing = Timing::new();
        assert_eq!(timing.quantiles(), Quantiles::default());
        timing.record(Duration::MAX);
        assert!(timing.quantiles().max <= DURATION_MAX.as_secs_f64() * 1.01);
    }
}
