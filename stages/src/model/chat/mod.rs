//! Chats: messages, and the template that turns them into a prompt.
//!
//! A model's template is a program in Jinja. It runs with bounded fuel, which pays for every step and every byte it makes,
//! and sees nothing but the messages, the model's special tokens and the request's own time, so that replicas come to the
//! same prompt.
//!
//! Control tokens that the template writes are parsed as such. The same characters in a message are not: the text is cut
//! inside of each, so that no message can speak for the system or end its own turn. Only a template that takes characters
//! out of messages could put them together again.
//!
//! Invariants: messages have one JSON form, and only that is read; rendering is a function of template, messages and time.
//!
//! It refuses to know HTTP, and which files templates come from.

#[cfg(test)]
mod tests;
mod time;

use std::collections::BTreeMap;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter};

use super::manifest::Manifest;
use super::source::Part;
use super::tokenizer::{EncodeError, TEXT_BYTES_MAX, Tokenizer};

/// Messages of a chat at most.
pub const MESSAGES_MAX: usize = 4096;
/// Steps of a template, each of which pays for 64 bytes as well: at most 64 MiB are made.
const FUEL: u64 = 1 << 20;
/// Length of a template's complaint that is repeated, in characters.
const COMPLAINT_CHARS_MAX: usize = 300;
const NAME: &str = "chat_template";

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever runs the conversation.
    System,
    /// The same, in newer clients; a template that does not know the word is given `system`.
    Developer,
    /// Whoever asks.
    User,
    /// The model.
    Assistant,
    /// A tool that the model asked for.
    Tool,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// A name for whoever speaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The call that a tool answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

/// The messages of a chat: 1 to [`MESSAGES_MAX`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Messages(Vec<Message>);

/// Why messages make no prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// No messages, or too many.
    #[error("there are {0} messages; 1 to {MESSAGES_MAX} are allowed")]
    Count(usize),
    /// Text that is not the one JSON form of messages.
    #[error("the messages are not in their canonical form")]
    Form,
    /// The model comes without a template.
    #[error(
        "the model has no chat template: put chat_template.jinja beside its tokenizer.json and start every node anew, or send \"prompt\" to /v1/completions"
    )]
    NoTemplate,
    /// The model has no tokenizer.
    #[error("the model has no tokenizer: send token ids in \"prompt\" to /v1/completions")]
    NoTokenizer,
    /// The model's template cannot be run.
    #[error("the model's chat template cannot be run: {0}")]
    Template(String),
    /// The template ended with an error, its own perhaps.
    #[error("the model's chat template does not take the messages: {0}")]
    Refused(String),
    /// The prompt is too long.
    #[error("the messages make a prompt of more than {TEXT_BYTES_MAX} bytes")]
    TooLong,
    /// A message holds a control token that cannot be told apart from the template's own.
    #[error("a message holds {0:?}, which is a control token of the model")]
    Control(String),
    /// The prompt cannot be tokenised.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

impl Messages {
    /// Takes messages.
    ///
    /// # Errors
    /// [`ChatError::Count`].
    pub fn new(messages: Vec<Message>) -> Result<Self, ChatError> {
        let count = messages.len();
        if (1..=MESSAGES_MAX).contains(&count) { Ok(Self(messages)) } else { Err(ChatError::Count(count)) }
    }

    /// Bytes of text in them.
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        self.0.iter().flat_map(texts).map(str::len).sum()
    }

    /// Their JSON form.
    #[must_use]
    pub fn to_json(&self) -> String {
        // Strings and their lists can always be written.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads the JSON form, and nothing else.
    ///
    /// # Errors
    /// [`ChatError::Form`] and [`ChatError::Count`].
    pub fn from_json(text: &str) -> Result<Self, ChatError> {
        let messages: Vec<Message> = serde_json::from_str(text).map_err(|_| ChatError::Form)?;
        let messages = Self::new(messages)?;
        if messages.to_json() == text { Ok(messages) } else { Err(ChatError::Form) }
    }
}

/// A model's template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// `bos_token` and the like, by name.
    tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// Compiles a template. `tokens` are the strings of special tokens by the names that templates have for them, such as
    /// `bos_token`.
    ///
    /// # Errors
    /// [`ChatError::Template`].
    pub fn new(source: &str, tokens: BTreeMap<String, String>) -> Result<Self, ChatError> {
        let broken = |error: minijinja::Error| ChatError::Template(complaint(&error));
        let mut environment = Environment::new();
        // As transformers compiles them.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(broken)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, without_generation_blocks(source)).map_err(broken)?;
        Ok(Self { environment, source: source.to_owned(), tokens })
    }

    /// With the first and the last token of a sequence under the names that templates have for them, where no file names
    /// others.
    #[must_use]
    pub(super) fn with_tokens(mut self, manifest: &Manifest, tokenizer: Option<&Tokenizer>) -> Self {
        for (name, id) in [("bos_token", manifest.bos), ("eos_token", manifest.eos.first().copied())] {
            let text = id.zip(tokenizer).and_then(|(id, tokenizer)| tokenizer.special_text(id));
            if let Some(text) = text {
                self.tokens.entry(name.to_owned()).or_insert(text);
            }
        }
        self
    }

    /// The tokens of the prompt that the messages make at `now_ms`, in milliseconds since 1970.
    ///
    /// # Errors
    /// [`ChatError`].
    pub fn tokens(&self, messages: &Messages, now_ms: u64, tokenizer: &Tokenizer) -> Result<Vec<u32>, ChatError> {
        let mut tokens = Vec::new();
        for piece in self.pieces(messages, now_ms, tokenizer.special_texts())? {
            tokens.extend(tokenizer.encode_bare(&piece)?);
        }
        Ok(tokens)
    }

    /// The prompt, cut wherever a message holds the text of a control token.
    fn pieces(&self, messages: &Messages, now_ms: u64, controls: &[String]) -> Result<Vec<String>, ChatError> {
        let (messages, cut) = self.marked(messages, controls)?;
        let strftime_now = Value::from_function(move |format: String| time::formatted(&format, now_ms));
        let tokens = Value::from(Serde(&self.tokens));
        let values = context! {
            messages => Value::from(Serde(&messages)),
            add_generation_prompt => true,
            // Templates ask whether these are none, which what is not there at all is not.
            tools => (),
            documents => (),
            strftime_now,
            ..tokens
        };
        let refused = |error: minijinja::Error| ChatError::Refused(complaint(&error));
        let prompt =
            self.environment.get_template(NAME).and_then(|template| template.render(values)).map_err(refused)?;
        if prompt.len() > TEXT_BYTES_MAX {
            return Err(ChatError::TooLong);
        }
        Ok(prompt.split(cut).map(str::to_owned).collect())
    }

    /// The messages as the template takes them, with a character that stands nowhere else inside each control token.
    fn marked(&self, messages: &Messages, controls: &[String]) -> Result<(Messages, char), ChatError> {
        let texts = || messages.0.iter().flat_map(texts);
        // Characters that Unicode keeps free for such use.
        let cut = ('\u{fdd0}'..='\u{fdef}')
            .find(|cut| !self.source.contains(*cut) && !texts().any(|text| text.contains(*cut)));
        let cut = cut.ok_or_else(|| ChatError::Control('\u{fdd0}'.to_string()))?;
        let mut by_first: BTreeMap<char, Vec<&str>> = BTreeMap::new();
        for control in controls {
            if let Some(first) = control.chars().next() {
                by_first.entry(first).or_default().push(control);
            }
        }
        let mark = |text: &str| -> Result<String, ChatError> {
            let mut marked = String::with_capacity(text.len());
            for (at, char) in text.char_indices() {
                marked.push(char);
                let rest = text.get(at..).unwrap_or_default();
                let of_first = by_first.get(&char).map_or(&[][..], Vec::as_slice);
                if let Some(control) = of_first.iter().find(|control| rest.starts_with(**control)) {
                    if control.len() == char.len_utf8() {
                        return Err(ChatError::Control((*control).to_owned()));
                    }
                    marked.push(cut);
                }
            }
            Ok(marked)
        };
        let knows_developer = self.source.contains("developer");
        let marked = messages.0.iter().map(|message| {
            Ok(Message {
                role: match message.role {
                    Role::Developer if !knows_developer => Role::System,
                    role => role,
                },
                content: mark(&message.content)?,
                name: message.name.as_deref().map(&mark).transpose()?,
                tool_call_id: message.tool_call_id.as_deref().map(&mark).transpose()?,
            })
        });
        Ok((Messages(marked.collect::<Result<_, ChatError>>()?), cut))
    }
}

/// The tokens that templates may name, as `tokenizer_config.json` has them.
const TOKEN_NAMES: [&str; 5] = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token"];

/// The template that lies beside a model, if one does.
pub(super) fn of_files(config: Option<&Part>, template: Option<&Part>) -> Result<ChatTemplate, ChatError> {
    let broken = |part: &Part, problem: String| ChatError::Template(format!("{}: {problem}", part.file));
    let mut tokens = BTreeMap::new();
    let mut inner = None;
    if let Some(part) = config {
        let config: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(part.bytes.as_ref()).map_err(|error| broken(part, error.to_string()))?;
        for name in TOKEN_NAMES {
            let token = config.get(name).map(|token| token.get("content").unwrap_or(token));
            if let Some(text) = token.and_then(serde_json::Value::as_str) {
                tokens.insert(name.to_owned(), text.to_owned());
            }
        }
        inner = config.get("chat_template").and_then(default_template).map(str::to_owned);
    }
    match template {
        Some(part) => {
            let text = std::str::from_utf8(part.bytes.as_ref()).map_err(|error| broken(part, error.to_string()))?;
            ChatTemplate::new(text, tokens)
        }
        None => ChatTemplate::new(&inner.ok_or(ChatError::NoTemplate)?, tokens),
    }
}

/// One template, or the one called `default` of a list of them.
fn default_template(value: &serde_json::Value) -> Option<&str> {
    let named = |entry: &serde_json::Value| entry.get("name").is_some_and(|name| name == "default");
    value.as_str().or_else(|| value.as_array()?.iter().find(|entry| named(entry))?.get("template")?.as_str())
}

fn texts(message: &Message) -> impl Iterator<Item = &str> {
    [Some(&message.content), message.name.as_ref(), message.tool_call_id.as_ref()]
        .into_iter()
        .flatten()
        .map(String::as_str)
}

fn complaint(error: &minijinja::Error) -> String {
    error.to_string().chars().take(COMPLAINT_CHARS_MAX).collect()
}

/// Blocks that mark what the model itself said, which matter in training only, become blocks that are always taken.
fn without_generation_blocks(source: &str) -> String {
    let mut rest = source;
    let mut rewritten = String::with_capacity(source.len());
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        rewritten.push_str(before);
        rest = tag;
        let body = tag.trim_start_matches(['-', '+']).trim_start();
        let lead = tag.len() - body.len();
        for (word, instead) in [("generation", "if true"), ("endgeneration", "endif")] {
            let Some(after) = body.strip_prefix(word) else { continue };
            let end = after.trim_start().trim_start_matches(['-', '+']);
            if end.starts_with("%}") {
                rewritten.push_str(tag.get(..lead).unwrap_or_default());
                rewritten.push_str(instead);
                // So that `endif` and a sign after it stay apart.
                rewritten.push(' ');
                rest = after;
            }
        }
    }
    rewritten + rest
}

/// JSON as Python writes it: nothing but quotes, backslashes and control characters is escaped, and after commas and
/// colons there is a space.
fn to_json(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // What else Python's function takes is about characters and keys as they are here anyway.
    for other in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = options.get(other)?;
    }
    options.assert_all_used()?;
    let mut out = Bounded(Vec::new());
    let written = match indent {
        Some(spaces) => write(value, &mut out, PrettyFormatter::with_indent(" ".repeat(spaces.min(16)).as_bytes())),
        None => write(value, &mut out, Spaced),
    };
    let failed = |problem: String| minijinja::Error::new(ErrorKind::BadSerialization, problem);
    written.map_err(|error| failed(error.to_string()))?;
    String::from_utf8(out.0).map_err(|error| failed(error.to_string()))
}

fn write<F: Formatter>(value: &Value, out: &mut Bounded, formatter: F) -> Result<(), serde_json::Error> {
    value.serialize(&mut serde_json::Serializer::with_formatter(out, formatter))
}

/// Bytes, as many as a prompt may have.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > TEXT_BYTES_MAX {
            return Err(io::Error::other("the JSON is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}
