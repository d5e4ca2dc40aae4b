//! A metric for each label set, in the order of the labels, so that two scrapes of the same state are the same text.
//!
//! Invariants: the number of label sets is bounded by [`LABEL_SETS_MAX`]; label sets beyond it share one metric that is not
//! exported, so that a bug in a caller cannot grow memory without limit.
//!
//! It refuses to know which metrics exist.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// The most label sets of one metric. Labels are stages, nodes, models and closed enums, never what a client sends.
pub const LABEL_SETS_MAX: usize = 4096;

/// A metric for each label set. Clones share it.
#[derive(Debug, Clone)]
pub struct Labelled<L, M> {
    shared: Arc<Shared<L, M>>,
}

#[derive(Debug)]
struct Shared<L, M> {
    metrics: RwLock<BTreeMap<L, M>>,
    overflow: M,
}

impl<L, M: Default> Default for Labelled<L, M> {
    fn default() -> Self {
        Self { shared: Arc::new(Shared { metrics: RwLock::new(BTreeMap::new()), overflow: M::default() }) }
    }
}

impl<L: Ord + Clone, M: Clone + Default> Labelled<L, M> {
    /// The metric of a label set, created at zero if it is new. The result shares the metric, so keep it where it is hot.
    pub fn of(&self, labels: &L) -> M {
        if let Some(metric) = self.shared.metrics.read().unwrap_or_else(PoisonError::into_inner).get(labels) {
            return metric.clone();
        }
        let mut metrics = self.shared.metrics.write().unwrap_or_else(PoisonError::into_inner);
        if metrics.len() >= LABEL_SETS_MAX && !metrics.contains_key(labels) {
            return self.shared.overflow.clone();
        }
        metrics.entry(labels.clone()).or_default().clone()
    }

    /// Every label set with its metric, in order.
    pub fn all(&self) -> Vec<(L, M)> {
        let metrics = self.shared.metrics.read().unwrap_or_else(PoisonError::into_inner);
        metrics.iter().map(|(labels, metric)| (labels.clone(), metric.clone())).collect()
    }
}

impl<L, M: TypedMetric> TypedMetric for Labelled<L, M> {
    const TYPE: MetricType = M::TYPE;
}

impl<L: EncodeLabelSet, M: EncodeMetric + TypedMetric> EncodeMetric for Labelled<L, M> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let metrics = self.shared.metrics.read().unwrap_or_else(PoisonError::into_inner);
        for (labels, metric) in metrics.iter() {
            metric.encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }

    fn is_empty(&self) -> bool {
        self.shared.metrics.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}
