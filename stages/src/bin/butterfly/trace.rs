//! `butterfly trace`: what happened to one request, on every node that had to do with it.
//!
//! Each node tells its own timeline by its own clock. Nothing is computed across two clocks: hops are timed where they
//! arrive, and what stands in one picture beside another node's times stands there on that node's word.

use serde_json::Value;

use crate::admin_client::{Said, Where, block_on, path_segment};
use crate::exit::{Exit, Failure};
use crate::global::{Global, Ink};
use crate::status::plain;
use crate::table::Table;

mod export;

/// Show the timeline of one request over stages, hops and replicas
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly trace req-5f3a-1 cluster/topology.toml       by the x-request-id of the response
  butterfly trace 3f2a… --format chrome > trace.json     by receipt id; open it at https://ui.perfetto.dev
  butterfly trace my-task --format otlp > spans.json     by task id; for an OpenTelemetry collector
  butterfly trace 0af7651916cd43dd8448eb211c80319c       by the trace id of a traceparent
"
)]
pub(crate) struct Args {
    /// The request: its x-request-id, task id, receipt id, or trace id
    #[arg(value_name = "ID")]
    id: String,
    #[command(flatten)]
    r#where: Where,
    /// How to show it
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For people
    Text,
    /// Chrome's trace events, for Perfetto
    Chrome,
    /// OpenTelemetry's JSON
    Otlp,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let admins = args.r#where.admins(global)?;
    let said = block_on(async {
        let mut said = admins.ask_all(&path(&args.id)).await;
        // The gateway knows every name of a request; the others know its digest, and where it came from.
        let known = said.iter().find_map(Said::document).and_then(|document| document["request"].as_str());
        if let Some(request) = known.map(str::to_owned).filter(|request| *request != args.id) {
            said = admins.ask_all(&path(&request)).await;
        }
        said
    })?;
    let timelines: Vec<&Value> = said.iter().filter_map(Said::document).collect();
    for silent in said.iter().filter(|said| !matches!(said.answer, Ok((200 | 404, _)))) {
        global.say(&format!("{}: {}", silent.name, silent.problem().unwrap_or_default()));
    }
    if timelines.is_empty() {
        return Err(Failure::new(Exit::Failure, format!("no node that answers knows {}", args.id))
            .help("a node keeps the timelines of its last 1024 requests; `butterfly status` says which nodes answer"));
    }
    match args.format {
        Format::Chrome => global.print_json(&export::chrome(&timelines)),
        Format::Otlp => global.print_json(&export::otlp(&timelines)),
        Format::Text if global.json => global.print_json(&timelines),
        Format::Text => global.print(text(&timelines, global.ink_stdout()).trim_end()),
    }
}

fn path(id: &str) -> String {
    format!("/api/v1/requests/{}/timeline", path_segment(id))
}

/// The marks of a timeline.
fn marks(timeline: &Value) -> &[Value] {
    timeline["marks"].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Whether this is the node that took the request in.
fn is_gateway(timeline: &Value) -> bool {
    marks(timeline).iter().any(|mark| mark["stage"] == "ingest")
}

fn text(timelines: &[&Value], ink: Ink) -> String {
    let mut text = String::new();
    if let Some(first) = timelines.iter().find(|timeline| is_gateway(timeline)).or(timelines.first()) {
        text.push_str(&format!("request {}\n", plain(&first["request"])));
        for (what, key) in [("request id", "request_id"), ("trace", "trace_id"), ("client's span", "parent_id")] {
            if first[key].is_string() {
                text.push_str(&format!("{what} {}\n", plain(&first[key])));
            }
        }
    }
    text.push_str("times are each node's own word, by its own clock; do not subtract those of two nodes\n");
    let mut ordered = timelines.to_vec();
    ordered.sort_by_key(|timeline| !is_gateway(timeline));
    for timeline in ordered {
        let role = if is_gateway(timeline) { " (gateway)" } else { "" };
        text.push_str(&format!("\n{}{role}\n", ink.strong(&plain(&timeline["node"]))));
        let mut table = Table::new(&["after", "took", "stage", "what", "slice", "from", "count"]);
        for mark in marks(timeline) {
            table.row(vec![
                milliseconds(&mark["at_us"]),
                if mark["took_us"].is_null() { String::new() } else { milliseconds(&mark["took_us"]) },
                plain(&mark["stage"]),
                plain(&mark["what"]),
                plain(&mark["slice"]),
                plain(&mark["peer"]),
                plain(&mark["count"]),
            ]);
        }
        text.push_str(&table.text());
        if timeline["marks_dropped"].as_u64().is_some_and(|dropped| dropped > 0) {
            text.push_str(&format!("{} further marks had no room\n", plain(&timeline["marks_dropped"])));
        }
    }
    text
}

fn milliseconds(micros: &Value) -> String {
    format!("{:.3} ms", micros.as_f64().unwrap_or(0.0) / 1000.0)
}
