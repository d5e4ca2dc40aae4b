//! The graph as a picture that needs no other program: a column for each step of the way, feedback edges dashed below.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{edge_lines, stage_lines};
use crate::name::StageName;
use crate::topology::Topology;

const BOX_WIDTH: usize = 130;
const BOX_HEIGHT: usize = 64;
/// Between the left sides of two columns: room for the text on an edge.
const COLUMN_STEP: usize = 330;
/// Between the tops of two boxes of a column.
const ROW_STEP: usize = 110;
const MARGIN: usize = 24;
/// Below the boxes, for the feedback edges.
const LOOP_HEIGHT: usize = 90;

/// The graph as an SVG document: item types and bounds on the edges, feedback edges dashed.
#[must_use]
pub fn svg(topology: &Topology) -> String {
    let places = places(topology);
    let most = |axis: fn(&(usize, usize)) -> usize| places.values().map(axis).max().unwrap_or(0);
    let width = 2 * MARGIN + most(|place| place.0) * COLUMN_STEP + BOX_WIDTH;
    let boxes_height = most(|place| place.1) * ROW_STEP + BOX_HEIGHT;
    let height = 2 * MARGIN + boxes_height + LOOP_HEIGHT;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<title>{}</title>\n<defs><marker id=\"end\" viewBox=\"0 0 8 8\" refX=\"8\" \
         refY=\"4\" markerWidth=\"8\" markerHeight=\"8\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\" fill=\"#555\"/></marker></defs>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
        escape(&topology.cluster.name)
    );
    // Writing to a string cannot fail.
    let _ = write_edges(&mut text, topology, &places, MARGIN + boxes_height);
    let _ = write_stages(&mut text, topology, &places);
    text.push_str("</svg>\n");
    text
}

/// Column and row of each stage. A stage stands one column behind the last of those that feed it.
fn places(topology: &Topology) -> BTreeMap<&StageName, (usize, usize)> {
    let mut places: BTreeMap<&StageName, (usize, usize)> = BTreeMap::new();
    let mut rows: BTreeMap<usize, usize> = BTreeMap::new();
    // Stages are in the order of travel, so whatever feeds one has its place already.
    for stage in &topology.graph.stages {
        let feeds = topology.graph.edges.iter().filter(|edge| edge.to.stage == stage.name && !edge.feedback);
        let before = feeds.filter_map(|edge| places.get(&edge.from.stage)).map(|(column, _)| column + 1);
        let column = before.max().unwrap_or(0);
        let row = rows.entry(column).or_default();
        places.insert(&stage.name, (column, *row));
        *row += 1;
    }
    places
}

fn corner((column, row): (usize, usize)) -> (usize, usize) {
    (MARGIN + column * COLUMN_STEP, MARGIN + row * ROW_STEP)
}

fn write_edges(
    text: &mut String,
    topology: &Topology,
    places: &BTreeMap<&StageName, (usize, usize)>,
    floor: usize,
) -> std::fmt::Result {
    for edge in &topology.graph.edges {
        let (Some(from), Some(to)) = (places.get(&edge.from.stage), places.get(&edge.to.stage)) else { continue };
        let ((from_x, from_y), (to_x, to_y)) = (corner(*from), corner(*to));
        let (label_x, label_y) = if edge.feedback {
            let (from_x, to_x) = (from_x + BOX_WIDTH / 2, to_x + BOX_WIDTH / 2);
            let (from_y, to_y, low) = (from_y + BOX_HEIGHT, to_y + BOX_HEIGHT, floor + LOOP_HEIGHT - 30);
            writeln!(
                text,
                "<path d=\"M{from_x} {from_y}C{from_x} {low} {to_x} {low} {to_x} {to_y}\" fill=\"none\" stroke=\"#555\" \
                 stroke-dasharray=\"5 4\" marker-end=\"url(#end)\"/>"
            )?;
            ((from_x + to_x) / 2, floor + LOOP_HEIGHT - 24)
        } else {
            let (from_x, from_y, to_y) = (from_x + BOX_WIDTH, from_y + BOX_HEIGHT / 2, to_y + BOX_HEIGHT / 2);
            let bend = (from_x + to_x) / 2;
            writeln!(
                text,
                "<path d=\"M{from_x} {from_y}C{bend} {from_y} {bend} {to_y} {to_x} {to_y}\" fill=\"none\" stroke=\"#555\" \
                 marker-end=\"url(#end)\"/>"
            )?;
            (bend, (from_y + to_y) / 2 - 20)
        };
        write_lines(text, (label_x, label_y), &edge_lines(edge), "#333")?;
    }
    Ok(())
}

fn write_stages(
    text: &mut String,
    topology: &Topology,
    places: &BTreeMap<&StageName, (usize, usize)>,
) -> std::fmt::Result {
    for stage in &topology.graph.stages {
        let Some(place) = places.get(&stage.name) else { continue };
        let (x, y) = corner(*place);
        writeln!(
            text,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{BOX_WIDTH}\" height=\"{BOX_HEIGHT}\" rx=\"6\" fill=\"#eef3fa\" stroke=\"#456\"/>"
        )?;
        let lines = stage_lines(stage);
        let top = y + (BOX_HEIGHT.saturating_sub(16 * lines.len())) / 2 + 12;
        write_lines(text, (x + BOX_WIDTH / 2, top), &lines, "#000")?;
    }
    Ok(())
}

fn write_lines(text: &mut String, (x, y): (usize, usize), lines: &[String], colour: &str) -> std::fmt::Result {
    for (line, index) in lines.iter().zip(0_usize..) {
        let y = y + 16 * index;
        writeln!(text, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\" fill=\"{colour}\">{}</text>", escape(line))?;
    }
    Ok(())
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars().filter(|c| !c.is_control()) {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}
