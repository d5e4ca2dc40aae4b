//! The shapes of the topology file, with spans.
//!
//! The text is read as a dynamic tree and each table is compared with the list of its keys, because deserialising into
//! structs stops at the first problem and this module reports all of them. What it hands on is well-formed table by
//! table; whether the tables fit together is for [`crate::check`].

pub(crate) mod stage;

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use crate::catalogue::{Catalogue, KeySpec, KindSignature, ValueSpec, WhenFull};
use crate::cluster::{BEHAVIOURS, MAX_BYZANTINE_MAX, NODES_MAX, SLICES_MAX};
use crate::diagnostic::{Code, Diagnostic, quote};
use crate::graph::STAGES_MAX;
use crate::name::{NodeId, StageName};
use crate::suggest;
use crate::value::{self, ConfigValue, StageConfig, type_name};

pub(crate) type Span = Range<usize>;

/// The most bytes of a topology file: 1 MiB.
pub(crate) const TEXT_BYTES_MAX: usize = 1 << 20;

/// All tables of a file, as far as they could be read.
pub(crate) struct Declared<'c> {
    pub(crate) cluster: Option<Table>,
    pub(crate) nodes: Vec<Table>,
    pub(crate) stages: Vec<StageDecl<'c>>,
    pub(crate) telemetry: Option<Table>,
}

/// A table with checked values.
pub(crate) struct Table {
    /// Its header.
    pub(crate) header: Span,
    pub(crate) values: StageConfig,
}

/// A `[[stage]]` table.
pub(crate) struct StageDecl<'c> {
    /// The stage's kind, or the one that was most likely meant; `None` when unknown.
    pub(crate) signature: Option<&'c KindSignature>,
    /// `None` when there is no usable name; the problem has been reported.
    pub(crate) name: Option<StageName>,
    /// Where the name, or else the kind, stands.
    pub(crate) name_span: Span,
    pub(crate) inputs: Vec<InputDecl>,
    /// Where the value of `input` stands.
    pub(crate) inputs_span: Option<Span>,
    /// Whether some input could not be read, so that what it joins is unknown.
    pub(crate) inputs_broken: bool,
    pub(crate) on: Option<Vec<(NodeId, Span)>>,
    pub(crate) capacity: Option<(usize, Span)>,
    pub(crate) capacity_bytes: Option<(usize, Span)>,
    pub(crate) full: WhenFull,
    pub(crate) values: StageConfig,
}

/// One reference of `input`.
pub(crate) struct InputDecl {
    pub(crate) stage: String,
    pub(crate) port: Option<String>,
    /// The text of the reference.
    pub(crate) span: Span,
    pub(crate) to: Option<(String, Span)>,
    pub(crate) feedback: Option<Span>,
}

const fn key(name: &'static str, doc: &'static str, value: ValueSpec) -> KeySpec {
    KeySpec { name, doc, value, default: None, required: false }
}

const fn required(name: &'static str, doc: &'static str, value: ValueSpec) -> KeySpec {
    KeySpec { name, doc, value, default: None, required: true }
}

const fn with_default(spec: KeySpec, default: &'static str) -> KeySpec {
    KeySpec { default: Some(default), ..spec }
}

pub(crate) const TABLES: [(&str, &str); 4] =
    [("cluster", "[cluster]"), ("node", "[[node]]"), ("stage", "[[stage]]"), ("telemetry", "[telemetry]")];

pub(crate) const CLUSTER_KEYS: &[KeySpec] = &[
    required("name", "name of the cluster", ValueSpec::Text),
    required("model", "the model: \"builtin:tiny-rust\", a folder or a file", ValueSpec::Text),
    required(
        "max_byzantine",
        "how many nodes may lie, f; 2f+1 nodes hold each slice, and 0 turns verification off",
        ValueSpec::Integer { min: 0, max: MAX_BYZANTINE_MAX as i64 },
    ),
    key("cluster_size", "how many nodes are listed", ValueSpec::Integer { min: 1, max: NODES_MAX as i64 }),
    key("slices", "into how many slices the model is cut", ValueSpec::Integer { min: 1, max: SLICES_MAX as i64 }),
];

pub(crate) const NODE_KEYS: &[KeySpec] = &[
    required("id", "id of the node, such as \"n0\"", ValueSpec::Text),
    required("listen_address", "where it listens and its peers dial it", ValueSpec::SocketAddress),
    required("public_key", "its identity, printed by `butterfly keygen`", ValueSpec::Text),
    key("domain", "who operates it", ValueSpec::Text),
    key("memory", "memory for weights and caches", ValueSpec::Bytes { min: 1 << 20, max: 1 << 50 }),
    key("compute", "measured speed relative to the others", ValueSpec::Number { min: 1e-6, max: 1e6 }),
    key("bandwidth", "measured bytes per second to the others", ValueSpec::Bytes { min: 1, max: 1 << 50 }),
    key("admin_address", "where its admin listener binds; it has none when absent", ValueSpec::SocketAddress),
    key("adversary", "a behaviour to show instead of the honest one", ValueSpec::Choice(BEHAVIOURS)),
];

pub(crate) const TELEMETRY_KEYS: &[KeySpec] = &[
    with_default(
        key("collector_type", "where metrics go", ValueSpec::Choice(&["prometheus", "console", "json"])),
        "prometheus",
    ),
    with_default(
        key(
            "export_interval_secs",
            "how often collectors that write do so",
            ValueSpec::Integer { min: 1, max: 86_400 },
        ),
        "60",
    ),
    with_default(
        key("admin_token_file", "the secret of the admin listeners, which only its owner may read", ValueSpec::Path),
        "admin.token",
    ),
];

/// A key with its value, by position in the file.
type Entry<'t, 'i> = (&'t Spanned<DeString<'i>>, &'t Spanned<DeValue<'i>>);

fn entries<'t, 'i>(table: &'t DeTable<'i>) -> Vec<Entry<'t, 'i>> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

fn entry<'t, 'i>(table: &'t DeTable<'i>, key: &str) -> Option<Entry<'t, 'i>> {
    table.get_key_value(key)
}

/// Reads a file into tables. Problems are added to `problems`; when the text is not TOML there is nothing to hand on.
pub(crate) fn read<'c>(text: &str, catalogue: &'c Catalogue, problems: &mut Vec<Diagnostic>) -> Option<Declared<'c>> {
    if text.len() > TEXT_BYTES_MAX {
        problems.push(Diagnostic::error(
            Code::TooLarge,
            format!("the file has {} bytes, and a topology has at most {TEXT_BYTES_MAX}", text.len()),
        ));
        return None;
    }
    let (root, errors) = DeTable::parse_recoverable(text);
    problems.extend(errors.iter().map(|error| syntax(error, text)));
    // A key that is there twice leaves a tree that can be read; after any other error its shape is a guess.
    if errors.iter().any(|error| error.message() != DUPLICATE_KEY) {
        return None;
    }
    let mut reader = Reader { catalogue, problems };
    Some(reader.root(root.get_ref()))
}

/// The parser's words for a key that is there twice.
const DUPLICATE_KEY: &str = "duplicate key";

fn syntax(error: &toml::de::Error, text: &str) -> Diagnostic {
    let message = error.message().replace('\n', "; ");
    let Some(span) = error.span() else { return Diagnostic::error(Code::Syntax, message) };
    if message == DUPLICATE_KEY {
        let key = text.get(span.clone()).unwrap_or_default();
        return Diagnostic::error(Code::Syntax, format!("{} is there twice", quote(key)))
            .at(span, "again")
            .help("a key or table has one value: remove one of them");
    }
    let before = text.get(..span.start).unwrap_or_default();
    let line = before.rsplit('\n').next().unwrap_or_default();
    if span.is_empty() && line.trim_end().ends_with('=') {
        return Diagnostic::error(Code::Syntax, "there is no value after `=`").at(span, "a value is missing here");
    }
    Diagnostic::error(Code::Syntax, message).at(span, "")
}

struct Reader<'c, 'p> {
    catalogue: &'c Catalogue,
    problems: &'p mut Vec<Diagnostic>,
}

impl<'c> Reader<'c, '_> {
    fn root(&mut self, root: &DeTable<'_>) -> Declared<'c> {
        let mut declared = Declared { cluster: None, nodes: Vec::new(), stages: Vec::new(), telemetry: None };
        let mut meant = Vec::new();
        for (key, value) in entries(root) {
            let mut name = &**key.get_ref();
            if !TABLES.iter().any(|(known, _)| *known == name) {
                // As with misspelt kinds, the table that was meant is read, unless it is there as well.
                let Some(near) = self.unknown_table(name, key.span()) else { continue };
                meant.push(near);
                if root.contains_key(near) {
                    continue;
                }
                name = near;
            }
            match name {
                "cluster" => {
                    declared.cluster = self.table("[cluster]", key, value, CLUSTER_KEYS);
                }
                "telemetry" => {
                    declared.telemetry = self.table("[telemetry]", key, value, TELEMETRY_KEYS);
                }
                "node" => {
                    for (table, header) in self.tables("[[node]]", NODES_MAX, key, value) {
                        let what = node_text(table);
                        let values = self.values(&what, table, &header, NODE_KEYS, &[]);
                        declared.nodes.push(Table { header, values });
                    }
                }
                "stage" => {
                    for (table, header) in self.tables("[[stage]]", STAGES_MAX, key, value) {
                        let stage = self.stage(table, header);
                        declared.stages.push(stage);
                    }
                }
                _ => {}
            }
        }
        for (name, header) in TABLES.iter().take(3) {
            if !root.contains_key(*name) && !meant.contains(name) {
                let message = format!("there is no `{header}`");
                self.problems.push(Diagnostic::error(Code::MissingTable, message).help(missing_table_help(name)));
            }
        }
        declared
    }

    /// Reports a table that does not exist. Gives back the one that was most likely meant.
    fn unknown_table(&mut self, name: &str, span: Span) -> Option<&'static str> {
        let near = suggest::nearest(name, TABLES.map(|(name, _)| name));
        let diagnostic = Diagnostic::error(Code::UnknownKey, format!("unknown table {}", quote(name)));
        let diagnostic = match near {
            Some(near) => diagnostic.at(span, format!("did you mean {}?", quote(near))),
            None => {
                let all = TABLES.map(|(_, header)| header).join(", ");
                diagnostic.at(span, "not a table of a topology").help(format!("the tables are {all}"))
            }
        };
        self.problems.push(diagnostic);
        near
    }

    /// A table that is there once.
    fn table(
        &mut self,
        header: &str,
        key: &Spanned<DeString<'_>>,
        value: &Spanned<DeValue<'_>>,
        keys: &[KeySpec],
    ) -> Option<Table> {
        let DeValue::Table(table) = value.get_ref() else {
            let diagnostic = Diagnostic::error(
                Code::WrongType,
                format!("`{header}` is one table, not {}", type_name(value.get_ref())),
            );
            self.problems
                .push(diagnostic.at(key.span(), "").help(format!("write it once, with single brackets: {header}")));
            return None;
        };
        let values = self.values(&format!("`{header}`"), table, &value.span(), keys, &[]);
        Some(Table { header: value.span(), values })
    }

    /// The tables of a list, with their headers.
    fn tables<'t, 'i>(
        &mut self,
        header: &str,
        count_max: usize,
        key: &Spanned<DeString<'_>>,
        value: &'t Spanned<DeValue<'i>>,
    ) -> Vec<(&'t DeTable<'i>, Span)> {
        let help = format!("write each with double brackets: {header}");
        let DeValue::Array(array) = value.get_ref() else {
            let message = format!("`{header}` is a list of tables, not {}", type_name(value.get_ref()));
            let span = if value.get_ref().is_table() { value.span() } else { key.span() };
            self.problems.push(Diagnostic::error(Code::WrongType, message).at(span, "").help(help));
            return Vec::new();
        };
        if array.len() > count_max {
            let message = format!("there are {} of `{header}`, and at most {count_max} are possible", array.len());
            self.problems.push(Diagnostic::error(Code::TooLarge, message).at(key.span(), ""));
        }
        let mut tables = Vec::new();
        for item in array.iter().take(count_max) {
            if let DeValue::Table(table) = item.get_ref() {
                tables.push((table, item.span()));
            } else {
                let message = format!("`{header}` is a list of tables, not of {}", plural(item.get_ref()));
                self.problems.push(Diagnostic::error(Code::WrongType, message).at(item.span(), "").help(&*help));
            }
        }
        tables
    }

    /// The values of one table: unknown keys, wrong values and missing keys are reported, defaults are applied. Keys in
    /// `apart` are known and read elsewhere.
    fn values(
        &mut self,
        what: &str,
        table: &DeTable<'_>,
        header: &Span,
        keys: &[KeySpec],
        apart: &[&str],
    ) -> StageConfig {
        let mut values = StageConfig::new();
        let mut meant = Vec::new();
        for spec in keys {
            if let Some(value) = spec.default.and_then(|text| value::default_value(&spec.value, text)) {
                values.set(spec.name, value, None);
            }
        }
        for (key, value) in entries(table) {
            let name = &**key.get_ref();
            if apart.contains(&name) {
                continue;
            }
            match keys.iter().find(|spec| spec.name == name) {
                Some(spec) => {
                    if let Some(read) = self.value(what, spec.name, &spec.value, value) {
                        values.set(spec.name, read, Some(value.span()));
                    }
                }
                None => meant.extend(self.unknown_key(what, name, key.span(), keys, apart)),
            }
        }
        for spec in keys {
            let there = table.contains_key(spec.name) || meant.iter().any(|name| name == spec.name);
            if spec.required && spec.default.is_none() && !there {
                let message = format!("{what} has no `{}`", spec.name);
                let label = format!("`{}` is missing", spec.name);
                let help = format!("`{}`: {}", spec.name, spec.doc);
                self.problems.push(Diagnostic::error(Code::MissingKey, message).at(header.clone(), label).help(help));
            }
        }
        values
    }

    /// One value; `None` when it is wrong, which is reported.
    fn value(&mut self, what: &str, key: &str, spec: &ValueSpec, value: &Spanned<DeValue<'_>>) -> Option<ConfigValue> {
        match value::read(spec, value.get_ref()) {
            Ok(read) => Some(read),
            Err(fault) => {
                let message = format!("`{key}` of {what} {}", fault.message);
                self.problems
                    .push(Diagnostic::error(fault.code, message).at(value.span(), fault.label).help_opt(fault.help));
                None
            }
        }
    }

    /// Reports a key that does not exist. Gives back the one that was most likely meant.
    fn unknown_key(&mut self, what: &str, name: &str, span: Span, keys: &[KeySpec], apart: &[&str]) -> Option<String> {
        let diagnostic = Diagnostic::error(Code::UnknownKey, format!("unknown key {} in {what}", quote(name)));
        let known: Vec<&str> = keys.iter().map(|spec| spec.name).chain(apart.iter().copied()).collect();
        let near = suggest::nearest(name, known.iter().copied());
        let diagnostic = match near {
            Some(near) => diagnostic.at(span, format!("did you mean {}?", quote(near))),
            None => diagnostic
                .at(span, format!("not a key of {what}"))
                .help_opt(self.owner_of(name, apart))
                .help(format!("the keys are {}", list(&known))),
        };
        self.problems.push(diagnostic);
        near.map(str::to_owned)
    }

    /// The kinds that have a key which this stage has not.
    fn owner_of(&self, name: &str, apart: &[&str]) -> Option<String> {
        if !apart.contains(&"kind") {
            return None;
        }
        let owners: Vec<&str> =
            self.catalogue.kinds().filter(|kind| kind.key(name).is_some()).map(|kind| kind.kind).collect();
        (!owners.is_empty()).then(|| format!("{} is a key of {}", quote(name), list(&owners)))
    }
}

fn node_text(table: &DeTable<'_>) -> String {
    match entry(table, "id").map(|(_, value)| value.get_ref()) {
        Some(DeValue::String(id)) => format!("node {}", quote(id)),
        _ => "this node".to_owned(),
    }
}

fn plural(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "texts",
        DeValue::Integer(_) | DeValue::Float(_) => "numbers",
        DeValue::Boolean(_) => "flags",
        DeValue::Datetime(_) => "dates",
        DeValue::Array(_) => "lists",
        DeValue::Table(_) => "tables",
    }
}

/// `a`, `b` and `c`.
pub(crate) fn list(words: &[impl AsRef<str>]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| quote(word.as_ref())).collect();
    match quoted.split_last() {
        None => String::new(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
    }
}

fn missing_table_help(name: &str) -> &'static str {
    match name {
        "cluster" => "[cluster] says the `name`, the `model` and `max_byzantine`, how many nodes may lie",
        "node" => {
            "list every node: [[node]] with `id`, `listen_address` and `public_key`; `butterfly init` writes them"
        }
        _ => "list the stages: [[stage]] with `kind` and `input`; `butterfly init` writes a graph that works",
    }
}
