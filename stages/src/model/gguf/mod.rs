//! GGUF: one file with the configuration, the tokenizer and the weights of a model.
//!
//! Purpose: read the container (versions 2 and 3, little-endian) and say what it holds in the words of the other
//! formats: the configuration and the tokenizer as the JSON documents that a folder would have, and each tensor under
//! the name that it has in safetensors. So one parser checks each of these, wherever the model came from. [`mod@write`] makes
//! such files.
//!
//! Invariants: nothing is allocated by what a file claims; counts and lengths are compared with the bytes that are there
//! first. Tensors lie one behind the other in the order of the directory, each at a multiple of the alignment, and the
//! file ends where the last one does, so none overlaps another and a file that was cut is refused.
//!
//! It refuses to know how weights are packed. Layout: `docs/gguf.md` of ggml.

pub(super) mod config;
pub mod convert;
mod kind;
pub mod quantise;
pub(super) mod tensors;
#[cfg(test)]
mod tests;
pub(super) mod tokenizer;
pub mod write;

use std::collections::BTreeMap;
use std::ops::Range;

pub(super) use kind::TensorKind;

/// Entries of the metadata, at most.
pub const METADATA_MAX: usize = 1 << 16;
/// Tensors of one file, at most.
pub const TENSORS_MAX: usize = 1 << 16;
/// Length of a key or of a tensor's name, at most.
pub const NAME_BYTES_MAX: usize = 1 << 10;
/// Alignment of the tensors, at most.
pub const ALIGNMENT_MAX: usize = 1 << 20;

pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Alignment of the tensors where the file does not state one.
const ALIGNMENT_DEFAULT: usize = 32;
const DIMENSIONS_MAX: usize = 4;

/// Why a GGUF file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    /// It does not begin as a GGUF file does.
    #[error("not a GGUF file: it begins with {0:02x?}")]
    Magic(Vec<u8>),
    /// A version that this build does not read.
    #[error("GGUF version {0} is not supported; 2 and 3 (little-endian) are")]
    Version(u32),
    /// The file ends before something that it announces.
    #[error("the file ends within {what}, which needs {needed} bytes at offset {offset}")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it begins.
        offset: usize,
        /// How long it is.
        needed: u64,
    },
    /// Something is larger than is allowed.
    #[error("{what}: {found} is more than the {max} allowed")]
    TooLarge {
        /// What.
        what: &'static str,
        /// Its count or length.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// Bytes that mean nothing.
    #[error("{what} at offset {offset}: {problem}")]
    Malformed {
        /// What was being read.
        what: &'static str,
        /// Where it begins.
        offset: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A key appears twice, or a tensor does.
    #[error("{what} '{name}' appears twice")]
    Repeated {
        /// A key or a tensor.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A tensor is not where it must be, or has no possible shape.
    #[error("tensor '{tensor}': {problem}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The file does not end where its last tensor does.
    #[error("expected {expected} bytes by its directory, found {found}")]
    Length {
        /// By the directory, padding included.
        expected: u64,
        /// The file's size.
        found: u64,
    },
    /// A key that the model needs is absent.
    #[error("key '{0}' is missing")]
    Missing(String),
    /// A key holds something of another kind than it must.
    #[error("key '{key}' must be {expected}")]
    Kind {
        /// The key.
        key: String,
        /// What it may hold.
        expected: &'static str,
    },
    /// A key asks for something that this build does not compute.
    #[error("key '{key}' = {found} is not supported; supported: {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// What it asks for.
        found: String,
        /// What could be run.
        supported: &'static str,
    },
}

/// A checked file.
#[derive(Debug)]
pub(super) struct Gguf<'a> {
    metadata: BTreeMap<&'a str, Value<'a>>,
    /// In the order of the file.
    pub(super) tensors: Vec<Tensor<'a>>,
}

/// A tensor's entry in the directory.
#[derive(Debug)]
pub(super) struct Tensor<'a> {
    pub(super) name: &'a str,
    /// Slowest first, as the other formats have it: `[rows, columns]`.
    pub(super) shape: Vec<usize>,
    pub(super) kind: &'static TensorKind,
    /// Within the file.
    pub(super) bytes: Range<usize>,
}

/// A value of the metadata.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
    Integer(i128),
    Float(f64),
    Flag(bool),
    Text(&'a str),
    List(List<'a>),
}

/// A list whose members were checked and are read again when they are asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct List<'a> {
    kind: u32,
    count: usize,
    bytes: &'a [u8],
}

const KIND_FLAG: u32 = 7;
const KIND_TEXT: u32 = 8;
const KIND_LIST: u32 = 9;

impl<'a> Gguf<'a> {
    /// Reads and checks everything but the weights' values.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor { bytes, at: 0 };
        let magic = bytes.get(..MAGIC.len()).unwrap_or(bytes);
        if magic != MAGIC {
            return Err(GgufError::Magic(magic.to_vec()));
        }
        cursor.at = MAGIC.len();
        let version = cursor.u32("the version")?;
        if !matches!(version, 2 | 3) {
            return Err(GgufError::Version(version));
        }
        let tensors = cursor.count("the number of tensors", TENSORS_MAX)?;
        let entries = cursor.count("the number of metadata entries", METADATA_MAX)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let key = cursor.name("a key")?;
            let kind = cursor.u32("the type of a value")?;
            let value = cursor.value(kind)?;
            if metadata.insert(key, value).is_some() {
                return Err(GgufError::Repeated { what: "key", name: key.to_owned() });
            }
        }
        let alignment = alignment(&metadata)?;
        let tensors = cursor.directory(tensors, alignment)?;
        Ok(Self { metadata, tensors })
    }

    pub(super) fn value(&self, key: &str) -> Option<Value<'a>> {
        self.metadata.get(key).copied()
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(GgufError::Kind { key: key.to_owned(), expected: "text" }),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Flag(flag)) => Ok(Some(flag)),
            Some(_) => Err(GgufError::Kind { key: key.to_owned(), expected: "true or false" }),
        }
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<i128>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Integer(integer)) => Ok(Some(integer)),
            Some(_) => Err(GgufError::Kind { key: key.to_owned(), expected: "an integer" }),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Float(number)) if number.is_finite() => Ok(Some(number)),
            Some(Value::Integer(integer)) => Ok(Some(integer as f64)),
            Some(_) => Err(GgufError::Kind { key: key.to_owned(), expected: "a finite number" }),
        }
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<List<'a>>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::List(list)) => Ok(Some(list)),
            Some(_) => Err(GgufError::Kind { key: key.to_owned(), expected: "a list" }),
        }
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&Tensor<'a>> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

impl<'a> List<'a> {
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Its members, if it is one of texts.
    pub(super) fn texts(&self) -> Option<impl Iterator<Item = &'a str> + use<'a>> {
        if self.kind != KIND_TEXT {
            return None;
        }
        let mut cursor = Cursor { bytes: self.bytes, at: 0 };
        Some((0..self.count).map_while(move |_| cursor.text("a text", usize::MAX).ok()))
    }

    /// Its members, if they are numbers.
    pub(super) fn numbers(&self) -> Option<impl Iterator<Item = f64> + use<'a>> {
        let list = *self;
        if matches!(list.kind, KIND_FLAG | KIND_TEXT) {
            return None;
        }
        let mut cursor = Cursor { bytes: list.bytes, at: 0 };
        Some((0..list.count).map_while(move |_| match cursor.value(list.kind).ok()? {
            Value::Integer(integer) => Some(integer as f64),
            Value::Float(number) => Some(number),
            _ => None,
        }))
    }
}

/// The alignment of the tensors: a power of two.
fn alignment(metadata: &BTreeMap<&str, Value<'_>>) -> Result<usize, GgufError> {
    const KEY: &str = "general.alignment";
    let wrong = || GgufError::Kind { key: KEY.to_owned(), expected: "a power of two of at most a MiB" };
    match metadata.get(KEY) {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(Value::Integer(integer)) => usize::try_from(*integer)
            .ok()
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= ALIGNMENT_MAX)
            .ok_or_else(wrong),
        Some(_) => Err(wrong()),
    }
}

/// Reads little-endian values in order, never beyond the end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: u64, what: &'static str) -> Result<&'a [u8], GgufError> {
        let end = usize::try_from(length).ok().and_then(|length| self.at.checked_add(length));
        match end.and_then(|end| self.bytes.get(self.at..end).map(|bytes| (end, bytes))) {
            Some((end, bytes)) => {
                self.at = end;
                Ok(bytes)
            }
            None => Err(GgufError::Truncated { what, offset: self.at, needed: length }),
        }
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let offset = self.at;
        let truncated = GgufError::Truncated { what, offset, needed: N as u64 };
        self.take(N as u64, what)?.try_into().map_err(|_| truncated)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &'static str, max: usize) -> Result<usize, GgufError> {
        let found = self.u64(what)?;
        let count = usize::try_from(found).ok().filter(|count| *count <= max);
        count.ok_or(GgufError::TooLarge { what, found, max: max as u64 })
    }

    fn text(&mut self, what: &'static str, max: usize) -> Result<&'a str, GgufError> {
        let length = self.u64(what)?;
        if length > max as u64 {
            return Err(GgufError::TooLarge { what, found: length, max: max as u64 });
        }
        let offset = self.at;
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|error| GgufError::Malformed { what, offset, problem: error.to_string() })
    }

    fn name(&mut self, what: &'static str) -> Result<&'a str, GgufError> {
        self.text(what, NAME_BYTES_MAX)
    }

    fn value(&mut self, kind: u32) -> Result<Value<'a>, GgufError> {
        const WHAT: &str = "a value";
        Ok(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.array(WHAT)?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.array(WHAT)?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.array(WHAT)?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.array(WHAT)?).into()),
            4 => Value::Integer(u32::from_le_bytes(self.array(WHAT)?).into()),
            5 => Value::Integer(i32::from_le_bytes(self.array(WHAT)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(WHAT)?).into()),
            KIND_FLAG => match self.array(WHAT)? {
                [0] => Value::Flag(false),
                [1] => Value::Flag(true),
                [found] => {
                    let problem = format!("{found} is neither true nor false");
                    return Err(GgufError::Malformed { what: WHAT, offset: self.at - 1, problem });
                }
            },
            KIND_TEXT => Value::Text(self.text("a text", usize::MAX)?),
            KIND_LIST => Value::List(self.list()?),
            10 => Value::Integer(u64::from_le_bytes(self.array(WHAT)?).into()),
            11 => Value::Integer(i64::from_le_bytes(self.array(WHAT)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array(WHAT)?)),
            _ => {
                let problem = format!("type {kind} is not one of the format's");
                return Err(GgufError::Malformed { what: WHAT, offset: self.at, problem });
            }
        })
    }

    /// Lists of lists are in no model's metadata, and so nothing here recurses deeper than once.
    fn list(&mut self) -> Result<List<'a>, GgufError> {
        const WHAT: &str = "a list";
        let kind = self.u32(WHAT)?;
        if kind == KIND_LIST {
            let problem = "lists of lists are not supported".to_owned();
            return Err(GgufError::Malformed { what: WHAT, offset: self.at, problem });
        }
        let count = self.u64(WHAT)?;
        let start = self.at;
        // The least that so many members take, so that a false count is known before they are walked.
        let least: u64 = match kind {
            0 | 1 | KIND_FLAG => 1,
            2 | 3 => 2,
            4..=6 => 4,
            _ => 8,
        };
        let room = (self.bytes.len() - start) as u64;
        let needed = count.saturating_mul(least);
        if needed > room {
            return Err(GgufError::Truncated { what: WHAT, offset: start, needed });
        }
        for _ in 0..count {
            self.value(kind)?;
        }
        let bytes = self.bytes.get(start..self.at).unwrap_or_default();
        // It is at most the room, which is a usize.
        Ok(List { kind, count: usize::try_from(count).unwrap_or(usize::MAX), bytes })
    }

    fn directory(&mut self, count: usize, alignment: usize) -> Result<Vec<Tensor<'a>>, GgufError> {
        let mut entries = Vec::new();
        let mut names = std::collections::BTreeSet::new();
        for _ in 0..count {
            let entry = self.entry()?;
            if !names.insert(entry.0.name) {
                return Err(GgufError::Repeated { what: "tensor", name: entry.0.name.to_owned() });
            }
            entries.push(entry);
        }
        let overflow = || GgufError::Length { expected: u64::MAX, found: self.bytes.len() as u64 };
        let start = self.at.checked_next_multiple_of(alignment).ok_or_else(overflow)?;
        let mut next = start;
        let mut tensors = Vec::new();
        for (mut tensor, length, offset) in entries {
            if offset != (next - start) as u64 {
                let problem = format!("it begins at offset {offset}; expected {}", next - start);
                return Err(GgufError::Tensor { tensor: tensor.name.to_owned(), problem });
            }
            let end = next.checked_add(length).ok_or_else(overflow)?;
            tensor.bytes = next..end;
            next = end.checked_next_multiple_of(alignment).ok_or_else(overflow)?;
            tensors.push(tensor);
        }
        if next != self.bytes.len() {
            return Err(GgufError::Length { expected: next as u64, found: self.bytes.len() as u64 });
        }
        Ok(tensors)
    }

    /// A tensor that does not know yet where it lies, its length in bytes, and its stated offset.
    fn entry(&mut self) -> Result<(Tensor<'a>, usize, u64), GgufError> {
        const WHAT: &str = "the directory of tensors";
        let name = self.name("a tensor's name")?;
        let wrong = |problem: String| GgufError::Tensor { tensor: name.to_owned(), problem };
        let dimensions = self.u32(WHAT)? as usize;
        if !(1..=DIMENSIONS_MAX).contains(&dimensions) {
            return Err(wrong(format!("it has {dimensions} dimensions; 1 to {DIMENSIONS_MAX} are allowed")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(WHAT)?;
            let size = usize::try_from(size).ok().filter(|size| *size > 0);
            shape.push(size.ok_or_else(|| wrong("a dimension is 0 or too large".to_owned()))?);
        }
        let code = self.u32(WHAT)?;
        let kind = TensorKind::of(code).ok_or_else(|| wrong(format!("type {code} is not one of the format's")))?;
        let offset = self.u64(WHAT)?;
        // The fastest dimension comes first in this format, and a block never spans two rows.
        let row = shape.first().copied().unwrap_or_default();
        if !row.is_multiple_of(kind.block) {
            return Err(wrong(format!("rows of {row} are not whole {} blocks of {}", kind.name, kind.block)));
        }
        let elements = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
        let length = elements.and_then(|elements| (elements / kind.block).checked_mul(kind.block_bytes));
        let length = length.ok_or_else(|| wrong("its size overflows".to_owned()))?;
        shape.reverse();
        Ok((Tensor { name, shape, kind, bytes: 0..0 }, length, offset))
    }
}
