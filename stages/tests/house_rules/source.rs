//! The project's Rust sources, split into code and text, so that a rule about code is not broken by a comment or a string.
//! Knows no rule.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::root;

/// One Rust file, its path relative to the project.
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
    pub(crate) lines: Vec<Line>,
}

/// One line without its comments.
pub(crate) struct Line {
    pub(crate) code: String,
    pub(crate) with_strings: String,
}

impl Source {
    pub(crate) fn is_under(&self, prefixes: &[&str]) -> bool {
        prefixes.iter().any(|prefix| self.path.starts_with(prefix))
    }

    pub(crate) fn lines_with_text(&self, wanted: &str) -> Vec<usize> {
        self.lines_where(|code| code.contains(wanted))
    }

    pub(crate) fn lines_with_word(&self, wanted: &str) -> Vec<usize> {
        self.lines_where(|code| code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == wanted))
    }

    fn lines_where(&self, holds: impl Fn(&str) -> bool) -> Vec<usize> {
        let numbered = self.lines.iter().enumerate();
        numbered.filter(|(_, line)| holds(&line.code)).map(|(index, _)| index + 1).collect()
    }
}

/// Every Rust file of the project.
pub(crate) fn sources() -> &'static [Source] {
    static SOURCES: LazyLock<Vec<Source>> = LazyLock::new(read_all);
    &SOURCES
}

fn read_all() -> Vec<Source> {
    let mut paths = Vec::new();
    for folder in ["topology", "engine", "stages", "benches", "fuzz", "examples"] {
        collect(&root().join(folder), &mut paths);
    }
    paths.sort();
    assert!(paths.len() > 7, "only {} sources under {}", paths.len(), root().display());
    paths
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let lines = split(&text);
            let path = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            Source { path, text, lines }
        })
        .collect()
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                collect(&path, paths);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            paths.push(path);
        }
    }
}

/// Splits a source into lines, comments taken out, and strings too in `code`.
fn split(source: &str) -> Vec<Line> {
    let mut lines = vec![Line { code: String::new(), with_strings: String::new() }];
    let mut rest = source;
    while !rest.is_empty() {
        let (token, length) = token(rest);
        for c in rest[..length].chars() {
            if c == '\n' {
                lines.push(Line { code: String::new(), with_strings: String::new() });
                continue;
            }
            let line = lines.last_mut().unwrap();
            if token == Token::Code {
                line.code.push(c);
            }
            if token != Token::Comment {
                line.with_strings.push(c);
            }
        }
        rest = &rest[length..];
    }
    if source.ends_with('\n') {
        lines.pop();
    }
    lines
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Token {
    Code,
    Comment,
    Text,
}

/// The token at the start of `rest` and its length in bytes: enough of Rust's lexer to tell code from text.
fn token(rest: &str) -> (Token, usize) {
    let first = rest.chars().next().map_or(1, char::len_utf8);
    if rest.starts_with("//") {
        return (Token::Comment, rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return (Token::Comment, block_comment(rest));
    }
    for prefix in ["r", "br", "cr"] {
        if let Some(after) = rest.strip_prefix(prefix) {
            let hashes = after.len() - after.trim_start_matches('#').len();
            if after[hashes..].starts_with('"') {
                let close = format!("\"{}", "#".repeat(hashes));
                let open = prefix.len() + hashes + 1;
                return (Token::Text, rest[open..].find(&close).map_or(rest.len(), |at| open + at + close.len()));
            }
        }
    }
    if rest.starts_with('"') {
        return (Token::Text, quoted(rest));
    }
    // A lifetime has no closing quote behind its first character; a character literal has.
    let mut after_quote = rest.chars().skip(1);
    if rest.starts_with('\'') && (after_quote.next() == Some('\\') || after_quote.next() == Some('\'')) {
        return (Token::Text, quoted(rest));
    }
    let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    (Token::Code, word.max(first))
}

/// The length of a literal that ends with the quote it begins with.
fn quoted(rest: &str) -> usize {
    let quote = rest.as_bytes()[0];
    let mut escaped = false;
    for (at, byte) in rest.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            _ if byte == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// The length of a block comment; they nest.
fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        let (step, change) = match rest.get(at..at + 2) {
            Some("/*") => (2, 1),
            Some("*/") => (2, -1),
            _ => (1, 0),
        };
        at += step;
        depth = depth.checked_add_signed(change).unwrap();
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

#[test]
fn the_rules_read_code_and_not_text() {
    let source = "let a = \"unsafe \\\" //\"; // unsafe\nlet b = r#\"unsafe\"#; /* unsafe /* x */ unsafe */ let c = '\"'; unsafe {}\n";
    let lines = split(source);
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0].code.trim_end(), "let a = ;");
    assert_eq!(lines[0].with_strings.trim_end(), "let a = \"unsafe \\\" //\";");
    assert_eq!(lines[1].code, "let b = ;  let c = ; unsafe {}");
    let lifetime = split("fn f<'a>(x: &'a str) -> char { 'x' }\n");
    assert_eq!(lifetime[0].code, "fn f<'a>(x: &'a str) -> char {  }");
}
