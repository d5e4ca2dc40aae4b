//! The canonical codec: the bytes that are hashed, signed and sent.
//!
//! Integers are little-endian and of fixed width, byte strings and lists carry a u32 length, choices one byte. Each value
//! has exactly one encoding, and a reader accepts nothing else: `decode(encode(x)) == x`, and bytes that decode encode to
//! themselves. Every length is compared with its named limit, and with the bytes that are left, before anything is
//! allocated. Bytes after the end are refused.

use crate::digest::Digest;

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at}: {problem}")]
pub struct DecodeError {
    /// The field.
    pub what: &'static str,
    /// Where in the bytes, from 0.
    pub at: usize,
    /// What is wrong with it.
    pub problem: DecodeProblem,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeProblem {
    /// The bytes end before the field does.
    #[error("the bytes end here")]
    Truncated,
    /// A length above its limit.
    #[error("{found} is more than the {max} allowed")]
    TooLong {
        /// The length found.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// A number that is NaN or infinite.
    #[error("not a finite number")]
    NotFinite,
    /// A list that must not be empty.
    #[error("must not be empty")]
    Empty,
    /// A byte that stands for none of the choices.
    #[error("{found} is not a known choice")]
    Choice {
        /// The byte found.
        found: u8,
    },
    /// A string that is not UTF-8.
    #[error("not UTF-8")]
    NotUtf8,
    /// Bytes after the end.
    #[error("{count} bytes too many")]
    Trailing {
        /// How many.
        count: usize,
    },
}

/// Appends canonical bytes.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes) }
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    pub(crate) fn f32(&mut self, value: f32) {
        self.u32(value.to_bits());
    }

    pub(crate) fn flag(&mut self, value: bool) {
        self.u8(u8::from(value));
    }

    pub(crate) fn digest(&mut self, digest: &Digest) {
        self.raw(&digest.0);
    }

    /// The length of a list or string. Every length written is below a limit far under `u32::MAX`.
    pub(crate) fn length(&mut self, length: usize) {
        self.u32(u32::try_from(length).unwrap_or(u32::MAX));
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.length(bytes.len());
        self.raw(bytes);
    }

    pub(crate) fn tokens(&mut self, tokens: &[u32]) {
        self.length(tokens.len());
        for token in tokens {
            self.u32(*token);
        }
    }

    pub(crate) fn floats(&mut self, values: &[f32]) {
        self.length(values.len());
        for value in values {
            self.f32(*value);
        }
    }
}

/// Takes canonical bytes apart, front to back.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn error<T>(&self, what: &'static str, problem: DecodeProblem) -> Result<T, DecodeError> {
        Err(DecodeError { what, at: self.at, problem })
    }

    fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    /// The next `count` bytes.
    pub(crate) fn raw(&mut self, what: &'static str, count: usize) -> Result<&'a [u8], DecodeError> {
        let end = self.at.checked_add(count);
        match end.and_then(|end| self.bytes.get(self.at..end)) {
            Some(taken) => {
                self.at = self.at.saturating_add(count);
                Ok(taken)
            }
            None => self.error(what, DecodeProblem::Truncated),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], DecodeError> {
        let taken = self.raw(what, N)?;
        let mut array = [0; N];
        array.copy_from_slice(taken);
        Ok(array)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        self.array::<1>(what).map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, DecodeError> {
        self.array(what).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(crate) fn f32(&mut self, what: &'static str) -> Result<f32, DecodeError> {
        self.u32(what).map(f32::from_bits)
    }

    pub(crate) fn digest(&mut self, what: &'static str) -> Result<Digest, DecodeError> {
        self.array(what).map(Digest)
    }

    pub(crate) fn flag(&mut self, what: &'static str) -> Result<bool, DecodeError> {
        self.choice(what, |byte| match byte {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        })
    }

    /// One byte that stands for a choice.
    pub(crate) fn choice<T>(
        &mut self,
        what: &'static str,
        known: impl FnOnce(u8) -> Option<T>,
    ) -> Result<T, DecodeError> {
        let before = self.clone();
        let found = self.u8(what)?;
        match known(found) {
            Some(value) => Ok(value),
            None => before.error(what, DecodeProblem::Choice { found }),
        }
    }

    /// The length of a list whose items take at least `item_bytes_min` bytes each: at most `max`, and no more than the
    /// bytes left can hold.
    pub(crate) fn length(
        &mut self,
        what: &'static str,
        max: usize,
        item_bytes_min: usize,
    ) -> Result<usize, DecodeError> {
        let before = self.clone();
        let found = usize::try_from(self.u32(what)?).unwrap_or(usize::MAX);
        if found > max {
            return before.error(what, DecodeProblem::TooLong { found, max });
        }
        if found.saturating_mul(item_bytes_min) > self.left() {
            return before.error(what, DecodeProblem::Truncated);
        }
        Ok(found)
    }

    pub(crate) fn bytes(&mut self, what: &'static str, max: usize) -> Result<&'a [u8], DecodeError> {
        let length = self.length(what, max, 1)?;
        self.raw(what, length)
    }

    pub(crate) fn string(&mut self, what: &'static str, max: usize) -> Result<String, DecodeError> {
        let before = self.clone();
        match std::str::from_utf8(self.bytes(what, max)?) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => before.error(what, DecodeProblem::NotUtf8),
        }
    }

    pub(crate) fn tokens(&mut self, what: &'static str, max: usize) -> Result<Vec<u32>, DecodeError> {
        self.words(what, max, u32::from_le_bytes)
    }

    pub(crate) fn floats(&mut self, what: &'static str, max: usize) -> Result<Vec<f32>, DecodeError> {
        self.words(what, max, f32::from_le_bytes)
    }

    fn words<T>(&mut self, what: &'static str, max: usize, word: fn([u8; 4]) -> T) -> Result<Vec<T>, DecodeError> {
        let count = self.length(what, max, 4)?;
        let bytes = self.raw(what, count.saturating_mul(4))?;
        let (words, _) = bytes.as_chunks::<4>();
        Ok(words.iter().map(|bytes| word(*bytes)).collect())
    }

    /// Refuses bytes after the end.
    pub(crate) fn end(&self, what: &'static str) -> Result<(), DecodeError> {
        match self.left() {
            0 => Ok(()),
            count => self.error(what, DecodeProblem::Trailing { count }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_checked_before_allocation() {
        let mut writer = Writer::default();
        writer.u32(u32::MAX);
        let bytes = writer.finish();
        let error = Reader::new(&bytes).bytes("name", 10).unwrap_err();
        assert_eq!(error.problem, DecodeProblem::TooLong { found: u32::MAX as usize, max: 10 });
        let error = Reader::new(&bytes).tokens("tokens", usize::MAX).unwrap_err();
        assert_eq!(error.problem, DecodeProblem::Truncated);
    }

    #[test]
    fn a_flag_has_two_encodings_only() {
        assert!(Reader::new(&[1]).flag("flag").unwrap());
        let error = Reader::new(&[2]).flag("flag").unwrap_err();
        assert_eq!(error, DecodeError { what: "flag", at: 0, problem: DecodeProblem::Choice { found: 2 } });
    }

    #[test]
    fn bytes_after_the_end_are_refused() {
        let mut reader = Reader::new(&[1, 2]);
        assert_eq!(reader.u8("first"), Ok(1));
        assert_eq!(reader.end("all").unwrap_err().problem, DecodeProblem::Trailing { count: 1 });
    }
}
