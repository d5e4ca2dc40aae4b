//! A plan: into which slices a model is cut and which nodes hold each.
//!
//! Invariants of a [`Plan`] that came from [`crate::planner`]: the slices are not empty and cover every layer exactly
//! once, in order; every slice is held by 2f+1 distinct nodes of the cluster. Plans enter the epoch digest, so they are a
//! function of their input alone, built from exact integers and IEEE additions, products and quotients.

use std::fmt;
use std::ops::Range;

use serde::Serialize;

use crate::cluster::NodeSpec;
use crate::name::NodeId;

/// The most layers of a model.
pub const LAYERS_MAX: usize = 4096;

/// How a plan is made, from the most to the least informed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Speeds, memory, bandwidth and trust domains, all of which must be known.
    TopologyAware,
    /// Speeds and memory, as far as they are known.
    LoadBalanced,
    /// Equal numbers of layers.
    Uniform,
}

impl Strategy {
    /// All strategies, in the order of degradation.
    pub const ALL: [Strategy; 3] = [Strategy::TopologyAware, Strategy::LoadBalanced, Strategy::Uniform];

    /// The word of the file.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Strategy::TopologyAware => "topology_aware",
            Strategy::LoadBalanced => "load_balanced",
            Strategy::Uniform => "uniform",
        }
    }

    /// The strategy of this word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|strategy| strategy.as_str() == word)
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Slices and replica sets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The slices, first layers first.
    pub slices: Vec<SlicePlan>,
    /// How it was made.
    pub strategy: Strategy,
    /// Strategies that were to be preferred, and why they could not be used.
    pub fallbacks: Vec<(Strategy, String)>,
}

/// One slice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlicePlan {
    /// Its layers, `[first, last)`.
    pub layers: Range<usize>,
    /// Its replica set: 2f+1 distinct nodes, fastest first where speeds are known.
    pub replicas: Vec<NodeId>,
}

/// What one layer costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerCost {
    /// Bytes of its weights in memory. The first layer carries the embedding, the last one the output projection.
    pub weight_bytes: u64,
    /// Bytes of keys and values that it keeps for each position.
    pub kv_bytes_per_position: u64,
    /// Multiply-adds for each position.
    pub work: f64,
    /// Bytes that leave it for each position when a slice ends here.
    pub boundary_bytes: u64,
}

/// What a planner works from.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// The model's layers.
    pub layers: &'a [LayerCost],
    /// The nodes that may hold slices.
    pub nodes: &'a [NodeSpec],
    /// How many nodes may lie, `f`.
    pub max_byzantine: usize,
    /// How many slices; the planner chooses when `None`.
    pub slices: Option<usize>,
    /// Positions that a node must be able to keep in its caches at once, over all requests.
    pub positions_max: u64,
}

/// Why there is no plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// Fewer nodes than one replica set has.
    #[error("a replica set needs {needed} nodes, {available} can take part")]
    NoNodesAvailable {
        /// 2f+1.
        needed: usize,
        /// Nodes given.
        available: usize,
    },
    /// The input contradicts itself.
    #[error("{reason}")]
    InvalidConfiguration {
        /// What contradicts what.
        reason: String,
    },
    /// The nodes have too little of something.
    #[error("{0}")]
    InsufficientResources(Lack),
    /// The strategy needs measurements that are not there.
    #[error("{what} of {} is not known", names(nodes))]
    Unmeasured {
        /// `compute`, `bandwidth` or `domain`.
        what: &'static str,
        /// The nodes without it.
        nodes: Vec<NodeId>,
    },
    /// No strategy gives a plan.
    #[error("no strategy gives a plan: {}", reasons(.0))]
    Exhausted(Vec<(Strategy, PlanError)>),
}

/// What the nodes have too little of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    /// One layer alone is too large for every replica set.
    #[error(
        "layer {layer} needs {} of memory, and no replica set has more than {} (bounded by node {node})",
        bytes_text(*needed_bytes), bytes_text(*available_bytes)
    )]
    LayerMemory {
        /// The layer.
        layer: usize,
        /// Its weights and caches.
        needed_bytes: u64,
        /// What the largest replica set has.
        available_bytes: u64,
        /// The node that has no more.
        node: NodeId,
    },
    /// All replica sets together are too small.
    #[error(
        "the model needs {} of memory, and {slices} replica set{} {} in all",
        bytes_text(*needed_bytes), if *slices == 1 { " has" } else { "s have" }, bytes_text(*available_bytes)
    )]
    TotalMemory {
        /// Weights and caches of all layers.
        needed_bytes: u64,
        /// What the replica sets have in all.
        available_bytes: u64,
        /// How many replica sets there are.
        slices: usize,
    },
    /// There is enough in all, and yet no way to cut whole layers so that each replica set holds its share.
    #[error(
        "no cut into {slices} slices fits: the model needs {} of {} of memory, but layers cannot be split",
        bytes_text(*needed_bytes), bytes_text(*available_bytes)
    )]
    Fragmented {
        /// Weights and caches of all layers.
        needed_bytes: u64,
        /// What the replica sets have in all.
        available_bytes: u64,
        /// How many slices were tried last.
        slices: usize,
    },
    /// A node is too small for the slices it would hold.
    #[error(
        "node {node} has {} of memory and would hold {}",
        bytes_text(*available_bytes), bytes_text(*needed_bytes)
    )]
    NodeMemory {
        /// The node.
        node: NodeId,
        /// Weights and caches of its slices.
        needed_bytes: u64,
        /// Its memory.
        available_bytes: u64,
    },
    /// Too few trust domains for replica sets without two nodes of one.
    #[error(
        "{slices} replica set{} of {needed} nodes in {needed} different domains {} possible with the {available} domain{} there {}",
        if *slices == 1 { "" } else { "s" }, if *slices == 1 { "is not" } else { "are not" },
        if *available == 1 { "" } else { "s" }, if *available == 1 { "is" } else { "are" }
    )]
    Domains {
        /// 2f+1.
        needed: usize,
        /// Distinct domains.
        available: usize,
        /// How many replica sets.
        slices: usize,
    },
}

fn names(nodes: &[NodeId]) -> String {
    const NAMES_SHOWN_MAX: usize = 5;
    let shown: Vec<&str> = nodes.iter().take(NAMES_SHOWN_MAX).map(NodeId::as_str).collect();
    let word = if nodes.len() == 1 { "node" } else { "nodes" };
    let more = match nodes.len().saturating_sub(NAMES_SHOWN_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{word} {}{more}", shown.join(", "))
}

fn reasons(reasons: &[(Strategy, PlanError)]) -> String {
    reasons.iter().map(|(strategy, error)| format!("{strategy}: {error}")).collect::<Vec<_>>().join("; ")
}

/// Bytes for people: the largest binary unit, one decimal.
#[must_use]
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    for (unit, size) in UNITS {
        if bytes >= size {
            let tenths = u128::from(bytes) * 10 / u128::from(size);
            return match tenths % 10 {
                0 => format!("{} {unit}", tenths / 10),
                tenth => format!("{}.{tenth} {unit}", tenths / 10),
            };
        }
    }
    if bytes == 1 { "1 byte".to_owned() } else { format!("{bytes} bytes") }
}
