//! `butterfly schema`: the JSON Schema of a topology file, for editors, made from what `butterfly check` checks.

use butterfly::registry::catalogue;
use butterfly_topology::json_schema;

use crate::exit::Failure;
use crate::global::Global;

/// Print the JSON Schema of a topology file
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly schema > topology.schema.json    an editor finds it by the first line of what `init` writes:
                                             #:schema ./topology.schema.json
"
)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args, global: &Global) -> Result<(), Failure> {
    global.print_json(&json_schema(&catalogue()))
}
