//! The fields of a request's JSON body, read without trust and without losing their names.
//!
//! A body is read once. A field of the wrong type does not fail the reading: it is kept as wrong, so that the failure can
//! name the field. Only text that is no JSON object, or names a field twice, fails at once.
//!
//! Invariants: memory is a small multiple of the body's length; lists are cut at their named limit; nesting is limited by
//! the JSON reader; numbers are finite.
//!
//! It refuses to know models and tasks.

mod inputs;
mod lists;
mod messages;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

pub(super) use inputs::Inputs;
pub(super) use lists::{Bias, List, Options, Prompt, Prompts, Stops};
pub(super) use messages::{Content, Said, SaidOnce};

use super::errors::Failure;

/// Fields with one value that some route knows.
const SETTINGS: [&str; 25] = [
    "model",
    "text",
    "task_id",
    "wait",
    "verify",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "stream",
    "return_token_ids",
    "n",
    "best_of",
    "logprobs",
    "encoding_format",
    "dimensions",
    "top_logprobs",
    "max_completion_tokens",
    "echo",
    "add_special_tokens",
    "return_token_strs",
];

/// Answers to one prompt at most.
pub(super) const CHOICES_MAX: u32 = 128;

/// Fields that clients of such interfaces know and that are not supported, with the values that change nothing. Anything
/// else in them fails, because leaving them out silently would be an answer to another question.
const UNSUPPORTED: [(&str, &[Setting]); 40] = [
    ("store", &[Setting::Flag(false)]),
    ("prompt_logprobs", &[]),
    ("suffix", &[]),
    ("priority", &[Setting::Integer(0)]),
    ("min_p", &[Setting::Integer(0), Setting::Number(0.0)]),
    ("typical_p", &[Setting::Integer(1), Setting::Number(1.0)]),
    ("repetition_penalty", &[Setting::Integer(1), Setting::Number(1.0)]),
    ("length_penalty", &[Setting::Integer(1), Setting::Number(1.0)]),
    ("min_tokens", &[Setting::Integer(0)]),
    ("use_beam_search", &[Setting::Flag(false)]),
    ("early_stopping", &[Setting::Flag(false)]),
    ("stop_token_ids", &[Setting::EmptyList]),
    ("include_stop_str_in_output", &[Setting::Flag(false)]),
    ("bad_words", &[Setting::EmptyList]),
    ("allowed_token_ids", &[]),
    ("truncate_prompt_tokens", &[]),
    ("grammar", &[]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("guided_choice", &[]),
    ("guided_grammar", &[]),
    ("structured_outputs", &[]),
    ("json_schema", &[]),
    ("logits_processors", &[Setting::EmptyList]),
    ("prompt_embeds", &[]),
    ("skip_special_tokens", &[Setting::Flag(true)]),
    ("spaces_between_special_tokens", &[Setting::Flag(true)]),
    ("tools", &[Setting::EmptyList]),
    ("tool_choice", &[]),
    ("functions", &[Setting::EmptyList]),
    ("function_call", &[]),
    ("audio", &[]),
    ("prediction", &[]),
    ("reasoning_effort", &[]),
    ("verbosity", &[]),
    ("web_search_options", &[]),
    ("chat_template", &[]),
    ("documents", &[Setting::EmptyList]),
    ("continue_final_message", &[Setting::Flag(false)]),
    ("add_generation_prompt", &[Setting::Flag(true)]),
];

/// Of these, `none` is the default.
const NONE_CHANGES_NOTHING: [&str; 3] = ["tool_choice", "function_call", "reasoning_effort"];

/// The value of a field that has one.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Setting {
    /// `null`, which says no more than leaving it out.
    Null,
    /// `true` or `false`.
    Flag(bool),
    /// A number written without a fraction.
    Integer(i128),
    /// Any other number; finite.
    Number(f64),
    /// A string.
    Text(String),
    /// `[]`.
    EmptyList,
    /// A list or an object.
    Compound,
}

/// A body, read.
#[derive(Debug, Default)]
pub(super) struct Fields {
    settings: BTreeMap<&'static str, Setting>,
    /// `prompt`.
    pub prompt: List<Prompts>,
    /// `messages`.
    pub messages: List<Said>,
    /// `tokens`.
    pub tokens: List<Prompts>,
    /// `response_format`.
    pub response_format: List<Options>,
    /// `input`.
    pub input: List<Inputs>,
    /// `stop`.
    pub stop: List<Stops>,
    /// `logit_bias`.
    pub logit_bias: List<Bias>,
    /// `stream_options`.
    pub stream_options: List<Options>,
    /// `butterfly`.
    pub butterfly: List<Options>,
}

impl Fields {
    /// Reads a body.
    ///
    /// # Errors
    /// When it is no JSON object, or names a field twice.
    pub(super) fn parse(body: &[u8]) -> Result<Self, Failure> {
        serde_json::from_slice(body).map_err(Failure::invalid_json)
    }

    /// Refuses fields that are known, not supported, and set to something that matters.
    ///
    /// # Errors
    /// Names the first such field.
    pub(super) fn refuse_unsupported(&self) -> Result<(), Failure> {
        for (name, harmless) in UNSUPPORTED {
            let is_none = |value: &Setting| matches!(value, Setting::Text(text) if text == "none");
            let changes_nothing = |value: &Setting| {
                *value == Setting::Null
                    || harmless.contains(value)
                    || (NONE_CHANGES_NOTHING.contains(&name) && is_none(value))
            };
            if self.settings.get(name).is_some_and(|value| !changes_nothing(value)) {
                return Err(unsupported(name));
            }
        }
        // To take the best of several is only supported where it means all of them.
        let choices = self.choices()?;
        let best_of = self.integer("best_of", 1..=i64::MAX)?;
        if best_of.is_some_and(|best_of| best_of != i64::from(choices)) {
            return Err(unsupported("best_of"));
        }
        Ok(())
    }

    /// How many answers are wanted to each prompt.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn choices(&self) -> Result<u32, Failure> {
        Ok(self.integer("n", 1..=CHOICES_MAX.into())?.and_then(|n| u32::try_from(n).ok()).unwrap_or(1))
    }

    /// Refuses a field that another route has.
    ///
    /// # Errors
    /// When it is set to anything but null or `harmless`.
    pub(super) fn refuse(&self, name: &'static str, harmless: Setting) -> Result<(), Failure> {
        match self.settings.get(name) {
            Some(value) if *value != Setting::Null && *value != harmless => Err(unsupported(name)),
            _ => Ok(()),
        }
    }

    /// Takes a field out, for a route that supports what others do not.
    pub(super) fn take(&mut self, name: &'static str) -> Option<Setting> {
        self.settings.remove(name)
    }

    /// A flag, `otherwise` if it is not there.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn flag(&self, name: &'static str, otherwise: bool) -> Result<bool, Failure> {
        flag(name, self.settings.get(name), otherwise)
    }

    /// A string.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<String>, Failure> {
        text(name, self.settings.remove(name))
    }

    /// An integer in a range.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn integer(&self, name: &'static str, range: RangeInclusive<i64>) -> Result<Option<i64>, Failure> {
        integer(name, self.settings.get(name), range)
    }

    /// A number in a range.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn number(&self, name: &'static str, range: RangeInclusive<f32>) -> Result<Option<f32>, Failure> {
        let value = match self.settings.get(name) {
            None | Some(Setting::Null) => return Ok(None),
            Some(Setting::Integer(value)) => *value as f64,
            Some(Setting::Number(value)) => *value,
            Some(other) => return Err(wrong(name, "a number", other)),
        };
        let value = value as f32;
        if range.contains(&value) {
            return Ok(Some(value));
        }
        let message = format!("{name} must be from {} to {}, not {value}", range.start(), range.end());
        Err(Failure::invalid_value(name, message))
    }
}

/// A flag of an object inside the body.
///
/// # Errors
/// When it is something else.
pub(super) fn flag(name: &str, value: Option<&Setting>, otherwise: bool) -> Result<bool, Failure> {
    match value {
        None | Some(Setting::Null) => Ok(otherwise),
        Some(Setting::Flag(value)) => Ok(*value),
        Some(other) => Err(wrong(name, "true or false", other)),
    }
}

/// A string of an object inside the body.
///
/// # Errors
/// When it is something else.
pub(super) fn text(name: &str, value: Option<Setting>) -> Result<Option<String>, Failure> {
    match value {
        None | Some(Setting::Null) => Ok(None),
        Some(Setting::Text(value)) => Ok(Some(value)),
        Some(other) => Err(wrong(name, "a string", &other)),
    }
}

/// An integer of an object inside the body.
///
/// # Errors
/// When it is something else.
pub(super) fn integer(name: &str, value: Option<&Setting>, range: RangeInclusive<i64>) -> Result<Option<i64>, Failure> {
    let value = match value {
        None | Some(Setting::Null) => return Ok(None),
        Some(Setting::Integer(value)) => *value,
        Some(other) => return Err(wrong(name, "an integer", other)),
    };
    if let Some(value) = i64::try_from(value).ok().filter(|value| range.contains(value)) {
        return Ok(Some(value));
    }
    let message = if *range.end() == i64::MAX {
        format!("{name} must be at least {}, not {value}", range.start())
    } else {
        format!("{name} must be from {} to {}, not {value}", range.start(), range.end())
    };
    Err(Failure::invalid_value(name, message))
}

fn wrong(name: &str, wanted: &str, found: &Setting) -> Failure {
    let found = match found {
        Setting::Null => "null",
        Setting::Flag(_) => "a flag",
        Setting::Integer(_) | Setting::Number(_) => "another number",
        Setting::Text(_) => "a string",
        Setting::EmptyList => "a list",
        Setting::Compound => "a list or an object",
    };
    Failure::invalid_value(name, format!("{name} must be {wanted}, not {found}"))
}

pub(super) fn unsupported(name: &str) -> Failure {
    let message = format!("{name} is not supported here; leave it out, or leave it at its default");
    Failure::unsupported_parameter(name, message)
}

impl<'de> Deserialize<'de> for Setting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Setting;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_unit<E>(self) -> Result<Setting, E> {
                Ok(Setting::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Setting, E> {
                Ok(Setting::Flag(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Setting, E> {
                Ok(Setting::Integer(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Setting, E> {
                Ok(Setting::Integer(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Setting, E> {
                Ok(Setting::Number(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Setting, E> {
                Ok(Setting::Text(value.to_owned()))
            }

            fn visit_string<E>(self, value: String) -> Result<Setting, E> {
                Ok(Setting::Text(value))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Setting, A::Error> {
                let is_empty = seq.next_element::<IgnoredAny>()?.is_none();
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(if is_empty { Setting::EmptyList } else { Setting::Compound })
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Setting, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Setting::Compound)
            }
        }

        deserializer.deserialize_any(Any)
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Fields::default();
                while let Some(name) = map.next_key::<String>()? {
                    let is_first = match name.as_str() {
                        "prompt" => fields.prompt.take(map.next_value()?),
                        "messages" => fields.messages.take(map.next_value()?),
                        "tokens" => fields.tokens.take(map.next_value()?),
                        "response_format" => fields.response_format.take(map.next_value()?),
                        "input" => fields.input.take(map.next_value()?),
                        "stop" => fields.stop.take(map.next_value()?),
                        "logit_bias" => fields.logit_bias.take(map.next_value()?),
                        "stream_options" => fields.stream_options.take(map.next_value()?),
                        "butterfly" => fields.butterfly.take(map.next_value()?),
                        other => match known(other) {
                            Some(name) => fields.settings.insert(name, map.next_value()?).is_none(),
                            None => map.next_value::<IgnoredAny>().map(|_| true)?,
                        },
                    };
                    if !is_first {
                        return Err(A::Error::custom(format!("the field {name} is there twice")));
                    }
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(Object)
    }
}

/// The name of a field with one value, if it is one.
fn known(name: &str) -> Option<&'static str> {
    let unsupported = UNSUPPORTED.iter().map(|(name, _)| *name);
    SETTINGS.into_iter().chain(unsupported).find(|known| *known == name)
}

#[cfg(test)]
mod tests;
