//! `butterfly doctor`: whether this machine can run a node, each failure with its cure.
//!
//! Checks are independent: one that fails does not hide another. What cannot be looked at is said, and is no failure.

use std::path::{Path, PathBuf};

use butterfly_topology::NodeId;
use serde::Serialize;

use crate::exit::{Exit, Failure};
use crate::global::Global;
use crate::topology_file;

mod cluster;
mod machine;

/// Check this machine and a topology's files on it; each failure comes with a fix
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly doctor                                     clock, processor, network of this machine
  butterfly doctor cluster/topology.toml               also keys, weights, ports and disk, before `serve`
  butterfly doctor cluster/topology.toml --node n0     only what node n0 needs
"
)]
pub(crate) struct Args {
    /// The topology file
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// The node that is to run here [default: every node whose key is here]
    #[arg(long, value_name = "ID", value_parser = NodeId::parse)]
    node: Option<NodeId>,
    /// Folder of the nodes' logs [default: data, beside the topology file]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

/// What one check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    check: &'static str,
    state: State,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warning,
    Failure,
}

impl Finding {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self { check, state: State::Ok, detail: detail.into(), fix: None }
    }

    fn warning(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, state: State::Warning, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn failure(check: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, state: State::Failure, detail: detail.into(), fix: Some(fix.into()) }
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    if args.file.is_none() && (args.node.is_some() || args.data.is_some()) {
        return Err(Failure::usage("--node and --data belong to a topology: name its file"));
    }
    let mut findings = machine::findings();
    if let Some(file) = &args.file {
        let topology = topology_file::load(file, global)?;
        if let Some(node) = args.node.as_ref().filter(|node| topology.cluster.node(node).is_none()) {
            return Err(Failure::usage(format!("the topology has no node `{node}`")));
        }
        let base = file.parent().unwrap_or(Path::new(""));
        let data = args.data.clone().unwrap_or_else(|| base.join("data"));
        findings.extend(cluster::findings(&topology, file, args.node.as_ref(), &data));
    }
    let failed = findings.iter().any(|finding| finding.state == State::Failure);
    if global.json {
        global.print_json(&serde_json::json!({ "healthy": !failed, "findings": findings }))?;
    } else {
        global.print(text(&findings, global).trim_end())?;
    }
    if failed { Err(Failure::told(Exit::Environment)) } else { Ok(()) }
}

fn text(findings: &[Finding], global: &Global) -> String {
    let ink = global.ink_stdout();
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Finding { check, state, detail, fix } in findings {
        let state = match state {
            State::Ok => ink.good("ok     "),
            State::Warning => ink.warn("warning"),
            State::Failure => ink.bad("failure"),
        };
        text.push_str(&format!("{state}  {check:<width$}  {detail}\n"));
        if let Some(fix) = fix {
            text.push_str(&format!("         {:width$}  {}: {fix}\n", "", ink.strong("fix")));
        }
    }
    text
}
