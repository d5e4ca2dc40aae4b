//! `[[stage]]` tables: kind, name, inputs, nodes and bounds.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::catalogue::{COMMON_KEYS, KeySpec, KindSignature, ValueSpec, WhenFull};
use crate::cluster::NODES_MAX;
use crate::diagnostic::{Code, Diagnostic, quote};
use crate::graph::{CAPACITY_BYTES_MAX, CAPACITY_ITEMS_MAX};
use crate::name::{NodeId, StageName};
use crate::suggest;
use crate::value::{ConfigValue, StageConfig, type_name};

use super::{InputDecl, Reader, Span, StageDecl, entry, key, list, plural, required};

/// The most inputs of one stage.
pub(crate) const INPUTS_MAX: usize = 256;

pub(crate) const CAPACITY: ValueSpec = ValueSpec::Integer { min: 1, max: CAPACITY_ITEMS_MAX as i64 };
pub(crate) const CAPACITY_BYTES: ValueSpec = ValueSpec::Bytes { min: 1, max: CAPACITY_BYTES_MAX };
pub(crate) const FULL: &[&str] = &["wait", "reject"];

/// Keys of an input that is written as a table.
pub(crate) const INPUT_KEYS: &[KeySpec] = &[
    required("from", "where the items come from: \"stage\" or \"stage.port\"", ValueSpec::Text),
    key("to", "the input port they enter", ValueSpec::Text),
    key("feedback", "whether this edge closes a loop", ValueSpec::Flag),
];

impl<'c> Reader<'c, '_> {
    pub(super) fn stage(&mut self, table: &DeTable<'_>, header: Span) -> StageDecl<'c> {
        let (signature, kind_span) = self.kind(table, &header);
        let (name, name_span) = self.stage_name(table, signature, kind_span.unwrap_or_else(|| header.clone()));
        let what = match &name {
            Some(name) => format!("stage `{name}`"),
            None => "this stage".to_owned(),
        };
        let common: Vec<&str> = COMMON_KEYS.iter().map(|(name, _)| *name).collect();
        let values = match signature {
            Some(signature) => self.values(&what, table, &header, signature.keys, &common),
            None => StageConfig::new(),
        };
        let read = |reader: &mut Self, key: &str, spec: &ValueSpec| {
            let (_, value) = entry(table, key)?;
            reader.value(&what, key, spec, value).map(|read| (read, value.span()))
        };
        let capacity = read(self, "capacity", &CAPACITY).and_then(|(value, span)| match value {
            ConfigValue::Integer(items) => usize::try_from(items).ok().map(|items| (items, span)),
            _ => None,
        });
        let capacity_bytes = read(self, "capacity_bytes", &CAPACITY_BYTES).and_then(|(value, span)| match value {
            ConfigValue::Bytes(bytes) => usize::try_from(bytes).ok().map(|bytes| (bytes, span)),
            _ => None,
        });
        let full = read(self, "full", &ValueSpec::Choice(FULL));
        let full = self.full(&what, signature, full);
        let on = self.on(&what, table);
        let mut inputs = Inputs::default();
        let inputs_span = entry(table, "input").map(|(_, value)| {
            self.inputs(&what, value, &mut inputs);
            value.span()
        });
        StageDecl {
            signature,
            name,
            name_span,
            inputs: inputs.read,
            inputs_span,
            inputs_broken: inputs.broken,
            on,
            capacity,
            capacity_bytes,
            full,
            values,
        }
    }

    /// The signature, and where the kind stands.
    fn kind(&mut self, table: &DeTable<'_>, header: &Span) -> (Option<&'c KindSignature>, Option<Span>) {
        let kinds: Vec<&str> = self.catalogue.kinds().map(|kind| kind.kind).collect();
        let Some((_, value)) = entry(table, "kind") else {
            let diagnostic = Diagnostic::error(Code::MissingKey, "this stage has no `kind`");
            self.problems.push(
                diagnostic.at(header.clone(), "`kind` is missing").help(format!("the kinds are {}", list(&kinds))),
            );
            return (None, None);
        };
        let Some(ConfigValue::Text(kind)) = self.value("this stage", "kind", &ValueSpec::Text, value) else {
            return (None, Some(value.span()));
        };
        if let Some(signature) = self.catalogue.kind(&kind) {
            return (Some(signature), Some(value.span()));
        }
        let near = suggest::nearest(&kind, kinds.iter().copied());
        let diagnostic = Diagnostic::error(Code::UnknownKind, format!("unknown stage kind {}", quote(&kind)));
        let diagnostic = match near {
            Some(near) => diagnostic.at(value.span(), format!("did you mean {}?", quote(near))),
            None => diagnostic.at(value.span(), "no such kind"),
        };
        self.problems.push(diagnostic.help(format!("the kinds are {}", list(&kinds))));
        // Going on with the kind that was meant finds the problems behind this one, and makes up none.
        (near.and_then(|near| self.catalogue.kind(near)), Some(value.span()))
    }

    fn stage_name(
        &mut self,
        table: &DeTable<'_>,
        signature: Option<&KindSignature>,
        kind_span: Span,
    ) -> (Option<StageName>, Span) {
        let Some((_, value)) = entry(table, "name") else {
            return (signature.and_then(|signature| StageName::parse(signature.kind).ok()), kind_span);
        };
        let Some(ConfigValue::Text(text)) = self.value("this stage", "name", &ValueSpec::Text, value) else {
            return (None, value.span());
        };
        match StageName::parse(&text) {
            Ok(name) => (Some(name), value.span()),
            Err(error) => {
                let message = format!("{} is not a name for a stage: {error}", quote(&text));
                self.problems.push(
                    Diagnostic::error(Code::InvalidValue, message)
                        .at(value.span(), "not a name")
                        .help("names are made of a-z, 0-9, - and _, and start with a letter or a digit"),
                );
                (None, value.span())
            }
        }
    }

    /// What the stage does when an edge is full, as far as its kind can.
    fn full(&mut self, what: &str, signature: Option<&KindSignature>, set: Option<(ConfigValue, Span)>) -> WhenFull {
        let default = signature.map_or(WhenFull::Wait, KindSignature::full_default);
        let Some((ConfigValue::Text(word), span)) = set else { return default };
        let full = if word == WhenFull::Reject.as_str() { WhenFull::Reject } else { WhenFull::Wait };
        let Some(signature) = signature else { return full };
        let allowed = if signature.full.is_empty() { &[WhenFull::Wait] } else { signature.full };
        if allowed.contains(&full) {
            return full;
        }
        let words: Vec<&str> = allowed.iter().map(|full| full.as_str()).collect();
        self.problems.push(
            Diagnostic::error(Code::UnknownChoice, format!("`full` of {what} cannot be {}", quote(&word)))
                .at(span, format!("`{}` has no client that it could refuse", signature.kind))
                .help(format!("a stage of kind `{}` can only {}", signature.kind, list(&words))),
        );
        default
    }

    fn on(&mut self, what: &str, table: &DeTable<'_>) -> Option<Vec<(NodeId, Span)>> {
        let (_, value) = entry(table, "on")?;
        let DeValue::Array(array) = value.get_ref() else {
            let message = format!("`on` of {what} must be a list of node ids, not {}", type_name(value.get_ref()));
            let diagnostic = Diagnostic::error(Code::WrongType, message).at(value.span(), "expected a list");
            self.problems.push(match value.get_ref() {
                DeValue::String(id) => diagnostic.help(format!("put it in brackets: [\"{}\"]", id.escape_default())),
                _ => diagnostic,
            });
            return None;
        };
        if array.is_empty() {
            self.problems.push(
                Diagnostic::error(Code::InvalidValue, format!("`on` of {what} names no node"))
                    .at(value.span(), "nothing here")
                    .help("leave `on` out to let every node run the stage"),
            );
            return None;
        }
        let mut on: Vec<(NodeId, Span)> = Vec::new();
        let mut broken = false;
        for item in array.iter().take(NODES_MAX) {
            let DeValue::String(text) = item.get_ref() else {
                let message = format!("`on` of {what} must be a list of node ids, not of {}", plural(item.get_ref()));
                self.problems.push(Diagnostic::error(Code::WrongType, message).at(item.span(), "expected text"));
                broken = true;
                continue;
            };
            match NodeId::parse(text) {
                Ok(id) => on.push((id, item.span())),
                Err(error) => {
                    let message = format!("{} is not a node id: {error}", quote(text));
                    self.problems.push(Diagnostic::error(Code::InvalidValue, message).at(item.span(), ""));
                    broken = true;
                }
            }
        }
        (!broken).then_some(on)
    }

    fn inputs(&mut self, what: &str, value: &Spanned<DeValue<'_>>, inputs: &mut Inputs) {
        match value.get_ref() {
            DeValue::Array(array) => {
                for item in array.iter().take(INPUTS_MAX) {
                    self.input(what, item, inputs);
                }
                if array.len() > INPUTS_MAX {
                    let message = format!("{what} has more than {INPUTS_MAX} inputs");
                    self.problems.push(Diagnostic::error(Code::TooLarge, message).at(value.span(), ""));
                    inputs.broken = true;
                }
            }
            _ => self.input(what, value, inputs),
        }
    }

    fn input(&mut self, what: &str, value: &Spanned<DeValue<'_>>, inputs: &mut Inputs) {
        let read = match value.get_ref() {
            DeValue::String(text) => self.reference(text, value.span()),
            DeValue::Table(table) => self.input_table(what, table, value.span()),
            other => {
                let message = format!("an input of {what} must be text or a table, not {}", type_name(other));
                self.problems.push(
                    Diagnostic::error(Code::WrongType, message).at(value.span(), "expected text or a table").help(
                        "write \"stage\", \"stage.port\" or { from = \"stage.port\", to = \"port\", feedback = true }",
                    ),
                );
                None
            }
        };
        match read {
            Some(input) => inputs.read.push(input),
            None => inputs.broken = true,
        }
    }

    /// `stage` or `stage.port`.
    fn reference(&mut self, text: &str, span: Span) -> Option<InputDecl> {
        let (stage, port) = match text.split_once('.') {
            Some((stage, port)) => (stage, Some(port)),
            None => (text, None),
        };
        let bad = StageName::parse(stage).is_err() || port.is_some_and(|port| port.is_empty() || port.contains('.'));
        if bad {
            self.problems.push(
                Diagnostic::error(Code::InvalidValue, format!("{} does not name a stage or a port", quote(text)))
                    .at(span, "expected `stage` or `stage.port`"),
            );
            return None;
        }
        let (stage, port) = (stage.to_owned(), port.map(str::to_owned));
        Some(InputDecl { stage, port, span, to: None, feedback: None })
    }

    /// `{ from = "stage.port", to = "port", feedback = true }`.
    fn input_table(&mut self, what: &str, table: &DeTable<'_>, span: Span) -> Option<InputDecl> {
        let values = self.values(&format!("an input of {what}"), table, &span, INPUT_KEYS, &[]);
        let from = values.text("from")?;
        let mut input = self.reference(from, values.place("from").unwrap_or(span))?;
        input.to = values.text("to").map(str::to_owned).zip(values.place("to"));
        input.feedback = values.flag("feedback").filter(|set| *set).and_then(|_| values.place("feedback"));
        Some(input)
    }
}

#[derive(Default)]
struct Inputs {
    read: Vec<InputDecl>,
    broken: bool,
}
