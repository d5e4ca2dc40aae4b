//! Weights in safetensors files: one file, or several with an index.
//!
//! Purpose: find each tensor that a configuration asks for, and prove its shape, its element type and that it is finite
//! before anything is computed with it.
//!
//! Invariants: every tensor lies wholly inside its file and has a name of its own; a file is neither shorter nor longer
//! than its header says; where there is an index, files and index name the same tensors. Headers are hostile until
//! checked: their size is bounded before they are parsed, and offsets are checked without overflow.
//!
//! It refuses to know which tensors a model has (`llama` and `mlp` do).

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use butterfly_kernels::{Dtype, Matrix, PackError, WeightView};
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::source::{Index, Part};

/// Size of a safetensors header, at most.
pub const HEADER_BYTES_MAX: usize = 16 << 20;
/// Bytes before the header: its length, little-endian.
const PREFIX_BYTES: usize = 8;

/// Why weights cannot be used. Every variant names the file, and the tensor where there is one.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The header is no safetensors header.
    #[error("{file}: malformed header: {problem}")]
    Header {
        /// The weight file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The file ends before, or goes on after, what its header describes.
    #[error("{file}: expected {expected} bytes by its header, found {found}")]
    Length {
        /// The weight file.
        file: String,
        /// Header and tensors together.
        expected: u64,
        /// The file's size.
        found: u64,
    },
    /// Two tensors have one name.
    #[error("{file}: tensor '{tensor}' appears twice{}", elsewhere(other))]
    Duplicate {
        /// The weight file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The other file, if it is another.
        other: Option<String>,
    },
    /// A tensor the configuration asks for is not there.
    #[error("{file}: tensor '{tensor}' is missing; expected shape {expected:?}")]
    Missing {
        /// The weight file, or the first of several.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape by the configuration.
        expected: Vec<usize>,
    },
    /// A tensor that this architecture has no use for: leaving it out would be another model.
    #[error("{file}: tensor '{tensor}' {found:?} has no place in this architecture")]
    Unexpected {
        /// The weight file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{file}: tensor '{tensor}': expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The weight file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape by the configuration.
        expected: Vec<usize>,
        /// Its shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has another element type than the configuration says, or one this build does not compute with.
    #[error("{file}: tensor '{tensor}': expected {expected}, found {found}")]
    ElementType {
        /// The weight file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What would do.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// A weight is NaN or infinite.
    #[error("{file}: tensor '{tensor}': expected finite weights, found {found} at element {element}")]
    NotFinite {
        /// The weight file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The first such element, counted in row-major order.
        element: usize,
        /// NaN, inf or -inf.
        found: f32,
    },
    /// Files and index disagree.
    #[error("{file}: the index says that tensor '{tensor}' {problem}")]
    Index {
        /// The weight file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Where the index has it.
        problem: String,
    },
}

fn elsewhere(other: &Option<String>) -> String {
    other.as_ref().map_or_else(String::new, |file| format!(", also in {file}"))
}

/// Where every tensor of a model lies.
#[derive(Debug)]
pub(super) struct Weights {
    tensors: BTreeMap<String, Place>,
    /// How errors name each file.
    files: Vec<String>,
}

#[derive(Debug)]
struct Place {
    /// Which of the source's weight files.
    file: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    /// Within the file.
    bytes: Range<usize>,
}

impl Weights {
    /// Reads the headers of all weight files.
    pub(super) fn open(parts: &[Part], index: Option<&Index>) -> Result<Self, WeightsError> {
        let mut tensors: BTreeMap<String, Place> = BTreeMap::new();
        for (file, part) in parts.iter().enumerate() {
            for (tensor, place) in header(part, file)? {
                if let Some(earlier) = tensors.get(&tensor) {
                    let other = parts.get(earlier.file).map(|part| part.file.clone());
                    return Err(WeightsError::Duplicate { file: part.file.clone(), tensor, other });
                }
                tensors.insert(tensor, place);
            }
        }
        let weights = Self { tensors, files: parts.iter().map(|part| part.file.clone()).collect() };
        if let Some(index) = index {
            weights.agree_with(index, parts)?;
        }
        Ok(weights)
    }

    /// The names of all tensors, ascending.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Checks that a tensor has the shape and element type the configuration says. `dtype` is `None` where the
    /// configuration leaves it open.
    pub(super) fn check(&self, tensor: &str, shape: &[usize], dtype: Option<Dtype>) -> Result<Dtype, WeightsError> {
        self.place(tensor, shape, dtype).map(|(_, dtype)| dtype)
    }

    /// Packs a matrix `[rows, columns]`. `parts` are those the weights were opened with.
    pub(super) fn matrix(
        &self,
        parts: &[Part],
        tensor: &str,
        [rows, columns]: [usize; 2],
        dtype: Option<Dtype>,
    ) -> Result<Matrix, WeightsError> {
        let (place, dtype) = self.place(tensor, &[rows, columns], dtype)?;
        let bytes = self.bytes(parts, tensor, place)?;
        Matrix::pack(WeightView { dtype, bytes, rows, columns }).map_err(|error| match error {
            PackError::NotFinite { row, column } => {
                self.not_finite(tensor, place, dtype, bytes, row.saturating_mul(columns).saturating_add(column))
            }
            error => {
                WeightsError::Header { file: self.file(place.file), problem: format!("tensor '{tensor}': {error}") }
            }
        })
    }

    /// Widens a vector of `length` elements: a bias, or the weights of a norm. `parts` as for [`Weights::matrix`].
    pub(super) fn vector(
        &self,
        parts: &[Part],
        tensor: &str,
        length: usize,
        dtype: Option<Dtype>,
    ) -> Result<Vec<f32>, WeightsError> {
        let (place, dtype) = self.place(tensor, &[length], dtype)?;
        let bytes = self.bytes(parts, tensor, place)?;
        let vector: Vec<f32> = bytes.chunks_exact(dtype.block_bytes()).map(|element| widen(dtype, element)).collect();
        match vector.iter().position(|value| !value.is_finite()) {
            None => Ok(vector),
            Some(element) => Err(self.not_finite(tensor, place, dtype, bytes, element)),
        }
    }

    fn bytes<'a>(&self, parts: &'a [Part], tensor: &str, place: &Place) -> Result<&'a [u8], WeightsError> {
        let part = parts.get(place.file);
        part.and_then(|part| part.bytes.as_ref().get(place.bytes.clone())).ok_or_else(|| WeightsError::Header {
            file: self.file(place.file),
            problem: format!("tensor '{tensor}' lies outside the file"),
        })
    }

    fn not_finite(&self, tensor: &str, place: &Place, dtype: Dtype, bytes: &[u8], element: usize) -> WeightsError {
        let found = bytes.chunks_exact(dtype.block_bytes()).nth(element).map_or(f32::NAN, |bytes| widen(dtype, bytes));
        WeightsError::NotFinite { file: self.file(place.file), tensor: tensor.to_owned(), element, found }
    }

    /// Why a tensor that no part of the model asks for is refused.
    pub(super) fn unexpected(&self, tensor: &str) -> WeightsError {
        let place = self.tensors.get(tensor);
        WeightsError::Unexpected {
            file: place.map_or_else(String::new, |place| self.file(place.file)),
            tensor: tensor.to_owned(),
            found: place.map_or_else(Vec::new, |place| place.shape.clone()),
        }
    }

    fn place(&self, tensor: &str, shape: &[usize], dtype: Option<Dtype>) -> Result<(&Place, Dtype), WeightsError> {
        let Some(place) = self.tensors.get(tensor) else {
            let (file, tensor) = (self.file(0), tensor.to_owned());
            return Err(WeightsError::Missing { file, tensor, expected: shape.to_vec() });
        };
        let (file, tensor) = (self.file(place.file), tensor.to_owned());
        if place.shape != shape {
            let (expected, found) = (shape.to_vec(), place.shape.clone());
            return Err(WeightsError::Shape { file, tensor, expected, found });
        }
        let found = match place.dtype {
            safetensors::Dtype::F32 => Some(Dtype::F32),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            safetensors::Dtype::BF16 => Some(Dtype::Bf16),
            _ => None,
        };
        match (found, dtype) {
            (Some(found), None) => Ok((place, found)),
            (Some(found), Some(expected)) if found == expected => Ok((place, found)),
            (_, expected) => {
                let expected = expected.map_or("F32, F16 or BF16", name).to_owned();
                Err(WeightsError::ElementType { file, tensor, expected, found: format!("{:?}", place.dtype) })
            }
        }
    }

    fn file(&self, file: usize) -> String {
        self.files.get(file).cloned().unwrap_or_default()
    }

    fn agree_with(&self, index: &Index, parts: &[Part]) -> Result<(), WeightsError> {
        for (tensor, place) in &self.tensors {
            let lies_in = parts.get(place.file).map(|part| part.name.as_str());
            let listed = index.weight_map.get(tensor).map(String::as_str);
            if listed != lies_in {
                let problem = listed.map_or_else(|| "does not exist".to_owned(), |name| format!("is in '{name}'"));
                return Err(WeightsError::Index { file: self.file(place.file), tensor: tensor.clone(), problem });
            }
        }
        match index.weight_map.iter().find(|(tensor, _)| !self.tensors.contains_key(*tensor)) {
            None => Ok(()),
            Some((tensor, name)) => Err(WeightsError::Index {
                file: parts
                    .iter()
                    .find(|part| part.name == *name)
                    .map_or_else(|| name.clone(), |part| part.file.clone()),
                tensor: tensor.clone(),
                problem: "is here, and it is not".to_owned(),
            }),
        }
    }
}

/// Parses and checks the header of one file.
fn header(part: &Part, file: usize) -> Result<Vec<(String, Place)>, WeightsError> {
    let bytes = part.bytes.as_ref();
    let wrong = |problem: String| WeightsError::Header { file: part.file.clone(), problem };
    let length = |expected: u64| WeightsError::Length { file: part.file.clone(), expected, found: bytes.len() as u64 };
    let prefix: [u8; PREFIX_BYTES] = bytes
        .get(..PREFIX_BYTES)
        .and_then(|prefix| prefix.try_into().ok())
        .ok_or_else(|| length(PREFIX_BYTES as u64))?;
    let header_bytes = usize::try_from(u64::from_le_bytes(prefix))
        .ok()
        .filter(|header_bytes| *header_bytes <= HEADER_BYTES_MAX)
        .ok_or_else(|| {
            let found = u64::from_le_bytes(prefix);
            wrong(format!("its length of {found} bytes is above the {HEADER_BYTES_MAX} allowed"))
        })?;
    let data = PREFIX_BYTES + header_bytes;
    let text = bytes.get(PREFIX_BYTES..data).ok_or_else(|| length(data as u64))?;
    if let Some(tensor) = repeated_key(text).map_err(|error| wrong(error.to_string()))? {
        return Err(WeightsError::Duplicate { file: part.file.clone(), tensor, other: None });
    }
    // Contiguous ranges from zero, each as long as shape and element type say, are checked by the format's own crate.
    let metadata: Metadata = serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))?;
    let expected = (data as u64).saturating_add(metadata.data_len() as u64);
    if expected != bytes.len() as u64 {
        return Err(length(expected));
    }
    let place = |info: &TensorInfo| -> Option<Place> {
        let (start, end) = info.data_offsets;
        let bytes = data.checked_add(start)?..data.checked_add(end)?;
        Some(Place { file, dtype: info.dtype, shape: info.shape.clone(), bytes })
    };
    let places = metadata.tensors().into_iter();
    let places = places.map(|(name, info)| place(info).map(|place| (name, place))).collect::<Option<Vec<_>>>();
    let mut places = places.ok_or_else(|| wrong("an offset overflows".to_owned()))?;
    // The crate keeps names in a hash map; which error is reported must not depend on its order.
    places.sort_by(|(left, _), (right, _)| left.cmp(right));
    Ok(places)
}

/// The first key of a JSON object that appears twice: parsers keep one of the two and say nothing.
fn repeated_key(text: &[u8]) -> Result<Option<String>, serde_json::Error> {
    struct Keys(Option<String>);

    impl<'de> Deserialize<'de> for Keys {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_map(KeysVisitor)
        }
    }

    struct KeysVisitor;

    impl<'de> Visitor<'de> for KeysVisitor {
        type Value = Keys;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of tensors")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Keys, A::Error> {
            let mut seen = BTreeSet::new();
            let mut repeated = None;
            while let Some((key, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
                if let Some(key) = seen.replace(key) {
                    repeated.get_or_insert(key);
                }
            }
            Ok(Keys(repeated))
        }
    }

    serde_json::from_slice(text).map(|Keys(repeated)| repeated)
}

/// One stored element as f32, exactly. Bytes of another length than the element's give NaN.
fn widen(dtype: Dtype, bytes: &[u8]) -> f32 {
    match (dtype, bytes) {
        (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (Dtype::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
        (Dtype::Bf16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
        _ => f32::NAN,
    }
}

/// As weight files spell it.
fn name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
        Dtype::Q8_0 => "Q8_0",
        Dtype::Q4_0 => "Q4_0",
        Dtype::Q4K => "Q4_K",
        Dtype::Q5K => "Q5_K",
        Dtype::Q6K => "Q6_K",
    }
}
