//! What the consensus stages of two nodes say to each other: ballots, deltas and audits, as control messages.
//!
//! One byte of kind, then canonical little-endian fields. Only ballots are signed, because only they must convince a third
//! party; deltas and audits are taken on the word of an authenticated link, and f+1 of them are needed for anything. All
//! of it is checked here, and what does not hold is an error.

use butterfly_engine::frame::{Frame, FrameBuilder, FrameError};
use butterfly_verify::{Digest, NodeIndex, SignatureBytes};

use crate::items::RequestId;
use crate::model::Sampled;

/// Deltas or audits that one message may carry.
pub const ENTRIES_MAX: usize = 1024;
/// Tokens of one delta.
pub const DELTA_TOKENS_MAX: usize = 4096;

const KIND_BALLOTS: u8 = 1;
const KIND_DELTAS: u8 = 2;
const KIND_AUDITS: u8 = 3;
const KIND_CHECKPOINT: u8 = 4;
const KIND_VOUCH: u8 = 5;

/// Tokens that a replica of the last slice sampled, or found in the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// The request.
    pub rd: RequestId,
    /// Index of the first of `tokens` among the generated ones, or among those of the prompt and them, if the request wants the
    /// prompt's log-probabilities.
    pub index: u32,
    /// The tokens.
    pub tokens: Vec<Sampled>,
}

/// A replica's word that the work tag in another's vote is not that of the computation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadTag {
    /// The request.
    pub rd: RequestId,
    /// The slice.
    pub slice: u16,
    /// Whose tag it is.
    pub accused: NodeIndex,
}

/// A message from another consensus stage.
#[derive(Debug, PartialEq)]
pub enum Message<'a> {
    /// A signed batch, to be opened by `Epoch::open_ballots`.
    Ballots(&'a [u8]),
    /// Sampled tokens.
    Deltas(Vec<Delta>),
    /// Failed audits.
    BadTags(Vec<BadTag>),
    /// A checkpoint of the sender with its receipts, to be opened by `Proposal::decode`.
    Checkpoint(&'a [u8]),
    /// The sender vouches for the checkpoint of this digest.
    Vouch(Digest, SignatureBytes),
}

/// A message that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed control message")]
pub struct Malformed;

/// Wraps a signed batch of ballots.
///
/// # Errors
/// When the batch exceeds what a frame may carry.
pub fn ballots(batch: &[u8]) -> Result<Frame, FrameError> {
    let mut frame = FrameBuilder::control(1 + batch.len())?;
    frame.push(&[KIND_BALLOTS])?;
    frame.push(batch)?;
    frame.finish()
}

/// Wraps at most [`ENTRIES_MAX`] deltas.
///
/// # Errors
/// When they exceed what a frame may carry.
pub fn deltas(deltas: &[Delta]) -> Result<Frame, FrameError> {
    let mut message = vec![KIND_DELTAS];
    for delta in deltas.iter().take(ENTRIES_MAX) {
        message.extend_from_slice(&delta.rd.0);
        message.extend_from_slice(&delta.index.to_le_bytes());
        message.extend_from_slice(&(delta.tokens.len() as u32).to_le_bytes());
        delta.tokens.iter().for_each(|sampled| sampled.write(&mut message));
    }
    Frame::control(&message)
}

/// Wraps at most [`ENTRIES_MAX`] failed audits.
///
/// # Errors
/// When they exceed what a frame may carry.
pub fn bad_tags(audits: &[BadTag]) -> Result<Frame, FrameError> {
    let mut message = vec![KIND_AUDITS];
    for audit in audits.iter().take(ENTRIES_MAX) {
        message.extend_from_slice(&audit.rd.0);
        message.extend_from_slice(&audit.slice.to_le_bytes());
        message.extend_from_slice(&audit.accused.0.to_le_bytes());
    }
    Frame::control(&message)
}

/// Wraps a checkpoint and its receipts.
///
/// # Errors
/// When they exceed what a frame may carry.
pub fn checkpoint(proposal: &[u8]) -> Result<Frame, FrameError> {
    let mut frame = FrameBuilder::control(1 + proposal.len())?;
    frame.push(&[KIND_CHECKPOINT])?;
    frame.push(proposal)?;
    frame.finish()
}

/// Vouches for a checkpoint.
///
/// # Errors
/// When a frame cannot be made.
pub fn vouch(digest: &Digest, signature: &SignatureBytes) -> Result<Frame, FrameError> {
    let mut message = vec![KIND_VOUCH];
    message.extend_from_slice(&digest.0);
    message.extend_from_slice(&signature.0);
    Frame::control(&message)
}

/// Reads a control message.
///
/// # Errors
/// When it is none of the above.
pub fn read(message: &[u8]) -> Result<Message<'_>, Malformed> {
    let (kind, mut rest) = message.split_first().ok_or(Malformed)?;
    match *kind {
        KIND_BALLOTS => Ok(Message::Ballots(rest)),
        KIND_DELTAS => read_all(&mut rest, read_delta).map(Message::Deltas),
        KIND_AUDITS => read_all(&mut rest, read_bad_tag).map(Message::BadTags),
        KIND_CHECKPOINT => Ok(Message::Checkpoint(rest)),
        KIND_VOUCH => {
            let (digest, signature) = (Digest(*take(&mut rest)?), SignatureBytes(*take(&mut rest)?));
            if rest.is_empty() { Ok(Message::Vouch(digest, signature)) } else { Err(Malformed) }
        }
        _ => Err(Malformed),
    }
}

fn read_all<T>(rest: &mut &[u8], read: fn(&mut &[u8]) -> Result<T, Malformed>) -> Result<Vec<T>, Malformed> {
    let mut entries = Vec::new();
    while !rest.is_empty() {
        if entries.len() == ENTRIES_MAX {
            return Err(Malformed);
        }
        entries.push(read(rest)?);
    }
    Ok(entries)
}

fn read_delta(rest: &mut &[u8]) -> Result<Delta, Malformed> {
    let rd = Digest(*take::<32>(rest)?);
    let index = u32::from_le_bytes(*take(rest)?);
    let count = u32::from_le_bytes(*take(rest)?) as usize;
    if count > DELTA_TOKENS_MAX {
        return Err(Malformed);
    }
    let tokens = (0..count).map(|_| Sampled::read(rest).map_err(|_| Malformed)).collect::<Result<_, _>>()?;
    Ok(Delta { rd, index, tokens })
}

fn read_bad_tag(rest: &mut &[u8]) -> Result<BadTag, Malformed> {
    Ok(BadTag {
        rd: Digest(*take::<32>(rest)?),
        slice: u16::from_le_bytes(*take(rest)?),
        accused: NodeIndex(u16::from_le_bytes(*take(rest)?)),
    })
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Result<&'a [u8; N], Malformed> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(Malformed)?;
    *rest = tail;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use butterfly_kernels::LogProbs;

    use super::*;
    use proptest::prelude::*;

    fn sampled() -> impl Strategy<Value = Sampled> {
        let log_prob = -1e3..0.0_f32;
        let top = prop::collection::vec((any::<u32>(), log_prob.clone()), 0..=20);
        let logprobs = prop::option::of((log_prob, top));
        (any::<u32>(), logprobs).prop_map(|(token, logprobs)| {
            let logprobs = logprobs.map(|(chosen, top)| Box::new(LogProbs { chosen, top }));
            Sampled { token, logprobs }
        })
    }

    proptest! {
        #[test]
        fn deltas_survive(sent in prop::collection::vec((any::<[u8; 32]>(), any::<u32>(), prop::collection::vec(sampled(), 0..20)), 0..20)) {
            let sent: Vec<Delta> = sent.into_iter().map(|(rd, index, tokens)| Delta { rd: Digest(rd), index, tokens }).collect();
            let frame = deltas(&sent).unwrap();
            let message = frame.control_bytes().unwrap();
            prop_assert_eq!(read(message), Ok(Message::Deltas(sent.clone())));
            if let (Some(_), Some(cut)) = (sent.last(), message.get(..message.len() - 1)) {
                prop_assert_eq!(read(cut), Err(Malformed));
            }
        }

        #[test]
        fn audits_survive(sent in prop::collection::vec((any::<[u8; 32]>(), any::<u16>(), any::<u16>()), 0..20)) {
            let sent: Vec<BadTag> =
                sent.into_iter().map(|(rd, slice, accused)| BadTag { rd: Digest(rd), slice, accused: NodeIndex(accused) }).collect();
            let frame = bad_tags(&sent).unwrap();
            prop_assert_eq!(read(frame.control_bytes().unwrap()), Ok(Message::BadTags(sent)));
        }

        /// Whatever a peer sends, reading it ends, and a message cut short is refused.
        #[test]
        fn garbage_is_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&bytes);
        }
    }

    #[test]
    fn checkpoints_and_vouching_survive_and_cut_short_do_not() {
        let (digest, signature) = (Digest([3; 32]), SignatureBytes([4; 64]));
        let frame = vouch(&digest, &signature).unwrap();
        let bytes = frame.control_bytes().unwrap();
        assert_eq!(read(bytes), Ok(Message::Vouch(digest, signature)));
        assert_eq!(read(&bytes[..96]), Err(Malformed));
        assert_eq!(read(&[bytes, &[0][..]].concat()), Err(Malformed));
        assert_eq!(read(checkpoint(b"abc").unwrap().control_bytes().unwrap()), Ok(Message::Checkpoint(b"abc")));
    }

    #[test]
    fn a_length_beyond_the_message_is_refused() {
        let mut message = vec![KIND_DELTAS];
        message.extend_from_slice(&[0; 36]);
        message.extend_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(read(&message), Err(Malformed));
        message.truncate(37);
        message.extend_from_slice(&2u32.to_le_bytes());
        message.extend_from_slice(&[0; 4]);
        assert_eq!(read(&message), Err(Malformed));
    }
}
