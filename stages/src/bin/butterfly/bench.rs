//! `butterfly bench`: hands over to the program `butterfly-bench`, which lies beside this one. A program of its own, so
//! that a node does not carry a load generator.

use std::ffi::OsString;
use std::process::Command;

#[cfg(not(unix))]
use crate::exit::Exit;
use crate::exit::Failure;
use crate::global::Global;

/// Measure: load a cluster, or profile each stage and edge
#[derive(clap::Args)]
#[command(
    disable_help_flag = true,
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly bench serve --rate 500 --duration 30    open loop on three nodes of its own
  butterfly bench serve --url http://127.0.0.1:8080 --rate 20 --workload completions
  butterfly bench stage --json                      time, items and bytes of each stage and edge
  butterfly bench --help                            all options
"
)]
pub(crate) struct Args {
    /// What `butterfly-bench` takes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let own = std::env::current_exe()
        .map_err(|error| Failure::environment(format!("this program cannot find itself: {error}")))?;
    let sibling = own.with_file_name(format!("butterfly-bench{}", std::env::consts::EXE_SUFFIX));
    if !sibling.is_file() {
        return Err(Failure::environment(format!("there is no {}", sibling.display())).help(
            "build it with `cargo build --release -p butterfly-bench`, and keep the two programs in one folder",
        ));
    }
    let mut command = Command::new(&sibling);
    command.args(&args.arguments);
    if global.json {
        command.arg("--json");
    }
    hand_over(command, &sibling)
}

#[cfg(unix)]
fn hand_over(mut command: Command, sibling: &std::path::Path) -> Result<(), Failure> {
    // Returns only when it fails.
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    Err(Failure::file("run", sibling, &error))
}

#[cfg(not(unix))]
fn hand_over(mut command: Command, sibling: &std::path::Path) -> Result<(), Failure> {
    let status = command.status().map_err(|error| Failure::file("run", sibling, &error))?;
    if status.success() {
        return Ok(());
    }
    std::process::exit(status.code().unwrap_or(Exit::Failure as i32))
}
