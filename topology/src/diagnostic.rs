//! Diagnostics: what is wrong with a topology file, where, and what to do about it.
//!
//! Every problem has a stable [`Code`], a sentence, at least one place where a place exists, and help where there is a
//! way out. Text that came from the file is escaped and shortened before it enters a message, so a hostile file cannot
//! write to the terminal through its own diagnostics. This module refuses to know what is checked.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};
use serde::Serialize;

/// The most problems reported of one file; a last one says that there are more.
pub const DIAGNOSTICS_MAX: usize = 200;
/// Characters of a quoted text before it is cut.
const QUOTE_CHARS_MAX: usize = 60;
/// The longest line shown around a problem, in bytes; of a longer one only the number is given.
const SHOWN_LINE_BYTES_MAX: usize = 2000;

/// What kind of problem it is; stable across versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The text is not TOML.
    Syntax,
    /// The text is larger than any topology, or has more nodes or stages.
    TooLarge,
    /// A table is not there.
    MissingTable,
    /// A key is not there.
    MissingKey,
    /// A key or table that does not exist.
    UnknownKey,
    /// A stage kind that does not exist.
    UnknownKind,
    /// A value of another type.
    WrongType,
    /// A value of the right type that cannot be used.
    InvalidValue,
    /// A number outside its bounds.
    OutOfRange,
    /// A word that is not one of the choices.
    UnknownChoice,
    /// A name, id, address or key that another entry has.
    Duplicate,
    /// A stage that is named and does not exist.
    UnknownStage,
    /// A port that is named and does not exist.
    UnknownPort,
    /// A node that is named and does not exist.
    UnknownNode,
    /// Ports joined by an edge have different items.
    PortMismatch,
    /// Several ports fit and none is named.
    AmbiguousPort,
    /// An output port feeds two edges.
    OutputUsedTwice,
    /// A required output port feeds no edge.
    UnusedOutput,
    /// A required input port has no edge.
    MissingInput,
    /// Edges form a cycle and none is marked as feedback.
    Cycle,
    /// An edge is marked as feedback and closes no loop.
    NoLoop,
    /// What may travel in a loop does not fit its feedback edge.
    LoopCapacity,
    /// No item ever reaches a stage.
    Unreachable,
    /// A stage runs on no node.
    NeverRuns,
    /// A stage does not run on a node where a stage that feeds it does.
    CutEdge,
    /// Too few nodes for the faults to be tolerated.
    Quorum,
    /// `cluster_size` differs from the list of nodes.
    ClusterSize,
    /// Slices and nodes do not go together well.
    Slices,
    /// Trust domains do not allow what the faults to be tolerated ask for.
    Domains,
    /// A rule of a stage's own, beyond its signature.
    StageRule,
}

impl Code {
    /// The code as printed: `unknown-key`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Code::Syntax => "syntax",
            Code::TooLarge => "too-large",
            Code::MissingTable => "missing-table",
            Code::MissingKey => "missing-key",
            Code::UnknownKey => "unknown-key",
            Code::UnknownKind => "unknown-kind",
            Code::WrongType => "wrong-type",
            Code::InvalidValue => "invalid-value",
            Code::OutOfRange => "out-of-range",
            Code::UnknownChoice => "unknown-choice",
            Code::Duplicate => "duplicate",
            Code::UnknownStage => "unknown-stage",
            Code::UnknownPort => "unknown-port",
            Code::UnknownNode => "unknown-node",
            Code::PortMismatch => "port-mismatch",
            Code::AmbiguousPort => "ambiguous-port",
            Code::OutputUsedTwice => "output-used-twice",
            Code::UnusedOutput => "unused-output",
            Code::MissingInput => "missing-input",
            Code::Cycle => "cycle",
            Code::NoLoop => "no-loop",
            Code::LoopCapacity => "loop-capacity",
            Code::Unreachable => "unreachable",
            Code::NeverRuns => "never-runs",
            Code::CutEdge => "cut-edge",
            Code::Quorum => "quorum",
            Code::ClusterSize => "cluster-size",
            Code::Slices => "slices",
            Code::Domains => "domains",
            Code::StageRule => "stage-rule",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether the file can be used all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It cannot.
    Error,
    /// It can, and the author should know.
    Warning,
}

/// A place in the file and what is to be said about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Label {
    /// Bytes of the file, `start..end`.
    #[serde(skip)]
    pub span: Range<usize>,
    /// Line of the first character, from 1.
    pub line: usize,
    /// Column of the first character, in characters, from 1.
    pub column: usize,
    /// Line just after the last character.
    pub end_line: usize,
    /// Column just after the last character.
    pub end_column: usize,
    /// What is to be said here; may be empty.
    pub label: String,
    /// Whether this is the place of the problem, or another one that explains it.
    pub primary: bool,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// What kind of problem it is.
    pub code: Code,
    /// Whether the file can be used all the same.
    pub severity: Severity,
    /// The problem in one sentence.
    pub message: String,
    /// Places, the primary one first. Empty when the problem is that something is nowhere.
    pub spans: Vec<Label>,
    /// Ways out.
    pub help: Vec<String>,
}

impl Diagnostic {
    /// An error without a place so far.
    #[must_use]
    pub fn error(code: Code, message: impl Into<String>) -> Self {
        Self { code, severity: Severity::Error, message: message.into(), spans: Vec::new(), help: Vec::new() }
    }

    /// A warning without a place so far.
    #[must_use]
    pub fn warning(code: Code, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, message) }
    }

    /// Adds the place of the problem, as bytes of the file. Line and column are set when it joins its [`Diagnostics`].
    #[must_use]
    pub fn at(self, span: Range<usize>, label: impl Into<String>) -> Self {
        self.place(span, label, true)
    }

    /// Adds another place, which explains the problem.
    #[must_use]
    pub fn also(self, span: Range<usize>, label: impl Into<String>) -> Self {
        self.place(span, label, false)
    }

    fn place(mut self, span: Range<usize>, label: impl Into<String>, primary: bool) -> Self {
        let label = label.into();
        self.spans.push(Label { span, line: 0, column: 0, end_line: 0, end_column: 0, label, primary });
        self
    }

    /// Adds a way out.
    #[must_use]
    pub fn help(mut self, text: impl Into<String>) -> Self {
        self.help.push(text.into());
        self
    }

    /// Adds a way out if there is one.
    #[must_use]
    pub fn help_opt(self, text: Option<String>) -> Self {
        match text {
            Some(text) => self.help(text),
            None => self,
        }
    }

    fn start(&self) -> usize {
        self.spans.iter().find(|label| label.primary).map_or(usize::MAX, |label| label.span.start)
    }
}

/// Text of the file, quoted for a message: control characters escaped, long texts cut.
#[must_use]
pub(crate) fn quote(text: &str) -> String {
    if text.is_empty() {
        return "an empty text".to_owned();
    }
    let mut quoted = String::from("`");
    for (index, character) in text.chars().enumerate() {
        if index == QUOTE_CHARS_MAX {
            quoted.push('…');
            break;
        }
        if character.is_control() || is_invisible(character) {
            quoted.extend(character.escape_unicode());
        } else {
            quoted.push(character);
        }
    }
    quoted.push('`');
    quoted
}

/// Characters that change how a terminal shows the text around them.
fn is_invisible(character: char) -> bool {
    matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// A file as read: its name, its text and where its lines start.
#[derive(Clone, Debug, Default)]
pub(crate) struct Source {
    file_name: Arc<str>,
    text: Arc<str>,
    line_starts: Arc<[usize]>,
}

impl Source {
    pub(crate) fn new(file_name: &str, text: &str) -> Self {
        let line_starts = std::iter::once(0)
            .chain(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(index, _)| index + 1))
            .collect();
        Self { file_name: Arc::from(file_name), text: Arc::from(text), line_starts }
    }

    /// Line and column, both from 1; the column in characters.
    fn position(&self, offset: usize) -> (usize, usize) {
        let offset = self.boundary(offset);
        let line = self.line_starts.partition_point(|start| *start <= offset);
        let start = self.line_starts.get(line.saturating_sub(1)).copied().unwrap_or(0);
        let column = self.text.get(start..offset).map_or(0, |before| before.chars().count()) + 1;
        (line.max(1), column)
    }

    /// The next character boundary at or after this offset, within the text.
    fn boundary(&self, offset: usize) -> usize {
        let end = self.text.len();
        (offset.min(end)..end).find(|at| self.text.is_char_boundary(*at)).unwrap_or(end)
    }

    /// The lines that hold these places, as bytes, and the number of the first. `None` when there are none, or one of
    /// them is too long to be shown.
    fn window(&self, labels: &[Label]) -> Option<(Range<usize>, usize)> {
        let first_line = labels.iter().map(|label| label.line).min()?;
        let last_line = labels.iter().map(|label| label.end_line).max()?;
        let line_start = |line: usize| self.line_starts.get(line.saturating_sub(1)).copied().unwrap_or(self.text.len());
        let too_long = |line: usize| line_start(line + 1) - line_start(line) > SHOWN_LINE_BYTES_MAX;
        let shown = labels.iter().flat_map(|label| [label.line, label.end_line]);
        let window = line_start(first_line)..line_start(last_line + 1);
        (!shown.into_iter().any(too_long)).then_some((window, first_line))
    }

    fn locate(&self, label: &mut Label) {
        let start = self.boundary(label.span.start);
        let end = self.boundary(label.span.end).max(start);
        label.span = start..end;
        (label.line, label.column) = self.position(start);
        (label.end_line, label.end_column) = self.position(end);
    }
}

/// All problems of one file, in the order of the file.
#[derive(Clone, Debug, Default)]
pub struct Diagnostics {
    source: Source,
    all: Vec<Diagnostic>,
}

impl Diagnostics {
    pub(crate) fn new(source: Source, mut all: Vec<Diagnostic>) -> Self {
        for diagnostic in &mut all {
            diagnostic.spans.sort_by_key(|label| !label.primary);
            for label in &mut diagnostic.spans {
                source.locate(label);
            }
        }
        all.sort_by_key(|diagnostic| (diagnostic.start(), diagnostic.severity, diagnostic.code));
        all.dedup();
        if all.len() > DIAGNOSTICS_MAX {
            let more = all.len() - DIAGNOSTICS_MAX;
            all.truncate(DIAGNOSTICS_MAX);
            all.push(Diagnostic::error(Code::TooLarge, format!("{more} more problems are not shown")));
        }
        Self { source, all }
    }

    /// The problems, in the order of the file; those without a place last.
    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.all.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether one of them makes the file unusable.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.all.iter().any(|diagnostic| diagnostic.severity == Severity::Error)
    }

    /// The file that they are about.
    #[must_use]
    pub fn file_name(&self) -> &str {
        &self.source.file_name
    }

    /// For people: each problem with its place and the lines around it, and a last line that counts them.
    #[must_use]
    pub fn render(&self, color: bool) -> String {
        let renderer = if color { Renderer::styled() } else { Renderer::plain() };
        let mut text = String::new();
        for diagnostic in &self.all {
            text.push_str(&renderer.render(&[self.group(diagnostic)]));
            text.push_str("\n\n");
        }
        if let Some(summary) = self.summary() {
            let level = if self.has_errors() { Level::ERROR } else { Level::WARNING };
            text.push_str(&renderer.render(&[Group::with_title(level.primary_title(summary))]));
            text.push('\n');
        }
        text
    }

    fn group<'a>(&'a self, diagnostic: &'a Diagnostic) -> Group<'a> {
        let level = match diagnostic.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let title = level.primary_title(&*diagnostic.message).id(diagnostic.code.as_str());
        let mut group = Group::with_title(title);
        if let Some((window, first_line)) = self.source.window(&diagnostic.spans) {
            let annotations = diagnostic.spans.iter().map(|label| {
                let kind = if label.primary { AnnotationKind::Primary } else { AnnotationKind::Context };
                let text = (!label.label.is_empty()).then_some(&*label.label);
                kind.span(label.span.start - window.start..label.span.end - window.start).label(text)
            });
            let text = self.source.text.get(window.clone()).unwrap_or_default();
            let snippet = Snippet::source(text).line_start(first_line).path(&*self.source.file_name);
            group = group.element(snippet.annotations(annotations));
        } else {
            let origin = Origin::path(&*self.source.file_name);
            group = group.element(match diagnostic.spans.first() {
                Some(label) => origin.line(label.line).char_column(label.column),
                None => origin,
            });
            let labels = diagnostic.spans.iter().map(|label| &*label.label).filter(|label| !label.is_empty());
            group = group.elements(labels.map(|label| Level::NOTE.message(label)));
        }
        group.elements(diagnostic.help.iter().map(|help| Level::HELP.message(&**help)))
    }

    fn summary(&self) -> Option<String> {
        let errors = self.all.iter().filter(|diagnostic| diagnostic.severity == Severity::Error).count();
        let warnings = self.all.len() - errors;
        let count = |n: usize, word: &str| format!("{n} {word}{}", if n == 1 { "" } else { "s" });
        let counts = match (errors, warnings) {
            (0, 0) => return None,
            (errors, 0) => count(errors, "error"),
            (0, warnings) => count(warnings, "warning"),
            (errors, warnings) => format!("{} and {}", count(errors, "error"), count(warnings, "warning")),
        };
        Some(format!("{counts} in {}", self.source.file_name))
    }

    /// For programs: `{"file", "errors", "warnings", "diagnostics": [{"code", "severity", "message", "spans", "help"}]}`.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let errors = self.all.iter().filter(|diagnostic| diagnostic.severity == Severity::Error).count();
        serde_json::json!({
            "file": &*self.source.file_name,
            "errors": errors,
            "warnings": self.all.len() - errors,
            "diagnostics": self.all,
        })
    }
}

impl<'a> IntoIterator for &'a Diagnostics {
    type Item = &'a Diagnostic;
    type IntoIter = std::slice::Iter<'a, Diagnostic>;
    fn into_iter(self) -> Self::IntoIter {
        self.all.iter()
    }
}

/// One line for each problem: `file:line:column: message`.
impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, diagnostic) in self.all.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}", self.source.file_name)?;
            if let Some(label) = diagnostic.spans.first() {
                write!(f, ":{}:{}", label.line, label.column)?;
            }
            write!(f, ": {}", diagnostic.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}
