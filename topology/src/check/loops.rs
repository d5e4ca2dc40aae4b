//! Loops: whether all that may travel in one fits the edge that closes it.
//!
//! A loop deadlocks when its feedback edge is full while the stage that would empty it waits to send. That cannot happen
//! when the edge has room for everything that all gateways together may let into the loop: permits times window, in
//! items, and times the largest frame, in bytes. An edge without a stated capacity is given that room.

use crate::catalogue::Catalogue;
use crate::diagnostic::{Code, Diagnostic};
use crate::graph::{CAPACITY_BYTES_MAX, CAPACITY_ITEMS_MAX, FRAME_BYTES_KEY, Graph, LoopSpec, PERMITS_KEY};
use crate::name::StageName;
use crate::plan::bytes_text;
use crate::schema::StageDecl;

use super::cluster::Crew;

pub(super) fn check(
    graph: &mut Graph,
    crew: &Crew,
    stages: &[StageDecl<'_>],
    catalogue: &Catalogue,
    problems: &mut Vec<Diagnostic>,
) {
    let Some(max_byzantine) = crew.max_byzantine else { return };
    for spec in graph.loops(&crew.ids, max_byzantine, catalogue) {
        let (Some(frames), Some(permits)) = (spec.frames, spec.permits) else { continue };
        let frame_bytes = frame_bytes(graph, &spec);
        let Some(edge) = graph.edges.get_mut(spec.edge) else { continue };
        let source = stages.iter().find(|stage| stage.name.as_ref() == Some(&edge.from.stage));
        let Some(source) = source else { continue };
        let case = Case { spec: &spec, stages, from: edge.from.to_string(), frames, permits };
        match &source.capacity {
            Some((items, span)) if *items < frames => {
                problems.push(
                    case.problem(format!("{frames} frames"), format!("{items} items"))
                        .at(span.clone(), format!("room for {items}"))
                        .help(case.way_out("capacity", &frames.to_string(), *items)),
                );
            }
            Some(_) => {}
            None if frames > CAPACITY_ITEMS_MAX => {
                problems.push(
                    case.problem(format!("{frames} frames"), format!("at most {CAPACITY_ITEMS_MAX} items"))
                        .at(source.name_span.clone(), "its feedback edge cannot be that large")
                        .help(case.way_out("capacity", "", CAPACITY_ITEMS_MAX)),
                );
            }
            None => edge.capacity_items = edge.capacity_items.max(frames),
        }
        let Some(frame_bytes) = frame_bytes else { continue };
        let needed = frame_bytes.saturating_mul(frames as u64);
        let fits = usize::try_from(needed).ok().filter(|_| needed <= CAPACITY_BYTES_MAX);
        match (&source.capacity_bytes, fits) {
            (Some((bytes, span)), _) if (*bytes as u64) < needed => {
                let room = bytes_text(*bytes as u64);
                let items = usize::try_from(*bytes as u64 / frame_bytes.max(1)).unwrap_or(usize::MAX);
                problems.push(
                    case.problem(
                        format!("{frames} frames of {}, {}", bytes_text(frame_bytes), bytes_text(needed)),
                        room.clone(),
                    )
                    .at(span.clone(), format!("room for {room}"))
                    .help(case.way_out(
                        "capacity_bytes",
                        &format!("\"{}\"", round_up(needed)),
                        items,
                    )),
                );
            }
            (None, None) => {
                let room = bytes_text(CAPACITY_BYTES_MAX);
                problems.push(
                    case.problem(bytes_text(needed), format!("at most {room}"))
                        .at(source.name_span.clone(), "its feedback edge cannot be that large")
                        .help(case.way_out("capacity_bytes", "", 0)),
                );
            }
            (None, Some(needed)) => edge.capacity_bytes = edge.capacity_bytes.max(needed),
            (Some(_), _) => {}
        }
    }
}

/// The next whole KiB, MiB or GiB that holds this many bytes, as it would be written.
fn round_up(bytes: u64) -> String {
    for (unit, size) in [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= 8 * size || (bytes >= size && bytes.is_multiple_of(size)) {
            return format!("{} {unit}", bytes.div_ceil(size));
        }
    }
    format!("{bytes} B")
}

/// The largest frame that the loop's stages send, where one of them states it.
fn frame_bytes(graph: &Graph, spec: &LoopSpec) -> Option<u64> {
    spec.stages.iter().filter_map(|name| graph.stage(name)?.config.bytes(FRAME_BYTES_KEY)).max()
}

struct Case<'a> {
    spec: &'a LoopSpec,
    stages: &'a [StageDecl<'a>],
    from: String,
    frames: usize,
    permits: usize,
}

impl Case<'_> {
    fn problem(&self, travels: String, room: String) -> Diagnostic {
        let mut names: Vec<&str> = self.spec.stages.iter().map(StageName::as_str).collect();
        names.extend(self.spec.stages.first().map(StageName::as_str));
        let message = format!(
            "the loop {} may hold {travels}, and the edge from `{}` has room for {room}",
            names.join(" -> "),
            self.from
        );
        let mut diagnostic = Diagnostic::error(Code::LoopCapacity, message);
        for giver in &self.spec.permits_from {
            let decl = self.stages.iter().find(|stage| stage.name.as_ref() == Some(&giver.stage));
            let Some(span) = decl.and_then(|decl| decl.values.place(PERMITS_KEY)) else { continue };
            let gateways = if giver.nodes == 1 { "1 node".to_owned() } else { format!("{} nodes", giver.nodes) };
            diagnostic = diagnostic
                .also(span, format!("{} permits on {gateways} × {} replicas", giver.permits, self.spec.window));
        }
        diagnostic
    }

    fn way_out(&self, key: &str, needed: &str, frames_held: usize) -> String {
        let least = frames_held / (self.frames / self.permits.max(1)).max(1) / self.nodes();
        let lower = match least {
            0 => format!("lower `{PERMITS_KEY}`"),
            least => format!("lower `{PERMITS_KEY}` to {least}"),
        };
        match needed {
            "" => lower,
            needed => format!("set `{key} = {needed}` or more, leave it out to have it set, or {lower}"),
        }
    }

    fn nodes(&self) -> usize {
        self.spec.permits_from.iter().map(|giver| giver.nodes).sum::<usize>().max(1)
    }
}
