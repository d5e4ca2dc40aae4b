//! `butterfly status`: what every node says about itself and about the others, once.

use serde_json::{Value, json};

use crate::activity::{activities, bottleneck};
use crate::admin_client::{Admins, Said, Where, block_on};
use crate::exit::{Exit, Failure};
use crate::global::{Global, Ink};
use crate::table::Table;

/// Show the cluster: which nodes are ready, what they do, and what is held against whom
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly status                                   the nodes of ./topology.toml
  butterfly status cluster/topology.toml --json      for a program; status 1 when a node is not ready
  butterfly status --admin http://127.0.0.1:9100 --token-file admin.token
"
)]
pub(crate) struct Args {
    #[command(flatten)]
    r#where: Where,
}

/// What was learned of the cluster.
pub(crate) struct Seen {
    /// Whether each node is ready.
    pub(crate) ready: Vec<Said>,
    /// The roster, as each node sees it.
    pub(crate) nodes: Vec<Said>,
    /// The stages of each node.
    pub(crate) stages: Vec<Said>,
}

impl Seen {
    /// Asks every node.
    pub(crate) async fn ask(admins: &Admins) -> Self {
        let (ready, nodes, stages) = futures::join!(
            admins.ask_all("/readyz"),
            admins.ask_all("/api/v1/nodes"),
            admins.ask_all("/api/v1/stages"),
        );
        Self { ready, nodes, stages }
    }

    fn all_ready(&self) -> bool {
        self.ready.iter().all(|said| said.document().is_some())
    }

    pub(crate) fn json(&self) -> Value {
        let by_node = |((ready, nodes), stages): ((&Said, &Said), &Said)| {
            let readiness = ready.answer.as_ref().ok().map(|(_, document)| document);
            json!({
                "node": nodes.document().map_or_else(|| json!(ready.name), |document| document["node"].clone()),
                "ready": ready.document().is_some(),
                "reasons": readiness.map(|document| &document["reasons"]),
                "problem": ready.answer.as_ref().err().or(nodes.problem().as_ref()),
                "roster": nodes.document(),
                "stages": stages.document(),
            })
        };
        let nodes = self.ready.iter().zip(&self.nodes).zip(&self.stages);
        json!({ "ready": self.all_ready(), "nodes": nodes.map(by_node).collect::<Vec<_>>() })
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let admins = args.r#where.admins(global)?;
    let seen = block_on(Seen::ask(&admins))?;
    if global.json {
        global.print_json(&seen.json())?;
    } else {
        global.print(text(&seen, None, global.ink_stdout()).trim_end())?;
    }
    if seen.all_ready() { Ok(()) } else { Err(Failure::told(Exit::Failure)) }
}

/// The page that `status` and `top` show; with what was seen before, shares are of the time between.
pub(crate) fn text(seen: &Seen, before: Option<&Seen>, ink: Ink) -> String {
    let mut text = String::new();
    if let Some(cluster) = seen.nodes.iter().find_map(Said::document) {
        let slices = cluster["slices"].as_array().map_or(0, Vec::len);
        text.push_str(&format!(
            "cluster {}, model {}, epoch {}, at most {} lying, {slices} slice{}\n\n",
            plain(&cluster["cluster"]),
            plain(&cluster["model"]),
            plain(&cluster["epoch"]).get(..16).unwrap_or_default(),
            plain(&cluster["max_byzantine"]),
            if slices == 1 { "" } else { "s" },
        ));
    }
    text.push_str(&nodes(seen, ink));
    text.push('\n');
    text.push_str(&conduct(seen));
    for (index, said) in seen.stages.iter().enumerate() {
        let Some(now) = said.document() else { continue };
        let earlier = before.and_then(|before| before.stages.get(index)).and_then(Said::document);
        text.push('\n');
        text.push_str(&stages(now, earlier, ink));
    }
    text
}

fn nodes(seen: &Seen, ink: Ink) -> String {
    let mut table = Table::new(&["node", "state", "running", "waiting", "tokens", "receipts"]);
    for ((ready, nodes), stages) in seen.ready.iter().zip(&seen.nodes).zip(&seen.stages) {
        let name = nodes.document().map_or_else(|| ready.name.clone(), |document| plain(&document["node"]));
        let state = match &ready.answer {
            Ok((200, _)) => nodes.problem().map_or_else(|| ink.good("ready"), |why| ink.bad(&why)),
            Ok((_, document)) => {
                let reasons = document["reasons"].as_array().map(Vec::as_slice).unwrap_or_default();
                ink.warn(&reasons.iter().map(plain).collect::<Vec<_>>().join(", "))
            }
            Err(why) => ink.bad(&format!("unreachable: {why}")),
        };
        let tasks = stages.document().map(|document| &document["tasks"]);
        let count = |key: &str| tasks.map_or_else(String::new, |tasks| plain(&tasks[key]));
        table.row(vec![name, state, count("running"), count("waiting"), count("generation_tokens"), count("receipts")]);
    }
    table.text()
}

/// What the nodes hold against each other: each cell is what the node of the row says of the node of the column.
fn conduct(seen: &Seen) -> String {
    let mut table = Table::new(&["says", "of", "link", "rtt", "agreed", "silent", "accused"]);
    for said in &seen.nodes {
        let Some(document) = said.document() else { continue };
        let others = document["nodes"].as_array().map(Vec::as_slice).unwrap_or_default();
        for other in others.iter().filter(|other| other["self"] != true) {
            let accused = other["conduct"]["accused"].as_object();
            let accused: Vec<String> =
                accused.into_iter().flatten().map(|(kind, count)| format!("{count} {kind}")).collect();
            table.row(vec![
                plain(&document["node"]),
                plain(&other["id"]),
                plain(&other["state"]),
                other["rtt_ms"].as_f64().map_or_else(String::new, |rtt| format!("{rtt:.2} ms")),
                plain(&other["conduct"]["agreed"]),
                plain(&other["conduct"]["silent"]),
                accused.join(", "),
            ]);
        }
    }
    table.text()
}

fn stages(now: &Value, earlier: Option<&Value>, ink: Ink) -> String {
    let activities = activities(now, earlier);
    let mut table = Table::new(&["stage", "busy", "verifying", "blocked", "starved", "items", "service"]);
    let share = |share: f64| format!("{:.0} %", 100.0 * share);
    for activity in &activities {
        table.row(vec![
            activity.stage.clone(),
            share(activity.busy),
            share(activity.verifying),
            share(activity.blocked),
            share(activity.starved),
            activity.items.to_string(),
            format!("{:.3} ms", 1000.0 * activity.service_p50),
        ]);
    }
    let verdict = match bottleneck(&activities) {
        Some(activity) => format!(
            "{} bounds this node: it works {} of the time",
            activity.stage,
            share(activity.busy + activity.verifying)
        ),
        None => "no stage of this node is at its limit".to_owned(),
    };
    format!("{}: {verdict}\n{}", ink.strong(&plain(&now["node"])), table.text())
}

/// A value as text; what a node sends cannot steer the terminal.
pub(crate) fn plain(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
