//! `butterfly version`: what this program is, down to the numerics that decide whether two nodes can agree.

use butterfly_kernels as kernels;
use serde_json::json;

use crate::exit::Failure;
use crate::global::Global;

/// Print version, numerics profile and the instructions it runs on
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly version
  butterfly version --json
"
)]
pub(crate) struct Args {}

pub(crate) fn run(_: &Args, global: &Global) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    let profile_digest = hex::encode(kernels::profile_digest());
    let path = kernels::Path::detect();
    let instructions = match &path {
        Ok(path) => path.name().to_owned(),
        Err(unsupported) => format!("none: {unsupported}"),
    };
    let refused: Vec<String> = kernels::Path::refused().iter().map(ToString::to_string).collect();
    let adversary = cfg!(feature = "adversary");
    if global.json {
        return global.print_json(&json!({
            "version": version,
            "profile": kernels::PROFILE,
            "profile_digest": profile_digest,
            "instructions": path.is_ok().then_some(&instructions),
            "instructions_refused": refused,
            "features": { "adversary": adversary },
        }));
    }
    global.print(&format!(
        "butterfly {version}\nnumerics    {} {}\ninstructions {instructions}{}\nadversaries {}",
        kernels::PROFILE,
        &profile_digest[..16],
        refused.iter().map(|reason| format!("\n             {reason}")).collect::<String>(),
        if adversary { "may be named in a topology (feature `adversary`)" } else { "not built in" },
    ))
}
