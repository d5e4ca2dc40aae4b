//! The stage graph: stages ordered upstream first, and edges between their ports.
//!
//! Invariants of a [`Graph`] that came from [`crate::parse`]: names are distinct; every edge joins ports of the same
//! item; every output port feeds at most one edge and every required port has one; without its feedback edges the graph
//! has no cycle; every feedback edge has room for all that may travel in its loop. All edges are local to a node: a stage
//! reaches other nodes only through its counterparts there.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::Serialize;

use crate::catalogue::{Catalogue, WhenFull};
use crate::name::{NodeId, StageName};
use crate::value::StageConfig;

/// The most stages of a graph.
pub const STAGES_MAX: usize = 256;
/// Items of an edge when the file does not say.
pub const CAPACITY_ITEMS_DEFAULT: usize = 64;
/// The most items of an edge.
pub const CAPACITY_ITEMS_MAX: usize = 1 << 20;
/// Bytes of an edge when the file does not say: 64 MiB.
pub const CAPACITY_BYTES_DEFAULT: usize = 64 << 20;
/// The most bytes of an edge: 64 GiB.
pub const CAPACITY_BYTES_MAX: u64 = 64 << 30;
/// The key of stages that hand out permits: how many requests each node's instance lets into a loop at once.
pub const PERMITS_KEY: &str = "max_in_flight";
/// The key of stages that bound the frames they send into a loop.
pub const FRAME_BYTES_KEY: &str = "frame_bytes_max";

/// Stages and edges.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Graph {
    /// The stages, upstream first; ties keep the order of the file.
    pub stages: Vec<StageSpec>,
    /// The edges, in the order of the stages they enter.
    pub edges: Vec<EdgeSpec>,
}

/// One `[[stage]]`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageSpec {
    /// Its name within the graph.
    pub name: StageName,
    /// Its kind, one of the catalogue's.
    pub kind: String,
    /// The nodes that may run it; all when `None`. See [`Graph::runs_on`].
    pub on: Option<Vec<NodeId>>,
    /// Its own keys, checked, with defaults applied.
    pub config: StageConfig,
}

/// A port of a stage.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PortRef {
    /// The stage.
    pub stage: StageName,
    /// The port, one of its kind's.
    pub port: &'static str,
}

impl std::fmt::Display for PortRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.stage, self.port)
    }
}

/// A bounded connection from an output port to an input port of the same node.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EdgeSpec {
    /// The output port it leaves by. No two edges share one.
    pub from: PortRef,
    /// The input port it enters.
    pub to: PortRef,
    /// The item type that flows.
    pub item: &'static str,
    /// Its bound in items.
    pub capacity_items: usize,
    /// Its bound in bytes.
    pub capacity_bytes: usize,
    /// Whether it closes a loop.
    pub feedback: bool,
    /// What the sender does when it is full.
    pub full: WhenFull,
}

/// A loop of the graph: what may travel in it, and the edge that must have room for all of that.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoopSpec {
    /// The stages of the loop, in the direction of travel, from the one that the feedback edge enters.
    pub stages: Vec<StageName>,
    /// Index of the feedback edge in [`Graph::edges`].
    pub edge: usize,
    /// Requests that all nodes together let into the loop; `None` when no stage before it hands out permits.
    pub permits: Option<usize>,
    /// The stages that hand them out.
    pub permits_from: Vec<PermitsFrom>,
    /// Frames that one request may have in the loop: one for each replica of the neighbouring slice.
    pub window: usize,
    /// Permits times window, `None` when unknown.
    pub frames: Option<usize>,
}

/// A stage that hands out permits for a loop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PermitsFrom {
    /// The stage.
    pub stage: StageName,
    /// Requests that its instance on one node lets in.
    pub permits: usize,
    /// On how many nodes it runs.
    pub nodes: usize,
}

impl LoopSpec {
    /// Bytes that the feedback edge must hold so that the loop cannot deadlock, given its largest frame. `None` when the
    /// permits are unknown.
    #[must_use]
    pub fn bytes_needed(&self, frame_bytes: u64) -> Option<u64> {
        self.frames.map(|frames| frame_bytes.saturating_mul(frames as u64))
    }
}

impl Graph {
    /// The stage of this name.
    #[must_use]
    pub fn stage(&self, name: &StageName) -> Option<&StageSpec> {
        self.stages.iter().find(|stage| stage.name == *name)
    }

    /// The stages of a kind, upstream first.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a StageSpec> {
        self.stages.iter().filter(move |stage| stage.kind == kind)
    }

    /// The edges that enter a stage.
    pub fn inputs<'a>(&'a self, stage: &'a StageName) -> impl Iterator<Item = &'a EdgeSpec> {
        self.edges.iter().filter(move |edge| edge.to.stage == *stage)
    }

    /// The edges that leave a stage.
    pub fn outputs<'a>(&'a self, stage: &'a StageName) -> impl Iterator<Item = &'a EdgeSpec> {
        self.edges.iter().filter(move |edge| edge.from.stage == *stage)
    }

    /// Whether a stage runs on a node: `on` names the node or is absent, and the stage has no inputs, or its kind is
    /// networked, or some input that is not feedback comes from a stage that runs there. An unknown stage runs nowhere.
    #[must_use]
    pub fn runs_on(&self, stage: &StageName, node: &NodeId, catalogue: &Catalogue) -> bool {
        self.running_on(node, catalogue).contains(stage)
    }

    /// All stages that run on a node, by the rule of [`Graph::runs_on`].
    #[must_use]
    pub fn running_on(&self, node: &NodeId, catalogue: &Catalogue) -> BTreeSet<StageName> {
        let mut running: BTreeSet<StageName> = BTreeSet::new();
        // Upstream first, so every forward input is decided before the stage it enters.
        for stage in &self.stages {
            if stage.on.as_ref().is_some_and(|on| !on.contains(node)) {
                continue;
            }
            let networked = catalogue.kind(&stage.kind).is_some_and(|signature| signature.networked);
            let mut inputs = self.inputs(&stage.name).peekable();
            let fed =
                inputs.peek().is_none() || inputs.any(|edge| !edge.feedback && running.contains(&edge.from.stage));
            if networked || fed {
                running.insert(stage.name.clone());
            }
        }
        running
    }

    /// The loops of the graph, one for each feedback edge, with what may travel in them on a cluster of these nodes.
    #[must_use]
    pub fn loops(&self, nodes: &[NodeId], max_byzantine: usize, catalogue: &Catalogue) -> Vec<LoopSpec> {
        let mut loops = Vec::new();
        let mut running: Option<Vec<BTreeSet<StageName>>> = None;
        for (index, edge) in self.edges.iter().enumerate().filter(|(_, edge)| edge.feedback) {
            let stages = self.path(&edge.to.stage, &edge.from.stage);
            if stages.is_empty() {
                continue;
            }
            let running =
                running.get_or_insert_with(|| nodes.iter().map(|node| self.running_on(node, catalogue)).collect());
            let permits_from = self.permits_into(&stages, running);
            let permits = permits_from.iter().map(|giver| giver.permits.saturating_mul(giver.nodes));
            let permits = (!permits_from.is_empty()).then(|| permits.fold(0, usize::saturating_add));
            let window = max_byzantine.saturating_mul(2).saturating_add(1);
            let frames = permits.map(|permits| permits.saturating_mul(window));
            loops.push(LoopSpec { stages, edge: index, permits, permits_from, window, frames });
        }
        loops
    }

    /// The shortest path between two stages over forward edges, both ends included; empty when there is none.
    fn path(&self, from: &StageName, to: &StageName) -> Vec<StageName> {
        let mut came_from: BTreeMap<&StageName, &StageName> = BTreeMap::new();
        let mut queue = VecDeque::from([from]);
        while let Some(stage) = queue.pop_front() {
            for edge in self.outputs(stage).filter(|edge| !edge.feedback) {
                let next = &edge.to.stage;
                if next != from && !came_from.contains_key(next) {
                    came_from.insert(next, stage);
                    queue.push_back(next);
                }
            }
        }
        let mut path = vec![to.clone()];
        let mut at = to;
        while at != from {
            let Some(before) = came_from.get(at) else { return Vec::new() };
            path.push((*before).clone());
            at = before;
        }
        path.reverse();
        path
    }

    /// The nearest stages at or upstream of these that hand out permits.
    fn permits_into(&self, stages: &[StageName], running: &[BTreeSet<StageName>]) -> Vec<PermitsFrom> {
        let mut found: Vec<PermitsFrom> = Vec::new();
        let mut seen: BTreeSet<&StageName> = stages.iter().collect();
        let mut queue: VecDeque<&StageName> = stages.iter().collect();
        while let Some(name) = queue.pop_front() {
            let permits = self.stage(name).and_then(|stage| stage.config.integer(PERMITS_KEY));
            if let Some(permits) = permits.and_then(|permits| usize::try_from(permits).ok()) {
                let nodes = running.iter().filter(|running| running.contains(name)).count();
                found.push(PermitsFrom { stage: name.clone(), permits, nodes });
                continue;
            }
            for edge in self.inputs(name).filter(|edge| !edge.feedback) {
                if seen.insert(&edge.from.stage) {
                    queue.push_back(&edge.from.stage);
                }
            }
        }
        found
    }
}
