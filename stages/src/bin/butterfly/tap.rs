//! `butterfly tap`: items that pass a stage, while they do. Digests and counts, unless the payload is asked for.

use serde_json::Value;

use crate::admin_client::{Where, block_on, path_segment};
use crate::exit::{Exit, Failure};
use crate::global::Global;
use crate::status::plain;

/// Watch the items that a stage takes
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly tap consensus                                20 outcomes, as digests, from every node
  butterfly tap compute cluster/topology.toml --limit 5 --interval 1000
  butterfly tap partition --payload                      with what the clients asked: look before you share it
"
)]
pub(crate) struct Args {
    /// The stage whose inputs are watched; of one that has none, its outputs
    #[arg(value_name = "STAGE")]
    stage: String,
    #[command(flatten)]
    r#where: Where,
    /// Items of each node
    #[arg(long, default_value = "20", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// Milliseconds between two items of an edge, at least
    #[arg(long, default_value = "0", value_name = "MILLISECONDS")]
    interval: u64,
    /// Show what is in the items, prompts and answers among it
    #[arg(long)]
    payload: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let admins = args.r#where.admins(global)?;
    let path = format!(
        "/api/v1/tap/{}?limit={}&interval_ms={}&payload={}",
        path_segment(&args.stage),
        args.limit,
        args.interval,
        args.payload
    );
    let ended = block_on(admins.follow_all(&path, |node, item| show(node, item, global)))??;
    let problems: Vec<String> =
        ended.iter().filter_map(|(node, problem)| Some(format!("{node}: {}", problem.as_ref()?))).collect();
    // A stage need not run on every node.
    if problems.len() < ended.len() {
        return Ok(());
    }
    Err(Failure::new(Exit::Failure, problems.join("\n")))
}

fn show(node: &str, item: &Value, global: &Global) -> Result<(), Failure> {
    if global.json {
        let line = serde_json::json!({ "node": node, "tapped": item });
        return global.print(&line.to_string());
    }
    let mut line = format!("{node}  {}  {} bytes", plain(&item["edge"]), plain(&item["bytes"]));
    if let Some(facts) = item["item"].as_object() {
        for (key, value) in facts.iter().filter(|(key, _)| *key != "payload") {
            line.push_str(&format!("  {key}={}", plain(value)));
        }
    }
    if !item["item"]["payload"].is_null() {
        line.push_str(&format!("\n    {}", plain(&item["item"]["payload"])));
    }
    global.print(&line)
}
