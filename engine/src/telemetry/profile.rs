//! A snapshot of where the time and the bytes of a node go, for reports.
//!
//! It refuses to judge: a report decides what is a bottleneck.

use serde::{Deserialize, Serialize};

use super::timing::Quantiles;

/// All stages and edges of one node, in the order of the graph.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// The node.
    pub node: String,
    /// Its stages.
    pub stages: Vec<StageProfile>,
    /// Its edges.
    pub edges: Vec<EdgeProfile>,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageProfile {
    /// The stage's name.
    pub name: String,
    /// Seconds of work.
    pub busy: f64,
    /// Seconds of waiting for input.
    pub starved: f64,
    /// Seconds of waiting for room in an output.
    pub blocked: f64,
    /// Seconds of checking the work of others.
    pub verifying: f64,
    /// Items taken from its inputs.
    pub items: u64,
    /// Service time for each item.
    pub service: Quantiles,
}

/// One edge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EdgeProfile {
    /// Its start, as `stage.port`.
    pub from: String,
    /// Its end, as `stage.port`.
    pub to: String,
    /// Items that entered it.
    pub items: u64,
    /// Bytes that entered it.
    pub bytes: u64,
    /// Items in it now.
    pub queued_items: u64,
    /// Bytes in it now.
    pub queued_bytes: u64,
    /// Its room in items.
    pub capacity_items: u64,
    /// Its room in bytes.
    pub capacity_bytes: u64,
    /// How long sends waited for room.
    pub send: Quantiles,
    /// How long items waited in it.
    pub queue: Quantiles,
}
