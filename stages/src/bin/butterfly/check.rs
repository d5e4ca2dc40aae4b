//! `butterfly check`: everything that is wrong with a topology, at once.

use std::path::PathBuf;

use butterfly_topology::Topology;
use serde_json::json;

use crate::exit::{Exit, Failure};
use crate::global::Global;
use crate::topology_file;

/// Check a topology: every error at once, with its place and a cure
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly check cluster/topology.toml            exit status 3 when something is wrong
  butterfly check topology.toml --json             diagnostics for a program
  butterfly check topology.toml --set stage.ingest.bind_address=0.0.0.0:80
"
)]
pub(crate) struct Args {
    /// The topology file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    match topology_file::check(&args.file, global)? {
        Ok(topology) => tell_valid(args, &topology, global),
        Err(diagnostics) => {
            if global.json {
                global.print_json(&json!({ "valid": false, "diagnostics": diagnostics.to_json() }))?;
            } else {
                global.say(diagnostics.render(global.ink_stderr().on).trim_end());
            }
            Err(Failure::told(Exit::InvalidTopology))
        }
    }
}

fn tell_valid(args: &Args, topology: &Topology, global: &Global) -> Result<(), Failure> {
    if global.json {
        return global.print_json(&json!({ "valid": true, "diagnostics": topology.warnings.to_json() }));
    }
    topology_file::tell_warnings(topology, global);
    let cluster = &topology.cluster;
    let ink = global.ink_stdout();
    global.print(&format!(
        "{}: {}: cluster {} of {} with {}, {} of which may lie; {} on {}",
        args.file.display(),
        ink.good("valid"),
        cluster.name,
        cluster.model,
        count(cluster.nodes.len(), "node"),
        cluster.max_byzantine,
        count(topology.graph.stages.len(), "stage"),
        count(topology.graph.edges.len(), "edge"),
    ))
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
