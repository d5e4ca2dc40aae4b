//! The Merkle tree of a signed batch: merkle-cbt behind the rules that make its proofs safe.
//!
//! merkle-cbt alone accepts an inner node as a leaf, a shorter tree with the same root, and leaves out of order. Here a
//! leaf is `H(0x00 ‖ context ‖ u64 position ‖ u64 length ‖ bytes)`, a node `H(0x01 ‖ left ‖ right)`, and what is signed
//! `H(0x02 ‖ u32 count ‖ root)`, all SHA-256. Proofs are of one leaf; the index must lie within the count, the path must
//! have exactly the length that the leaf's place gives, and the verifier hashes the leaf's data itself.

use merkle_cbt::merkle_tree::{CBMT, Merge, MerkleProof, MerkleTree};
use sha2::{Digest as _, Sha256};

use crate::digest::{Digest, Purpose};
use crate::epoch::NodeIndex;
use crate::limits::BATCH_ITEMS_MAX;
use crate::rules::{Rule, Rules};

const LEAF: u8 = 0;
const NODE: u8 = 1;
const ROOT: u8 = 2;

/// What every leaf of a batch is bound to besides its bytes: purpose, epoch, signer. Of fixed length.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context {
    bytes: [u8; 35],
}

impl Context {
    pub(crate) fn new(purpose: Purpose, epoch: &Digest, signer: NodeIndex, rules: Rules) -> Self {
        let mut bytes = [0; 35];
        let (kind, rest) = bytes.split_at_mut(1);
        let (at_epoch, at_signer) = rest.split_at_mut(32);
        if rules.hold(Rule::Purpose) {
            kind.copy_from_slice(&[purpose as u8]);
        }
        if rules.hold(Rule::Epoch) {
            at_epoch.copy_from_slice(&epoch.0);
        }
        at_signer.copy_from_slice(&signer.0.to_le_bytes());
        Self { bytes }
    }
}

/// Why a place in a batch, or a path, cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PathError {
    /// The count is 0 or above [`BATCH_ITEMS_MAX`], or the index is not below the count.
    Place,
    /// The path is not as long as the leaf is deep.
    Length { found: usize, expected: usize },
    /// The path does not lead to a root.
    Broken,
}

struct Sha256Merge;

impl Merge for Sha256Merge {
    type Item = Digest;

    fn merge(left: &Digest, right: &Digest) -> Digest {
        sha256(&[&[NODE], &left.0, &right.0])
    }
}

/// The tree over all items of a batch.
pub(crate) struct BatchTree {
    tree: MerkleTree<Digest, Sha256Merge>,
    leaves: Vec<Digest>,
    root: Digest,
}

impl BatchTree {
    /// Builds the tree over 1 to [`BATCH_ITEMS_MAX`] items; `None` for any other number.
    pub(crate) fn build<'a>(context: &Context, items: impl IntoIterator<Item = &'a [u8]>) -> Option<Self> {
        let items = items.into_iter().take(BATCH_ITEMS_MAX + 1);
        let leaves: Vec<Digest> = (0_u64..).zip(items).map(|(position, item)| leaf(context, position, item)).collect();
        if leaves.is_empty() || leaves.len() > BATCH_ITEMS_MAX {
            return None;
        }
        let tree = CBMT::<Digest, Sha256Merge>::build_merkle_tree(&leaves);
        let root = signed_root(u32::try_from(leaves.len()).ok()?, &tree.root());
        Some(Self { tree, leaves, root })
    }

    /// What is signed.
    pub(crate) fn root(&self) -> Digest {
        self.root
    }

    /// The leaf at an index and its path, nearest sibling first.
    pub(crate) fn prove(&self, index: u32) -> Option<(Digest, Vec<Digest>)> {
        let leaf = self.leaves.get(usize::try_from(index).ok()?)?;
        let proof = self.tree.build_proof(&[index])?;
        Some((*leaf, proof.lemmas().to_vec()))
    }
}

/// The leaf of an item.
pub(crate) fn leaf(context: &Context, position: u64, item: &[u8]) -> Digest {
    let length = u64::try_from(item.len()).unwrap_or(u64::MAX);
    sha256(&[&[LEAF], &context.bytes, &position.to_le_bytes(), &length.to_le_bytes(), item])
}

/// The signed root that a leaf and its path lead to.
pub(crate) fn root_of(leaf: &Digest, index: u32, count: u32, path: &[Digest]) -> Result<Digest, PathError> {
    let in_bounds = usize::try_from(count).is_ok_and(|count| count <= BATCH_ITEMS_MAX);
    if !in_bounds || index >= count {
        return Err(PathError::Place);
    }
    // The tree is an array of 2 · count - 1 nodes whose leaves come last; node i is floor(log2(i + 1)) deep.
    let place = index.saturating_add(count).saturating_sub(1);
    let expected = usize::try_from(place.saturating_add(1).ilog2()).unwrap_or(usize::MAX);
    if path.len() != expected {
        return Err(PathError::Length { found: path.len(), expected });
    }
    MerkleProof::<Digest, Sha256Merge>::new(vec![place], path.to_vec())
        .root(&[*leaf])
        .map(|root| signed_root(count, &root))
        .ok_or(PathError::Broken)
}

fn signed_root(count: u32, root: &Digest) -> Digest {
    sha256(&[&[ROOT], &count.to_le_bytes(), &root.0])
}

fn sha256(parts: &[&[u8]]) -> Digest {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part);
    }
    Digest(hasher.finalize().into())
}

#[cfg(test)]
mod tests;
