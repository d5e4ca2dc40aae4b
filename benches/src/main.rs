//! `butterfly bench`: load and profiles of a cluster.
//!
//! Latency is counted from the time a request was scheduled to be sent, so a server that stalls shows in the figures instead
//! of slowing the load down. Figures are of this machine and this moment; compare two runs made in turn, not two documents.

mod client;
mod load;
mod report;
mod target;
mod workload;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use crate::load::Load;
use crate::report::Report;
use crate::target::Target;
use crate::workload::Workload;

#[derive(Parser)]
#[command(
    name = "butterfly bench",
    version,
    about = "Load and profiles of a Butterfly cluster.",
    before_help = "Examples:
  butterfly bench serve --workload mlp --rate 1000          three nodes in this process, verified vectors
  butterfly bench serve --workload completions --rate 5     text, streamed, on the built-in model
  butterfly bench serve --url http://127.0.0.1:8080 --rate 20 --workload completions
  butterfly bench stage --workload mlp --rate 500           where the time of each stage and edge goes
"
)]
struct Cli {
    /// Print the report as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Requests at a fixed rate, whatever the answers (open loop): rates, errors and latencies.
    Serve(Run),
    /// The same load, and the profile of every stage and edge of every node.
    Stage(Run),
}

#[derive(Args)]
struct Run {
    /// A gateway to load; without it a cluster of its own is started in this process.
    #[arg(long)]
    url: Option<String>,
    /// What is asked.
    #[arg(long, value_enum, default_value = "mlp")]
    workload: Workload,
    /// Requests per second.
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// Seconds of load.
    #[arg(long, default_value_t = 10)]
    duration: u64,
    /// Seconds of load before anything is counted.
    #[arg(long, default_value_t = 2)]
    warm_up: u64,
    /// Connections, and so requests under way at once.
    #[arg(long, default_value_t = 128)]
    connections: usize,
    /// Tokens of each completion.
    #[arg(long, default_value_t = 32)]
    max_tokens: u32,
    /// Nodes that may lie, of the own cluster.
    #[arg(long, default_value_t = 1)]
    max_byzantine: usize,
    /// Slices of the own cluster.
    #[arg(long, default_value_t = 1)]
    slices: usize,
    /// Threads of a forward pass, on each node of the own cluster.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Where to write report.json and the latency histograms (*.hgrm).
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let (args, with_stages) = match &cli.command {
        Command::Serve(args) => (args, false),
        Command::Stage(args) => (args, true),
    };
    anyhow::ensure!(args.rate.is_finite() && args.rate > 0.0, "--rate is {}; it must be more than 0", args.rate);
    anyhow::ensure!(args.connections > 0, "--connections must be at least 1");
    anyhow::ensure!(!with_stages || args.url.is_none(), "`stage` profiles a cluster of its own; drop --url");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(measure(args, with_stages))?;
    if let Some(folder) = &args.out {
        report.write(folder).with_context(|| format!("writing the report to {}", folder.display()))?;
    }
    if cli.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    anyhow::ensure!(report.ok > 0, "no request was answered");
    Ok(())
}

async fn measure(args: &Run, with_stages: bool) -> anyhow::Result<Report> {
    let target = match &args.url {
        Some(url) => Target::remote(url)?,
        None => {
            Target::start(&target::Own {
                model: args.workload.model().into(),
                max_byzantine: args.max_byzantine,
                slices: args.slices,
                threads: args.threads,
            })
            .await?
        }
    };
    let load =
        Load { rate: args.rate, connections: args.connections, workload: args.workload, max_tokens: args.max_tokens };
    if args.warm_up > 0 {
        load.run(target.address(), Duration::from_secs(args.warm_up)).await?;
    }
    let measured = load.run(target.address(), Duration::from_secs(args.duration)).await?;
    let checked = target.check_receipts(&measured.receipts).await?;
    let profiles = if with_stages { target.profiles() } else { Vec::new() };
    target.stop().await?;
    Ok(Report::new(&load, &measured, checked, profiles))
}
