//! What a node tells about itself: metrics, events, and a profile of its stages and edges.
//!
//! Invariants: counting never waits for whoever reads; one telemetry belongs to one node, so several nodes in one process
//! do not mix.
//!
//! It refuses to know where metrics are sent: [`Telemetry::render`] and [`Telemetry::report`] give text.

mod catalogue;
mod events;
mod graph;
mod labelled;
mod profile;
mod report;
mod states;
mod tap;
mod text;
mod timing;
mod trace;

use std::sync::Arc;

use butterfly_topology::{NodeId, StageName};
use prometheus_client::registry::Registry;

pub use catalogue::{
    CircuitState, HitRatio, Level, Metrics, ModelLabel, NodeLabel, PeerMeters, PhaseLabels, TaskLabels, TaskStatus,
    VerificationLabels, VerificationResult,
};
pub use events::{EVENTS_WAITING_MAX, Event, EventBus, SUBSCRIBERS_MAX, Subscriber, TooManySubscribers};
pub use graph::{EdgeLabel, EdgeMeters};
pub use labelled::{LABEL_SETS_MAX, Labelled};
pub use profile::{EdgeProfile, Profile, StageProfile};
pub use prometheus_client::metrics::counter::Counter;
pub use prometheus_client::metrics::gauge::Gauge;
pub use report::ReportForm;
pub use states::{StageState, StageStates, StateGuard, StateTimes};
pub use tap::{TAPS_MAX, TapError, TapRequest, TapStream, Tapped};
pub use text::{Sample, TextFormat, samples};
pub use timing::{DURATION_MAX, Quantiles, Timing};
pub use trace::{Context, MARKS_MAX, Mark, REQUEST_ID_BYTES_MAX, TRACED_MAX, Timeline, TraceContext, TraceKey, Traces};

use crate::channel::Bounds;
use crate::clock::{Clock, RealClock};
use graph::GraphMeters;

/// Everything that is counted and told about one node.
#[derive(Debug)]
pub struct Telemetry {
    node: NodeId,
    clock: Arc<dyn Clock>,
    registry: Registry,
    metrics: Metrics,
    events: EventBus,
    graph: Arc<GraphMeters>,
    traces: Traces,
}

impl Telemetry {
    /// The telemetry of a node, on real time.
    pub fn new(node: NodeId) -> Self {
        Self::with_clock(node, RealClock::shared())
    }

    /// The telemetry of a node, on the given time.
    pub fn with_clock(node: NodeId, clock: Arc<dyn Clock>) -> Self {
        let mut registry = Registry::with_prefix("butterfly");
        let metrics = Metrics::default();
        metrics.register(&mut registry, &node);
        let graph = Arc::new(GraphMeters::default());
        graph.register(&mut registry, &node);
        let events = EventBus::new(Arc::clone(&clock), metrics.events_dropped_total.clone());
        let traces = Traces::new(Arc::clone(&clock));
        Self { node, clock, registry, metrics, events, graph, traces }
    }

    /// The node this is about.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// The metrics that stages and links write.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The bus of events.
    pub fn events(&self) -> &EventBus {
        &self.events
    }

    /// What happened to recent requests on this node.
    pub fn traces(&self) -> &Traces {
        &self.traces
    }

    /// The clock that everything here is told by.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// The counters of a peer.
    pub fn peer(&self, node: &NodeId) -> PeerMeters {
        self.metrics.peer(node)
    }

    /// All metrics as text. Empty if formatting failed, which it does only when memory runs out.
    pub fn render(&self, format: TextFormat) -> String {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => format.finish(&text),
            Err(std::fmt::Error) => String::new(),
        }
    }

    /// Where the time and the bytes went so far.
    pub fn profile(&self) -> Profile {
        Profile { node: self.node.to_string(), stages: self.graph.stage_profiles(), edges: self.graph.edge_profiles() }
    }

    /// Opens the account of a stage, in place of an earlier one of the same name.
    pub fn open_stage(&self, name: &StageName) -> StageStates {
        let states = StageStates::detached(Arc::clone(&self.clock));
        self.graph.add_stage(name.clone(), states.clone());
        states
    }

    /// Looks at the items that a stage takes; at those that it sends, if it takes none from an edge.
    pub fn tap(&self, stage: &str, request: TapRequest) -> Result<TapStream, TapError> {
        self.graph.tap(stage, request)
    }

    /// The account of a stage of this node.
    pub fn stage_states(&self, name: &str) -> Option<StageStates> {
        self.graph.stage(name)
    }

    /// The accounts of all stages, in the order of the graph.
    pub fn stages(&self) -> Vec<(StageName, StageStates)> {
        self.graph.stages()
    }

    /// The accounts of all edges, in the order of the graph.
    pub fn edges(&self) -> Vec<Arc<EdgeMeters>> {
        self.graph.edges()
    }

    /// Opens the account of an edge, in place of an earlier one between the same ends.
    pub fn open_edge(&self, label: EdgeLabel, bounds: Bounds) -> Arc<EdgeMeters> {
        let meters = Arc::new(EdgeMeters::new(label, bounds.items, bounds.bytes));
        self.graph.add_edge(Arc::clone(&meters));
        meters
    }
}
