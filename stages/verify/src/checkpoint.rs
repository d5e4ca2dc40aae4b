//! Checkpoints: what a gateway certified so far, vouched for by those who computed it.
//!
//! A gateway publishes its receipts in segments of at most [`CHECKPOINT_RECEIPTS_MAX`], each bound to the one before. A replica
//! of the last slice vouches for a segment when it has itself computed every answer in it, and found the same. f+1 such
//! signatures certify that the receipts are valid, not that they are all there are.
//!
//! A gateway that publishes two segments under one number has lost its log or keeps two books. Whoever vouched for one does
//! not vouch for the other.
//!
//! It refuses to know where receipts are kept and when a segment is due.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::codec::{DecodeError, Reader, Writer};
use crate::digest::{Digest, Purpose, hash};
use crate::epoch::{Epoch, NodeIndex};
use crate::limits::BATCH_ITEMS_MAX;
use crate::merkle::{BatchTree, Context};
use crate::sign::{SignError, Signer, verify};
use crate::vote::SignatureBytes;

/// Receipts of one segment at most.
pub const CHECKPOINT_RECEIPTS_MAX: usize = BATCH_ITEMS_MAX;
/// Bytes of an encoded entry.
const ENTRY_BYTES: usize = 64;

/// A receipt in short.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Entry {
    /// The request.
    pub rd: Digest,
    /// The root of its answer.
    pub answer_root: Digest,
}

/// What is signed of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// The gateway whose receipts they are.
    pub publisher: NodeIndex,
    /// Its number, from 1.
    pub sequence: u64,
    /// The digest of the checkpoint before; zeros before the first.
    pub previous: Digest,
    /// Receipts in the segment.
    pub count: u32,
    /// The Merkle root over them.
    pub root: Digest,
}

/// A checkpoint with its receipts, as its publisher sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// What is signed.
    pub checkpoint: Checkpoint,
    /// What it covers, in order.
    pub entries: Vec<Entry>,
    /// The publisher's signature.
    pub signature: SignatureBytes,
}

/// A checkpoint that f+1 replicas of the last slice vouch for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointCertificate {
    /// What they signed.
    pub checkpoint: Checkpoint,
    /// Who signed.
    pub signatures: Vec<(NodeIndex, SignatureBytes)>,
}

/// Why nobody should vouch for a proposal, or a certificate is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointFault {
    /// The signature is not the node's.
    #[error("a signature of {0} does not hold")]
    Signature(NodeIndex),
    /// The root or the count is not that of the receipts.
    #[error("the receipts are not those of the root")]
    Root,
    /// A receipt that was not computed here, or too long ago to know.
    #[error("request {0} was not computed here")]
    Unknown(Digest),
    /// A receipt whose answer is not the one computed here.
    #[error("request {0} has another answer than the one computed here")]
    Differs(Digest),
    /// The numbers of this publisher are beyond this one.
    #[error("checkpoint {sequence} comes after {last}")]
    Stale {
        /// Its number.
        sequence: u64,
        /// The number of the last one.
        last: u64,
    },
    /// The publisher has published another checkpoint under this number, or before it.
    #[error("checkpoint {0} forks from what its publisher has published before")]
    Fork(u64),
    /// Signatures of fewer than f+1 replicas of the last slice.
    #[error("{found} of the {needed} signatures needed")]
    Signatures {
        /// Replicas of the last slice that signed.
        found: usize,
        /// f+1.
        needed: usize,
    },
}

impl Checkpoint {
    /// The checkpoint over a segment. `None` if it has no receipt, or more than [`CHECKPOINT_RECEIPTS_MAX`].
    pub fn over(
        epoch: &Epoch,
        publisher: NodeIndex,
        sequence: u64,
        previous: Digest,
        entries: &[Entry],
    ) -> Option<Self> {
        let root = root(epoch, publisher, entries)?;
        let count = u32::try_from(entries.len()).ok()?;
        Some(Self { publisher, sequence, previous, count, root })
    }

    /// What is signed, and what the next checkpoint names.
    pub fn digest(&self, epoch: &Epoch) -> Digest {
        let mut writer = Writer::with_capacity(2 + 8 + 32 + 4 + 32);
        self.write(&mut writer);
        hash(Purpose::Checkpoint, &[&epoch.digest().0, &writer.finish()])
    }

    /// Whether these are its receipts.
    pub fn covers(&self, epoch: &Epoch, entries: &[Entry]) -> bool {
        usize::try_from(self.count).is_ok_and(|count| count == entries.len())
            && root(epoch, self.publisher, entries) == Some(self.root)
    }

    fn write(&self, writer: &mut Writer) {
        writer.u16(self.publisher.0);
        writer.u64(self.sequence);
        writer.digest(&self.previous);
        writer.u32(self.count);
        writer.digest(&self.root);
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            publisher: NodeIndex(reader.u16("publisher")?),
            sequence: reader.u64("sequence")?,
            previous: reader.digest("previous")?,
            count: reader.u32("count")?,
            root: reader.digest("root")?,
        })
    }
}

fn root(epoch: &Epoch, publisher: NodeIndex, entries: &[Entry]) -> Option<Digest> {
    let encoded: Vec<[u8; ENTRY_BYTES]> = entries
        .iter()
        .map(|entry| {
            let mut bytes = [0; ENTRY_BYTES];
            let (rd, answer_root) = bytes.split_at_mut(32);
            rd.copy_from_slice(&entry.rd.0);
            answer_root.copy_from_slice(&entry.answer_root.0);
            bytes
        })
        .collect();
    let context = Context::new(Purpose::Checkpoints, &epoch.digest(), publisher, epoch.rules());
    BatchTree::build(&context, encoded.iter().map(<[u8; ENTRY_BYTES]>::as_slice)).map(|tree| tree.root())
}

impl Signer {
    /// Signs a checkpoint: as its publisher, or to vouch for it.
    pub fn sign_checkpoint(&self, epoch: &Epoch, checkpoint: &Checkpoint) -> Result<SignatureBytes, SignError> {
        self.sign_digest(Purpose::Checkpoints, &checkpoint.digest(epoch))
    }
}

impl Proposal {
    /// What travels.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::with_capacity(256 + self.entries.len().saturating_mul(ENTRY_BYTES));
        self.checkpoint.write(&mut writer);
        writer.length(self.entries.len());
        for entry in &self.entries {
            writer.digest(&entry.rd);
            writer.digest(&entry.answer_root);
        }
        writer.raw(&self.signature.0);
        writer.finish()
    }

    /// Reads what travelled. Total on any bytes; nothing but the form is checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let checkpoint = Checkpoint::read(&mut reader)?;
        let count = reader.length("entries", CHECKPOINT_RECEIPTS_MAX, ENTRY_BYTES)?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            entries.push(Entry { rd: reader.digest("rd")?, answer_root: reader.digest("answer_root")? });
        }
        let signature = SignatureBytes(reader.array("signature")?);
        reader.end("proposal")?;
        Ok(Self { checkpoint, entries, signature })
    }
}

/// What a replica remembers of the checkpoints it vouched for.
#[derive(Debug, Clone, Default)]
pub struct Witness {
    last: BTreeMap<NodeIndex, (u64, Digest)>,
}

impl Witness {
    /// Whether to vouch for a proposal. `computed` gives the root of the answer that this replica itself found.
    ///
    /// The same checkpoint is vouched for again when it is asked again, as after a loss.
    pub fn judge(
        &mut self,
        epoch: &Epoch,
        proposal: &Proposal,
        computed: impl Fn(&Digest) -> Option<Digest>,
    ) -> Result<(), CheckpointFault> {
        let Proposal { checkpoint, entries, signature } = proposal;
        let (publisher, sequence, digest) = (checkpoint.publisher, checkpoint.sequence, checkpoint.digest(epoch));
        if !verify(epoch, publisher, Purpose::Checkpoints, &digest, signature) {
            return Err(CheckpointFault::Signature(publisher));
        }
        if !checkpoint.covers(epoch, entries) {
            return Err(CheckpointFault::Root);
        }
        match self.last.get(&publisher) {
            Some((last, same)) if *last == sequence && *same != digest => return Err(CheckpointFault::Fork(sequence)),
            Some((last, _)) if *last > sequence => return Err(CheckpointFault::Stale { sequence, last: *last }),
            Some((last, before)) if last.checked_add(1) == Some(sequence) && *before != checkpoint.previous => {
                return Err(CheckpointFault::Fork(sequence));
            }
            _ => {}
        }
        for entry in entries {
            match computed(&entry.rd) {
                None => return Err(CheckpointFault::Unknown(entry.rd)),
                Some(answer_root) if answer_root != entry.answer_root => {
                    return Err(CheckpointFault::Differs(entry.rd));
                }
                Some(_) => {}
            }
        }
        self.last.insert(publisher, (sequence, digest));
        Ok(())
    }
}

/// The signatures under one checkpoint while they come in.
#[derive(Debug, Clone)]
pub struct Collector {
    checkpoint: Checkpoint,
    digest: Digest,
    signatures: BTreeMap<NodeIndex, SignatureBytes>,
}

impl Collector {
    /// No signatures yet.
    pub fn new(epoch: &Epoch, checkpoint: Checkpoint) -> Self {
        Self { checkpoint, digest: checkpoint.digest(epoch), signatures: BTreeMap::new() }
    }

    /// The digest of the checkpoint, by which replies name it.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Takes one signature; gives the certificate as soon as there are enough.
    pub fn add(
        &mut self,
        epoch: &Epoch,
        signer: NodeIndex,
        signature: SignatureBytes,
    ) -> Result<Option<CheckpointCertificate>, CheckpointFault> {
        if !may_vouch(epoch, signer) || !verify(epoch, signer, Purpose::Checkpoints, &self.digest, &signature) {
            return Err(CheckpointFault::Signature(signer));
        }
        self.signatures.insert(signer, signature);
        let signatures = self.signatures.iter().map(|(signer, signature)| (*signer, *signature)).collect();
        let certificate = CheckpointCertificate { checkpoint: self.checkpoint, signatures };
        Ok((self.signatures.len() >= needed(epoch)).then_some(certificate))
    }
}

impl CheckpointCertificate {
    /// Checks that f+1 replicas of the last slice signed it.
    pub fn check(&self, epoch: &Epoch) -> Result<(), CheckpointFault> {
        let digest = self.checkpoint.digest(epoch);
        let mut signers = BTreeSet::new();
        for (signer, signature) in &self.signatures {
            if !may_vouch(epoch, *signer) || !verify(epoch, *signer, Purpose::Checkpoints, &digest, signature) {
                return Err(CheckpointFault::Signature(*signer));
            }
            signers.insert(*signer);
        }
        let (found, needed) = (signers.len(), needed(epoch));
        if found >= needed { Ok(()) } else { Err(CheckpointFault::Signatures { found, needed }) }
    }
}

/// Only who computes answers can vouch for them.
fn may_vouch(epoch: &Epoch, node: NodeIndex) -> bool {
    epoch.parts().slices.last().is_some_and(|slice| slice.replicas.contains(&node))
}

fn needed(epoch: &Epoch) -> usize {
    usize::from(epoch.parts().max_byzantine).saturating_add(1)
}

#[cfg(test)]
mod tests;
