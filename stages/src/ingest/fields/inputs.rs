//! `input`: a vector, or texts to be embedded.

use std::fmt;

use butterfly_verify::limits::{TOKENS_MAX, VALUES_MAX};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Setting;
use super::lists::{Kind, token};

/// Texts in one list at most.
pub(in crate::ingest) const INPUTS_MAX: usize = 2048;

/// What `input` may be.
#[derive(Debug, PartialEq)]
pub(in crate::ingest) enum Inputs {
    /// A list of finite numbers: a vector, or the tokens of one text.
    Numbers {
        /// The numbers. Token ids that a model can have are exact.
        values: Vec<f32>,
        /// Whether all of them were written without a fraction and without a sign.
        are_ids: bool,
    },
    /// A string, or a list of strings.
    Texts(Vec<String>),
    /// A list of lists of token ids.
    Lists(Vec<Vec<u32>>),
}

/// One element of a list.
enum Element {
    Number { value: f32, is_id: bool },
    Text(String),
    List(Result<Vec<u32>, String>),
    Other,
}

impl Kind for Inputs {
    const WANTED: &'static str = "a list of numbers, a string, or a list of strings or of lists of token ids";

    fn from_text(text: String) -> Result<Self, String> {
        Ok(Self::Texts(vec![text]))
    }

    fn from_list<'de, A: SeqAccess<'de>>(list: &mut A) -> Result<Result<Self, String>, A::Error> {
        let mut inputs = match list.next_element::<Element>()? {
            None => return Ok(Ok(Self::Numbers { values: Vec::new(), are_ids: false })),
            Some(Element::Number { value, is_id }) => Self::Numbers { values: vec![value], are_ids: is_id },
            Some(Element::Text(text)) => Self::Texts(vec![text]),
            Some(Element::List(Ok(tokens))) => Self::Lists(vec![tokens]),
            Some(Element::List(Err(problem))) => return Ok(Err(format!("element 0 {problem}"))),
            Some(Element::Other) => return Ok(Err(format!("must be {}", Self::WANTED))),
        };
        if let Some(problem) = inputs.first_problem() {
            return Ok(Err(problem));
        }
        while let Some(element) = list.next_element::<Element>()? {
            if let Err(problem) = inputs.push(element) {
                return Ok(Err(problem));
            }
        }
        Ok(Ok(inputs))
    }
}

impl Inputs {
    fn len(&self) -> usize {
        match self {
            Self::Numbers { values, .. } => values.len(),
            Self::Texts(texts) => texts.len(),
            Self::Lists(lists) => lists.len(),
        }
    }

    fn first_problem(&self) -> Option<String> {
        match self {
            Self::Numbers { values, .. } if !values.iter().all(|value| value.is_finite()) => Some(no_number(0)),
            _ => None,
        }
    }

    fn push(&mut self, element: Element) -> Result<(), String> {
        let at = self.len();
        let full = |max: usize, what: &str| if at < max { Ok(()) } else { Err(format!("has more than {max} {what}")) };
        match (self, element) {
            (Self::Numbers { values, are_ids }, Element::Number { value, is_id }) if value.is_finite() => {
                full(VALUES_MAX, "numbers")?;
                *are_ids &= is_id;
                values.push(value);
            }
            (Self::Numbers { .. }, _) => return Err(no_number(at)),
            (Self::Texts(texts), Element::Text(text)) => {
                full(INPUTS_MAX, "texts")?;
                texts.push(text);
            }
            (Self::Texts(_), _) => return Err(format!("element {at} is no string, as those before it are")),
            (Self::Lists(lists), Element::List(Ok(tokens))) => {
                full(INPUTS_MAX, "texts")?;
                lists.push(tokens);
            }
            (Self::Lists(_), Element::List(Err(problem))) => return Err(format!("element {at} {problem}")),
            (Self::Lists(_), _) => return Err(format!("element {at} is no list, as those before it are")),
        }
        Ok(())
    }
}

fn no_number(at: usize) -> String {
    format!("element {at} is no number that a 32-bit float can hold")
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(Inputs::WANTED)
            }

            fn visit_u64<E>(self, value: u64) -> Result<Element, E> {
                Ok(Element::Number { value: value as f32, is_id: true })
            }

            fn visit_i64<E>(self, value: i64) -> Result<Element, E> {
                Ok(Element::Number { value: value as f32, is_id: value >= 0 })
            }

            fn visit_f64<E>(self, value: f64) -> Result<Element, E> {
                Ok(Element::Number { value: value as f32, is_id: false })
            }

            fn visit_bool<E>(self, _: bool) -> Result<Element, E> {
                Ok(Element::Other)
            }

            fn visit_unit<E>(self) -> Result<Element, E> {
                Ok(Element::Other)
            }

            fn visit_str<E>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_string<E>(self, text: String) -> Result<Element, E> {
                Ok(Element::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::new();
                while let Some(value) = list.next_element::<Setting>()? {
                    let problem = match token(&value) {
                        Some(token) if tokens.len() < TOKENS_MAX => {
                            tokens.push(token);
                            continue;
                        }
                        Some(_) => format!("has more than {TOKENS_MAX} tokens"),
                        None => format!("has an element {} that is no token id", tokens.len()),
                    };
                    while list.next_element::<IgnoredAny>()?.is_some() {}
                    return Ok(Element::List(Err(problem)));
                }
                Ok(Element::List(Ok(tokens)))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Element, A::Error> {
                while object.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Element::Other)
            }
        }

        deserializer.deserialize_any(Any)
    }
}
