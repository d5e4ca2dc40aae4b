//! `butterfly check`: everything that is wrong with a topology, at once.

use std::path::{Path, PathBuf};

use butterfly::node::Foundation;
use butterfly_topology::{Diagnostics, Topology};
use butterfly_verify::Epoch;
use serde_json::{Value, json};

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
  butterfly check topology.toml --epoch epoch.json also the epoch, for those who verify receipts
  butterfly check topology.toml --set stage.ingest.bind_address=0.0.0.0:80
"
)]
pub(crate) struct Args {
    /// The topology file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Also open the model, plan it, and write the epoch: what `butterfly verify` is told to trust
    #[arg(long, value_name = "FILE")]
    epoch: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    match topology_file::check(&args.file, global)? {
        Ok(topology) => {
            let epoch = args.epoch.as_deref().map(|path| write_epoch(args, &topology, path)).transpose()?;
            tell_valid(args, &topology, epoch.as_ref(), global)
        }
        Err(diagnostics) => {
            if global.json {
                global.print_json(&document(false, &diagnostics, None))?;
            } else {
                global.say(diagnostics.render(global.ink_stderr().on).trim_end());
            }
            Err(Failure::told(Exit::InvalidTopology))
        }
    }
}

/// The epoch follows from the topology and the model alone, so anybody who has both can make it, and compare.
fn write_epoch(args: &Args, topology: &Topology, path: &Path) -> Result<Epoch, Failure> {
    let base = args.file.parent().unwrap_or(Path::new(""));
    let foundation = Foundation::new(topology, base)
        .map_err(|error| Failure::new(Exit::Failure, format!("the topology has no epoch yet: {error}")))?;
    std::fs::write(path, foundation.epoch.to_json()).map_err(|error| Failure::file("write", path, &error))?;
    Ok(Epoch::clone(&foundation.epoch))
}

fn document(valid: bool, diagnostics: &Diagnostics, epoch: Option<&Epoch>) -> Value {
    let mut document = diagnostics.to_json();
    document["valid"] = json!(valid);
    if let Some(epoch) = epoch {
        document["epoch"] = json!(epoch.digest());
    }
    document
}

fn tell_valid(args: &Args, topology: &Topology, epoch: Option<&Epoch>, global: &Global) -> Result<(), Failure> {
    if global.json {
        return global.print_json(&document(true, &topology.warnings, epoch));
    }
    topology_file::tell_warnings(topology, global);
    let cluster = &topology.cluster;
    let mut text = format!(
        "{}: {}: cluster {} of {}, {}, at most {} lying; {}, {}",
        args.file.display(),
        global.ink_stdout().good("valid"),
        cluster.name,
        cluster.model,
        count(cluster.nodes.len(), "node"),
        cluster.max_byzantine,
        count(topology.graph.stages.len(), "stage"),
        count(topology.graph.edges.len(), "edge"),
    );
    if let (Some(epoch), Some(path)) = (epoch, &args.epoch) {
        text.push_str(&format!("\nepoch {} in {}", epoch.digest(), path.display()));
    }
    global.print(&text)
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
