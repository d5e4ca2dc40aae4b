//! One load on one target, as the command line asks for it, and its report.
//!
//! It refuses to know what is done with the report.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use butterfly_engine::clock::{Clock, RealClock};
use clap::{Args, Parser};

use crate::arrivals::{self, Arrivals};
use crate::client::{Asker, Gateway};
use crate::load::{Asks, Load, Pace};
use crate::observe::Watch;
use crate::record::{Record, Slo};
use crate::report::{Report, Run};
use crate::target::{Own, Target};
use crate::workload::{Length, Recipe, Workload};

/// Numbers every request of this process, so that no two loads ask the same.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);

/// What is loaded, with what, and how.
#[derive(Args, Debug, Clone)]
pub(crate) struct LoadArgs {
    /// A gateway to load, as http://HOST:PORT; without it a cluster of its own is started in this process. The API key is
    /// taken from the environment variable BUTTERFLY_API_KEY.
    #[arg(long)]
    url: Option<String>,
    /// A file with the API key, in place of the environment variable.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// What is asked.
    #[arg(long, value_enum, default_value = "mlp")]
    workload: Workload,
    /// How the gaps between requests are distributed.
    #[arg(long, value_enum, default_value = "constant")]
    arrivals: Arrivals,
    /// Requests per second [default: 500 for mlp, 50 for embeddings, 5 for text].
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    /// Seconds of load.
    #[arg(long, default_value_t = 10.0)]
    duration: f64,
    /// Seconds of load before anything is counted.
    #[arg(long, default_value_t = 2.0)]
    warm_up: f64,
    /// Connections, and so requests under way at once; a request that finds none free leaves late, which counts.
    #[arg(long, default_value_t = 128)]
    connections: usize,
    /// Seconds after which a request is given up.
    #[arg(long, default_value_t = 120.0, value_name = "SECONDS")]
    timeout: f64,
    /// Objectives of a request, for goodput: ttft, itl (every gap), tpot (the mean gap), e2e; as ttft=200ms,e2e=1s.
    #[arg(long)]
    slo: Option<Slo>,
    /// Tokens of a prompt: 128, 16..256 (evenly), or 128~32 (mean and deviation). Words, where the server tokenises.
    #[arg(long, default_value = "16", value_name = "LENGTH")]
    prompt_tokens: Length,
    /// Tokens of a completion, in the same form.
    #[arg(long, default_value = "32", value_name = "LENGTH")]
    output_tokens: Length,
    /// Prompts are drawn from these token ids.
    #[arg(long, default_value = "100..500", value_name = "FIRST..LAST")]
    token_ids: Length,
    /// Numbers in a vector.
    #[arg(long, default_value_t = 64)]
    input_width: u32,
    /// What everything random is drawn from [default: the time].
    #[arg(long)]
    seed: Option<u64>,
    /// Model of the own cluster: builtin:…, or a folder [default: by workload].
    #[arg(long)]
    model: Option<String>,
    /// Nodes that may lie, of the own cluster.
    #[arg(long, default_value_t = 1)]
    max_byzantine: usize,
    /// Slices of the own cluster.
    #[arg(long, default_value_t = 1)]
    slices: usize,
    /// Threads of a forward pass, on each node of the own cluster.
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

/// What `serve` and `stage` have beside the load.
#[derive(Args, Debug, Clone)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    /// A closed loop: this many requests are always under way, and the next leaves when one is answered.
    #[arg(long, value_name = "REQUESTS", conflicts_with_all = ["rate", "replay", "connections"])]
    concurrency: Option<usize>,
    /// Sends what a file says, when it says so: the requests.jsonl of a run, or lines with timestamp (in milliseconds),
    /// input_length and output_length.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rate", "duration", "arrivals"])]
    replay: Option<PathBuf>,
    /// Runs the same load on one node that nobody checks as well, and tells the ratio. With an own cluster only.
    #[arg(long)]
    overhead: bool,
    /// Where to write report.json, report.csv, report.html, requests.jsonl and the distributions (*.hgrm).
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
}

/// A load without any option.
#[derive(Parser)]
struct Plain {
    #[command(flatten)]
    load: LoadArgs,
}

/// When requests leave, as asked for.
enum Plan<'a> {
    Rate(f64),
    Closed(usize),
    Replay(&'a PathBuf),
}

/// A target and what it is asked, ready for loads.
pub(crate) struct Ready<'a> {
    args: &'a LoadArgs,
    target: Target,
    recipe: Recipe,
    clock: Arc<dyn Clock>,
}

impl LoadArgs {
    /// Vectors, at this rate for so many seconds; all else as if no option were given.
    pub(crate) fn plain(rate: f64, duration: f64) -> Self {
        let Plain { load } = Plain::parse_from(["load"]);
        Self { rate: Some(rate), duration, ..load }
    }

    pub(crate) fn warm_up(&self) -> Duration {
        Duration::from_secs_f64(self.warm_up)
    }

    pub(crate) fn rate(&self) -> f64 {
        self.rate.unwrap_or(self.workload.rate())
    }

    pub(crate) fn is_remote(&self) -> bool {
        self.url.is_some()
    }

    fn check(&self) -> anyhow::Result<()> {
        let rate = self.rate();
        anyhow::ensure!(rate.is_finite() && rate > 0.0, "--rate is {rate}; it must be more than 0");
        anyhow::ensure!(self.connections > 0, "--connections must be at least 1");
        for (name, seconds, least) in
            [("duration", self.duration, 1e-3), ("timeout", self.timeout, 1e-3), ("warm-up", self.warm_up, 0.0)]
        {
            anyhow::ensure!(
                (least..=1e6).contains(&seconds),
                "--{name} is {seconds}; it must be from {least} to 1000000 seconds"
            );
        }
        let owns = self.model.is_some() || self.max_byzantine != 1 || self.slices != 1 || self.threads != 1;
        anyhow::ensure!(
            !self.is_remote() || !owns,
            "--model, --max-byzantine, --slices and --threads make a cluster of its own; drop them, or --url"
        );
        Ok(())
    }

    fn own(&self) -> anyhow::Result<Own> {
        let model = self.model.clone().or_else(|| self.workload.model().map(str::to_owned));
        let model = model.context("--model is needed: no built-in model makes embeddings; name a folder")?;
        Ok(Own { model, max_byzantine: self.max_byzantine, slices: self.slices, threads: self.threads })
    }

    /// Starts or finds the target.
    pub(crate) async fn ready(&self) -> anyhow::Result<Ready<'_>> {
        self.check()?;
        let target = match &self.url {
            Some(url) => Target::remote(url, Gateway::new(url, self.api_key_file.as_deref())?),
            None => Target::start(&self.own()?).await?,
        };
        self.ready_on(target).await
    }

    /// The same load, on a target that runs already.
    pub(crate) async fn ready_on(&self, target: Target) -> anyhow::Result<Ready<'_>> {
        let clock = RealClock::shared();
        let token_ids = match self.token_ids {
            Length::Fixed(id) => (id, id),
            Length::Between(first, last) => (first, last),
            Length::Around(..) => anyhow::bail!("--token-ids is a range, such as 100..500"),
        };
        let recipe = Recipe {
            workload: self.workload,
            model: target.model().await?,
            seed: self.seed.unwrap_or_else(|| clock.unix_ms()),
            prompt: self.prompt_tokens,
            output: self.output_tokens,
            token_ids,
            input_width: self.input_width,
        };
        Ok(Ready { args: self, target, recipe, clock })
    }
}

impl RunArgs {
    /// Runs the load and reports it.
    pub(crate) async fn run(&self) -> anyhow::Result<Report> {
        anyhow::ensure!(!self.overhead || !self.load.is_remote(), "--overhead needs a cluster of its own; drop --url");
        let ready = self.load.ready().await?;
        let mut report = ready.measure(&self.plan()).await?;
        ready.stop().await?;
        if self.overhead {
            let ready = self.load.ready_on(Target::start(&self.load.own()?.unchecked()).await?).await?;
            let unchecked = ready.measure(&self.plan()).await?;
            ready.stop().await?;
            let p50 = |report: &Report| report.latency_ms.get("e2e").map(|q| q.p50);
            report.verification.overhead_ratio =
                p50(&report).zip(p50(&unchecked)).map(|(with, without)| with / without);
        }
        Ok(report)
    }

    fn plan(&self) -> Plan<'_> {
        match (self.concurrency, &self.replay) {
            (Some(concurrency), _) => Plan::Closed(concurrency),
            (_, Some(file)) => Plan::Replay(file),
            _ => Plan::Rate(self.load.rate()),
        }
    }
}

impl Ready<'_> {
    /// Warms up, loads at a rate, and reports.
    pub(crate) async fn at_rate(&self, rate: f64) -> anyhow::Result<Report> {
        self.measure(&Plan::Rate(rate)).await
    }

    /// The same with so many requests always under way.
    #[cfg(test)]
    pub(crate) async fn in_closed_loop(&self, concurrency: usize) -> anyhow::Result<Report> {
        self.measure(&Plan::Closed(concurrency)).await
    }

    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.target.stop().await
    }

    async fn measure(&self, plan: &Plan<'_>) -> anyhow::Result<Report> {
        let args = self.args;
        if args.warm_up > 0.0 {
            self.send(self.load(plan, Some(Duration::from_secs_f64(args.warm_up)))?).await?;
        }
        let load = self.load(plan, None)?;
        let watch = Watch::begin(self.target.source(), Arc::clone(&self.clock)).await;
        let record = self.send(load).await?;
        let nodes = match watch {
            Some(watch) => watch.end().await?,
            None => Vec::new(),
        };
        let receipts = record.receipts.clone();
        let target_rate = match plan {
            Plan::Rate(rate) => Some(*rate),
            Plan::Closed(_) => None,
            Plan::Replay(_) => Some(record.sent as f64 / record.last_sent.as_secs_f64().max(1e-9)),
        };
        let mut report = Report::new(self.describe(plan), target_rate, record, nodes);
        report.verification.receipts_checked = self.target.check_receipts(&receipts).await?;
        Ok(report)
    }

    async fn send(&self, load: Load) -> anyhow::Result<Record> {
        let recipe = Arc::new(self.recipe.clone());
        let connect = || Asker {
            client: self.target.gateway().client(),
            recipe: Arc::clone(&recipe),
            clock: Arc::clone(&self.clock),
        };
        load.run(&self.clock, connect).await
    }

    /// The load of a plan; for the warm-up, only its first seconds.
    fn load(&self, plan: &Plan<'_>, warm_up: Option<Duration>) -> anyhow::Result<Load> {
        let args = self.args;
        let duration = warm_up.unwrap_or(Duration::from_secs_f64(args.duration));
        let mut connections = args.connections;
        let drawn = |count: usize| {
            let from = NEXT_NUMBER.fetch_add(count as u64, Ordering::Relaxed);
            Asks::Drawn(self.recipe.clone(), from)
        };
        let (pace, asks) = match plan {
            Plan::Rate(rate) => {
                let moments = args.arrivals.schedule(*rate, duration, self.recipe.seed)?;
                let asks = drawn(moments.len());
                (Pace::Open(moments), asks)
            }
            Plan::Closed(concurrency) => {
                anyhow::ensure!(*concurrency > 0, "--concurrency must be at least 1");
                connections = *concurrency;
                (Pace::Closed(duration), drawn(arrivals::REQUESTS_MAX))
            }
            Plan::Replay(file) => {
                let (mut moments, mut asks) = arrivals::replay(file, &self.recipe)?;
                if let Some(warm_up) = warm_up {
                    moments.retain(|moment| *moment < warm_up);
                    asks.truncate(moments.len());
                }
                let from = NEXT_NUMBER.fetch_add(asks.len() as u64, Ordering::Relaxed);
                asks.iter_mut().for_each(|ask| ask.number += from);
                (Pace::Open(moments), Asks::Listed(asks))
            }
        };
        let patience = Duration::from_secs_f64(args.timeout);
        Ok(Load { pace, asks, connections, patience, slo: args.slo.unwrap_or_default() })
    }

    fn describe(&self, plan: &Plan<'_>) -> Run {
        let args = self.args;
        let (arrivals, connections) = match plan {
            Plan::Rate(_) => (format!("{:?}", args.arrivals).to_lowercase(), args.connections),
            Plan::Closed(concurrency) => ("closed".into(), *concurrency),
            Plan::Replay(_) => ("replay".into(), args.connections),
        };
        Run {
            target: self.target.name().to_owned(),
            workload: format!("{:?}", args.workload).to_lowercase(),
            model: self.recipe.model.clone(),
            arrivals,
            duration_s: args.duration,
            warm_up_s: args.warm_up,
            connections,
            prompt_tokens: args.prompt_tokens.to_string(),
            output_tokens: args.output_tokens.to_string(),
            seed: self.recipe.seed,
            slo: args.slo.map(|slo| slo.to_string()),
        }
    }
}
