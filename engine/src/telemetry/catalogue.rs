//! The metrics that exist, each under its final name, and the labels they may have.
//!
//! Fields carry the names that are exported (with the prefix `butterfly_`). Metrics of stages and edges are not here:
//! they are computed from the accounts in [`graph`](super::graph).
//!
//! Invariants: the catalogue is closed: nothing else registers a metric. Labels are node ids, stage names, model names
//! and closed sets; never request ids, never what a client sends. Every label set that is known starts at zero, which is
//! what the `declare` methods are for.
//!
//! It refuses to know when anything is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use butterfly_topology::NodeId;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::labelled::Labelled;
use super::timing::Timing;

/// A gauge with a fraction.
pub type Level = Gauge<f64, AtomicU64>;

/// How a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TaskStatus {
    /// Answered.
    Completed,
    /// Answered with an error that is not the client's.
    Failed,
    /// Given up by the client.
    Cancelled,
    /// Refused: invalid, over a limit, or no room.
    Rejected,
}

impl TaskStatus {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Completed, Self::Failed, Self::Cancelled, Self::Rejected];

    /// The label's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Rejected => "rejected",
        }
    }
}

/// What a verifier found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VerificationResult {
    /// The node's vote agrees with the certificate.
    Agree,
    /// The node's vote contradicts the certificate.
    Mismatch,
    /// The node did not vote in time.
    Timeout,
}

impl VerificationResult {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Agree, Self::Mismatch, Self::Timeout];

    /// The label's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agree => "agree",
            Self::Mismatch => "mismatch",
            Self::Timeout => "timeout",
        }
    }
}

/// State of a circuit breaker, with the number it is exported as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CircuitState {
    /// 0: attempts are made.
    Closed,
    /// 1: one attempt probes.
    HalfOpen,
    /// 2: no attempt is made.
    Open,
}

impl CircuitState {
    /// The number exported.
    pub fn number(self) -> i64 {
        match self {
            Self::Closed => 0,
            Self::HalfOpen => 1,
            Self::Open => 2,
        }
    }
}

impl EncodeLabelValue for TaskStatus {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.name().encode(encoder)
    }
}

impl EncodeLabelValue for VerificationResult {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.name().encode(encoder)
    }
}

/// Labels of `tasks_total`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub struct TaskLabels {
    /// The model's name.
    pub model: String,
    /// What kind of task, from a closed set that the stages declare.
    pub kind: &'static str,
    /// How it ended.
    pub status: TaskStatus,
}

/// The model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub struct ModelLabel {
    /// The model's name.
    pub model: String,
}

/// The node concerned.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub struct NodeLabel {
    /// The node's id.
    pub node: String,
}

impl From<&NodeId> for NodeLabel {
    fn from(node: &NodeId) -> Self {
        Self { node: node.to_string() }
    }
}

/// A phase of the protocol and what came of it, both from closed sets that the stages declare.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub struct PhaseLabels {
    /// The phase.
    pub phase: &'static str,
    /// What came of it.
    pub result: &'static str,
}

/// Labels of `verifications_total`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub struct VerificationLabels {
    /// The node that was verified.
    pub node: String,
    /// What was found.
    pub result: VerificationResult,
}

/// Hits among lookups, exported as one ratio; zero before the first lookup.
#[derive(Debug, Clone, Default)]
pub struct HitRatio {
    counts: Arc<(AtomicU64, AtomicU64)>,
}

impl HitRatio {
    /// Counts a lookup that was answered from the cache.
    pub fn hit(&self) {
        self.counts.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a lookup that was not.
    pub fn miss(&self) {
        self.counts.1.fetch_add(1, Ordering::Relaxed);
    }

    /// Hits by lookups, in `[0, 1]`.
    pub fn ratio(&self) -> f64 {
        let hits = self.counts.0.load(Ordering::Relaxed);
        let lookups = hits.saturating_add(self.counts.1.load(Ordering::Relaxed));
        if lookups == 0 { 0.0 } else { hits as f64 / lookups as f64 }
    }
}

impl EncodeMetric for HitRatio {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.encode_gauge(&self.ratio())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}

/// The counters of one peer, for a link to keep.
#[derive(Debug, Clone)]
pub struct PeerMeters {
    /// Bytes of frames to and from the peer.
    pub bytes_transferred_total: Counter,
    /// Frames sent to it.
    pub messages_sent_total: Counter,
    /// Frames received from it.
    pub messages_received_total: Counter,
    /// Attempts after the first, of connecting or of sending.
    pub retries_total: Counter,
    /// Round-trip time, in seconds.
    pub peer_rtt_seconds: Level,
    /// See [`CircuitState::number`].
    pub circuit_state: Gauge,
}

/// Every metric that is not computed from the graph. Clones share the values.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Tasks that ended.
    pub tasks_total: Labelled<TaskLabels, Counter>,
    /// From admission to the end of the answer.
    pub task_latency_seconds: Labelled<ModelLabel, Timing>,
    /// From admission to the first token.
    pub time_to_first_token_seconds: Labelled<ModelLabel, Timing>,
    /// Between one token and the next.
    pub inter_token_latency_seconds: Labelled<ModelLabel, Timing>,
    /// From admission to the start of computing.
    pub task_queue_seconds: Labelled<ModelLabel, Timing>,
    /// Tasks that hold a permit.
    pub tasks_running: Gauge,
    /// Tasks admitted that wait for a permit.
    pub tasks_waiting: Gauge,
    /// Tokens of prompts.
    pub prompt_tokens_total: Counter,
    /// Tokens generated.
    pub generation_tokens_total: Counter,
    /// Used share of the room for keys and values.
    pub kv_cache_usage_ratio: Labelled<NodeLabel, Level>,
    /// Bytes of frames to and from a peer.
    pub bytes_transferred_total: Labelled<NodeLabel, Counter>,
    /// Frames sent to a peer.
    pub messages_sent_total: Labelled<NodeLabel, Counter>,
    /// Frames received from a peer.
    pub messages_received_total: Labelled<NodeLabel, Counter>,
    /// Attempts after the first, of connecting or of sending to a peer.
    pub retries_total: Labelled<NodeLabel, Counter>,
    /// Round-trip time to a peer.
    pub peer_rtt_seconds: Labelled<NodeLabel, Level>,
    /// See [`CircuitState::number`].
    pub circuit_state: Labelled<NodeLabel, Gauge>,
    /// Time to compute a plan.
    pub partition_computation_duration_seconds: Timing,
    /// Plans answered from the cache.
    pub partition_cache_hit_ratio: HitRatio,
    /// How near the plan comes to an even division of the work by the speed of the nodes: 1 is even.
    pub partition_quality_ratio: Level,
    /// Repeated requests answered from the result cache.
    pub result_cache_hit_ratio: HitRatio,
    /// Rounds of the protocol.
    pub consensus_rounds_total: Labelled<PhaseLabels, Counter>,
    /// Transitions between its phases.
    pub phase_transitions_total: Labelled<PhaseLabels, Counter>,
    /// Nodes that failed in a phase.
    pub node_failures_total: Labelled<PhaseLabels, Counter>,
    /// Votes of a node compared with a certificate.
    pub verifications_total: Labelled<VerificationLabels, Counter>,
    /// Time to verify.
    pub verification_seconds: Timing,
    /// Evidence found against a node.
    pub evidence_total: Labelled<NodeLabel, Counter>,
    /// Time to make a batch durable.
    pub commit_seconds: Timing,
    /// Receipts made durable.
    pub receipts_total: Counter,
    /// Checkpoints certified.
    pub checkpoints_total: Counter,
    /// Deliveries of events given up because a subscriber was full.
    pub events_dropped_total: Counter,
}

impl Metrics {
    /// Starts at zero what is known of a model: its latencies, and each kind of task with each status.
    pub fn declare_model(&self, model: &str, kinds: &[&'static str]) {
        let label = ModelLabel { model: model.to_owned() };
        for timings in self.latencies().map(|(_, _, timings)| timings) {
            timings.of(&label);
        }
        for (kind, status) in kinds.iter().flat_map(|kind| TaskStatus::ALL.map(|status| (*kind, status))) {
            self.tasks_total.of(&TaskLabels { model: model.to_owned(), kind, status });
        }
    }

    /// Starts at zero what consensus will count: the outcomes of phases, transitions, and failures in a phase.
    pub fn declare_phases(&self, rounds: &[PhaseLabels], transitions: &[PhaseLabels], failures: &[PhaseLabels]) {
        let families = [&self.consensus_rounds_total, &self.phase_transitions_total, &self.node_failures_total];
        for (family, labels) in families.into_iter().zip([rounds, transitions, failures]) {
            for label in labels {
                family.of(label);
            }
        }
    }

    /// Starts at zero what is counted of a member of the roster, this node included.
    pub fn declare_member(&self, node: &NodeId) {
        let label = NodeLabel::from(node);
        self.peer(node);
        self.kv_cache_usage_ratio.of(&label);
        self.evidence_total.of(&label);
        for result in VerificationResult::ALL {
            self.verifications_total.of(&VerificationLabels { node: label.node.clone(), result });
        }
    }

    /// The counters of a peer, at zero if it is new.
    pub fn peer(&self, node: &NodeId) -> PeerMeters {
        let label = NodeLabel::from(node);
        PeerMeters {
            bytes_transferred_total: self.bytes_transferred_total.of(&label),
            messages_sent_total: self.messages_sent_total.of(&label),
            messages_received_total: self.messages_received_total.of(&label),
            retries_total: self.retries_total.of(&label),
            peer_rtt_seconds: self.peer_rtt_seconds.of(&label),
            circuit_state: self.circuit_state.of(&label),
        }
    }

    /// The latencies that are exported as quantiles too: name of the quantiles, help, metric.
    fn latencies(&self) -> [(&'static str, &'static str, &Labelled<ModelLabel, Timing>); 4] {
        [
            ("task_latency_quantile_seconds", "Quantiles of task_latency_seconds", &self.task_latency_seconds),
            (
                "time_to_first_token_quantile_seconds",
                "Quantiles of time_to_first_token_seconds",
                &self.time_to_first_token_seconds,
            ),
            (
                "inter_token_latency_quantile_seconds",
                "Quantiles of inter_token_latency_seconds",
                &self.inter_token_latency_seconds,
            ),
            ("task_queue_quantile_seconds", "Quantiles of task_queue_seconds", &self.task_queue_seconds),
        ]
    }

    /// Registers everything. Counters are registered without `_total` and the info without `_info`: the encoder adds them.
    pub(super) fn register(&self, registry: &mut Registry, node: &NodeId) {
        let build = Info::new([("version", env!("CARGO_PKG_VERSION").to_owned()), ("node", node.to_string())].to_vec());
        registry.register("build", "The program that runs", build);
        self.register_tasks(registry);
        self.register_network(registry);
        self.register_protocol(registry);
        registry.register(
            "events_dropped",
            "Events not delivered to a full subscriber",
            self.events_dropped_total.clone(),
        );
    }

    fn register_tasks(&self, registry: &mut Registry) {
        registry.register("tasks", "Tasks that ended", self.tasks_total.clone());
        registry.register("task_latency_seconds", "Admission to end of answer", self.task_latency_seconds.clone());
        registry.register(
            "time_to_first_token_seconds",
            "Admission to first token",
            self.time_to_first_token_seconds.clone(),
        );
        registry.register(
            "inter_token_latency_seconds",
            "One token to the next",
            self.inter_token_latency_seconds.clone(),
        );
        registry.register("task_queue_seconds", "Admission to start of computing", self.task_queue_seconds.clone());
        for (name, help, timings) in self.latencies() {
            registry.register(name, help, LatencyQuantiles(timings.clone()));
        }
        registry.register("tasks_running", "Tasks that hold a permit", self.tasks_running.clone());
        registry.register("tasks_waiting", "Tasks that wait for a permit", self.tasks_waiting.clone());
        registry.register("prompt_tokens", "Tokens of prompts", self.prompt_tokens_total.clone());
        registry.register("generation_tokens", "Tokens generated", self.generation_tokens_total.clone());
        registry.register("kv_cache_usage_ratio", "Used share of the KV cache", self.kv_cache_usage_ratio.clone());
    }

    fn register_network(&self, registry: &mut Registry) {
        registry.register(
            "bytes_transferred",
            "Bytes of frames to and from a peer",
            self.bytes_transferred_total.clone(),
        );
        registry.register("messages_sent", "Frames sent to a peer", self.messages_sent_total.clone());
        registry.register("messages_received", "Frames received from a peer", self.messages_received_total.clone());
        registry.register("retries", "Attempts after the first", self.retries_total.clone());
        registry.register("peer_rtt_seconds", "Round-trip time to a peer", self.peer_rtt_seconds.clone());
        registry.register("circuit_state", "0 closed, 1 half-open, 2 open", self.circuit_state.clone());
    }

    fn register_protocol(&self, registry: &mut Registry) {
        registry.register(
            "partition_computation_duration_seconds",
            "Time to compute a plan",
            self.partition_computation_duration_seconds.clone(),
        );
        registry.register(
            "partition_cache_hit_ratio",
            "Plans answered from the cache",
            self.partition_cache_hit_ratio.clone(),
        );
        registry.register(
            "partition_quality_ratio",
            "How even the plan divides the work by the speed of the nodes",
            self.partition_quality_ratio.clone(),
        );
        registry.register(
            "result_cache_hit_ratio",
            "Repeated requests answered from the result cache",
            self.result_cache_hit_ratio.clone(),
        );
        registry.register("consensus_rounds", "Rounds of the protocol", self.consensus_rounds_total.clone());
        registry.register("phase_transitions", "Transitions between phases", self.phase_transitions_total.clone());
        registry.register("node_failures", "Nodes that failed in a phase", self.node_failures_total.clone());
        registry.register("verifications", "Votes compared with a certificate", self.verifications_total.clone());
        registry.register("verification_seconds", "Time to verify", self.verification_seconds.clone());
        registry.register("evidence", "Evidence found against a node", self.evidence_total.clone());
        registry.register("commit_seconds", "Time to make a batch durable", self.commit_seconds.clone());
        registry.register("receipts", "Receipts made durable", self.receipts_total.clone());
        registry.register("checkpoints", "Checkpoints certified", self.checkpoints_total.clone());
    }
}

/// Quantiles of a latency as gauges, for whoever does not aggregate buckets.
#[derive(Debug)]
struct LatencyQuantiles(Labelled<ModelLabel, Timing>);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QuantileLabels {
    model: String,
    quantile: &'static str,
}

impl EncodeMetric for LatencyQuantiles {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (label, timing) in self.0.all() {
            let quantiles = timing.quantiles();
            for (quantile, value) in [("0.5", quantiles.p50), ("0.95", quantiles.p95), ("0.99", quantiles.p99)] {
                let labels = QuantileLabels { model: label.model.clone(), quantile };
                encoder.encode_family(&labels)?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}
