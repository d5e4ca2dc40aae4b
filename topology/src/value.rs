//! Values of keys: from TOML, or from a default of the catalogue, to what a stage reads.
//!
//! A value is checked against its [`ValueSpec`] once, here, and is right from then on.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;

use serde::Serialize;
use toml::de::DeValue;

use crate::catalogue::ValueSpec;
use crate::diagnostic::{Code, quote};
use crate::plan::bytes_text;
use crate::suggest;

/// A checked value.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum ConfigValue {
    /// Of [`ValueSpec::Text`], [`ValueSpec::Path`] and [`ValueSpec::Choice`].
    Text(String),
    /// Of [`ValueSpec::Integer`].
    Integer(i64),
    /// Of [`ValueSpec::Number`]; finite.
    Number(f64),
    /// Of [`ValueSpec::Flag`].
    Flag(bool),
    /// Of [`ValueSpec::Bytes`].
    Bytes(u64),
    /// Of [`ValueSpec::SocketAddress`].
    Address(SocketAddr),
}

/// The keys of one table, checked, with defaults applied.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct StageConfig {
    values: BTreeMap<String, ConfigValue>,
    #[serde(skip)]
    places: BTreeMap<String, Range<usize>>,
}

impl StageConfig {
    /// No keys.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With this key set.
    #[must_use]
    pub fn with(mut self, key: &str, value: ConfigValue) -> Self {
        self.values.insert(key.to_owned(), value);
        self
    }

    pub(crate) fn set(&mut self, key: &str, value: ConfigValue, place: Option<Range<usize>>) {
        self.values.insert(key.to_owned(), value);
        if let Some(place) = place {
            self.places.insert(key.to_owned(), place);
        }
    }

    /// The value of a key, if it is set or has a default.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&ConfigValue> {
        self.values.get(key)
    }

    /// The text, path or choice of a key.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.values.get(key)? {
            ConfigValue::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The whole number of a key.
    #[must_use]
    pub fn integer(&self, key: &str) -> Option<i64> {
        match self.values.get(key)? {
            ConfigValue::Integer(value) => Some(*value),
            _ => None,
        }
    }

    /// The number of a key; a whole number counts as one.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.values.get(key)? {
            ConfigValue::Number(value) => Some(*value),
            ConfigValue::Integer(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// The flag of a key.
    #[must_use]
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.values.get(key)? {
            ConfigValue::Flag(value) => Some(*value),
            _ => None,
        }
    }

    /// The number of bytes of a key.
    #[must_use]
    pub fn bytes(&self, key: &str) -> Option<u64> {
        match self.values.get(key)? {
            ConfigValue::Bytes(value) => Some(*value),
            _ => None,
        }
    }

    /// The address of a key.
    #[must_use]
    pub fn address(&self, key: &str) -> Option<SocketAddr> {
        match self.values.get(key)? {
            ConfigValue::Address(value) => Some(*value),
            _ => None,
        }
    }

    /// Where in the file the value of a key stands; `None` for defaults. For diagnostics of a stage's own rules.
    #[must_use]
    pub fn place(&self, key: &str) -> Option<Range<usize>> {
        self.places.get(key).cloned()
    }

    /// The keys that have a value.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }
}

/// Why a value cannot be that of its key.
pub(crate) struct ValueFault {
    pub(crate) code: Code,
    /// The sentence after the key: "must be a whole number, not text".
    pub(crate) message: String,
    pub(crate) label: String,
    pub(crate) help: Option<String>,
}

impl ValueFault {
    fn new(code: Code, message: impl Into<String>, label: impl Into<String>) -> Self {
        Self { code, message: message.into(), label: label.into(), help: None }
    }

    fn help(mut self, text: impl Into<String>) -> Self {
        self.help = Some(text.into());
        self
    }
}

/// What a TOML value is, for people.
pub(crate) fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a decimal number",
        DeValue::Boolean(_) => "a flag",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn wanted(spec: &ValueSpec) -> &'static str {
    match spec {
        ValueSpec::Text | ValueSpec::Choice(_) => "text",
        ValueSpec::Path => "text, the path of a file",
        ValueSpec::SocketAddress => "text, an address such as \"127.0.0.1:9000\"",
        ValueSpec::Integer { .. } => "a whole number",
        ValueSpec::Number { .. } => "a number",
        ValueSpec::Flag => "true or false",
        ValueSpec::Bytes { .. } => "a number of bytes, such as 4096 or \"4 GiB\"",
    }
}

/// Checks a value of the file.
pub(crate) fn read(spec: &ValueSpec, value: &DeValue<'_>) -> Result<ConfigValue, ValueFault> {
    match (spec, value) {
        (ValueSpec::Integer { min, max }, DeValue::Integer(text)) => {
            let number = i64::from_str_radix(text.as_str(), text.radix()).ok();
            within(number, *min, *max).map(ConfigValue::Integer)
        }
        (ValueSpec::Number { min, max }, DeValue::Float(text)) => number_within(text.as_str().parse().ok(), *min, *max),
        (ValueSpec::Number { min, max }, DeValue::Integer(text)) => {
            let number = i64::from_str_radix(text.as_str(), text.radix()).ok();
            number_within(number.map(|number| number as f64), *min, *max)
        }
        (ValueSpec::Flag, DeValue::Boolean(flag)) => Ok(ConfigValue::Flag(*flag)),
        (ValueSpec::Bytes { min, max }, DeValue::Integer(text)) => {
            let number = u64::from_str_radix(text.as_str(), text.radix()).ok();
            let hint = "a number without a unit counts bytes; with one it is text, such as \"4 GiB\"";
            bytes_within(number, *min, *max).map_err(|fault| fault.help(hint))
        }
        (ValueSpec::Bytes { min, max }, DeValue::String(text)) => bytes_within(parse_bytes(text)?, *min, *max),
        (
            ValueSpec::Text | ValueSpec::Path | ValueSpec::SocketAddress | ValueSpec::Choice(_),
            DeValue::String(text),
        ) => read_text(spec, text),
        _ => Err(wrong_type(spec, value)),
    }
}

fn wrong_type(spec: &ValueSpec, value: &DeValue<'_>) -> ValueFault {
    let wanted = wanted(spec);
    let fault = ValueFault::new(
        Code::WrongType,
        format!("must be {wanted}, not {}", type_name(value)),
        format!("expected {}", wanted.split(',').next().unwrap_or(wanted)),
    );
    match (spec, value) {
        (ValueSpec::Integer { .. } | ValueSpec::Number { .. } | ValueSpec::Flag, DeValue::String(text))
            if default_value(spec, text).is_some() =>
        {
            fault.help(format!("remove the quotes: {text}"))
        }
        (ValueSpec::Text | ValueSpec::Path | ValueSpec::Choice(_), DeValue::Integer(number)) => {
            fault.help(format!("put it in quotes: \"{number}\""))
        }
        _ => fault,
    }
}

fn read_text(spec: &ValueSpec, text: &str) -> Result<ConfigValue, ValueFault> {
    match spec {
        ValueSpec::SocketAddress => read_address(text).map(ConfigValue::Address),
        ValueSpec::Choice(choices) => {
            if choices.contains(&text) {
                return Ok(ConfigValue::Text(text.to_owned()));
            }
            let label = suggest::nearest(text, choices.iter().copied())
                .map_or_else(|| "not one of the choices".to_owned(), |near| format!("did you mean {}?", quote(near)));
            let all = choices.iter().map(|choice| format!("\"{choice}\"")).collect::<Vec<_>>().join(", ");
            let fault = ValueFault::new(Code::UnknownChoice, format!("cannot be {}", quote(text)), label);
            Err(fault.help(format!("the choices are {all}")))
        }
        _ if text.trim().is_empty() => Err(ValueFault::new(Code::InvalidValue, "cannot be empty", "nothing here")),
        _ => Ok(ConfigValue::Text(text.to_owned())),
    }
}

fn read_address(text: &str) -> Result<SocketAddr, ValueFault> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let fault = ValueFault::new(
        Code::InvalidValue,
        format!("must be an IP address and a port, and {} is not", quote(text)),
        "not an address",
    );
    let help = match text.rsplit_once(':') {
        Some(("localhost", port)) if port.parse::<u16>().is_ok() => {
            format!("names are not looked up; for this machine write \"127.0.0.1:{port}\"")
        }
        Some((_, port)) if port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_err() => {
            "ports go from 1 to 65535".to_owned()
        }
        None if text.parse::<std::net::IpAddr>().is_ok() => format!("the port is missing: \"{text}:9000\""),
        _ => "write it as \"192.0.2.7:9000\" or \"[2001:db8::7]:9000\"; names are not looked up".to_owned(),
    };
    Err(fault.help(help))
}

/// `"4 GiB"`, `"512 MB"`, `"1.5 KiB"`, `"100"`. `None` when it is a number of bytes that does not fit.
fn parse_bytes(text: &str) -> Result<Option<u64>, ValueFault> {
    const UNITS: [(&str, u64); 9] = [
        ("B", 1),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
    ];
    const FRACTION_DIGITS_MAX: usize = 6;
    let fault = || {
        ValueFault::new(
            Code::InvalidValue,
            format!("must be a number of bytes, and {} is not", quote(text)),
            "not a number of bytes",
        )
    };
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
    let (digits, unit) = trimmed.split_at(split);
    let unit = unit.trim();
    if digits.is_empty() {
        return Err(fault().help("write it as 4096, \"4 GiB\" or \"1.5 GiB\""));
    }
    let size = if unit.is_empty() {
        1
    } else {
        let known = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        known.map(|(_, size)| *size).ok_or_else(|| {
            fault().help("units are B, KiB, MiB, GiB, TiB (powers of 1024) and kB, MB, GB, TB (powers of 1000)")
        })?
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) || fraction.len() > FRACTION_DIGITS_MAX {
        return Err(fault().help("write it as 4096, \"4 GiB\" or \"1.5 GiB\""));
    }
    let Ok(whole) = whole.parse::<u64>() else { return Ok(None) };
    let scale = 10_u128.pow(fraction.len() as u32);
    let part = fraction.parse::<u128>().unwrap_or(0) * u128::from(size) / scale;
    let bytes = u128::from(whole) * u128::from(size) + part;
    Ok(u64::try_from(bytes).ok())
}

fn within<T: PartialOrd + std::fmt::Display + Copy>(value: Option<T>, min: T, max: T) -> Result<T, ValueFault> {
    match value {
        Some(value) if value >= min && value <= max => Ok(value),
        _ => Err(ValueFault::new(
            Code::OutOfRange,
            format!("must be from {min} to {max}"),
            format!("not from {min} to {max}"),
        )),
    }
}

fn number_within(value: Option<f64>, min: f64, max: f64) -> Result<ConfigValue, ValueFault> {
    // A number that is not one fails both comparisons.
    within(value, min, max).map(ConfigValue::Number)
}

fn bytes_within(value: Option<u64>, min: u64, max: u64) -> Result<ConfigValue, ValueFault> {
    match value {
        Some(value) if value >= min && value <= max => Ok(ConfigValue::Bytes(value)),
        _ => Err(ValueFault::new(
            Code::OutOfRange,
            format!("must be from {} to {}", bytes_text(min), bytes_text(max)),
            format!("not from {} to {}", bytes_text(min), bytes_text(max)),
        )),
    }
}

/// A default of the catalogue: text as it would be written, without quotes. `None` when it is not a value of the spec.
pub(crate) fn default_value(spec: &ValueSpec, text: &str) -> Option<ConfigValue> {
    match spec {
        ValueSpec::Text | ValueSpec::Path | ValueSpec::SocketAddress | ValueSpec::Choice(_) => {
            read_text(spec, text).ok()
        }
        ValueSpec::Integer { min, max } => within(text.parse().ok(), *min, *max).ok().map(ConfigValue::Integer),
        ValueSpec::Number { min, max } => number_within(text.parse().ok(), *min, *max).ok(),
        ValueSpec::Flag => text.parse().ok().map(ConfigValue::Flag),
        ValueSpec::Bytes { min, max } => bytes_within(parse_bytes(text).ok()?, *min, *max).ok(),
    }
}
