//! `butterfly graph`: the stage graph as a picture or as data.

use std::path::PathBuf;

use butterfly_topology::render;
use clap::ValueEnum;
use serde_json::json;

use crate::exit::Failure;
use crate::global::Global;
use crate::topology_file;

/// Draw the stage graph with the types on its ports and the bounds of its edges
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly graph topology.toml | dot -Tsvg > graph.svg     a picture, with Graphviz
  butterfly graph topology.toml --format svg > graph.svg    a picture, without it
  butterfly graph topology.toml --format mermaid            for Markdown
  butterfly graph topology.toml --format json               for a program
"
)]
pub(crate) struct Args {
    /// The topology file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// What to write [default: dot, or json with --json]
    #[arg(long, value_enum)]
    format: Option<Format>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Dot,
    Mermaid,
    Svg,
    Json,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let topology = topology_file::load(&args.file, global)?;
    let format = args.format.unwrap_or(if global.json { Format::Json } else { Format::Dot });
    match format {
        Format::Dot => global.print(render::dot(&topology).trim_end()),
        Format::Mermaid => global.print(render::mermaid(&topology).trim_end()),
        Format::Svg => global.print(render::svg(&topology).trim_end()),
        Format::Json => global.print_json(&json!({
            "cluster": topology.cluster.name,
            "stages": topology.graph.stages,
            "edges": topology.graph.edges,
        })),
    }
}
