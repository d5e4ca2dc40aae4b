//! JSON and hex forms, the same for every type of this crate.
//!
//! Byte strings are lower-case hex of their exact length. Floats are numbers whose decimal form returns the same bits.
//! JSON is read only up to a named size and never trusted: every type that has rules checks them after reading.

use serde::de::DeserializeOwned;

use crate::limits::JSON_BYTES_MAX;

/// Why JSON was refused.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// More bytes than [`JSON_BYTES_MAX`].
    #[error("{bytes} bytes of JSON, more than the {JSON_BYTES_MAX} allowed")]
    TooLong {
        /// Bytes given.
        bytes: usize,
    },
    /// Not JSON of the expected shape, or a rule of the type is broken. The text names the place.
    #[error("{0}")]
    Shape(#[from] serde_json::Error),
}

/// Reads one value from JSON text.
pub(crate) fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, JsonError> {
    if text.len() > JSON_BYTES_MAX {
        return Err(JsonError::TooLong { bytes: text.len() });
    }
    Ok(serde_json::from_str(text)?)
}

/// Writes one value as indented JSON. None of this crate's types can fail to be written.
pub(crate) fn to_json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

/// Exactly `N` bytes from `2 N` lower-case hex digits.
pub(crate) fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let lower = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (lower && hex::decode_to_slice(text, &mut bytes).is_ok()).then_some(bytes)
}

/// `#[serde(with)]` for byte arrays as hex.
pub(crate) mod hex_bytes {
    use std::fmt;

    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer, const N: usize>(bytes: &[u8; N], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>, const N: usize>(deserializer: D) -> Result<[u8; N], D::Error> {
        struct Hex<const N: usize>;
        impl<const N: usize> Visitor<'_> for Hex<N> {
            type Value = [u8; N];

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{} lower-case hex digits", 2 * N)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<[u8; N], E> {
                super::parse_hex(text).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(Hex::<N>)
    }
}

/// `#[serde(with)]` for byte strings that are nearly always UTF-8: a string if they are, else `{"hex": "…"}`.
pub(crate) mod text_or_hex {
    use serde::ser::SerializeMap;
    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Text(String),
        Hex(HexForm),
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct HexForm {
        hex: String,
    }

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        if let Ok(text) = std::str::from_utf8(bytes) {
            return serializer.serialize_str(text);
        }
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("hex", &hex::encode(bytes))?;
        map.end()
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        match Form::deserialize(deserializer)? {
            Form::Text(text) => Ok(text.into_bytes()),
            Form::Hex(form) => hex::decode(&form.hex).map_err(serde::de::Error::custom),
        }
    }
}

/// `#[serde(with)]` for one f32.
///
/// Written with all digits of the number widened to f64: a reader that is off by an ulp of f64 still rounds to the same
/// f32.
pub(crate) mod float {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(*value))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
        // The cast rounds to nearest.
        let value = f64::deserialize(deserializer)? as f32;
        if value.is_finite() { Ok(value) } else { Err(serde::de::Error::custom("a number is too large for f32")) }
    }
}

/// `#[serde(with)]` for a list of f32.
pub(crate) mod floats {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(transparent)]
    struct Float(#[serde(with = "super::float")] f32);

    pub(crate) fn serialize<S: Serializer>(values: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|value| Float(*value)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f32>, D::Error> {
        let values = Vec::<Float>::deserialize(deserializer)?;
        Ok(values.into_iter().map(|value| value.0).collect())
    }
}

/// `#[serde(with)]` for `(token, bias)` pairs.
pub(crate) mod bias {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Pair(u32, #[serde(with = "super::float")] f32);

    pub(crate) fn serialize<S: Serializer>(pairs: &[(u32, f32)], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(pairs.iter().map(|(token, bias)| Pair(*token, *bias)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(u32, f32)>, D::Error> {
        let pairs = Vec::<Pair>::deserialize(deserializer)?;
        Ok(pairs.into_iter().map(|pair| (pair.0, pair.1)).collect())
    }
}
