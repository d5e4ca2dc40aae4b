//! The graph for people: dot (Graphviz), mermaid, and a picture of its own.
//!
//! Names come from a file, so everything that enters the output is escaped for where it stands.

mod svg;

use std::fmt::Write as _;

use crate::catalogue::WhenFull;
use crate::graph::{EdgeSpec, StageSpec};
use crate::name::StageName;
use crate::plan::bytes_text;
use crate::topology::Topology;

pub use svg::svg;

/// The graph in the language of Graphviz: item types and bounds on the edges, feedback edges dashed.
#[must_use]
pub fn dot(topology: &Topology) -> String {
    let mut text = format!("digraph {} {{\n", dot_quote(&topology.cluster.name));
    text.push_str("  rankdir=LR;\n  node [shape=box, fontname=\"sans-serif\"];\n  edge [fontname=\"sans-serif\"];\n");
    for stage in &topology.graph.stages {
        let label = stage_lines(stage).iter().map(|line| dot_escape(line)).collect::<Vec<_>>().join("\\n");
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {} [label=\"{label}\"];", dot_quote(stage.name.as_str()));
    }
    for edge in &topology.graph.edges {
        let label = edge_lines(edge).iter().map(|line| dot_escape(line)).collect::<Vec<_>>().join("\\n");
        let style = if edge.feedback { ", style=dashed, constraint=false" } else { "" };
        let _ = writeln!(
            text,
            "  {} -> {} [label=\"{label}\"{style}];",
            dot_quote(edge.from.stage.as_str()),
            dot_quote(edge.to.stage.as_str()),
        );
    }
    text.push_str("}\n");
    text
}

/// The graph as a mermaid flowchart: item types and bounds on the edges, feedback edges dotted.
#[must_use]
pub fn mermaid(topology: &Topology) -> String {
    let mut text = String::from("flowchart LR\n");
    let position =
        |name: &StageName| topology.graph.stages.iter().position(|stage| stage.name == *name).unwrap_or_default();
    for (index, stage) in topology.graph.stages.iter().enumerate() {
        let label = stage_lines(stage).iter().map(|line| mermaid_escape(line)).collect::<Vec<_>>().join("<br/>");
        // Ids of its own, since a stage may be named like a word of the language.
        let _ = writeln!(text, "  s{index}[\"{label}\"]");
    }
    for edge in &topology.graph.edges {
        let label = edge_lines(edge).iter().map(|line| mermaid_escape(line)).collect::<Vec<_>>().join("<br/>");
        let arrow = if edge.feedback { "-.->" } else { "-->" };
        let (from, to) = (position(&edge.from.stage), position(&edge.to.stage));
        let _ = writeln!(text, "  s{from} {arrow}|\"{label}\"| s{to}");
    }
    text
}

fn stage_lines(stage: &StageSpec) -> Vec<String> {
    let mut lines = vec![stage.name.to_string()];
    if stage.name != *stage.kind {
        lines.push(format!("kind {}", stage.kind));
    }
    if let Some(on) = &stage.on {
        let ids: Vec<&str> = on.iter().map(|id| id.as_str()).collect();
        lines.push(format!("on {}", ids.join(", ")));
    }
    lines
}

fn edge_lines(edge: &EdgeSpec) -> Vec<String> {
    let ports = if edge.from.port == edge.to.port {
        edge.from.port.to_owned()
    } else {
        format!("{} > {}", edge.from.port, edge.to.port)
    };
    let mut bounds = format!("{} items, {}", edge.capacity_items, bytes_text(edge.capacity_bytes as u64));
    if edge.full == WhenFull::Reject {
        bounds.push_str(", rejects");
    }
    vec![format!("{ports}: {}", edge.item), bounds]
}

fn dot_quote(text: &str) -> String {
    format!("\"{}\"", dot_escape(text))
}

fn dot_escape(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .flat_map(|c| {
            let escape = matches!(c, '"' | '\\').then_some('\\');
            escape.into_iter().chain(std::iter::once(c))
        })
        .collect()
}

fn mermaid_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars().filter(|c| !c.is_control()) {
        match c {
            '"' => escaped.push_str("&quot;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '#' => escaped.push_str("&#35;"),
            c => escaped.push(c),
        }
    }
    escaped
}
