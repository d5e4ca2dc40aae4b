//! Running roots of what passes between slices, and the work tag.
//!
//! A boundary's root up to a position is a BLAKE3 hash over its elements so far, in order, each self-delimiting. It only
//! grows: the root at a position does not depend on what comes later, nor on the chunks in which rows arrived. Boundary 0
//! is the tokens (or the vector), the last boundary is the answer, those between are f32 rows.

use crate::answer::{Answer, Misfit};
use crate::digest::{Digest, Purpose, hash};
use crate::epoch::NodeIndex;
use crate::request::{Input, Request};

const BOUNDARY_CONTEXT: &str = "butterfly 1 boundary";
const LAYER_CONTEXT: &str = "butterfly 1 layer";
const INTERIOR_CONTEXT: &str = "butterfly 1 interior";

const TOKEN: u8 = 0;
const ROW: u8 = 1;
const NUMERIC: u8 = 2;

/// Values converted to bytes at a time.
const CHUNK: usize = 256;

/// The running root of one boundary.
#[derive(Debug, Clone)]
pub struct BoundaryRoot {
    hasher: blake3::Hasher,
    positions: u32,
}

impl BoundaryRoot {
    /// A boundary with no position yet.
    pub fn new() -> Self {
        Self { hasher: blake3::Hasher::new_derive_key(BOUNDARY_CONTEXT), positions: 0 }
    }

    /// Appends one position that is a token.
    pub fn push_token(&mut self, token: u32) {
        let [a, b, c, d] = token.to_le_bytes();
        self.hasher.update(&[TOKEN, a, b, c, d]);
        self.positions = self.positions.saturating_add(1);
    }

    /// Appends one position that is a row: f32 `[hidden]`, bit patterns as they are.
    pub fn push_row(&mut self, row: &[f32]) {
        let length = u64::try_from(row.len()).unwrap_or(u64::MAX);
        self.hasher.update(&[ROW]);
        self.hasher.update(&length.to_le_bytes());
        update_row(&mut self.hasher, row);
        self.positions = self.positions.saturating_add(1);
    }

    /// Appends one position whose row held a NaN or an infinity, here or at a position before it. Such a row's bits never
    /// enter a hash.
    pub fn push_numeric(&mut self) {
        self.hasher.update(&[NUMERIC]);
        self.positions = self.positions.saturating_add(1);
    }

    /// Positions appended.
    pub fn positions(&self) -> u32 {
        self.positions
    }

    /// The root up to here.
    pub fn root(&self) -> Digest {
        Digest(*self.hasher.finalize().as_bytes())
    }
}

impl Default for BoundaryRoot {
    fn default() -> Self {
        Self::new()
    }
}

/// Boundary 0 as the request and the answer give it: positions and root.
///
/// Text: the prompt and every token that was fed back, which is all but the last. Embedding: the prompt. Vector: one
/// position. This is what closes the token loop: a last slice that samples one token and feeds back another certifies nothing.
pub fn boundary0(request: &Request, answer: &Answer) -> Result<(u32, Digest), Misfit> {
    answer.fits(request)?;
    let mut boundary = BoundaryRoot::new();
    match &request.input {
        Input::Vector { values } => boundary.push_row(values),
        Input::Text { tokens: prompt, .. } | Input::Chat { tokens: prompt, .. } | Input::Tokens { tokens: prompt } => {
            let fed = match answer {
                Answer::Text { tokens, .. } => tokens.split_last().map_or(&[][..], |(_, fed)| fed),
                Answer::Numeric { tokens, .. } => tokens.as_slice(),
                Answer::Vector { .. } => &[],
            };
            prompt.iter().chain(fed).for_each(|token| boundary.push_token(*token));
        }
    }
    Ok((boundary.positions(), boundary.root()))
}

/// The running digest of what a slice computed inside: each layer's rows (the residual after attention), which never
/// leave a node.
#[derive(Debug, Clone, Default)]
pub struct Interior {
    layers: Vec<blake3::Hasher>,
}

impl Interior {
    /// Nothing computed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the rows of one or more positions to a layer's digest: f32 `[positions, width]`. Layers count from 0
    /// within the slice; how rows are split over calls does not matter.
    pub fn push(&mut self, layer: usize, rows: &[f32]) {
        while self.layers.len() <= layer {
            self.layers.push(blake3::Hasher::new_derive_key(LAYER_CONTEXT));
        }
        if let Some(hasher) = self.layers.get_mut(layer) {
            update_row(hasher, rows);
        }
    }

    /// The digest up to here.
    pub fn finish(&self) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key(INTERIOR_CONTEXT);
        for layer in &self.layers {
            hasher.update(layer.finalize().as_bytes());
        }
        Digest(*hasher.finalize().as_bytes())
    }
}

/// Proof of work done: whoever computed the slice can check the tags of others, whoever copied roots cannot make one.
pub fn work_tag(node: NodeIndex, rd: &Digest, slice: u16, positions: u32, interior: &Digest) -> Digest {
    hash(Purpose::WorkTag, &[&node.0.to_le_bytes(), &rd.0, &slice.to_le_bytes(), &positions.to_le_bytes(), &interior.0])
}

fn update_row(hasher: &mut blake3::Hasher, row: &[f32]) {
    let mut bytes = [[0_u8; 4]; CHUNK];
    for chunk in row.chunks(CHUNK) {
        for (slot, value) in bytes.iter_mut().zip(chunk) {
            *slot = value.to_le_bytes();
        }
        let filled = bytes.get(..chunk.len()).unwrap_or_default();
        hasher.update(filled.as_flattened());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_delimit_themselves() {
        let mut one = BoundaryRoot::new();
        one.push_row(&[1.0, 2.0]);
        let mut two = BoundaryRoot::new();
        two.push_row(&[1.0]);
        two.push_row(&[2.0]);
        assert_ne!(one.root(), two.root());
        let mut token = BoundaryRoot::new();
        token.push_token(0);
        let mut row = BoundaryRoot::new();
        row.push_row(&[0.0]);
        assert_ne!(token.root(), row.root());
    }

    #[test]
    fn a_root_depends_on_nothing_later() {
        let mut boundary = BoundaryRoot::new();
        boundary.push_token(1);
        let before = boundary.root();
        let mut longer = boundary.clone();
        longer.push_token(2);
        assert_eq!(boundary.root(), before);
        assert_ne!(longer.root(), before);
        assert_eq!(longer.positions(), 2);
    }

    #[test]
    fn interior_ignores_how_rows_were_split() {
        let rows: Vec<f32> = (0..1000_u16).map(f32::from).collect();
        let mut whole = Interior::new();
        whole.push(0, &rows);
        let mut split = Interior::new();
        rows.chunks(7).for_each(|chunk| split.push(0, chunk));
        assert_eq!(whole.finish(), split.finish());
        let mut other_layer = Interior::new();
        other_layer.push(1, &rows);
        assert_ne!(whole.finish(), other_layer.finish());
    }

    #[test]
    fn a_tag_is_bound_to_its_node() {
        let rd = Digest([1; 32]);
        let interior = Digest([2; 32]);
        assert_ne!(work_tag(NodeIndex(0), &rd, 0, 1, &interior), work_tag(NodeIndex(1), &rd, 0, 1, &interior));
    }
}
