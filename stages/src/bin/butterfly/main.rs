//! The program `butterfly`: one file per command. What a command does belongs into the library; here are arguments, words for
//! people, exit codes and files.
//!
//! Data goes to standard output, everything else to standard error, so that a pipe sees only data. Secrets are never
//! arguments: they are files that only their owner can read.

mod activity;
mod admin_client;
mod api_key;
mod bench;
mod check;
mod completions;
mod demo;
mod doctor;
mod exit;
mod global;
mod graph;
mod init;
mod key_file;
mod keygen;
mod lock;
mod plan;
mod schema;
mod serve;
mod settings;
mod status;
mod table;
mod tap;
mod top;
mod topology_file;
mod trace;
mod verify;
mod version;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::exit::Failure;
use crate::global::Global;

/// Examples before options: most readers want the line they can copy.
const HELP: &str = "\
{about-with-newline}
{before-help}{usage-heading} {usage}

{all-args}{after-help}
";

#[derive(Parser)]
#[command(
    name = "butterfly",
    version,
    about = "Run one model across machines that do not trust each other, and prove every answer.",
    help_template = HELP,
    before_help = "Examples:
  butterfly demo                                  see it work: three nodes, one of them lying
  butterfly init --nodes 3                        write a topology and its keys
  butterfly check cluster/topology.toml           all errors of a topology at once
  butterfly serve cluster/topology.toml           run its nodes (one of them with --node n0)
  butterfly verify bundle.json --epoch epoch.json prove an answer, offline
",
    after_help = "Exit status: 0 ok, 1 failure, 2 usage, 3 invalid topology, 4 environment, 5 verification failed, 99 objective breached.",
    max_term_width = 100
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Init(init::Args),
    Check(check::Args),
    Graph(graph::Args),
    Plan(plan::Args),
    Serve(serve::Args),
    Status(status::Args),
    Top(top::Args),
    Tap(tap::Args),
    Trace(trace::Args),
    Verify(verify::Args),
    Bench(bench::Args),
    Keygen(keygen::Args),
    Doctor(doctor::Args),
    Schema(schema::Args),
    Completions(completions::Args),
    Version(version::Args),
}

impl Command {
    /// What is logged without `-v` and `-q`: a node says what it does, the other commands only what goes wrong.
    fn log_level(&self) -> &'static str {
        match self {
            Self::Serve(_) => "info",
            // It tells its own story.
            Self::Demo(_) => "off",
            _ => "warn",
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.global.start_logging(cli.command.log_level());
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.tell(&cli.global);
            failure.code()
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    let global = &cli.global;
    match &cli.command {
        Command::Demo(args) => demo::run(args, global),
        Command::Init(args) => init::run(args, global),
        Command::Check(args) => check::run(args, global),
        Command::Graph(args) => graph::run(args, global),
        Command::Plan(args) => plan::run(args, global),
        Command::Serve(args) => serve::run(args, global),
        Command::Status(args) => status::run(args, global),
        Command::Top(args) => top::run(args, global),
        Command::Tap(args) => tap::run(args, global),
        Command::Trace(args) => trace::run(args, global),
        Command::Verify(args) => verify::run(args, global),
        Command::Bench(args) => bench::run(args, global),
        Command::Keygen(args) => keygen::run(args, global),
        Command::Doctor(args) => doctor::run(args, global),
        Command::Schema(args) => schema::run(args, global),
        Command::Completions(args) => completions::run(args, global),
        Command::Version(args) => version::run(args, global),
    }
}
