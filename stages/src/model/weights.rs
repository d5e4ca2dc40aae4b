//! Weights in safetensors files, one or several with an index, or in a GGUF file.
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

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use butterfly_kernels::{Dtype, Matrix, PackError, WeightView};
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use super::config::Config;
use super::gguf::{Gguf, GgufError, TensorKind, tensors};
use super::loading::Loading;
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
    /// The GGUF file is malformed.
    #[error("{file}: {error}")]
    Gguf {
        /// The weight file.
        file: String,
        /// What is wrong with it.
        error: GgufError,
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
    stored: Stored,
    shape: Vec<usize>,
    /// Within the file.
    bytes: Range<usize>,
    /// The rows stand side by side by pairs, in so many heads, and are put back into halves when they are read.
    paired_heads: Option<usize>,
}

/// An element type as a file names it.
#[derive(Debug, Clone, Copy)]
enum Stored {
    Safetensors(safetensors::Dtype),
    Gguf(&'static TensorKind),
}

impl Stored {
    /// What the kernels call it, if they compute with it.
    fn dtype(self) -> Option<Dtype> {
        match self {
            Self::Safetensors(safetensors::Dtype::F32) => Some(Dtype::F32),
            Self::Safetensors(safetensors::Dtype::F16) => Some(Dtype::F16),
            Self::Safetensors(safetensors::Dtype::BF16) => Some(Dtype::Bf16),
            Self::Safetensors(_) => None,
            Self::Gguf(kind) => kind.dtype(),
        }
    }
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Safetensors(dtype) => write!(f, "{dtype:?}"),
            Self::Gguf(kind) => f.write_str(kind.name),
        }
    }
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

    /// Reads the directory of a GGUF file, the only one of `parts`.
    pub(super) fn gguf(parts: &[Part], config: &Config) -> Result<Self, WeightsError> {
        let files: Vec<String> = parts.iter().map(|part| part.file.clone()).collect();
        let wrong = |error| WeightsError::Gguf { file: files.first().cloned().unwrap_or_default(), error };
        let gguf = Gguf::parse(parts.first().map_or(&[], |part| part.bytes.as_ref())).map_err(wrong)?;
        let architecture = super::gguf::config::architecture(&gguf).map_err(wrong)?;
        let (heads, kv_heads) = match config {
            Config::Llama(config) => (config.heads, config.kv_heads),
            _ => (0, 0),
        };
        let mut tensors = BTreeMap::new();
        for tensor in gguf.tensors {
            let name = tensors::canonical(tensor.name);
            let paired_heads = tensors::paired_heads(architecture, &name, heads, kv_heads);
            let (stored, shape, bytes) = (Stored::Gguf(tensor.kind), tensor.shape, tensor.bytes);
            let place = Place { file: 0, stored, shape, bytes, paired_heads };
            if tensors.insert(name.clone(), place).is_some() {
                let file = files.first().cloned().unwrap_or_default();
                return Err(WeightsError::Duplicate { file, tensor: name, other: None });
            }
        }
        Ok(Self { tensors, files })
    }

    /// Bytes that a tensor takes in its file; 0 if there is none of this name.
    pub(super) fn stored_bytes(&self, tensor: &str) -> u64 {
        self.tensors.get(tensor).map_or(0, |place| place.bytes.len() as u64)
    }

    /// Whether there is such a tensor.
    pub(super) fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
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

    /// Packs a matrix `[rows, columns]`, or takes it as an earlier load packed it. The files are those the weights were
    /// opened with.
    pub(super) fn matrix(
        &self,
        loading: &Loading<'_>,
        tensor: &str,
        [rows, columns]: [usize; 2],
        dtype: Option<Dtype>,
    ) -> Result<Matrix, WeightsError> {
        let (place, dtype) = self.place(tensor, &[rows, columns], dtype)?;
        if let Some(matrix) = loading.find(place.file, tensor, dtype, [rows, columns]) {
            loading.done_with(place.file, place.bytes.clone());
            return Ok(matrix);
        }
        let bytes = self.bytes(loading.parts, tensor, place)?;
        let matrix = Matrix::pack(WeightView { dtype, bytes: &bytes, rows, columns }).map_err(|error| match error {
            PackError::NotFinite { row, column } => {
                self.not_finite(tensor, place, dtype, &bytes, row.saturating_mul(columns).saturating_add(column))
            }
            error => {
                WeightsError::Header { file: self.file(place.file), problem: format!("tensor '{tensor}': {error}") }
            }
        })?;
        drop(bytes);
        loading.done_with(place.file, place.bytes.clone());
        loading.keep(place.file, tensor, &matrix);
        Ok(matrix)
    }

    /// Widens one row of a tensor of this shape, of which a vector has one. `parts` are those the weights were
    /// opened with.
    pub(super) fn stored_row(
        &self,
        parts: &[Part],
        tensor: &str,
        shape: &[usize],
        row: usize,
        out: &mut [f32],
    ) -> Result<(), WeightsError> {
        let (place, dtype) = self.place(tensor, shape, None)?;
        let bytes = self.bytes(parts, tensor, place)?;
        let row = row.saturating_mul(out.len()).saturating_mul(dtype.block_bytes());
        read(dtype, bytes.get(row..).unwrap_or_default(), out);
        Ok(())
    }

    /// Widens a vector of `length` elements: a bias, or the weights of a norm.
    pub(super) fn vector(
        &self,
        loading: &Loading<'_>,
        tensor: &str,
        length: usize,
        dtype: Option<Dtype>,
    ) -> Result<Vec<f32>, WeightsError> {
        let (place, dtype) = self.place(tensor, &[length], dtype)?;
        let bytes = self.bytes(loading.parts, tensor, place)?;
        let mut vector = vec![0.0; length];
        read(dtype, &bytes, &mut vector);
        match vector.iter().position(|value| !value.is_finite()) {
            None => Ok(vector),
            Some(element) => Err(self.not_finite(tensor, place, dtype, &bytes, element)),
        }
    }

    /// The bytes of a tensor, its rows in order.
    fn bytes<'a>(&self, parts: &'a [Part], tensor: &str, place: &Place) -> Result<Cow<'a, [u8]>, WeightsError> {
        let wrong = |problem: &str| WeightsError::Header {
            file: self.file(place.file),
            problem: format!("tensor '{tensor}' {problem}"),
        };
        let part = parts.get(place.file);
        let bytes = part.and_then(|part| part.bytes.as_ref().get(place.bytes.clone()));
        let bytes = bytes.ok_or_else(|| wrong("lies outside the file"))?;
        match place.paired_heads {
            None => Ok(Cow::Borrowed(bytes)),
            Some(heads) => {
                let rows = place.shape.first().copied().unwrap_or_default();
                let row_bytes = bytes.len().checked_div(rows).unwrap_or_default();
                let halves = tensors::halves(bytes, row_bytes, heads);
                halves.map(Cow::Owned).ok_or_else(|| wrong("has rows that are not those of its heads"))
            }
        }
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
        // Vectors are used as they are; blocks are for matrices.
        let usable = |dtype: &Dtype| shape.len() == 2 || dtype.block_columns() == 1;
        match (place.stored.dtype().filter(usable), dtype) {
            (Some(found), None) => Ok((place, found)),
            (Some(found), Some(expected)) if found == expected => Ok((place, found)),
            (_, expected) => {
                let expected = expected.map_or(any(shape), name).to_owned();
                Err(WeightsError::ElementType { file, tensor, expected, found: place.stored.to_string() })
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
        let stored = Stored::Safetensors(info.dtype);
        Some(Place { file, stored, shape: info.shape.clone(), bytes, paired_heads: None })
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

/// Elements as f32, as many as `out` has. Elements that do not stand alone give NaN.
fn read(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    out.fill(f32::NAN);
    for (out, element) in out.iter_mut().zip(bytes.chunks_exact(dtype.block_bytes())) {
        *out = widen(dtype, element);
    }
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

/// What a tensor of this shape may be.
fn any(shape: &[usize]) -> &'static str {
    if shape.len() == 2 { "F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K or Q6_K" } else { "F32, F16 or BF16" }
}

/// As the files spell it.
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
