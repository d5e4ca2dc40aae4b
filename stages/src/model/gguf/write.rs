//! Writes GGUF files, version 3.
//!
//! Invariants: rows are asked for one at a time, so a file may be larger than memory; tensors stand in the order given,
//! each at a multiple of 32 bytes, and the last is padded as well.
//!
//! It refuses to know what a model is.

use std::io::{self, Write};

use super::MAGIC;
use super::quantise::Encoding;

const ALIGNMENT: usize = 32;
const VERSION: u32 = 3;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Field {
    /// An unsigned integer.
    Unsigned(u32),
    /// A number.
    Float(f32),
    /// True or false.
    Flag(bool),
    /// A text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of integers.
    Integers(Vec<i32>),
    /// A list of numbers.
    Floats(Vec<f32>),
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its name in the file.
    pub name: String,
    /// Rows; `None` for a vector.
    pub rows: Option<usize>,
    /// Numbers of a row: whole blocks of the encoding.
    pub columns: usize,
    /// How its numbers are written.
    pub encoding: Encoding,
}

/// Writes a file. `fill` is asked for each row of each tensor, in order: index of the tensor, row, numbers to write to.
///
/// # Errors
///
/// What `out` or `fill` say; `InvalidInput` if a row is not whole blocks.
pub fn write(
    out: &mut impl Write,
    metadata: &[(String, Field)],
    tensors: &[Tensor],
    mut fill: impl FnMut(usize, usize, &mut [f32]) -> io::Result<()>,
) -> io::Result<()> {
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, field) in metadata {
        text(key, &mut head);
        value(field, &mut head);
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&tensor.name, &mut head);
        let dimensions = [Some(tensor.columns), tensor.rows];
        head.extend((dimensions.iter().flatten().count() as u32).to_le_bytes());
        head.extend(dimensions.iter().flatten().flat_map(|size| (*size as u64).to_le_bytes()));
        head.extend(tensor.encoding.code().to_le_bytes());
        head.extend((offset as u64).to_le_bytes());
        offset += bytes(tensor)?.next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    out.write_all(&head)?;
    let (mut row, mut encoded) = (Vec::new(), Vec::new());
    for (index, tensor) in tensors.iter().enumerate() {
        row.resize(tensor.columns, 0.0);
        for number in 0..tensor.rows.unwrap_or(1) {
            fill(index, number, &mut row)?;
            encoded.clear();
            tensor.encoding.encode(&row, &mut encoded);
            out.write_all(&encoded)?;
        }
        let length = bytes(tensor)?;
        out.write_all(&[0; ALIGNMENT][..length.next_multiple_of(ALIGNMENT) - length])?;
    }
    out.flush()
}

fn bytes(tensor: &Tensor) -> io::Result<usize> {
    let row = tensor.encoding.row_bytes(tensor.columns).ok_or_else(|| {
        let (name, encoding, block) = (&tensor.name, tensor.encoding.name(), tensor.encoding.block());
        let problem = format!("{name}: rows of {} numbers are not whole {encoding} blocks of {block}", tensor.columns);
        io::Error::new(io::ErrorKind::InvalidInput, problem)
    })?;
    Ok(row * tensor.rows.unwrap_or(1))
}

fn text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn value(field: &Field, out: &mut Vec<u8>) {
    let list = |kind: u32, count: usize, out: &mut Vec<u8>| {
        out.extend(9_u32.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    };
    match field {
        Field::Unsigned(number) => {
            out.extend(4_u32.to_le_bytes());
            out.extend(number.to_le_bytes());
        }
        Field::Float(number) => {
            out.extend(6_u32.to_le_bytes());
            out.extend(number.to_le_bytes());
        }
        Field::Flag(flag) => {
            out.extend(7_u32.to_le_bytes());
            out.push(u8::from(*flag));
        }
        Field::Text(one) => {
            out.extend(8_u32.to_le_bytes());
            text(one, out);
        }
        Field::Texts(texts) => {
            list(8, texts.len(), out);
            texts.iter().for_each(|one| text(one, out));
        }
        Field::Integers(numbers) => {
            list(5, numbers.len(), out);
            out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        Field::Floats(numbers) => {
            list(6, numbers.len(), out);
            out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
    }
}
