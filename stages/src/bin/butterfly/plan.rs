//! `butterfly plan`: which node would hold which layers, what that promises, and why others hold nothing.

use std::path::{Path, PathBuf};

use butterfly::node::Foundation;
use butterfly_topology::planner::{self, Forecast, REFERENCE_WORK_PER_SECOND};
use butterfly_topology::{Plan, Strategy, Topology, bytes_text};
use serde_json::json;

use crate::exit::{Exit, Failure};
use crate::global::{Global, Ink};
use crate::lock::{self, Lock};
use crate::table::Table;
use crate::topology_file;

/// Show the plan of a topology: slices, replica sets, predicted speed, and who is left out
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly plan cluster/topology.toml             what `serve` would do, and what it promises
  butterfly plan topology.toml --write             keep it in topology.lock, for review
  butterfly plan topology.toml --strategy uniform  what another strategy would do
"
)]
pub(crate) struct Args {
    /// The topology file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Write topology.lock beside the file; `serve` then refuses any other plan
    #[arg(long)]
    write: bool,
    /// Plan with this strategy first: topology_aware, load_balanced or uniform [default: what the topology says]
    #[arg(long, value_parser = parse_strategy, conflicts_with = "write")]
    strategy: Option<Strategy>,
    /// Multiply-adds per second of a node of speed 1, as measured; the prediction is as good as this number
    #[arg(long, default_value_t = REFERENCE_WORK_PER_SECOND, value_name = "NUMBER")]
    work_per_second: f64,
}

fn parse_strategy(word: &str) -> Result<Strategy, String> {
    Strategy::parse(word).ok_or_else(|| {
        let words: Vec<&str> = Strategy::ALL.iter().map(|strategy| strategy.as_str()).collect();
        format!("expected one of {}", words.join(", "))
    })
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    if !(args.work_per_second.is_finite() && args.work_per_second > 0.0) {
        return Err(Failure::usage("--work-per-second is a positive number"));
    }
    let topology = topology_file::load(&args.file, global)?;
    let base = args.file.parent().unwrap_or(Path::new(""));
    let foundation = Foundation::new(&topology, base)
        .map_err(|error| Failure::new(Exit::Failure, format!("there is no plan: {error}")))?;
    let input = foundation.question.input();
    let plan = match args.strategy {
        Some(strategy) => planner::plan_or_degrade(strategy, &input)
            .map_err(|error| Failure::new(Exit::Failure, format!("there is no plan: {error}")))?,
        None => Plan::clone(&foundation.plan),
    };
    let forecast = planner::forecast(&plan, &input, args.work_per_second);
    let found = Lock::new(&foundation.plan, &foundation.epoch);
    let locked = Lock::read(&args.file)?;
    let written = if args.write { Some(found.write(&args.file)?) } else { None };
    if global.json {
        return global.print_json(&json!({
            "cluster": topology.cluster.name,
            "model": topology.cluster.model,
            "plan": plan,
            "forecast": forecast,
            "epoch": args.strategy.is_none().then(|| foundation.epoch.digest()),
            "lock": locked.as_ref().map(|locked| json!({ "differences": locked.differences(&found) })),
            "written": written,
        }));
    }
    let mut text = describe(&topology, &plan, &forecast, global.ink_stdout());
    if args.strategy.is_none() {
        text.push_str(&format!("\nepoch {}\n", foundation.epoch.digest()));
        text.push_str(&about_lock(&args.file, locked.as_ref(), &found, written.as_deref()));
    }
    global.print(text.trim_end())
}

fn about_lock(topology: &Path, locked: Option<&Lock>, found: &Lock, written: Option<&Path>) -> String {
    let differences = locked.map(|locked| locked.differences(found));
    let path = lock::beside(topology);
    match (written, differences) {
        (Some(path), Some(differences)) if !differences.is_empty() => {
            format!("wrote {}; it changed:\n  {}", path.display(), differences.join("\n  "))
        }
        (Some(path), _) => format!("wrote {}", path.display()),
        (None, None) => format!("{} does not exist; --write makes it, and `serve` then insists on it", path.display()),
        (None, Some(differences)) if differences.is_empty() => format!("{} says the same", path.display()),
        (None, Some(differences)) => {
            format!("{} says otherwise, so `serve` will refuse:\n  {}", path.display(), differences.join("\n  "))
        }
    }
}

fn describe(topology: &Topology, plan: &Plan, forecast: &Forecast, ink: Ink) -> String {
    let cluster = &topology.cluster;
    let mut text = format!(
        "{} of cluster {} for {}: {}, by {}\n\n",
        ink.strong("plan"),
        cluster.name,
        cluster.model,
        count(plan.slices.len(), "slice"),
        plan.strategy
    );
    let mut table = Table::new(&["slice", "layers", "weights", "memory", "computing", "crossing", "replicas"]);
    for ((index, slice), costs) in plan.slices.iter().enumerate().zip(&forecast.slices) {
        table.row(vec![
            index.to_string(),
            format!("{}..{}", slice.layers.start, slice.layers.end),
            bytes_text(costs.weight_bytes),
            bytes_text(costs.memory_bytes),
            seconds(costs.compute_seconds),
            seconds(costs.crossing_seconds),
            slice.replicas.iter().map(AsRef::as_ref).collect::<Vec<&str>>().join(", "),
        ]);
    }
    text.push_str(&table.text());
    text.push_str(&format!(
        "\npredicted: {} for one token of one request, {:.0} tokens/s over all requests; slice {} bounds it; the work is \
         divided {:.0} % evenly\n",
        seconds(forecast.step_seconds),
        forecast.tokens_per_second,
        forecast.slowest_slice,
        100.0 * forecast.quality,
    ));
    if forecast.links.iter().any(|link| link.links > 0) {
        let mut table = Table::new(&["from slice", "to slice", "links", "on each, per token"]);
        for link in &forecast.links {
            table.row(vec![
                link.from_slice.to_string(),
                link.to_slice.to_string(),
                link.links.to_string(),
                bytes_text(link.bytes_per_token),
            ]);
        }
        text.push_str(&format!("\n{}", table.text()));
    }
    if !forecast.rejected.is_empty() {
        text.push_str("\nleft out:\n");
        for rejection in &forecast.rejected {
            text.push_str(&format!("  {}: {}\n", rejection.node, rejection.reason));
        }
    }
    if !plan.fallbacks.is_empty() {
        text.push_str("\npassed over:\n");
        for (strategy, reason) in &plan.fallbacks {
            text.push_str(&format!("  {strategy}: {reason}\n"));
        }
    }
    text
}

fn seconds(seconds: f64) -> String {
    match std::time::Duration::try_from_secs_f64(seconds) {
        Ok(duration) => format!("{duration:.1?}"),
        Err(_) => "longer than ever".to_owned(),
    }
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
