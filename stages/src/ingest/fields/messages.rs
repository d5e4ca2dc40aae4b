//! `messages`: what each message of a chat says, read in one pass.
//!
//! What is not text is kept as such, so that it can be refused by name.

use serde::de::{IgnoredAny, MapAccess, SeqAccess};

use super::Setting;
use super::lists::{Kind, List};
use crate::model::MESSAGES_MAX;

/// Parts of a message's content at most.
const PARTS_MAX: usize = 1024;

/// `messages`.
#[derive(Debug)]
pub(in crate::ingest) struct Said(pub Vec<SaidOnce>);

/// One message as the client wrote it.
#[derive(Debug, Default)]
pub(in crate::ingest) struct SaidOnce {
    /// `role`.
    pub role: Option<Setting>,
    /// `content`.
    pub content: List<Content>,
    /// `name`.
    pub name: Option<Setting>,
    /// `tool_call_id`.
    pub tool_call_id: Option<Setting>,
    /// The first field that is known, not supported, and says something.
    pub unsupported: Option<&'static str>,
}

/// What a message says.
#[derive(Debug)]
pub(in crate::ingest) enum Content {
    /// Text; that of several parts is joined.
    Text(String),
    /// The type of a part that is no text.
    Other(String),
}

/// Fields of messages that belong to tools and media.
const UNSUPPORTED: [&str; 5] = ["tool_calls", "function_call", "audio", "refusal", "prefix"];

impl Kind for Said {
    const WANTED: &'static str = "a list of messages";

    fn from_list<'de, A: SeqAccess<'de>>(list: &mut A) -> Result<Result<Self, String>, A::Error> {
        let mut messages = Vec::new();
        while let Some(message) = list.next_element::<List<SaidOnce>>()? {
            let number = messages.len();
            if number == MESSAGES_MAX {
                return Ok(Err(format!("has more than {MESSAGES_MAX} messages")));
            }
            match message {
                List::Value(message) => messages.push(message),
                List::Wrong(problem) => return Ok(Err(format!("element {number}: {problem}"))),
                List::Absent | List::Null => return Ok(Err(format!("element {number} must be {}", SaidOnce::WANTED))),
            }
        }
        Ok(if messages.is_empty() { Err("is empty".to_owned()) } else { Ok(Self(messages)) })
    }
}

impl Kind for SaidOnce {
    const WANTED: &'static str = "an object with role and content";

    fn from_object<'de, A: MapAccess<'de>>(object: &mut A) -> Result<Result<Self, String>, A::Error> {
        let mut message = Self::default();
        while let Some(name) = object.next_key::<String>()? {
            let is_first = match name.as_str() {
                "role" => message.role.replace(object.next_value()?).is_none(),
                "content" => message.content.take(object.next_value()?),
                "name" => message.name.replace(object.next_value()?).is_none(),
                "tool_call_id" => message.tool_call_id.replace(object.next_value()?).is_none(),
                other => {
                    let known = UNSUPPORTED.into_iter().find(|known| *known == other);
                    let value = match known {
                        Some(_) => object.next_value::<Setting>()?,
                        None => object.next_value::<IgnoredAny>().map(|_| Setting::Null)?,
                    };
                    let says_nothing = matches!(value, Setting::Null | Setting::EmptyList | Setting::Flag(false));
                    message.unsupported = message.unsupported.or(known.filter(|_| !says_nothing));
                    true
                }
            };
            if !is_first {
                return Ok(Err(format!("has {name} twice")));
            }
        }
        Ok(Ok(message))
    }
}

impl Kind for Content {
    const WANTED: &'static str = "a string, null or a list of parts";

    fn from_text(text: String) -> Result<Self, String> {
        Ok(Self::Text(text))
    }

    fn from_list<'de, A: SeqAccess<'de>>(list: &mut A) -> Result<Result<Self, String>, A::Error> {
        let mut whole = String::new();
        let mut number = 0;
        while let Some(part) = list.next_element::<List<Part>>()? {
            if number == PARTS_MAX {
                return Ok(Err(format!("has more than {PARTS_MAX} parts")));
            }
            match part {
                List::Value(Part::Text(text)) => whole += &text,
                List::Value(Part::Other(kind)) => return Ok(Ok(Self::Other(kind))),
                List::Wrong(problem) => return Ok(Err(format!("part {number}: {problem}"))),
                List::Absent | List::Null => return Ok(Err(format!("part {number} must be {}", Part::WANTED))),
            }
            number += 1;
        }
        Ok(Ok(Self::Text(whole)))
    }
}

/// One part of a message's content.
enum Part {
    Text(String),
    Other(String),
}

impl Kind for Part {
    const WANTED: &'static str = "an object with type and text";

    fn from_text(text: String) -> Result<Self, String> {
        Ok(Self::Text(text))
    }

    fn from_object<'de, A: MapAccess<'de>>(object: &mut A) -> Result<Result<Self, String>, A::Error> {
        let (mut kind, mut text) = (None, None);
        while let Some(name) = object.next_key::<String>()? {
            match name.as_str() {
                "type" => kind = Some(object.next_value::<Setting>()?),
                "text" => text = Some(object.next_value::<Setting>()?),
                _ => _ = object.next_value::<IgnoredAny>()?,
            }
        }
        Ok(match (kind, text) {
            (Some(Setting::Text(kind)), Some(Setting::Text(text))) if kind == "text" => Ok(Self::Text(text)),
            (Some(Setting::Text(kind)), _) if kind != "text" => Ok(Self::Other(kind.chars().take(64).collect())),
            _ => Err("must have \"type\": \"text\" and a string \"text\"".to_owned()),
        })
    }
}
