//! Batches under one signature: made by their signer, opened by their receiver.
//!
//! A signature is deterministic (RFC 6979), low-S ECDSA on secp256k1 over
//! `SHA-256(domain ‖ purpose ‖ epoch digest ‖ root)`, where the root commits to every item, its place, their count and the
//! signer. A batch travels as its items and one signature; the receiver builds the tree again, once for all items.

use k256::ecdsa::signature::hazmat::{PrehashSigner, PrehashVerifier};
use k256::ecdsa::{Signature, SigningKey};

use crate::answer::Answer;
use crate::codec::{DecodeError, DecodeProblem, Reader, Writer};
use crate::digest::{Digest, Purpose, hash};
use crate::epoch::{Epoch, NodeIndex};
use crate::limits::{ANSWER_BYTES_MAX, BATCH_BYTES_MAX, BATCH_ITEMS_MAX, REQUEST_BYTES_MAX};
use crate::merkle::{BatchTree, Context};
use crate::request::{Request, RequestError};
use crate::rules::{Rule, Rules};
use crate::vote::{Ballot, BatchProof, SignatureBytes, SignedBallot, SignedVote, VOTE_BYTES, Vote};

/// The layout of a batch as it travels: version, purpose, signer, count, items, signature.
const WIRE_VERSION: u8 = 1;

/// A gateway's word that a request is to be computed. Its signature authorises.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrePrepare {
    /// The request.
    pub request: Request,
    /// Counts the gateway's tries for this request, from 0. No vote depends on it.
    pub attempt: u32,
}

/// Why a batch cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignError {
    /// No item, or more than [`BATCH_ITEMS_MAX`].
    #[error("{items} items, but a batch has 1 to {BATCH_ITEMS_MAX}")]
    Items {
        /// Items given.
        items: usize,
    },
    /// An answer that no receiver would read: too large, or with a number that is not finite.
    #[error("the answer of ballot {index} is too large or not finite")]
    Answer {
        /// The ballot.
        index: usize,
    },
    /// The batch would be larger than [`BATCH_BYTES_MAX`]: split it.
    #[error("{bytes} bytes, but a batch has at most {BATCH_BYTES_MAX}")]
    Bytes {
        /// Its size.
        bytes: usize,
    },
    /// The key signs for another node than the roster says.
    #[error("{node} has another key in the roster, or is not in it")]
    Key {
        /// The node.
        node: NodeIndex,
    },
    /// The signature algorithm failed.
    #[error("the key cannot sign")]
    Signature,
}

/// Why bytes are not a batch of this sender in this epoch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// More than [`BATCH_BYTES_MAX`].
    #[error("{bytes} bytes, but a batch has at most {BATCH_BYTES_MAX}")]
    Bytes {
        /// Bytes given.
        bytes: usize,
    },
    /// The bytes are not of the layout.
    #[error("batch: {0}")]
    Codec(#[from] DecodeError),
    /// The batch claims to be signed by another node than the one that sent it.
    #[error("signed by {claimed}, sent by {sender}")]
    Sender {
        /// The signer claimed.
        claimed: NodeIndex,
        /// The authenticated sender.
        sender: NodeIndex,
    },
    /// The sender is not in the roster.
    #[error("{sender} is not in the roster")]
    Unknown {
        /// The authenticated sender.
        sender: NodeIndex,
    },
    /// The signature is not the sender's over these items, for this purpose, in this epoch.
    #[error("the signature is not the sender's over these items in this epoch")]
    Signature,
    /// A request in the batch breaks a rule.
    #[error("item {index}: {error}")]
    Request {
        /// The item.
        index: usize,
        /// The rule.
        error: RequestError,
    },
}

/// A batch of ballots as it travels, and its ballots as any receiver would open them.
#[derive(Debug, Clone, PartialEq)]
pub struct SealedBallots {
    /// What travels.
    pub bytes: Vec<u8>,
    /// The same ballots, for the signer's own tally.
    pub ballots: Vec<SignedBallot>,
}

/// Signs as one node of one epoch.
#[derive(Clone)]
pub struct Signer {
    key: SigningKey,
    index: NodeIndex,
    epoch: Digest,
    rules: Rules,
}

impl Signer {
    /// A signer for the node whose key this is. [`SignError::Key`] if the roster gives the node another key.
    pub fn new(key: SigningKey, index: NodeIndex, epoch: &Epoch) -> Result<Self, SignError> {
        if epoch.key(index) != Some(key.verifying_key()) {
            return Err(SignError::Key { node: index });
        }
        Ok(Self { key, index, epoch: epoch.digest(), rules: epoch.rules() })
    }

    /// The node it signs for.
    pub fn index(&self) -> NodeIndex {
        self.index
    }

    /// Signs 1 to [`BATCH_ITEMS_MAX`] ballots and returns what travels.
    pub fn sign_ballots(&self, ballots: Vec<Ballot>) -> Result<Vec<u8>, SignError> {
        self.seal_ballots(ballots).map(|sealed| sealed.bytes)
    }

    /// Signs 1 to [`BATCH_ITEMS_MAX`] ballots; returns what travels and the ballots as a receiver would open them, so that
    /// the signer need not check its own signature.
    pub fn seal_ballots(&self, ballots: Vec<Ballot>) -> Result<SealedBallots, SignError> {
        let votes: Vec<Vec<u8>> = ballots.iter().map(|ballot| ballot.vote.encode()).collect();
        let (tree, signature) = self.sign(Purpose::Votes, votes.iter().map(Vec::as_slice), votes.len())?;
        let mut writer = self.header(Purpose::Votes, ballots.len());
        for (index, (ballot, vote)) in ballots.iter().zip(&votes).enumerate() {
            writer.raw(vote);
            writer.flag(ballot.answer.is_some());
            if let Some(answer) = &ballot.answer {
                if !answer.is_readable() {
                    return Err(SignError::Answer { index });
                }
                writer.bytes(&answer.encode());
            }
        }
        let bytes = finish(writer, &signature)?;
        let ballots = signed_ballots(self.epoch, self.index, &tree, signature, ballots);
        Ok(SealedBallots { bytes, ballots })
    }

    /// Signs 1 to [`BATCH_ITEMS_MAX`] PrePrepares and returns what travels.
    pub fn sign_pre_prepares(&self, items: Vec<PrePrepare>) -> Result<Vec<u8>, SignError> {
        let encoded: Vec<Vec<u8>> = items.iter().map(encode_pre_prepare).collect();
        let (_, signature) = self.sign(Purpose::PrePrepares, encoded.iter().map(Vec::as_slice), encoded.len())?;
        let mut writer = self.header(Purpose::PrePrepares, encoded.len());
        for item in &encoded {
            writer.bytes(item);
        }
        finish(writer, &signature)
    }

    fn header(&self, purpose: Purpose, count: usize) -> Writer {
        let mut writer = Writer::with_capacity(count.saturating_mul(VOTE_BYTES).saturating_add(128));
        writer.u8(WIRE_VERSION);
        writer.u8(purpose as u8);
        writer.u16(self.index.0);
        writer.length(count);
        writer
    }

    /// One signature over the tree of the items.
    pub(crate) fn sign<'a>(
        &self,
        purpose: Purpose,
        items: impl IntoIterator<Item = &'a [u8]>,
        count: usize,
    ) -> Result<(BatchTree, SignatureBytes), SignError> {
        let context = Context::new(purpose, &self.epoch, self.index, self.rules);
        let tree = BatchTree::build(&context, items).ok_or(SignError::Items { items: count })?;
        let signature = self.sign_digest(purpose, &tree.root())?;
        Ok((tree, signature))
    }

    pub(crate) fn sign_digest(&self, purpose: Purpose, digest: &Digest) -> Result<SignatureBytes, SignError> {
        let message = signed_message(purpose, &self.epoch, digest, self.rules);
        let signature: Signature = self.key.sign_prehash(&message.0).map_err(|_| SignError::Signature)?;
        let bytes: [u8; 64] = signature.normalize_s().to_bytes().into();
        Ok(SignatureBytes(bytes))
    }
}

impl Epoch {
    /// Opens a batch of ballots that `sender`, authenticated by its link, has sent. Total on any bytes; one signature is
    /// checked for all.
    pub fn open_ballots(&self, bytes: &[u8], sender: NodeIndex) -> Result<Vec<SignedBallot>, OpenError> {
        let (mut reader, signer, count) = self.open_header(bytes, sender, Purpose::Votes, VOTE_BYTES + 1)?;
        let mut votes = Vec::with_capacity(count);
        let mut ballots = Vec::with_capacity(count);
        for _ in 0..count {
            votes.push(reader.clone().raw("vote", VOTE_BYTES)?);
            let vote = Vote::read(&mut reader)?;
            let answer = match reader.flag("ballot.answer")? {
                true => Some(Answer::decode(reader.bytes("ballot.answer", ANSWER_BYTES_MAX)?)?),
                false => None,
            };
            ballots.push(Ballot { vote, answer });
        }
        let (tree, signature) = self.open_signature(reader, signer, Purpose::Votes, votes)?;
        Ok(signed_ballots(self.digest(), signer, &tree, signature, ballots))
    }

    /// Opens a batch of PrePrepares that `sender`, authenticated by its link, has sent. Total on any bytes.
    pub fn open_pre_prepares(&self, bytes: &[u8], sender: NodeIndex) -> Result<Vec<PrePrepare>, OpenError> {
        let (mut reader, signer, count) = self.open_header(bytes, sender, Purpose::PrePrepares, 8)?;
        let mut encoded = Vec::with_capacity(count);
        for _ in 0..count {
            encoded.push(reader.bytes("pre_prepare", REQUEST_BYTES_MAX + 4)?);
        }
        self.open_signature(reader, signer, Purpose::PrePrepares, encoded.iter().copied())?;
        let mut items = Vec::with_capacity(count);
        for (index, item) in encoded.into_iter().enumerate() {
            let mut reader = Reader::new(item);
            let attempt = reader.u32("attempt")?;
            let request = reader.raw("request", item.len().saturating_sub(4))?;
            let request = Request::decode(request).map_err(|error| OpenError::Request { index, error })?;
            items.push(PrePrepare { request, attempt });
        }
        Ok(items)
    }

    fn open_header<'a>(
        &self,
        bytes: &'a [u8],
        sender: NodeIndex,
        purpose: Purpose,
        item_bytes_min: usize,
    ) -> Result<(Reader<'a>, NodeIndex, usize), OpenError> {
        if bytes.len() > BATCH_BYTES_MAX {
            return Err(OpenError::Bytes { bytes: bytes.len() });
        }
        let mut reader = Reader::new(bytes);
        reader.choice("version", |byte| (byte == WIRE_VERSION).then_some(()))?;
        reader.choice("purpose", |byte| (byte == purpose as u8).then_some(()))?;
        let claimed = NodeIndex(reader.u16("signer")?);
        if claimed != sender && self.rules().hold(Rule::Sender) {
            return Err(OpenError::Sender { claimed, sender });
        }
        let before = reader.clone();
        let count = reader.length("count", BATCH_ITEMS_MAX, item_bytes_min)?;
        if count == 0 {
            before.error("count", DecodeProblem::Empty)?;
        }
        Ok((reader, claimed, count))
    }

    fn open_signature<'a>(
        &self,
        mut reader: Reader<'_>,
        signer: NodeIndex,
        purpose: Purpose,
        items: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<(BatchTree, SignatureBytes), OpenError> {
        let signature = SignatureBytes(reader.array("signature")?);
        reader.end("batch")?;
        if self.key(signer).is_none() {
            return Err(OpenError::Unknown { sender: signer });
        }
        let context = Context::new(purpose, &self.digest(), signer, self.rules());
        let tree = BatchTree::build(&context, items).ok_or(OpenError::Signature)?;
        if !verify(self, signer, purpose, &tree.root(), &signature) {
            return Err(OpenError::Signature);
        }
        Ok((tree, signature))
    }
}

/// Whether a node signed this root for this purpose in this epoch.
pub(crate) fn verify(
    epoch: &Epoch,
    signer: NodeIndex,
    purpose: Purpose,
    root: &Digest,
    signature: &SignatureBytes,
) -> bool {
    let rules = epoch.rules();
    if !rules.hold(Rule::Signature) {
        return true;
    }
    let Some(key) = epoch.key(signer) else { return false };
    let Ok(signature) = Signature::from_slice(&signature.0) else { return false };
    let low = signature.normalize_s();
    if low != signature && rules.hold(Rule::LowS) {
        return false;
    }
    let message = signed_message(purpose, &epoch.digest(), root, rules);
    key.verify_prehash(&message.0, &low).is_ok()
}

fn signed_message(purpose: Purpose, epoch: &Digest, root: &Digest, rules: Rules) -> Digest {
    let purpose = if rules.hold(Rule::Purpose) { purpose } else { Purpose::Votes };
    let epoch = if rules.hold(Rule::Epoch) { *epoch } else { Digest::default() };
    hash(purpose, &[&epoch.0, &root.0])
}

fn signed_ballots(
    epoch: Digest,
    signer: NodeIndex,
    tree: &BatchTree,
    signature: SignatureBytes,
    ballots: Vec<Ballot>,
) -> Vec<SignedBallot> {
    let count = u32::try_from(ballots.len()).unwrap_or(u32::MAX);
    let root = tree.root();
    (0_u32..)
        .zip(ballots)
        .filter_map(|(index, Ballot { vote, answer })| {
            let (leaf, path) = tree.prove(index)?;
            let proof = BatchProof { count, index, leaf, path, root, signature };
            Some(SignedBallot { epoch, signed: SignedVote { signer, vote, proof }, answer })
        })
        .collect()
}

fn encode_pre_prepare(item: &PrePrepare) -> Vec<u8> {
    let request = item.request.encode();
    let mut writer = Writer::with_capacity(request.len().saturating_add(4));
    writer.u32(item.attempt);
    writer.raw(&request);
    writer.finish()
}

fn finish(mut writer: Writer, signature: &SignatureBytes) -> Result<Vec<u8>, SignError> {
    writer.raw(&signature.0);
    let bytes = writer.finish();
    if bytes.len() > BATCH_BYTES_MAX {
        return Err(SignError::Bytes { bytes: bytes.len() });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
