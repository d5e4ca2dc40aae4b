//! Checkpoints of this gateway on their way to a certificate, and those of others that this node vouches for.
//!
//! A segment is due after as many receipts as the topology says, or [`EVERY`] after the last one when there are new ones. It
//! is sent to the replicas of the last slice, each of which vouches for it if it found the same answers. f+1 signatures
//! certify it. What cannot be certified in [`TRIES`] tries, because replicas forgot in a restart what they computed, is kept
//! with the signatures it got, and the chain goes on.
//!
//! It refuses to know the log and the links; time comes as an argument.

use std::time::Duration;

use butterfly_verify::checkpoint::CHECKPOINT_RECEIPTS_MAX;
use butterfly_verify::{
    Checkpoint, CheckpointCertificate, Collector, Digest, Epoch, NodeIndex, Proposal, SignError, SignatureBytes,
    Signer, Witness,
};

use crate::commit::Segment;

/// How long new receipts wait for a checkpoint at most, when they are fewer than fill one.
pub(crate) const EVERY: Duration = Duration::from_secs(10);
/// How long replicas have to vouch before they are asked again.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How often they are asked.
const TRIES: u32 = 3;

/// A checkpoint that is to be kept.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    /// The checkpoint, and who vouches for it.
    pub(crate) certificate: CheckpointCertificate,
    /// The number of its last receipt in the log.
    pub(crate) through: u64,
    /// Whether enough vouch for it.
    pub(crate) is_certified: bool,
}

/// The one checkpoint on its way, and the memory of those vouched for.
pub(crate) struct Checkpoints {
    receipts_max: usize,
    pub(crate) witness: Witness,
    pending: Option<Pending>,
    /// When the last one was begun.
    last: Duration,
}

struct Pending {
    collector: Collector,
    proposal: Proposal,
    through: u64,
    so_far: CheckpointCertificate,
    tries: u32,
    asked: Duration,
    is_kept: bool,
}

impl Checkpoints {
    /// Checkpoints over at most so many receipts.
    pub(crate) fn new(receipts_max: usize) -> Self {
        Self {
            receipts_max: receipts_max.clamp(1, CHECKPOINT_RECEIPTS_MAX),
            witness: Witness::default(),
            pending: None,
            last: Duration::ZERO,
        }
    }

    /// Receipts of one checkpoint at most.
    pub(crate) fn receipts_max(&self) -> usize {
        self.receipts_max
    }

    /// Whether a segment should be begun: `uncovered` receipts are in no checkpoint yet, and `covered` are.
    pub(crate) fn is_due(&mut self, now: Duration, uncovered: u64, covered: u64) -> bool {
        if self.pending.as_ref().is_some_and(|pending| pending.is_kept && pending.through <= covered) {
            self.pending = None;
        }
        let is_full = uncovered >= self.receipts_max as u64;
        self.pending.is_none() && uncovered > 0 && (is_full || now.saturating_sub(self.last) >= EVERY)
    }

    /// Begins a checkpoint over a segment. Returns what is sent to the replicas of the last slice.
    pub(crate) fn begin(
        &mut self,
        now: Duration,
        epoch: &Epoch,
        signer: &Signer,
        segment: Segment,
    ) -> Result<Option<Proposal>, SignError> {
        self.last = now;
        let Segment { sequence, previous, entries, through } = segment;
        let Some(checkpoint) = Checkpoint::over(epoch, signer.index(), sequence, previous, &entries) else {
            return Ok(None);
        };
        let proposal = Proposal { checkpoint, entries, signature: signer.sign_checkpoint(epoch, &checkpoint)? };
        self.pending = Some(Pending {
            collector: Collector::new(epoch, checkpoint),
            proposal: proposal.clone(),
            through,
            so_far: CheckpointCertificate { checkpoint, signatures: Vec::new() },
            tries: 1,
            asked: now,
            is_kept: false,
        });
        Ok(Some(proposal))
    }

    /// Takes a signature under the checkpoint of this digest. Returns it when that makes it certified.
    pub(crate) fn vouched(
        &mut self,
        epoch: &Epoch,
        signer: NodeIndex,
        digest: &Digest,
        signature: SignatureBytes,
    ) -> Option<Kept> {
        let pending = self.pending.as_mut().filter(|pending| !pending.is_kept)?;
        if pending.collector.digest() != *digest {
            return None;
        }
        match pending.collector.add(epoch, signer, signature) {
            Ok(Some(certificate)) => {
                pending.is_kept = true;
                Some(Kept { certificate, through: pending.through, is_certified: true })
            }
            Ok(None) => {
                pending.so_far.signatures.push((signer, signature));
                None
            }
            Err(error) => {
                tracing::warn!(%error, "a signature under a checkpoint does not hold");
                None
            }
        }
    }

    /// What to do when nobody answered in time: ask again, or keep what there is.
    pub(crate) fn overdue(&mut self, now: Duration) -> Option<Overdue> {
        let pending = self.pending.as_mut().filter(|pending| !pending.is_kept)?;
        if now.saturating_sub(pending.asked) < ANSWER_WITHIN {
            return None;
        }
        if pending.tries < TRIES {
            pending.tries += 1;
            pending.asked = now;
            return Some(Overdue::AskAgain(pending.proposal.clone()));
        }
        pending.is_kept = true;
        let certificate = pending.so_far.clone();
        Some(Overdue::GiveUp(Kept { certificate, through: pending.through, is_certified: false }))
    }
}

/// See [`Checkpoints::overdue`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Overdue {
    /// Some did not hear it, or their word did not come.
    AskAgain(Proposal),
    /// It is not certified, and will not be.
    GiveUp(Kept),
}

#[cfg(test)]
mod tests {
    use butterfly_verify::Entry;
    use k256::ecdsa::SigningKey;

    use super::*;

    fn segment(sequence: u64, through: u64) -> Segment {
        let entries = vec![Entry { rd: Digest([1; 32]), answer_root: Digest([2; 32]) }];
        Segment { sequence, previous: Digest::default(), entries, through }
    }

    #[test]
    fn a_segment_is_due_when_it_is_full_or_old_and_one_at_a_time() {
        let epoch = crate::ingest::fixture::epoch(4096);
        let signer = Signer::new(SigningKey::from_slice(&[1; 32]).unwrap(), NodeIndex(0), &epoch).unwrap();
        let mut checkpoints = Checkpoints::new(8);
        let second = Duration::from_secs(1);
        assert!(!checkpoints.is_due(9 * second, 5, 0));
        assert!(checkpoints.is_due(9 * second, 8, 0));
        assert!(checkpoints.is_due(10 * second, 1, 0));
        assert!(!checkpoints.is_due(10 * second, 0, 0), "nothing new");
        let proposal = checkpoints.begin(10 * second, &epoch, &signer, segment(1, 1)).unwrap().unwrap();
        assert!(!checkpoints.is_due(99 * second, 2000, 0), "one is on its way");
        assert_eq!(checkpoints.overdue(11 * second), None);
        assert_eq!(checkpoints.overdue(12 * second), Some(Overdue::AskAgain(proposal.clone())));
        let digest = proposal.checkpoint.digest(&epoch);
        assert_eq!(checkpoints.vouched(&epoch, NodeIndex(0), &Digest::default(), proposal.signature), None);
        let kept = checkpoints.vouched(&epoch, NodeIndex(0), &digest, proposal.signature).unwrap();
        assert!(kept.is_certified && kept.certificate.check(&epoch).is_ok());
        assert!(!checkpoints.is_due(99 * second, 2000, 0), "it is not in the log yet");
        assert!(checkpoints.is_due(99 * second, 2000, 1));
    }

    #[test]
    fn what_nobody_vouches_for_is_kept_as_it_is_and_the_chain_goes_on() {
        let epoch = crate::ingest::fixture::epoch(4096);
        let signer = Signer::new(SigningKey::from_slice(&[1; 32]).unwrap(), NodeIndex(0), &epoch).unwrap();
        let mut checkpoints = Checkpoints::new(8);
        let mut now = EVERY;
        checkpoints.begin(now, &epoch, &signer, segment(1, 1)).unwrap();
        for _ in 1..TRIES {
            now += ANSWER_WITHIN;
            assert!(matches!(checkpoints.overdue(now), Some(Overdue::AskAgain(_))));
        }
        now += ANSWER_WITHIN;
        let Some(Overdue::GiveUp(kept)) = checkpoints.overdue(now) else { panic!("asked for ever") };
        assert!(!kept.is_certified && kept.certificate.signatures.is_empty());
        assert!(checkpoints.is_due(now + EVERY, 1, 1));
    }
}
