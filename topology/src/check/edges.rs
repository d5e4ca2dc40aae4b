//! Edges: from references to ports that fit.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalogue::{KindSignature, PortSpec};
use crate::diagnostic::{Code, Diagnostic, quote};
use crate::graph::{CAPACITY_BYTES_DEFAULT, CAPACITY_ITEMS_DEFAULT, EdgeSpec, Graph, PortRef, StageSpec};
use crate::schema::{InputDecl, Span, StageDecl, list};
use crate::suggest;

/// The edges of a file, as far as they could be resolved.
pub(super) struct Wires {
    pub(super) all: Vec<Wire>,
    /// Whether every reference became an edge and every stage has a kind and a name of its own.
    pub(super) complete: bool,
}

/// An edge between stages, given by their positions in the file.
pub(super) struct Wire {
    pub(super) from: usize,
    pub(super) output: &'static PortSpec,
    pub(super) to: usize,
    pub(super) input: &'static PortSpec,
    /// The reference.
    pub(super) span: Span,
    pub(super) feedback: Option<Span>,
}

pub(super) fn resolve(stages: &[StageDecl<'_>], problems: &mut Vec<Diagnostic>) -> Wires {
    let before = problems.len();
    let by_name = names(stages, problems);
    let broken = |stage: &StageDecl<'_>| stage.inputs_broken || stage.signature.is_none() || stage.name.is_none();
    let mut complete = !stages.iter().any(broken) && problems.len() == before;
    let mut all = Vec::new();
    for (to, stage) in stages.iter().enumerate() {
        for input in &stage.inputs {
            match (Resolver { stages, by_name: &by_name }).wire(to, stage, input) {
                Ok(wire) => all.push(wire),
                Err(problem) => {
                    problems.extend(problem.map(|problem| *problem));
                    complete = false;
                }
            }
        }
    }
    used_twice(stages, &all, problems);
    let wanted = missing_inputs(stages, &all, problems);
    if complete {
        unused_outputs(stages, &all, &wanted, problems);
    }
    Wires { complete: complete && problems.len() == before, all }
}

/// Stages by name; names used twice are reported and mean the first.
fn names<'s>(stages: &'s [StageDecl<'_>], problems: &mut Vec<Diagnostic>) -> BTreeMap<&'s str, usize> {
    let mut by_name: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, stage) in stages.iter().enumerate() {
        let Some(name) = &stage.name else { continue };
        let Some(first) = by_name.get(name.as_str()).and_then(|first| stages.get(*first)) else {
            by_name.insert(name.as_str(), index);
            continue;
        };
        problems.push(
            Diagnostic::error(Code::Duplicate, format!("two stages are named `{name}`"))
                .at(stage.name_span.clone(), "same name")
                .also(first.name_span.clone(), "first used here")
                .help("a stage without a `name` takes that of its kind; give one of them a `name` of its own"),
        );
    }
    by_name
}

struct Resolver<'s, 'c> {
    stages: &'s [StageDecl<'c>],
    by_name: &'s BTreeMap<&'s str, usize>,
}

/// No edge, and why; the reason is absent when it was reported elsewhere.
type NoWire = Option<Box<Diagnostic>>;

impl Resolver<'_, '_> {
    fn wire(&self, to: usize, stage: &StageDecl<'_>, input: &InputDecl) -> Result<Wire, NoWire> {
        let from = *self.by_name.get(input.stage.as_str()).ok_or_else(|| self.unknown_stage(input))?;
        let source = self.stages.get(from).and_then(|source| source.signature).ok_or(None)?;
        let target = stage.signature.ok_or(None)?;
        let outputs: Vec<&'static PortSpec> = match &input.port {
            Some(port) => vec![source.output(port).ok_or_else(|| unknown_output(source, port, input))?],
            None => source.outputs.iter().collect(),
        };
        let inputs: Vec<&'static PortSpec> = match &input.to {
            Some((port, span)) => vec![target.input(port).ok_or_else(|| unknown_input(target, port, span))?],
            None => target.inputs.iter().collect(),
        };
        let fits = |output: &PortSpec| inputs.iter().any(|port| port.item == output.item);
        let fitting: Vec<&'static PortSpec> = outputs.iter().copied().filter(|output| fits(output)).collect();
        let output = match fitting.as_slice() {
            [output] => *output,
            [] => return Err(self.mismatch(source, target, &outputs, &inputs, stage, input)),
            several => return Err(ambiguous_output(several, target, input)),
        };
        let entering: Vec<&'static PortSpec> = inputs.iter().copied().filter(|port| port.item == output.item).collect();
        match entering.as_slice() {
            [port] => {
                Ok(Wire { from, output, to, input: port, span: input.span.clone(), feedback: input.feedback.clone() })
            }
            several => Err(ambiguous_input(several, output, target, input)),
        }
    }

    fn mismatch(
        &self,
        source: &KindSignature,
        target: &KindSignature,
        outputs: &[&'static PortSpec],
        inputs: &[&'static PortSpec],
        stage: &StageDecl<'_>,
        input: &InputDecl,
    ) -> NoWire {
        let to = stage.name.as_ref().map_or("this stage", |name| name.as_str());
        let from = &input.stage;
        let span = input.span.clone();
        let diagnostic = if target.inputs.is_empty() {
            Diagnostic::error(Code::PortMismatch, format!("stage `{to}` takes no input"))
                .at(span, format!("a stage of kind `{}` is where items come from", target.kind))
        } else if source.outputs.is_empty() {
            Diagnostic::error(Code::PortMismatch, format!("stage `{from}` has no output"))
                .at(span, format!("a stage of kind `{}` is where items end", source.kind))
        } else {
            let given: BTreeSet<&str> = outputs.iter().map(|port| port.item).collect();
            let wanted: BTreeSet<&str> = inputs.iter().map(|port| port.item).collect();
            let given = list(&given.into_iter().collect::<Vec<_>>());
            let wanted = list(&wanted.into_iter().collect::<Vec<_>>()).replace(" and ", " or ");
            let other = self.giver(from, inputs);
            Diagnostic::error(
                Code::PortMismatch,
                format!("stage `{from}` gives {given}, and stage `{to}` takes {wanted}"),
            )
            .at(span, format!("gives {given}"))
            .help_opt(other)
        };
        Some(Box::new(diagnostic))
    }

    /// A port that gives what one of these takes: of the stage that was named, or else of another one.
    fn giver(&self, named: &str, inputs: &[&'static PortSpec]) -> Option<String> {
        let mut outputs = Vec::new();
        for (name, index) in self.by_name {
            let signature = self.stages.get(*index).and_then(|stage| stage.signature);
            for output in signature.map_or(&[][..], |signature| signature.outputs) {
                if inputs.iter().any(|input| input.item == output.item) {
                    outputs.push((*name != named, *name, output));
                }
            }
        }
        let (_, name, output) = outputs.into_iter().min_by_key(|(other, name, _)| (*other, *name))?;
        Some(format!("`{name}.{}` gives `{}`", output.name, output.item))
    }

    fn unknown_stage(&self, input: &InputDecl) -> NoWire {
        let names: Vec<&str> = self.by_name.keys().copied().collect();
        let near = suggest::nearest(&input.stage, names.iter().copied());
        // A stage whose name could not be read may be the one that is meant.
        if near.is_none() && self.stages.iter().any(|stage| stage.name.is_none()) {
            return None;
        }
        let diagnostic = Diagnostic::error(Code::UnknownStage, format!("there is no stage {}", quote(&input.stage)));
        Some(Box::new(match near {
            Some(near) => diagnostic.at(input.span.clone(), format!("did you mean {}?", quote(near))),
            None => diagnostic.at(input.span.clone(), "no such stage").help(format!("the stages are {}", list(&names))),
        }))
    }
}

fn port_names(ports: &[&'static PortSpec]) -> Vec<&'static str> {
    ports.iter().map(|port| port.name).collect()
}

fn ports_are(end: &str, names: &[&str]) -> String {
    match names {
        [name] => format!("the only {end} port is {}", quote(name)),
        names => format!("the {end} ports are {}", list(names)),
    }
}

fn unknown_output(source: &KindSignature, port: &str, input: &InputDecl) -> NoWire {
    let names: Vec<&str> = source.outputs.iter().map(|port| port.name).collect();
    let message = format!("stage `{}` has no output port {}", input.stage, quote(port));
    let diagnostic = Diagnostic::error(Code::UnknownPort, message);
    let diagnostic = match suggest::nearest(port, names.iter().copied()) {
        Some(near) => diagnostic.at(input.span.clone(), format!("did you mean `{}.{near}`?", input.stage)),
        None => diagnostic.at(input.span.clone(), "no such output port"),
    };
    let help = if names.is_empty() {
        format!("a stage of kind `{}` has no output", source.kind)
    } else if source.input(port).is_some() {
        format!("{} is an input port; {}", quote(port), ports_are("output", &names))
    } else {
        ports_are("output", &names)
    };
    Some(Box::new(diagnostic.help(help)))
}

fn unknown_input(target: &KindSignature, port: &str, span: &Span) -> NoWire {
    let names: Vec<&str> = target.inputs.iter().map(|port| port.name).collect();
    let message = format!("a stage of kind `{}` has no input port {}", target.kind, quote(port));
    let diagnostic = Diagnostic::error(Code::UnknownPort, message);
    let diagnostic = match suggest::nearest(port, names.iter().copied()) {
        Some(near) => diagnostic.at(span.clone(), format!("did you mean {}?", quote(near))),
        None => diagnostic.at(span.clone(), "no such input port"),
    };
    Some(Box::new(match names.is_empty() {
        true => diagnostic.help("it takes no input"),
        false => diagnostic.help(ports_are("input", &names)),
    }))
}

fn ambiguous_output(several: &[&'static PortSpec], target: &KindSignature, input: &InputDecl) -> NoWire {
    let message = format!(
        "stage `{}` has {} output ports that a stage of kind `{}` can take",
        input.stage,
        several.len(),
        target.kind
    );
    let choices: Vec<String> = port_names(several).iter().map(|port| format!("\"{}.{port}\"", input.stage)).collect();
    Some(Box::new(
        Diagnostic::error(Code::AmbiguousPort, message)
            .at(input.span.clone(), "which one?")
            .help(format!("write {}", choices.join(" or "))),
    ))
}

fn ambiguous_input(
    several: &[&'static PortSpec],
    output: &PortSpec,
    target: &KindSignature,
    input: &InputDecl,
) -> NoWire {
    let message =
        format!("a stage of kind `{}` has {} input ports that take `{}`", target.kind, several.len(), output.item);
    let choices: Vec<String> = port_names(several)
        .iter()
        .map(|port| format!("{{ from = \"{}.{}\", to = \"{port}\" }}", input.stage, output.name))
        .collect();
    Some(Box::new(
        Diagnostic::error(Code::AmbiguousPort, message)
            .at(input.span.clone(), "which one does it enter?")
            .help(format!("write {}", choices.join(" or "))),
    ))
}

fn used_twice(stages: &[StageDecl<'_>], wires: &[Wire], problems: &mut Vec<Diagnostic>) {
    let mut first: BTreeMap<(usize, &str), &Wire> = BTreeMap::new();
    for wire in wires {
        let Some(earlier) = first.get(&(wire.from, wire.output.name)) else {
            first.insert((wire.from, wire.output.name), wire);
            continue;
        };
        let from = stages.get(wire.from).and_then(|stage| stage.name.as_ref()).map_or("", |name| name.as_str());
        let message = format!("output port `{from}.{}` feeds two inputs", wire.output.name);
        problems.push(
            Diagnostic::error(Code::OutputUsedTwice, message)
                .at(wire.span.clone(), "used again")
                .also(earlier.span.clone(), "first used here")
                .help("an item goes to one place: each output port feeds exactly one edge"),
        );
    }
}

/// Reports required input ports without an edge. Gives back the items they wait for.
fn missing_inputs(stages: &[StageDecl<'_>], wires: &[Wire], problems: &mut Vec<Diagnostic>) -> BTreeSet<&'static str> {
    let mut wanted = BTreeSet::new();
    for (index, stage) in stages.iter().enumerate() {
        let Some(signature) = stage.signature.filter(|_| !stage.inputs_broken) else { continue };
        // A reference that led nowhere may have been meant for any of the ports.
        if wires.iter().filter(|wire| wire.to == index).count() < stage.inputs.len() {
            continue;
        }
        let name = stage.name.as_ref().map_or("this stage", |name| name.as_str());
        for port in signature.inputs.iter().filter(|port| port.required) {
            if wires.iter().any(|wire| wire.to == index && wire.input.name == port.name) {
                continue;
            }
            let message = format!("input port `{}` of stage `{name}` has no edge", port.name);
            let span = stage.inputs_span.clone().unwrap_or_else(|| stage.name_span.clone());
            problems.push(
                Diagnostic::error(Code::MissingInput, message)
                    .at(span, format!("nothing gives `{}`", port.item))
                    .help_opt(giver(stages, wires, index, port)),
            );
            wanted.insert(port.item);
        }
    }
    wanted
}

/// An output port, free so far, that would fit a port without an edge.
fn giver(stages: &[StageDecl<'_>], wires: &[Wire], to: usize, port: &PortSpec) -> Option<String> {
    for (index, stage) in stages.iter().enumerate().filter(|(index, _)| *index != to) {
        let (Some(signature), Some(name)) = (stage.signature, &stage.name) else { continue };
        for output in signature.outputs.iter().filter(|output| output.item == port.item) {
            let free = !wires.iter().any(|wire| wire.from == index && wire.output.name == output.name);
            if free {
                return Some(format!("`{name}.{}` gives it: add \"{name}.{}\" to `input`", output.name, output.name));
            }
        }
    }
    None
}

/// Reports required output ports without an edge, except those of items that an input was reported to wait for.
fn unused_outputs(stages: &[StageDecl<'_>], wires: &[Wire], wanted: &BTreeSet<&str>, problems: &mut Vec<Diagnostic>) {
    for (index, stage) in stages.iter().enumerate() {
        let (Some(signature), Some(name)) = (stage.signature, &stage.name) else { continue };
        for port in signature.outputs.iter().filter(|port| port.required && !wanted.contains(port.item)) {
            if wires.iter().any(|wire| wire.from == index && wire.output.name == port.name) {
                continue;
            }
            let message = format!("output port `{name}.{}` feeds nothing", port.name);
            problems.push(
                Diagnostic::error(Code::UnusedOutput, message)
                    .at(stage.name_span.clone(), format!("its `{}` would be lost", port.item))
                    .help(format!("name \"{name}.{}\" in the `input` of the stage that takes it", port.name)),
            );
        }
    }
}

/// The graph, stages in `order`. `None` when a stage has no name or kind, which has been reported.
pub(super) fn graph(stages: &[StageDecl<'_>], wires: &Wires, order: &[usize]) -> Option<Graph> {
    let mut specs = Vec::new();
    let mut edges = Vec::new();
    for &index in order {
        let stage = stages.get(index)?;
        specs.push(StageSpec {
            name: stage.name.clone()?,
            kind: stage.signature?.kind.to_owned(),
            on: stage.on.as_ref().map(|on| on.iter().map(|(id, _)| id.clone()).collect()),
            config: stage.values.clone(),
        });
        for wire in wires.all.iter().filter(|wire| wire.to == index) {
            let source = stages.get(wire.from)?;
            edges.push(EdgeSpec {
                from: PortRef { stage: source.name.clone()?, port: wire.output.name },
                to: PortRef { stage: stage.name.clone()?, port: wire.input.name },
                item: wire.output.item,
                capacity_items: source.capacity.as_ref().map_or(CAPACITY_ITEMS_DEFAULT, |(items, _)| *items),
                capacity_bytes: source.capacity_bytes.as_ref().map_or(CAPACITY_BYTES_DEFAULT, |(bytes, _)| *bytes),
                feedback: wire.feedback.is_some(),
                full: source.full,
            });
        }
    }
    Some(Graph { stages: specs, edges })
}
