//! `--set` and environment over file: changes single keys of a topology before it is checked.
//!
//! The text itself is changed, at the place where the key stands, so that diagnostics still point into what the reader
//! wrote, and so that a key given here passes the same checks as one in the file. Knows the names of the tables, and no key.

use std::ops::Range;
use std::str::FromStr;

use toml::de::{DeTable, DeValue};

use crate::exit::Failure;

/// `BUTTERFLY_STAGE__INGEST__BIND_ADDRESS`: this, then the path with two underscores between its parts.
const ENVIRONMENT_PREFIX: &str = "BUTTERFLY_";

/// One key and its value, such as `stage.ingest.bind_address=0.0.0.0:8080`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    target: Target,
    key: String,
    /// As written in TOML.
    value: String,
    /// How the user named it, for messages.
    origin: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    /// `[cluster]` or `[telemetry]`.
    Table(&'static str),
    /// A `[[node]]` by id, or a `[[stage]]` by name.
    Element { list: &'static str, name: String },
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
        let parts: Vec<&str> = path.trim().split('.').collect();
        Self::new(&parts, value.trim(), format!("--set {path}"))
    }
}

impl Setting {
    fn new(path: &[&str], value: &str, origin: String) -> Result<Self, String> {
        let (target, key) = match *path {
            ["cluster", key] => (Target::Table("cluster"), key),
            ["telemetry", key] => (Target::Table("telemetry"), key),
            ["stage", name, key] => (Target::Element { list: "stage", name: name.to_owned() }, key),
            ["node", id, key] => (Target::Element { list: "node", name: id.to_owned() }, key),
            _ => return Err("expected cluster.KEY, telemetry.KEY, stage.NAME.KEY or node.ID.KEY".to_owned()),
        };
        if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(format!("`{key}` is not the name of a key"));
        }
        Ok(Self { target, key: key.to_owned(), value: toml_value(value), origin })
    }

    /// The settings of the environment, in the order of their names.
    pub(crate) fn from_environment(variables: impl Iterator<Item = (String, String)>) -> Result<Vec<Self>, Failure> {
        let mut settings = Vec::new();
        for (name, value) in variables {
            let Some(path) = name.strip_prefix(ENVIRONMENT_PREFIX).filter(|path| path.contains("__")) else {
                continue;
            };
            let path = path.to_ascii_lowercase();
            let parts: Vec<&str> = path.split("__").collect();
            let setting = Self::new(&parts, &value, name.clone())
                .map_err(|error| Failure::usage(format!("environment variable {name}: {error}")))?;
            settings.push(setting);
        }
        settings.sort_by(|a, b| a.origin.cmp(&b.origin));
        Ok(settings)
    }
}

/// A value as TOML: what is a number, a flag, a string or an array in TOML stays it, all else is a string.
fn toml_value(text: &str) -> String {
    let document = format!("v = {text}");
    let single = DeTable::parse(&document).ok().filter(|table| table.get_ref().len() == 1);
    let kept = single.and_then(|table| {
        let value = table.into_inner().into_iter().next()?.1.into_inner();
        (!matches!(value, DeValue::Datetime(_) | DeValue::Table(_))).then_some(())
    });
    // `#` would start a comment in the middle of an unquoted value.
    match kept.filter(|()| !text.contains('#') || text.starts_with(['"', '\'', '['])) {
        Some(()) => text.to_owned(),
        None => toml::Value::String(text.to_owned()).to_string(),
    }
}

/// Applies settings to the text of a topology, later ones over earlier ones. Text that is no TOML stays as it is: the
/// check says what is wrong with it.
pub(crate) fn apply(text: &str, settings: &[Setting]) -> Result<String, Failure> {
    let mut text = text.to_owned();
    for setting in settings {
        let Some(change) = change(&text, setting)? else { break };
        text.replace_range(change.0, &change.1);
    }
    Ok(text)
}

/// Which part of the text a setting replaces, and by what. `None` when the text does not parse.
fn change(text: &str, setting: &Setting) -> Result<Option<(Range<usize>, String)>, Failure> {
    let Ok(document) = DeTable::parse(text) else { return Ok(None) };
    let document = document.get_ref();
    let line = format!("{} = {}\n", setting.key, setting.value);
    let found = match &setting.target {
        Target::Table(name) => match document.get(*name) {
            Some(table) => Some((table.span(), table.get_ref())),
            None => {
                let separator = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
                return Ok(Some((text.len()..text.len(), format!("{separator}\n[{name}]\n{line}"))));
            }
        },
        Target::Element { list, name } => element(document, list, name).map(|element| (element.0, element.1)),
    };
    let Some((span, DeValue::Table(table))) = found else {
        return Err(not_found(document, setting));
    };
    if let Some(value) = table.get(setting.key.as_str()) {
        return Ok(Some((value.span(), setting.value.clone())));
    }
    if text[span.clone()].starts_with('{') {
        return Err(Failure::usage(format!("{}: the table is written inline, `{{ … }}`", setting.origin))
            .help("write it with a header of its own, such as [cluster]"));
    }
    // A new line below the first key, or below the header where there is no key.
    let anchor = table.iter().map(|(_, value)| value.span().end).min().unwrap_or(span.end);
    let at = text[anchor..].find('\n').map(|newline| anchor + newline + 1);
    Ok(Some(match at {
        Some(at) => (at..at, line),
        None => (text.len()..text.len(), format!("\n{line}")),
    }))
}

/// The element of a `[[list]]` with this name; `_` in the wanted name also stands for `-`, which environment variables
/// cannot have.
fn element<'a>(document: &'a DeTable<'_>, list: &str, wanted: &str) -> Option<(Range<usize>, &'a DeValue<'a>)> {
    let DeValue::Array(elements) = document.get(list)?.get_ref() else { return None };
    elements
        .iter()
        .find(|element| {
            element_name(element.get_ref(), list)
                .is_some_and(|name| name == wanted || name.replace('-', "_") == wanted.replace('-', "_"))
        })
        .map(|element| (element.span(), element.get_ref()))
}

/// A stage's name defaults to its kind.
fn element_name<'a>(element: &'a DeValue<'_>, list: &str) -> Option<&'a str> {
    let DeValue::Table(table) = element else { return None };
    let keys: &[&str] = if list == "node" { &["id"] } else { &["name", "kind"] };
    let value = keys.iter().find_map(|key| table.get(*key))?;
    match value.get_ref() {
        DeValue::String(name) => Some(name),
        _ => None,
    }
}

fn not_found(document: &DeTable<'_>, setting: &Setting) -> Failure {
    match &setting.target {
        Target::Table(name) => Failure::usage(format!("{}: `{name}` is not a table", setting.origin)),
        Target::Element { list, name } => {
            let known: Vec<&str> = match document.get(*list).map(toml::Spanned::get_ref) {
                Some(DeValue::Array(elements)) => {
                    elements.iter().filter_map(|element| element_name(element.get_ref(), list)).collect()
                }
                _ => Vec::new(),
            };
            let failure = Failure::usage(format!("{}: the topology has no {list} `{name}`", setting.origin));
            if known.is_empty() { failure } else { failure.help(format!("it has {}", known.join(", "))) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# a comment\n[cluster]\nname = \"demo\" # its name\n\n[[node]]\nid = \"n-0\"\n\n[[stage]]\nkind = \"ingest\"\nbind_address = \"127.0.0.1:8080\"\n\n[[stage]]\nkind = \"assign\"\nname = \"second\"";

    fn set(text: &str, settings: &[&str]) -> Result<String, Failure> {
        let settings: Vec<Setting> = settings.iter().map(|setting| setting.parse().unwrap()).collect();
        apply(text, &settings)
    }

    #[test]
    fn a_value_is_replaced_where_it_stands() {
        let changed = set(FILE, &["stage.ingest.bind_address=0.0.0.0:80", "cluster.name=two words"]).unwrap();
        assert_eq!(changed, FILE.replace("127.0.0.1:8080", "0.0.0.0:80").replace("\"demo\"", "\"two words\""));
    }

    #[test]
    fn a_new_key_joins_its_table_and_a_new_table_comes_last() {
        let changed =
            set(FILE, &["stage.second.max_queue_size=7", "node.n-0.domain=lab", "telemetry.collector_type=json"])
                .unwrap();
        let parsed: toml::Table = changed.parse().unwrap();
        assert_eq!(parsed["stage"][1]["max_queue_size"].as_integer(), Some(7));
        assert_eq!(parsed["node"][0]["domain"].as_str(), Some("lab"));
        assert_eq!(parsed["telemetry"]["collector_type"].as_str(), Some("json"));
        assert_eq!(parsed["stage"][0]["kind"].as_str(), Some("ingest"));
    }

    #[test]
    fn a_later_setting_wins_over_an_earlier_one() {
        let changed = set(FILE, &["cluster.max_byzantine=1", "cluster.max_byzantine=2"]).unwrap();
        let parsed: toml::Table = changed.parse().unwrap();
        assert_eq!(parsed["cluster"]["max_byzantine"].as_integer(), Some(2));
    }

    #[test]
    fn values_keep_their_toml_type() {
        for (text, toml) in [
            ("7", "7"),
            ("true", "true"),
            ("[\"n0\"]", "[\"n0\"]"),
            ("\"7\"", "\"7\""),
            ("4 GiB", "\"4 GiB\""),
            ("2026-01-01", "\"2026-01-01\""),
            ("", "\"\""),
            ("1\nname = 2", "\"\"\"\n1\nname = 2\"\"\""),
            ("a # b", "\"a # b\""),
        ] {
            assert_eq!(toml_value(text), toml, "{text:?}");
        }
    }

    #[test]
    fn the_environment_comes_in_the_same_form() {
        let variables = [
            ("BUTTERFLY_STAGE__INGEST__BIND_ADDRESS", "1.2.3.4:5"),
            ("BUTTERFLY_NODE__N_0__DOMAIN", "lab"),
            ("BUTTERFLY_LOG", "info"),
            ("HOME", "/"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let settings = Setting::from_environment(variables.into_iter()).unwrap();
        let parsed: toml::Table = apply(FILE, &settings).unwrap().parse().unwrap();
        assert_eq!(parsed["stage"][0]["bind_address"].as_str(), Some("1.2.3.4:5"));
        assert_eq!(parsed["node"][0]["domain"].as_str(), Some("lab"));
        assert_eq!(settings.len(), 2);
    }

    #[test]
    fn what_does_not_exist_is_named() {
        assert!(set(FILE, &["stage.ingst.bind_address=1"]).is_err());
        assert!("stage.ingest=1".parse::<Setting>().is_err());
        assert!("stage.ingest.bind_address".parse::<Setting>().is_err());
        assert!("cluster.a-b=1".parse::<Setting>().is_err());
    }

    #[test]
    fn text_that_is_no_toml_is_left_to_the_check() {
        assert_eq!(set("[cluster", &["cluster.name=x"]).unwrap(), "[cluster");
    }
}
