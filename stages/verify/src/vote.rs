//! One node's claim about one slice of one request, and the signature it stands under.
//!
//! A vote is a pure function of its request: it carries no attempt, no time and no random bytes, so it may be signed again
//! after a crash without harm. Votes are signed in batches; [`SignedVote`] carries what leads from one vote to its batch's
//! signature. A [`SignedVote`] is data and proves nothing until it is checked; a [`SignedBallot`] has been.

use serde::{Deserialize, Serialize};

use crate::answer::Answer;
use crate::codec::{DecodeError, Reader, Writer};
use crate::digest::{Digest, Purpose};
use crate::epoch::{Epoch, NodeIndex};
use crate::merkle::{self, Context, PathError};
use crate::rules::Rule;
use crate::sign;
use crate::text;

/// Bytes of an encoded vote.
pub(crate) const VOTE_BYTES: usize = 32 + 2 + 4 + 32 + 32 + 32;

/// A node's claim: "for this request, from this input up to this position, the slice gives this output".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vote {
    /// The request's digest.
    pub rd: Digest,
    /// The slice, from 0.
    pub slice: u16,
    /// Positions covered: `[0, positions)`.
    pub positions: u32,
    /// Root of the boundary that goes in.
    pub input_root: Digest,
    /// Root of the boundary that comes out; the answer's root for the last slice.
    pub output_root: Digest,
    /// See [`work_tag`](crate::work_tag).
    pub tag: Digest,
}

/// The part of a vote that must be equal for votes to add up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) positions: u32,
    pub(crate) input_root: Digest,
    pub(crate) output_root: Digest,
}

impl Claim {
    /// Whether both start from the same input up to the same position.
    pub(crate) fn same_input(&self, other: &Self) -> bool {
        self.positions == other.positions && self.input_root == other.input_root
    }
}

impl Vote {
    pub(crate) fn claim(&self) -> Claim {
        Claim { positions: self.positions, input_root: self.input_root, output_root: self.output_root }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::with_capacity(VOTE_BYTES);
        self.write(&mut writer);
        writer.finish()
    }

    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.digest(&self.rd);
        writer.u16(self.slice);
        writer.u32(self.positions);
        writer.digest(&self.input_root);
        writer.digest(&self.output_root);
        writer.digest(&self.tag);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            rd: reader.digest("vote.rd")?,
            slice: reader.u16("vote.slice")?,
            positions: reader.u32("vote.positions")?,
            input_root: reader.digest("vote.input_root")?,
            output_root: reader.digest("vote.output_root")?,
            tag: reader.digest("vote.tag")?,
        })
    }
}

/// A vote and, for the last slice, the answer whose root it names. The answer travels beside what is signed.
#[derive(Debug, Clone, PartialEq)]
pub struct Ballot {
    /// The vote.
    pub vote: Vote,
    /// The answer, with votes of the last slice.
    pub answer: Option<Answer>,
}

/// 64 bytes of a signature (r ‖ s), as hex in text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SignatureBytes(#[serde(with = "text::hex_bytes")] pub [u8; 64]);

/// What leads from one item of a batch to the batch's signature.
///
/// `leaf` and `root` could be derived; they are kept so that a change of any byte is found where it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchProof {
    /// Items in the batch.
    pub count: u32,
    /// The place of this item, from 0.
    pub index: u32,
    /// The leaf made of this item in its place.
    pub leaf: Digest,
    /// Siblings from the leaf up.
    pub path: Vec<Digest>,
    /// What was signed.
    pub root: Digest,
    /// The signer's signature over it.
    pub signature: SignatureBytes,
}

/// A vote with its signature, as it stands in receipts and evidence: not checked yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedVote {
    /// Who signed, as claimed.
    pub signer: NodeIndex,
    /// The vote.
    pub vote: Vote,
    /// Its way to the signature.
    pub proof: BatchProof,
}

/// Which part of a signed vote does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VoteFault {
    /// The signer is not in the roster.
    #[error("signer: {signer} is not in the roster")]
    Signer {
        /// The signer claimed.
        signer: NodeIndex,
    },
    /// The place in the batch is impossible.
    #[error("place: item {index} of a batch of {count}")]
    Place {
        /// The index claimed.
        index: u32,
        /// The count claimed.
        count: u32,
    },
    /// The vote is not what the leaf was made of.
    #[error("vote: the vote in its place is not what was signed")]
    Vote,
    /// The path has the wrong length.
    #[error("path: {found} digests, but the vote's place needs {expected}")]
    PathLength {
        /// Digests given.
        found: usize,
        /// Digests needed.
        expected: usize,
    },
    /// The path does not lead to the signed root.
    #[error("path: it does not lead to the signed root")]
    Path,
    /// The path leads to what was signed, which is not the root given.
    #[error("root: it is not what was signed")]
    Root,
    /// The signature is not the signer's over this root in this epoch.
    #[error("signature: not the signer's over this root in this epoch")]
    Signature,
}

impl SignedVote {
    /// Checks that the claimed signer signed this vote in this epoch.
    pub fn check(&self, epoch: &Epoch) -> Result<(), VoteFault> {
        let (proof, signer) = (&self.proof, self.signer);
        let rules = epoch.rules();
        if epoch.key(signer).is_none() {
            return Err(VoteFault::Signer { signer });
        }
        let place = VoteFault::Place { index: proof.index, count: proof.count };
        let context = Context::new(Purpose::Votes, &epoch.digest(), signer, rules);
        let leaf = merkle::leaf(&context, u64::from(proof.index), &self.vote.encode());
        if leaf != proof.leaf && rules.hold(Rule::Leaf) {
            return Err(VoteFault::Vote);
        }
        let derived =
            merkle::root_of(&proof.leaf, proof.index, proof.count, &proof.path).map_err(|error| match error {
                PathError::Place => place,
                PathError::Length { found, expected } => VoteFault::PathLength { found, expected },
                PathError::Broken => VoteFault::Path,
            })?;
        let signed = |root: &Digest| sign::verify(epoch, signer, Purpose::Votes, root, &proof.signature);
        match (derived == proof.root, signed(&proof.root)) {
            (true, true) => Ok(()),
            (true, false) => Err(VoteFault::Signature),
            (false, true) => Err(VoteFault::Path),
            (false, false) if signed(&derived) => Err(VoteFault::Root),
            (false, false) => Err(VoteFault::Path),
        }
    }
}

/// A ballot whose vote is known to be signed by its signer in an epoch. Made only by opening a batch or by signing one.
#[derive(Debug, Clone, PartialEq)]
pub struct SignedBallot {
    pub(crate) epoch: Digest,
    pub(crate) signed: SignedVote,
    pub(crate) answer: Option<Answer>,
}

impl SignedBallot {
    /// The epoch under which it was signed.
    pub fn epoch(&self) -> Digest {
        self.epoch
    }

    /// Who signed.
    pub fn signer(&self) -> NodeIndex {
        self.signed.signer
    }

    /// The vote.
    pub fn vote(&self) -> &Vote {
        &self.signed.vote
    }

    /// The vote with its way to the signature.
    pub fn signed(&self) -> &SignedVote {
        &self.signed
    }

    /// The answer that came beside it: not signed, and only worth something if its root is the vote's output root.
    pub fn answer(&self) -> Option<&Answer> {
        self.answer.as_ref()
    }
}
