//! The order of the stages: cycles, feedback that closes no loop, stages that nothing reaches.

use std::collections::{BTreeSet, VecDeque};

use crate::diagnostic::{Code, Diagnostic};
use crate::schema::StageDecl;

use super::edges::{Wire, Wires};

/// The stages' positions in the file, upstream first. `None` when there is no such order, or something else is wrong
/// with the order, which is reported.
pub(super) fn check(stages: &[StageDecl<'_>], wires: &Wires, problems: &mut Vec<Diagnostic>) -> Option<Vec<usize>> {
    let before = problems.len();
    let forward: Vec<&Wire> = wires.all.iter().filter(|wire| wire.feedback.is_none()).collect();
    let order = upstream_first(stages.len(), &forward);
    let ordered = order.len() == stages.len();
    let mut in_cycles = BTreeSet::new();
    if !ordered {
        in_cycles = cycles(stages, &forward, problems);
    }
    if wires.complete {
        feedback_without_loop(stages, wires, problems);
    }
    unreachable(stages, wires, &in_cycles, problems);
    (ordered && problems.len() == before).then_some(order)
}

/// Kahn's algorithm; of several stages that are free, the first of the file goes first.
fn upstream_first(count: usize, forward: &[&Wire]) -> Vec<usize> {
    let mut waiting = vec![0_usize; count];
    let mut leaving: Vec<Vec<usize>> = vec![Vec::new(); count];
    for wire in forward {
        if let (Some(entering), Some(leaving)) = (waiting.get_mut(wire.to), leaving.get_mut(wire.from)) {
            *entering += 1;
            leaving.push(wire.to);
        }
    }
    let mut free: BTreeSet<usize> =
        waiting.iter().enumerate().filter(|(_, entering)| **entering == 0).map(|(index, _)| index).collect();
    let mut order = Vec::with_capacity(count);
    while let Some(stage) = free.pop_first() {
        order.push(stage);
        for &next in leaving.get(stage).into_iter().flatten() {
            if let Some(entering) = waiting.get_mut(next) {
                *entering -= 1;
                if *entering == 0 {
                    free.insert(next);
                }
            }
        }
    }
    order
}

/// The shortest path over edges from one stage to another, as positions in `wires`; empty when they are the same stage
/// or there is none.
pub(super) fn path(from: usize, to: usize, count: usize, wires: &[&Wire]) -> Vec<usize> {
    let mut leaving: Vec<Vec<usize>> = vec![Vec::new(); count];
    for (index, wire) in wires.iter().enumerate() {
        if let Some(leaving) = leaving.get_mut(wire.from) {
            leaving.push(index);
        }
    }
    let mut came_by: Vec<Option<usize>> = vec![None; count];
    let mut queue = VecDeque::from([from]);
    while let Some(stage) = queue.pop_front() {
        for &index in leaving.get(stage).into_iter().flatten() {
            let Some(wire) = wires.get(index) else { continue };
            if wire.to != from && came_by.get(wire.to).is_some_and(Option::is_none) {
                if let Some(by) = came_by.get_mut(wire.to) {
                    *by = Some(index);
                }
                queue.push_back(wire.to);
            }
        }
    }
    let mut path = Vec::new();
    let mut at = to;
    while at != from {
        let Some(index) = came_by.get(at).copied().flatten() else { return Vec::new() };
        path.push(index);
        at = wires.get(index).map_or(from, |wire| wire.from);
    }
    path.reverse();
    path
}

/// Reports one cycle for each group of stages that feed each other. Gives back the stages of all of them.
fn cycles(stages: &[StageDecl<'_>], forward: &[&Wire], problems: &mut Vec<Diagnostic>) -> BTreeSet<usize> {
    let mut seen = BTreeSet::new();
    for start in 0..stages.len() {
        if seen.contains(&start) {
            continue;
        }
        // The shortest way from this stage back to itself: over each edge that enters it.
        let closing = forward.iter().enumerate().filter(|(_, wire)| wire.to == start);
        let around = closing.filter_map(|(index, wire)| {
            let path = path(start, wire.from, stages.len(), forward);
            (wire.from == start || !path.is_empty()).then_some((path.len(), index, path))
        });
        let Some((_, closing, path)) = around.min() else { continue };
        let members: Vec<usize> = std::iter::once(start)
            .chain(path.iter().filter_map(|index| forward.get(*index)).map(|wire| wire.to))
            .collect();
        let fresh = members.iter().all(|stage| !seen.contains(stage));
        seen.extend(members.iter().copied());
        if fresh && let Some(closing) = forward.get(closing) {
            problems.push(cycle(stages, &members, closing, &path, forward));
        }
    }
    seen
}

fn cycle(stages: &[StageDecl<'_>], members: &[usize], closing: &Wire, path: &[usize], forward: &[&Wire]) -> Diagnostic {
    let name = |stage: usize| stages.get(stage).and_then(|stage| stage.name.as_ref()).map_or("?", |name| name.as_str());
    let mut names: Vec<&str> = members.iter().map(|stage| name(*stage)).collect();
    names.extend(members.first().map(|stage| name(*stage)));
    let mut diagnostic = Diagnostic::error(Code::Cycle, format!("the stages form a cycle: {}", names.join(" -> ")))
        .at(closing.span.clone(), "this edge closes it");
    for wire in path.iter().filter_map(|index| forward.get(*index)) {
        diagnostic = diagnostic.also(wire.span.clone(), "");
    }
    diagnostic.help(format!(
        "if the loop is meant, mark the edge that closes it: {{ from = \"{}.{}\", feedback = true }}",
        name(closing.from),
        closing.output.name
    ))
}

fn feedback_without_loop(stages: &[StageDecl<'_>], wires: &Wires, problems: &mut Vec<Diagnostic>) {
    let all: Vec<&Wire> = wires.all.iter().collect();
    for wire in &wires.all {
        let Some(span) = &wire.feedback else { continue };
        let closes = wire.from == wire.to || !path(wire.to, wire.from, stages.len(), &all).is_empty();
        if closes {
            continue;
        }
        let name =
            |stage: usize| stages.get(stage).and_then(|stage| stage.name.as_ref()).map_or("?", |name| name.as_str());
        let message = format!(
            "the edge from `{}.{}` to `{}.{}` is marked as feedback and closes no loop",
            name(wire.from),
            wire.output.name,
            name(wire.to),
            wire.input.name
        );
        problems.push(
            Diagnostic::error(Code::NoLoop, message)
                .at(span.clone(), format!("no path leads from `{}` back to `{}`", name(wire.to), name(wire.from)))
                .help("remove `feedback = true`"),
        );
    }
}

/// Stages that no item can reach from a stage that takes none.
fn unreachable(stages: &[StageDecl<'_>], wires: &Wires, in_cycles: &BTreeSet<usize>, problems: &mut Vec<Diagnostic>) {
    let entering = |index: usize| wires.all.iter().filter(move |wire| wire.to == index);
    // Stages about which something else has been reported count as reached, so that only what is new is reported.
    let mut reached: BTreeSet<usize> = BTreeSet::new();
    for (index, stage) in stages.iter().enumerate() {
        let has_problem = match stage.signature {
            None => true,
            Some(signature) => {
                let lacks = |port: &str| !entering(index).any(|wire| wire.input.name == port);
                stage.inputs_broken
                    || entering(index).count() < stage.inputs.len()
                    || signature.inputs.iter().any(|port| port.required && lacks(port.name))
            }
        };
        let is_source = stage.signature.is_some_and(|signature| signature.inputs.is_empty());
        if has_problem || is_source || in_cycles.contains(&index) {
            reached.insert(index);
        }
    }
    flood(&mut reached, wires);
    // Of a row of such stages the first is reported, and of a ring one: the others follow from it.
    let first_then_rings = (0..stages.len()).filter(|index| entering(*index).next().is_none()).chain(0..stages.len());
    for index in first_then_rings {
        let Some(stage) = stages.get(index).filter(|_| !reached.contains(&index)) else { continue };
        let name = stage.name.as_ref().map_or("this stage", |name| name.as_str());
        let label = match entering(index).next() {
            None => "it has no `input`",
            Some(_) => "its inputs come from stages that nothing reaches",
        };
        problems.push(
            Diagnostic::error(Code::Unreachable, format!("no item ever reaches stage `{name}`"))
                .at(stage.name_span.clone(), label)
                .help("give it an `input`, or remove it"),
        );
        reached.insert(index);
        flood(&mut reached, wires);
    }
}

/// Adds every stage that the stages of `reached` lead to.
fn flood(reached: &mut BTreeSet<usize>, wires: &Wires) {
    let mut queue: VecDeque<usize> = reached.iter().copied().collect();
    while let Some(stage) = queue.pop_front() {
        for wire in wires.all.iter().filter(|wire| wire.from == stage) {
            if reached.insert(wire.to) {
                queue.push_back(wire.to);
            }
        }
    }
}
