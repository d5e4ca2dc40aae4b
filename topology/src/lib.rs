//! What is declared: the topology file, the stage graph it describes, the cluster it runs on and the plan that cuts a
//! model into slices.
//!
//! [`parse`] turns text into a [`Topology`] that is right by construction, or into every problem it found, each with its
//! place, at once. Nothing else in the workspace reads topology text, so nothing can start from unchecked text.
//!
//! The crate is pure: no clock, no I/O, no threads, and the same inputs always give the same outputs, byte for byte,
//! because plans enter the digest that peers compare. It knows the *signatures* of stage kinds, handed over as data in a
//! [`Catalogue`], and refuses to know what any kind does.

pub mod catalogue;
mod check;
pub mod cluster;
pub mod diagnostic;
pub mod graph;
mod json_schema;
pub mod name;
pub mod plan;
pub mod planner;
pub mod render;
mod schema;
mod suggest;
mod topology;
mod value;

pub use catalogue::{Catalogue, KeySpec, KindSignature, PortSpec, ValueSpec, WhenFull};
pub use cluster::{Cluster, CollectorType, NodeSpec, TelemetrySpec};
pub use diagnostic::{Code, Diagnostic, Diagnostics, Severity};
pub use graph::{EdgeSpec, Graph, LoopSpec, PermitsFrom, PortRef, StageSpec};
pub use json_schema::json_schema;
pub use name::{NameError, NodeId, StageName};
pub use plan::{Lack, LayerCost, Plan, PlanError, PlanInput, SlicePlan, Strategy, bytes_text};
pub use topology::{Topology, parse};
pub use value::{ConfigValue, StageConfig};
