//! Fields that hold lists, each read in one pass and cut at its limit.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use butterfly_verify::limits::{LOGIT_BIAS_MAX, STOP_BYTES_MAX, STOPS_MAX, TOKENS_MAX};
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Setting;
use crate::ingest::errors::Failure;

/// Entries of an object of options at most.
const OPTIONS_MAX: usize = 16;
/// Prompts of one request at most.
pub(super) const PROMPTS_MAX: usize = 128;

/// A field that holds a list of some kind.
#[derive(Debug, Default)]
pub(in crate::ingest) enum List<T> {
    /// It is not there.
    #[default]
    Absent,
    /// `null`, which says no more.
    Null,
    /// It is as it should be.
    Value(T),
    /// It is not, and why.
    Wrong(String),
}

/// `prompt`: one or several, never none.
#[derive(Debug, PartialEq)]
pub(in crate::ingest) struct Prompts(pub Vec<Prompt>);

/// One prompt.
#[derive(Debug, PartialEq)]
pub(in crate::ingest) enum Prompt {
    /// A string.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// `stop`: one string or several.
#[derive(Debug, PartialEq)]
pub(in crate::ingest) struct Stops(pub Vec<String>);

/// `logit_bias`: from token ids, ascending, to numbers.
#[derive(Debug, PartialEq)]
pub(in crate::ingest) struct Bias(pub Vec<(u32, f32)>);

/// An object of options, each with one value.
#[derive(Debug, PartialEq)]
pub(in crate::ingest) struct Options(pub BTreeMap<String, Setting>);

impl<T> List<T> {
    /// Takes the value of the field; false if it was there before.
    pub(super) fn take(&mut self, value: Self) -> bool {
        let is_first = matches!(self, Self::Absent);
        *self = value;
        is_first
    }

    /// The value, if it is there.
    ///
    /// # Errors
    /// When it is not as it should be.
    pub(in crate::ingest) fn value(self, name: &str) -> Result<Option<T>, Failure> {
        match self {
            Self::Absent | Self::Null => Ok(None),
            Self::Value(value) => Ok(Some(value)),
            Self::Wrong(problem) => Err(Failure::invalid_value(name, format!("{name}: {problem}"))),
        }
    }
}

/// How a kind of list is read. Each gives either the value or why it is none; errors are left to broken JSON.
pub(in crate::ingest) trait Kind: Sized {
    /// What it should be.
    const WANTED: &'static str;

    /// From a string.
    fn from_text(_text: String) -> Result<Self, String> {
        Err(format!("must be {}", Self::WANTED))
    }

    /// From a list. What is left of the list is passed over by the caller.
    fn from_list<'de, A: SeqAccess<'de>>(_list: &mut A) -> Result<Result<Self, String>, A::Error> {
        Ok(Err(format!("must be {}", Self::WANTED)))
    }

    /// From an object. What is left of it is passed over by the caller.
    fn from_object<'de, A: MapAccess<'de>>(_object: &mut A) -> Result<Result<Self, String>, A::Error> {
        Ok(Err(format!("must be {}", Self::WANTED)))
    }
}

impl<T> From<Result<T, String>> for List<T> {
    fn from(result: Result<T, String>) -> Self {
        result.map_or_else(Self::Wrong, Self::Value)
    }
}

impl<'de, T: Kind> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any<T>(PhantomData<T>);

        impl<T: Kind> Any<T> {
            fn wrong<E>() -> Result<List<T>, E> {
                Ok(List::Wrong(format!("must be {}", T::WANTED)))
            }
        }

        impl<'de, T: Kind> Visitor<'de> for Any<T> {
            type Value = List<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::WANTED)
            }

            fn visit_unit<E>(self) -> Result<List<T>, E> {
                Ok(List::Null)
            }

            fn visit_bool<E>(self, _: bool) -> Result<List<T>, E> {
                Self::wrong()
            }

            fn visit_i64<E>(self, _: i64) -> Result<List<T>, E> {
                Self::wrong()
            }

            fn visit_u64<E>(self, _: u64) -> Result<List<T>, E> {
                Self::wrong()
            }

            fn visit_f64<E>(self, _: f64) -> Result<List<T>, E> {
                Self::wrong()
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<List<T>, E> {
                Ok(T::from_text(text.to_owned()).into())
            }

            fn visit_string<E: Error>(self, text: String) -> Result<List<T>, E> {
                Ok(T::from_text(text).into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<List<T>, A::Error> {
                let value = T::from_list(&mut list)?;
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(value.into())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<List<T>, A::Error> {
                let value = T::from_object(&mut object)?;
                while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(value.into())
            }
        }

        deserializer.deserialize_any(Any(PhantomData))
    }
}

/// A token id, or not.
pub(super) fn token(value: &Setting) -> Option<u32> {
    match value {
        Setting::Integer(value) => u32::try_from(*value).ok(),
        _ => None,
    }
}

impl Kind for Prompts {
    const WANTED: &'static str = "a string, a list of token ids, or a list of these";

    fn from_text(text: String) -> Result<Self, String> {
        Ok(Self(vec![Prompt::Text(text)]))
    }

    fn from_list<'de, A: SeqAccess<'de>>(list: &mut A) -> Result<Result<Self, String>, A::Error> {
        let first = match list.next_element::<Element>()? {
            None => return Ok(Err("is empty".to_owned())),
            Some(Element::Token(token)) => return Ok(tokens_after(token, list)?.map(|prompt| Self(vec![prompt]))),
            Some(first) => first,
        };
        let mut prompts = Vec::new();
        let mut next = Some(first);
        while let Some(element) = next {
            let number = prompts.len();
            match element {
                Element::Prompt(_) if number == PROMPTS_MAX => {
                    return Ok(Err(format!("has more than {PROMPTS_MAX} prompts")));
                }
                Element::Prompt(prompt) => prompts.push(prompt),
                Element::Token(_) => return Ok(Err(format!("element {number} is a token id among prompts"))),
                Element::Wrong(problem) => return Ok(Err(format!("element {number}{problem}"))),
            }
            next = list.next_element()?;
        }
        Ok(Ok(Self(prompts)))
    }
}

/// The rest of a list of token ids.
fn tokens_after<'de, A: SeqAccess<'de>>(first: u32, list: &mut A) -> Result<Result<Prompt, String>, A::Error> {
    let mut tokens = vec![first];
    while let Some(value) = list.next_element::<Setting>()? {
        match token(&value) {
            Some(_) if tokens.len() == TOKENS_MAX => return Ok(Err(format!("has more than {TOKENS_MAX} tokens"))),
            Some(token) => tokens.push(token),
            None => return Ok(Err(format!("element {} is no token id", tokens.len()))),
        }
    }
    Ok(Ok(Prompt::Tokens(tokens)))
}

/// An element of a prompt that is a list.
enum Element {
    Token(u32),
    Prompt(Prompt),
    /// What is wrong, to be read after its number.
    Wrong(String),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl Any {
            fn integer<E>(value: impl TryInto<u32>) -> Result<Element, E> {
                Ok(value.try_into().map_or_else(|_| wrong(), Element::Token))
            }
        }

        fn wrong() -> Element {
            Element::Wrong(" is neither a token id nor a prompt".to_owned())
        }

        impl<'de> Visitor<'de> for Any {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(Prompts::WANTED)
            }

            fn visit_u64<E>(self, value: u64) -> Result<Element, E> {
                Self::integer(value)
            }

            fn visit_i64<E>(self, value: i64) -> Result<Element, E> {
                Self::integer(value)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Element, E> {
                Ok(wrong())
            }

            fn visit_bool<E>(self, _: bool) -> Result<Element, E> {
                Ok(wrong())
            }

            fn visit_unit<E>(self) -> Result<Element, E> {
                Ok(wrong())
            }

            fn visit_str<E>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Prompt(Prompt::Text(text.to_owned())))
            }

            fn visit_string<E>(self, text: String) -> Result<Element, E> {
                Ok(Element::Prompt(Prompt::Text(text)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                let mut problem = None;
                while problem.is_none() {
                    let Some(value) = list.next_element::<Setting>()? else { break };
                    match token(&value) {
                        Some(token) if tokens.len() < TOKENS_MAX => tokens.push(token),
                        Some(_) => problem = Some(format!(" has more than {TOKENS_MAX} tokens")),
                        None => problem = Some(format!(", element {} is no token id", tokens.len())),
                    }
                }
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(problem.map_or(Element::Prompt(Prompt::Tokens(tokens)), Element::Wrong))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Element, A::Error> {
                while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(wrong())
            }
        }

        deserializer.deserialize_any(Any)
    }
}

impl Kind for Stops {
    const WANTED: &'static str = "a string or a list of strings";

    fn from_text(text: String) -> Result<Self, String> {
        // An empty string is what some clients send for none.
        if text.is_empty() {
            return Ok(Self(Vec::new()));
        }
        stop(0, Setting::Text(text)).map(|stop| Self(vec![stop]))
    }

    fn from_list<'de, A: SeqAccess<'de>>(list: &mut A) -> Result<Result<Self, String>, A::Error> {
        let mut stops = Vec::new();
        while let Some(value) = list.next_element::<Setting>()? {
            if stops.len() == STOPS_MAX {
                return Ok(Err(format!("has more than {STOPS_MAX} strings")));
            }
            match stop(stops.len(), value) {
                Ok(stop) => stops.push(stop),
                Err(problem) => return Ok(Err(problem)),
            }
        }
        Ok(Ok(Self(stops)))
    }
}

fn stop(number: usize, value: Setting) -> Result<String, String> {
    match value {
        Setting::Text(text) if text.is_empty() => Err(format!("string {number} is empty")),
        Setting::Text(text) if text.len() > STOP_BYTES_MAX => {
            Err(format!("string {number} is longer than {STOP_BYTES_MAX} bytes"))
        }
        Setting::Text(text) => Ok(text),
        _ => Err(format!("element {number} is no string")),
    }
}

impl Kind for Bias {
    const WANTED: &'static str = "an object from token ids to numbers";

    fn from_object<'de, A: MapAccess<'de>>(object: &mut A) -> Result<Result<Self, String>, A::Error> {
        let mut biases = BTreeMap::new();
        while let Some((token, value)) = object.next_entry::<String, Setting>()? {
            let Ok(id) = token.parse::<u32>() else {
                return Ok(Err(format!("\"{}\" is no token id", token.chars().take(32).collect::<String>())));
            };
            let bias = match value {
                Setting::Integer(value) => value as f32,
                Setting::Number(value) => value as f32,
                _ => f32::NAN,
            };
            if !(-100.0..=100.0).contains(&bias) {
                return Ok(Err(format!("the bias of token {id} is no number from -100 to 100")));
            }
            if biases.len() == LOGIT_BIAS_MAX {
                return Ok(Err(format!("has more than {LOGIT_BIAS_MAX} entries")));
            }
            if biases.insert(id, bias).is_some() {
                return Ok(Err(format!("token {id} is there twice")));
            }
        }
        Ok(Ok(Self(biases.into_iter().collect())))
    }

    fn from_list<'de, A: SeqAccess<'de>>(list: &mut A) -> Result<Result<Self, String>, A::Error> {
        // Some clients send an empty list for none.
        let is_empty = list.next_element::<IgnoredAny>()?.is_none();
        Ok(if is_empty { Ok(Self(Vec::new())) } else { Err(format!("must be {}", Self::WANTED)) })
    }
}

impl Kind for Options {
    const WANTED: &'static str = "an object";

    fn from_object<'de, A: MapAccess<'de>>(object: &mut A) -> Result<Result<Self, String>, A::Error> {
        let mut options = BTreeMap::new();
        while let Some((name, value)) = object.next_entry::<String, Setting>()? {
            if options.len() == OPTIONS_MAX {
                return Ok(Err(format!("has more than {OPTIONS_MAX} entries")));
            }
            options.insert(name, value);
        }
        Ok(Ok(Self(options)))
    }
}
