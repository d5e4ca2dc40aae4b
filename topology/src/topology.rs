//! The whole file: from text to a [`Topology`], or to every problem at once.

use std::ops::Range;

use crate::catalogue::Catalogue;
use crate::check;
use crate::cluster::{Cluster, TelemetrySpec};
use crate::diagnostic::{Diagnostic, Diagnostics, Severity, Source};
use crate::graph::Graph;
use crate::name::{NodeId, StageName};
use crate::schema;

/// A checked topology.
#[derive(Clone, Debug)]
pub struct Topology {
    /// Nodes and shared limits.
    pub cluster: Cluster,
    /// Stages and edges.
    pub graph: Graph,
    /// Where metrics go.
    pub telemetry: TelemetrySpec,
    /// What the author should know, although the file can be used.
    pub warnings: Diagnostics,
    pub(crate) places: Places,
    pub(crate) source: Source,
}

/// Where things stand in the file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places {
    pub(crate) nodes: Vec<(NodeId, Range<usize>)>,
    pub(crate) stages: Vec<(StageName, Range<usize>)>,
}

impl Topology {
    /// Where the id of a node stands in the file, as bytes.
    #[must_use]
    pub fn node_place(&self, id: &NodeId) -> Option<Range<usize>> {
        self.places.nodes.iter().find(|(node, _)| node == id).map(|(_, place)| place.clone())
    }

    /// Where a stage's name, or else its kind, stands in the file, as bytes.
    #[must_use]
    pub fn stage_place(&self, name: &StageName) -> Option<Range<usize>> {
        self.places.stages.iter().find(|(stage, _)| stage == name).map(|(_, place)| place.clone())
    }

    /// Problems that others found in this file, such as a rule between keys of one stage, with the lines they are about.
    #[must_use]
    pub fn diagnostics(&self, found: Vec<Diagnostic>) -> Diagnostics {
        Diagnostics::new(self.source.clone(), found)
    }
}

/// Reads and checks a topology. `file_name` is only shown.
///
/// # Errors
/// Every problem of the file at once. A text that is not TOML is not looked at any further.
pub fn parse(text: &str, file_name: &str, catalogue: &Catalogue) -> Result<Topology, Diagnostics> {
    let source = Source::new(file_name, text);
    let mut problems = Vec::new();
    let checked = schema::read(text, catalogue, &mut problems)
        .and_then(|declared| check::check(&declared, catalogue, &mut problems));
    let failed = problems.iter().any(|problem| problem.severity == Severity::Error);
    let found = Diagnostics::new(source.clone(), problems);
    match checked {
        Some(checked) if !failed => Ok(Topology {
            cluster: checked.cluster,
            graph: checked.graph,
            telemetry: checked.telemetry,
            warnings: found,
            places: checked.places,
            source,
        }),
        _ => Err(found),
    }
}
