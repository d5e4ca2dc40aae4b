//! 32-byte digests, and the purpose each hash is told.
//!
//! Everything signed goes through SHA-256 under the domain of this protocol and a purpose; bulk rows go through
//! BLAKE3 in [`boundary`](crate::boundary). Two things of different purpose never share a hash input.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

use crate::text;

/// The first bytes of everything hashed for a signature.
const DOMAIN: &[u8; 12] = b"butterfly/1\0";

/// A 32-byte digest. Text and JSON show 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl From<Digest> for [u8; 32] {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl AsRef<[u8]> for Digest {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Text that is not 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a digest is 64 lower-case hex digits")]
pub struct NotADigest;

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(s: &str) -> Result<Self, NotADigest> {
        text::parse_hex(s).map(Self).ok_or(NotADigest)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        text::hex_bytes::serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text::hex_bytes::deserialize(deserializer).map(Self)
    }
}

/// What a hash is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Purpose {
    /// An epoch's digest.
    Epoch = 1,
    /// A request's digest `rd`.
    Request = 2,
    /// An answer's root.
    Answer = 3,
    /// A work tag.
    WorkTag = 4,
    /// A checkpoint's digest.
    Checkpoint = 5,
    /// A signed batch of votes.
    Votes = 16,
    /// A signed batch of PrePrepares.
    PrePrepares = 17,
    /// The receipts of a checkpoint, and its signature.
    Checkpoints = 18,
}

/// SHA-256 of the domain, the purpose and the parts. All parts but the last must have a fixed length.
pub(crate) fn hash(purpose: Purpose, parts: &[&[u8]]) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(DOMAIN);
    hasher.update([purpose as u8]);
    for part in parts {
        hasher.update(part);
    }
    Digest(hasher.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_is_canonical() {
        let digest = Digest([0xab; 32]);
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!(digest.to_string().to_uppercase().parse::<Digest>(), Err(NotADigest));
        assert_eq!("ab".parse::<Digest>(), Err(NotADigest));
        assert_eq!("é".repeat(32).parse::<Digest>(), Err(NotADigest));
    }

    #[test]
    fn purposes_separate() {
        assert_ne!(hash(Purpose::Request, &[b"x"]), hash(Purpose::Answer, &[b"x"]));
    }
}
