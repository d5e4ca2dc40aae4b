//! The accounts of the stages and edges of this node, and the metrics computed from them.
//!
//! Invariants: there is one account for each stage and each edge of the running graph, and the engine alone writes them,
//! with the same code for every stage.
//!
//! It refuses to know what flows.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use butterfly_topology::{NodeId, StageName};
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::profile::{EdgeProfile, StageProfile};
use super::states::{StageState, StageStates};
use super::tap::{TapError, TapRequest, TapStream, Taps};
use super::timing::Timing;

/// The two ends of an edge, each as `stage.port`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
pub struct EdgeLabel {
    /// Where items come from.
    pub from: String,
    /// Where they go.
    pub to: String,
}

impl EdgeLabel {
    /// A label of two ends.
    pub fn new(from: impl Into<String>, to: impl Into<String>) -> Self {
        Self { from: from.into(), to: to.into() }
    }
}

impl std::fmt::Display for EdgeLabel {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} -> {}", self.from, self.to)
    }
}

/// What is counted of one edge.
#[derive(Debug)]
pub struct EdgeMeters {
    pub(crate) label: EdgeLabel,
    pub(crate) capacity_items: usize,
    pub(crate) capacity_bytes: usize,
    queued_items: AtomicU64,
    queued_bytes: AtomicU64,
    items: AtomicU64,
    bytes: AtomicU64,
    /// How long sends waited for room.
    pub(crate) send: Timing,
    /// How long items waited in the queue.
    pub(crate) queue: Timing,
    /// Whoever looks at what passes.
    pub(crate) taps: Taps,
}

impl EdgeMeters {
    pub(crate) fn new(label: EdgeLabel, capacity_items: usize, capacity_bytes: usize) -> Self {
        Self {
            label,
            capacity_items,
            capacity_bytes,
            queued_items: AtomicU64::new(0),
            queued_bytes: AtomicU64::new(0),
            items: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            send: Timing::new(),
            queue: Timing::new(),
            taps: Taps::default(),
        }
    }

    pub(crate) fn entered(&self, bytes: usize) {
        self.queued_items.fetch_add(1, Ordering::Relaxed);
        self.queued_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.items.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Takes back [`entered`](Self::entered), for an item that the queue refused.
    pub(crate) fn refused(&self, bytes: usize) {
        self.left(bytes);
        self.items.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn left(&self, bytes: usize) {
        self.queued_items.fetch_sub(1, Ordering::Relaxed);
        self.queued_bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    /// Items in the queue now.
    pub fn queued_items(&self) -> u64 {
        self.queued_items.load(Ordering::Relaxed)
    }

    /// Bytes in the queue now.
    pub fn queued_bytes(&self) -> u64 {
        self.queued_bytes.load(Ordering::Relaxed)
    }

    /// Items that entered the queue so far.
    pub fn items(&self) -> u64 {
        self.items.load(Ordering::Relaxed)
    }

    /// Bytes that entered the queue so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Its two ends.
    pub fn label(&self) -> &EdgeLabel {
        &self.label
    }

    /// Its room in items.
    pub fn capacity_items(&self) -> u64 {
        self.capacity_items as u64
    }

    /// How long sends waited for room.
    pub fn send(&self) -> &Timing {
        &self.send
    }

    /// How long items waited in the queue.
    pub fn queue(&self) -> &Timing {
        &self.queue
    }

    fn profile(&self) -> EdgeProfile {
        EdgeProfile {
            from: self.label.from.clone(),
            to: self.label.to.clone(),
            items: self.items(),
            bytes: self.bytes(),
            queued_items: self.queued_items(),
            queued_bytes: self.queued_bytes(),
            capacity_items: self.capacity_items as u64,
            capacity_bytes: self.capacity_bytes as u64,
            send: self.send.quantiles(),
            queue: self.queue.quantiles(),
        }
    }
}

/// The accounts of one node, in the order of the graph.
#[derive(Debug, Default)]
pub(super) struct GraphMeters {
    stages: Mutex<Vec<(StageName, StageStates)>>,
    edges: Mutex<Vec<Arc<EdgeMeters>>>,
}

impl GraphMeters {
    /// Adds a stage, in place of an earlier one of the same name.
    pub(super) fn add_stage(&self, name: StageName, states: StageStates) {
        let mut stages = lock(&self.stages);
        stages.retain(|(existing, _)| *existing != name);
        stages.push((name, states));
    }

    pub(super) fn stage(&self, name: &str) -> Option<StageStates> {
        let stages = lock(&self.stages);
        stages.iter().find(|(existing, _)| existing.as_str() == name).map(|(_, states)| states.clone())
    }

    /// Adds an edge, in place of an earlier one between the same ends.
    pub(super) fn add_edge(&self, meters: Arc<EdgeMeters>) {
        let mut edges = lock(&self.edges);
        edges.retain(|existing| existing.label != meters.label);
        edges.push(meters);
    }

    /// Puts a tap on the edges that enter a stage, or else on those that leave it.
    pub(super) fn tap(&self, stage: &str, request: TapRequest) -> Result<TapStream, TapError> {
        let edges = lock(&self.edges);
        let at = |end: fn(&EdgeLabel) -> &str| -> Vec<&Taps> {
            let is_meant = |meters: &&Arc<EdgeMeters>| end(&meters.label).split('.').next() == Some(stage);
            edges.iter().filter(is_meant).map(|meters| &meters.taps).collect()
        };
        let mut taps = at(|label| &label.to);
        if taps.is_empty() {
            taps = at(|label| &label.from);
        }
        if taps.is_empty() {
            return Err(TapError::NoEdge(stage.to_owned()));
        }
        TapStream::on(taps.into_iter(), request)
    }

    pub(super) fn stages(&self) -> Vec<(StageName, StageStates)> {
        lock(&self.stages).clone()
    }

    pub(super) fn edges(&self) -> Vec<Arc<EdgeMeters>> {
        lock(&self.edges).clone()
    }

    pub(super) fn stage_profiles(&self) -> Vec<StageProfile> {
        let stages = lock(&self.stages);
        let profile = |(name, states): &(StageName, StageStates)| {
            let times = states.times();
            let seconds = |state| times.of(state).as_secs_f64();
            StageProfile {
                name: name.to_string(),
                busy: seconds(StageState::Busy),
                starved: seconds(StageState::Starved),
                blocked: seconds(StageState::Blocked),
                verifying: seconds(StageState::Verifying),
                items: states.items(),
                service: states.service().quantiles(),
            }
        };
        stages.iter().map(profile).collect()
    }

    pub(super) fn edge_profiles(&self) -> Vec<EdgeProfile> {
        lock(&self.edges).iter().map(|meters| meters.profile()).collect()
    }

    pub(super) fn register(self: &Arc<Self>, registry: &mut Registry, node: &NodeId) {
        let metric = |of| GraphMetric { graph: Arc::clone(self), node: node.to_string(), of };
        registry.register("stage_state_seconds", "Time of a stage in each state", metric(Of::StageState));
        registry.register("stage_duration_seconds", "Service time of a stage for each item", metric(Of::StageDuration));
        registry.register("edge_queue_items", "Items in the queue of an edge", metric(Of::EdgeItems));
        registry.register("edge_queue_capacity_items", "Room of an edge in items", metric(Of::EdgeCapacity));
        registry.register("edge_send_seconds", "Wait of a send for room", metric(Of::EdgeSend));
        registry.register("edge_bytes", "Bytes that entered an edge", metric(Of::EdgeBytes));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A metric that is computed from the accounts when it is scraped.
#[derive(Debug)]
struct GraphMetric {
    graph: Arc<GraphMeters>,
    node: String,
    of: Of,
}

#[derive(Debug, Clone, Copy)]
enum Of {
    StageState,
    StageDuration,
    EdgeItems,
    EdgeCapacity,
    EdgeSend,
    EdgeBytes,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageStateLabels {
    stage: String,
    node: String,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabel {
    stage: String,
}

impl EncodeMetric for GraphMetric {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        match self.of {
            Of::StageState | Of::StageDuration => {
                let stages = lock(&self.graph.stages);
                stages.iter().try_for_each(|(name, states)| self.encode_stage(&mut encoder, name, states))
            }
            Of::EdgeItems | Of::EdgeCapacity | Of::EdgeSend | Of::EdgeBytes => {
                let edges = lock(&self.graph.edges);
                edges.iter().try_for_each(|meters| self.encode_edge(&mut encoder, meters))
            }
        }
    }

    fn metric_type(&self) -> MetricType {
        match self.of {
            Of::StageState | Of::EdgeBytes => MetricType::Counter,
            Of::EdgeItems | Of::EdgeCapacity => MetricType::Gauge,
            Of::StageDuration | Of::EdgeSend => MetricType::Histogram,
        }
    }
}

impl GraphMetric {
    fn encode_stage(
        &self,
        encoder: &mut MetricEncoder<'_>,
        name: &StageName,
        states: &StageStates,
    ) -> Result<(), std::fmt::Error> {
        let stage = name.to_string();
        if let Of::StageDuration = self.of {
            return states.service().encode(encoder.encode_family(&StageLabel { stage })?);
        }
        let times = states.times();
        for state in StageState::ALL {
            let labels = StageStateLabels { stage: stage.clone(), node: self.node.clone(), state: state.name() };
            let seconds = times.of(state).as_secs_f64();
            encoder.encode_family(&labels)?.encode_counter::<NoLabelSet, f64, f64>(&seconds, None)?;
        }
        Ok(())
    }

    fn encode_edge(&self, encoder: &mut MetricEncoder<'_>, meters: &EdgeMeters) -> Result<(), std::fmt::Error> {
        let mut encoder = encoder.encode_family(&meters.label)?;
        match self.of {
            Of::EdgeItems => encoder.encode_gauge(&meters.queued_items()),
            Of::EdgeCapacity => encoder.encode_gauge(&(meters.capacity_items as u64)),
            Of::EdgeBytes => encoder.encode_counter::<NoLabelSet, u64, f64>(&meters.bytes(), None),
            Of::EdgeSend => meters.send.encode(encoder),
            Of::StageState | Of::StageDuration => Ok(()),
        }
    }
}
