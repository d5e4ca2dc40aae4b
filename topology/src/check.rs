//! Whether the tables of a file fit together: from well-formed tables to a cluster and a graph.
//!
//! Each part of the check reports what it finds and goes on, so one run names every problem. Where one problem would
//! bring others about (a stage of unknown kind, a reference that names nothing), the parts behind it are left unchecked
//! rather than reported for something their author did not get wrong.

mod cluster;
mod edges;
mod loops;
mod order;
mod placement;

use std::time::Duration;

use crate::catalogue::Catalogue;
use crate::cluster::{Cluster, CollectorType, TelemetrySpec};
use crate::diagnostic::Diagnostic;
use crate::graph::Graph;
use crate::schema::{Declared, Table};
use crate::topology::Places;

/// What a file without errors declares.
pub(crate) struct Checked {
    pub(crate) cluster: Cluster,
    pub(crate) graph: Graph,
    pub(crate) telemetry: TelemetrySpec,
    pub(crate) places: Places,
}

/// Checks everything that spans tables. `None` when there are errors.
pub(crate) fn check(declared: &Declared<'_>, catalogue: &Catalogue, problems: &mut Vec<Diagnostic>) -> Option<Checked> {
    let crew = cluster::check(declared, problems);
    let wires = edges::resolve(&declared.stages, problems);
    let order = order::check(&declared.stages, &wires, problems);
    let on_known = placement::check_names(&declared.stages, &crew, problems);
    let mut graph = match order {
        Some(order) if wires.complete => edges::graph(&declared.stages, &wires, &order)?,
        _ => return None,
    };
    // Where stages run is only a question when the nodes are known.
    if on_known && crew.complete {
        placement::check_running(&graph, &crew.ids, &declared.stages, catalogue, problems);
    }
    loops::check(&mut graph, &crew, &declared.stages, catalogue, problems);
    let stages = declared.stages.iter();
    let stages = stages.filter_map(|stage| Some((stage.name.clone()?, stage.name_span.clone()))).collect();
    let places = Places { nodes: crew.places, stages };
    Some(Checked { cluster: crew.cluster?, graph, telemetry: telemetry(declared.telemetry.as_ref()), places })
}

fn telemetry(table: Option<&Table>) -> TelemetrySpec {
    let default = TelemetrySpec::default();
    let Some(table) = table else { return default };
    let collector_type = match table.values.text("collector_type") {
        Some("console") => CollectorType::Console,
        Some("json") => CollectorType::Json,
        _ => CollectorType::Prometheus,
    };
    let seconds = table.values.integer("export_interval_secs").and_then(|secs| u64::try_from(secs).ok());
    TelemetrySpec {
        collector_type,
        export_interval: seconds.map_or(default.export_interval, Duration::from_secs),
        admin_token_file: table.values.text("admin_token_file").map_or(default.admin_token_file, str::to_owned),
    }
}
