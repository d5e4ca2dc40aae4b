//! Names of nodes and stages: short, printable, and safe to use as file names, metric labels and parts of references.
//!
//! A name is valid by construction. A reference such as `compute.boundary` is split at its dot, so no name has one.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing was given.
    #[error("a name cannot be empty")]
    Empty,
    /// Longer than [`NAME_BYTES_MAX`].
    #[error("a name has at most {NAME_BYTES_MAX} characters, this one has {length}")]
    TooLong {
        /// Bytes given.
        length: usize,
    },
    /// A character that names do not have.
    #[error("{character:?} cannot be part of a name")]
    Character {
        /// The first such character.
        character: char,
    },
    /// The first character is a hyphen or an underscore.
    #[error("a name starts with a letter or a digit")]
    Start,
}

fn check(text: &str, underscore: bool) -> Result<(), NameError> {
    let Some(first) = text.chars().next() else { return Err(NameError::Empty) };
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || (underscore && c == '_');
    if let Some(character) = text.chars().find(|&c| !allowed(c)) {
        return Err(NameError::Character { character });
    }
    if !first.is_ascii_alphanumeric() {
        return Err(NameError::Start);
    }
    if text.len() > NAME_BYTES_MAX {
        return Err(NameError::TooLong { length: text.len() });
    }
    Ok(())
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, underscore: $underscore:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Parses a name.
            ///
            /// # Errors
            /// [`NameError`] when the text is not a name.
            pub fn parse(text: &str) -> Result<Self, NameError> {
                check(text, $underscore)?;
                Ok(Self(Arc::from(text)))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl PartialEq<str> for $name {
            fn eq(&self, other: &str) -> bool {
                &*self.0 == other
            }
        }

        impl PartialEq<&str> for $name {
            fn eq(&self, other: &&str) -> bool {
                &*self.0 == *other
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl TryFrom<&str> for $name {
            type Error = NameError;
            fn try_from(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.as_ref().to_owned()
            }
        }
    };
}

name!(
    /// The id of a node: `[a-z0-9][a-z0-9-]{0,62}`.
    NodeId, underscore: false
);

name!(
    /// The name of a stage within the graph: `[a-z0-9][a-z0-9_-]{0,62}`. Underscores are allowed because a stage without
    /// a name takes the name of its kind, and kinds are Rust words.
    StageName, underscore: true
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_lower_case_words() {
        for good in ["n0", "0", "rack-3-node-11", &"a".repeat(63)] {
            assert_eq!(NodeId::parse(good).unwrap().as_str(), good);
        }
        assert_eq!(NodeId::parse(""), Err(NameError::Empty));
        assert_eq!(NodeId::parse("N0"), Err(NameError::Character { character: 'N' }));
        assert_eq!(NodeId::parse("a.b"), Err(NameError::Character { character: '.' }));
        assert_eq!(NodeId::parse("a_b"), Err(NameError::Character { character: '_' }));
        assert_eq!(NodeId::parse("-a"), Err(NameError::Start));
        assert_eq!(NodeId::parse(&"a".repeat(64)), Err(NameError::TooLong { length: 64 }));
        assert!(StageName::parse("to_upper").is_ok());
        assert_eq!(StageName::parse("_x"), Err(NameError::Start));
    }
}
