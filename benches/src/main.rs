//! `butterfly bench`: load and profiles of a cluster.
//!
//! Latency is counted from the time a request was scheduled to be sent, so a server that stalls shows in the figures instead
//! of slowing the load down. Figures are of this machine and this moment; compare two runs made in turn, not two documents.

mod arrivals;
mod bits;
mod bottleneck;
mod client;
mod compare;
mod draw;
mod environment;
mod honesty;
mod html;
mod kernels;
mod load;
mod observe;
mod peer;
mod plot;
mod record;
mod report;
mod run;
mod soak;
mod sweep;
mod synth;
mod target;
mod workload;

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use serde::Serialize;

use crate::compare::Threshold;
use crate::honesty::SelftestArgs;
use crate::run::{LoadArgs, RunArgs};
use crate::soak::SoakArgs;
use crate::sweep::Search;

#[derive(Parser)]
#[command(
    name = "butterfly bench",
    version,
    about = "Load and profiles of a Butterfly cluster.",
    before_help = "Examples:
  butterfly bench serve --workload mlp --rate 1000          three nodes in this process, verified vectors
  butterfly bench serve --workload completions --rate 5 --slo ttft=200ms,itl=50ms
  butterfly bench serve --url http://127.0.0.1:8080 --rate 20 --workload completions --out run
  butterfly bench sweep --workload mlp --rate 200           how much it takes
  butterfly bench stage --workload mlp --rate 500           where the time of each stage and edge goes
  butterfly bench compare before after --fail-on 'ttft.p99>+5%'
  butterfly bench synth model.gguf --encoding Q8_0          a model of random numbers
  butterfly bench kernels --model model.gguf                how fast it computes here
  butterfly bench peer --model model.gguf                   the same beside llama.cpp
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
    /// Requests on schedule, whatever the answers (open loop): rates, errors, latencies and goodput.
    Serve(RunArgs),
    /// The same load, and the profile of every stage and edge of every node.
    Stage(RunArgs),
    /// Rates from --rate upwards until the cluster no longer keeps up, and the knee.
    Sweep(SweepArgs),
    /// Whether memory stays flat over many requests and streams, cancelled ones among them.
    Soak(SoakArgs),
    /// Whether the harness finds what is done to a cluster on purpose: a slowed stage, a stopped server.
    Selftest(SelftestArgs),
    /// Starts the own cluster, prints its address, and runs until standard input ends.
    Host(LoadArgs),
    /// Two reports side by side; exit status 99 if a threshold is crossed.
    Compare(CompareArgs),
    /// Prefill, decode and batched decode of a model, and the share of the machine's read bandwidth that decode reaches.
    Kernels(kernels::KernelsArgs),
    /// This program and llama.cpp in turn on one GGUF file: ratios, or both perplexities.
    Peer(peer::PeerArgs),
    /// Whether a model computes the same bits whatever the instructions, the batch, the chunks and the threads.
    Bits(bits::BitsArgs),
    /// Writes a model of random numbers, or a folder's model as GGUF.
    Synth(synth::SynthArgs),
}

#[derive(Args)]
struct SweepArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Each rate over the one before.
    #[arg(long, default_value_t = 1.5)]
    factor: f64,
    /// How often the gap around the knee is halved.
    #[arg(long, default_value_t = 3)]
    halvings: u32,
    /// Where to write report.json, report.csv and report.html.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Args)]
struct CompareArgs {
    /// The run before: report.json, or its folder.
    before: PathBuf,
    /// The run after.
    after: PathBuf,
    /// A threshold: a column of report.csv, > or <, and a change in percent (+5%), a change (+0), or a value (200). May be
    /// given several times.
    #[arg(long, value_name = "THRESHOLD")]
    fail_on: Vec<Threshold>,
}

/// How a command ended, if it did not fail.
#[derive(PartialEq, Eq)]
enum Ended {
    Well,
    /// An objective was breached.
    Breached,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(Ended::Well) => ExitCode::SUCCESS,
        Ok(Ended::Breached) => ExitCode::from(99),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<Ended> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match &cli.command {
            Command::Serve(args) => serve(args, false, cli.json).await,
            Command::Stage(args) => serve(args, true, cli.json).await,
            Command::Sweep(args) => sweep(args, cli.json).await,
            Command::Soak(args) => soak(args, cli.json).await,
            Command::Selftest(args) => {
                let verdict = args.run().await?;
                print(cli.json, &verdict)?;
                anyhow::ensure!(verdict.holds(), "the harness does not find what it should");
                Ok(Ended::Well)
            }
            Command::Host(args) => host(args).await,
            Command::Compare(args) => compare(args, cli.json),
            Command::Kernels(args) => well(print(cli.json, &kernels::run(args)?)),
            Command::Peer(args) => well(print(cli.json, &peer::run(args)?)),
            Command::Bits(args) => {
                let bits = bits::run(args)?;
                print(cli.json, &bits)?;
                anyhow::ensure!(bits.holds(), "bits differ");
                Ok(Ended::Well)
            }
            Command::Synth(args) => well(synth::run(args)),
        }
    })
}

async fn serve(args: &RunArgs, shows_stages: bool, json: bool) -> anyhow::Result<Ended> {
    let mut report = args.run().await?;
    report.shows_stages = shows_stages;
    if let Some(folder) = &args.out {
        report.write(folder)?;
    }
    print(json, &report)?;
    anyhow::ensure!(report.ok > 0, "no request was answered");
    Ok(Ended::Well)
}

async fn sweep(args: &SweepArgs, json: bool) -> anyhow::Result<Ended> {
    anyhow::ensure!(args.factor > 1.0 && args.factor <= 100.0, "--factor is {}; it must be more than 1", args.factor);
    let ready = args.load.ready().await?;
    let search = Search { from: args.load.rate(), factor: args.factor, halvings: args.halvings.min(16) };
    let sweep = search.run(|rate| {
        eprintln!("at {rate:.1} per second …");
        ready.at_rate(rate)
    });
    let sweep = sweep.await?;
    ready.stop().await?;
    if let Some(folder) = &args.out {
        sweep.write(folder)?;
    }
    print(json, &sweep)?;
    Ok(Ended::Well)
}

async fn soak(args: &SoakArgs, json: bool) -> anyhow::Result<Ended> {
    let soak = args.run().await?;
    if let Some(folder) = &args.out {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join("soak.json"), serde_json::to_string_pretty(&soak)?)?;
    }
    print(json, &soak)?;
    Ok(if soak.holds() { Ended::Well } else { Ended::Breached })
}

async fn host(args: &LoadArgs) -> anyhow::Result<Ended> {
    anyhow::ensure!(!args.is_remote(), "`host` starts a cluster of its own; drop --url");
    let ready = args.ready().await?;
    println!("{}", ready.target().gateway().url());
    tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await??;
    ready.stop().await?;
    Ok(Ended::Well)
}

fn compare(args: &CompareArgs, json: bool) -> anyhow::Result<Ended> {
    let (before, after) = (compare::read(&args.before)?, compare::read(&args.after)?);
    let comparison = compare::compare(&before, &after, &args.fail_on)?;
    print(json, &comparison)?;
    Ok(if comparison.breaches.is_empty() { Ended::Well } else { Ended::Breached })
}

fn well(done: anyhow::Result<()>) -> anyhow::Result<Ended> {
    done.map(|()| Ended::Well)
}

fn print<T: Serialize + Display>(json: bool, found: &T) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(found)?);
    } else {
        print!("{found}");
    }
    Ok(())
}
