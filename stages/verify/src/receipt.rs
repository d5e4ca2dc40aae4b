//! The offline proof of an answer: for each slice, the votes that certified it.
//!
//! A receipt is data from anyone until [`Receipt::verify`] has checked it against an epoch; it needs no model, no
//! tokenizer and no network. A request of mode `none` has one vote per slice: its receipt is checked like any other, but
//! [`Verified::is_verified`] says no. A receipt does not prove that its answer is the only one asked for, or when it was.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::answer::{Answer, Misfit};
use crate::boundary::boundary0;
use crate::digest::Digest;
use crate::epoch::{Epoch, NodeIndex};
use crate::request::{Mode, Request};
use crate::rules::Rule;
use crate::text::{self, JsonError};
use crate::vote::{Claim, SignedVote, VoteFault};

/// The version of the receipt's form.
pub const RECEIPT_VERSION: u32 = 1;

/// Votes of different members of one replica set for the same input and output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceCertificate {
    /// As many votes as certify, by signer, strictly ascending.
    pub votes: Vec<SignedVote>,
}

/// The proof that an answer was certified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// [`RECEIPT_VERSION`].
    pub version: u32,
    /// The digest of the epoch.
    pub epoch: Digest,
    /// The digest of the request.
    pub rd: Digest,
    /// The mode of the request.
    pub mode: Mode,
    /// The root of the answer.
    pub answer_root: Digest,
    /// One certificate for each slice, in order.
    pub slices: Vec<SliceCertificate>,
}

/// What a receipt was found to prove.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// The mode of the request, which decides how many votes were needed.
    pub mode: Mode,
    /// f of the epoch.
    pub max_byzantine: u16,
    /// Votes per slice.
    pub votes_per_slice: usize,
    /// Slices.
    pub slices: usize,
    /// Positions covered.
    pub positions: u32,
    /// Whether the request was given and is the one certified.
    pub request: bool,
    /// Whether the answer was given and is the one certified.
    pub answer: bool,
}

impl Verified {
    /// Whether more than one node stands behind the answer, so that it is right unless more than f lie.
    pub fn is_verified(&self) -> bool {
        self.mode != Mode::None && self.max_byzantine > 0
    }

    /// Whether the token loop was checked too: that needs the request and the answer.
    pub fn is_complete(&self) -> bool {
        self.request && self.answer
    }
}

/// Which part of a receipt does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptFault {
    /// Another version.
    #[error("version: {found}, but this program knows {RECEIPT_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Another epoch.
    #[error("epoch: the receipt is of epoch {found}, not {expected}")]
    Epoch {
        /// The receipt's.
        found: Digest,
        /// The one given.
        expected: Digest,
    },
    /// Another number of slices than the epoch's plan.
    #[error("slices: {found} certificates, but the plan has {expected}")]
    Slices {
        /// Certificates found.
        found: usize,
        /// Slices of the plan.
        expected: usize,
    },
    /// A certificate does not hold.
    #[error("slice {slice}: {fault}")]
    Certificate {
        /// The slice.
        slice: usize,
        /// What does not hold.
        fault: CertificateFault,
    },
    /// The receipt names another request than its votes.
    #[error("rd: the receipt names another request than its votes")]
    Rd,
    /// What a slice got is not what the slice before it gave.
    #[error("slice {slice}: its input is not the output of the slice before it")]
    Chain {
        /// The slice that got it.
        slice: usize,
    },
    /// The receipt names another answer than the votes of the last slice.
    #[error("answer_root: the receipt names another answer than the votes of the last slice")]
    AnswerRoot,
    /// The request given is not the one certified.
    #[error("request: its digest is {found}, but {certified} was certified")]
    Request {
        /// Digest of the request given.
        found: Digest,
        /// The receipt's.
        certified: Digest,
    },
    /// The receipt names another mode than the request.
    #[error("mode: the receipt names another mode than the request")]
    Mode,
    /// The answer given is not the one certified.
    #[error("answer: its root is {found}, but {certified} was certified")]
    Answer {
        /// Root of the answer given.
        found: Digest,
        /// The receipt's.
        certified: Digest,
    },
    /// The answer cannot be one to the request.
    #[error("answer: {0}")]
    Misfit(#[from] Misfit),
    /// The positions are not those that the request and the answer give.
    #[error("positions: {found} certified, but the request and the answer give {expected}")]
    Positions {
        /// Certified.
        found: u32,
        /// Given.
        expected: u32,
    },
    /// What went into the first slice is not what the request and the answer give.
    #[error("boundary 0: what went into the first slice is not what the request and the answer give")]
    Boundary0,
}

/// Which part of a certificate does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateFault {
    /// Too few votes, or too many.
    #[error("count: {found} votes, but exactly {expected} certify")]
    Count {
        /// Votes found.
        found: usize,
        /// Votes needed.
        expected: usize,
    },
    /// The signers are not strictly ascending.
    #[error("vote {vote}: signers are not strictly ascending")]
    Order {
        /// The vote that is out of order.
        vote: usize,
    },
    /// A signer does not hold the slice.
    #[error("vote {vote}: signer {signer} does not hold this slice")]
    Member {
        /// The vote.
        vote: usize,
        /// Its signer.
        signer: NodeIndex,
    },
    /// A vote was not signed like this.
    #[error("vote {vote}: {fault}")]
    Vote {
        /// The vote.
        vote: usize,
        /// What does not hold.
        fault: VoteFault,
    },
    /// A vote is for another slice.
    #[error("vote {vote}: it is for another slice")]
    Slice {
        /// The vote.
        vote: usize,
    },
    /// A vote names another request, positions, input or output than the first.
    #[error("vote {vote}: it does not agree with the first")]
    Disagreement {
        /// The vote.
        vote: usize,
    },
}

impl Receipt {
    /// Checks everything that can be checked with what is given. With the request and the answer, that is everything.
    pub fn verify(
        &self,
        epoch: &Epoch,
        request: Option<&Request>,
        answer: Option<&Answer>,
    ) -> Result<Verified, ReceiptFault> {
        if self.version != RECEIPT_VERSION {
            return Err(ReceiptFault::Version { found: self.version });
        }
        let rules = epoch.rules();
        if self.epoch != epoch.digest() && rules.hold(Rule::Epoch) {
            return Err(ReceiptFault::Epoch { found: self.epoch, expected: epoch.digest() });
        }
        if self.slices.len() != epoch.parts().slices.len() {
            return Err(ReceiptFault::Slices { found: self.slices.len(), expected: epoch.parts().slices.len() });
        }
        let (first, last) = self.check_slices(epoch)?;
        if last.output_root != self.answer_root && rules.hold(Rule::AnswerRoot) {
            return Err(ReceiptFault::AnswerRoot);
        }
        self.check_given(request, answer)?;
        if let (Some(request), Some(answer)) = (request, answer) {
            let (expected, root) = boundary0(request, answer)?;
            if first.positions != expected && rules.hold(Rule::Positions) {
                return Err(ReceiptFault::Positions { found: first.positions, expected });
            }
            if first.input_root != root && rules.hold(Rule::Boundary0) {
                return Err(ReceiptFault::Boundary0);
            }
        }
        Ok(Verified {
            mode: self.mode,
            max_byzantine: epoch.parts().max_byzantine,
            votes_per_slice: self.mode.votes(epoch.parts().max_byzantine),
            slices: self.slices.len(),
            positions: first.positions,
            request: request.is_some(),
            answer: answer.is_some(),
        })
    }

    /// Every certificate, and that each goes on from the one before it. Returns the first and the last claim.
    fn check_slices(&self, epoch: &Epoch) -> Result<(Claim, Claim), ReceiptFault> {
        let needed = self.mode.votes(epoch.parts().max_byzantine);
        let mut ends: Option<(Claim, Claim)> = None;
        for (slice, certificate) in self.slices.iter().enumerate() {
            let index = u16::try_from(slice).unwrap_or(u16::MAX);
            let (rd, claim) =
                certificate.check(epoch, index, needed).map_err(|fault| ReceiptFault::Certificate { slice, fault })?;
            if rd != self.rd && epoch.rules().hold(Rule::Request) {
                return Err(ReceiptFault::Rd);
            }
            let first = match ends {
                Some((_, before)) if !follows(&before, &claim) && epoch.rules().hold(Rule::Chain) => {
                    return Err(ReceiptFault::Chain { slice });
                }
                Some((first, _)) => first,
                None => claim,
            };
            ends = Some((first, claim));
        }
        ends.ok_or(ReceiptFault::Slices { found: 0, expected: epoch.parts().slices.len() })
    }

    fn check_given(&self, request: Option<&Request>, answer: Option<&Answer>) -> Result<(), ReceiptFault> {
        if let Some(request) = request {
            if request.digest() != self.rd {
                return Err(ReceiptFault::Request { found: request.digest(), certified: self.rd });
            }
            if request.mode != self.mode {
                return Err(ReceiptFault::Mode);
            }
        }
        if let Some(answer) = answer {
            let found = answer.root();
            if found != self.answer_root {
                return Err(ReceiptFault::Answer { found, certified: self.answer_root });
            }
        }
        Ok(())
    }

    /// Reads the JSON form. What it says is not checked.
    pub fn from_json(text: &str) -> Result<Self, JsonError> {
        text::from_json(text)
    }

    /// Writes the JSON form.
    pub fn to_json(&self) -> String {
        text::to_json(self)
    }
}

/// Whether a slice's claim goes on from the claim of the slice before it.
pub(crate) fn follows(before: &Claim, after: &Claim) -> bool {
    before.output_root == after.input_root && before.positions == after.positions
}

impl SliceCertificate {
    /// Checks that exactly `needed` members of the replica set signed one claim; returns the request and the claim.
    pub(crate) fn check(&self, epoch: &Epoch, slice: u16, needed: usize) -> Result<(Digest, Claim), CertificateFault> {
        let rules = epoch.rules();
        let needed = if rules.hold(Rule::Threshold) { needed } else { self.votes.len() };
        let first = match self.votes.first() {
            Some(first) if self.votes.len() == needed => first,
            _ => return Err(CertificateFault::Count { found: self.votes.len(), expected: needed }),
        };
        let replicas = epoch.replicas(slice);
        let mut before: Option<NodeIndex> = None;
        for (vote, signed) in self.votes.iter().enumerate() {
            let signer = signed.signer;
            if before.is_some_and(|before| before >= signer) && rules.hold(Rule::Distinct) {
                return Err(CertificateFault::Order { vote });
            }
            before = Some(signer);
            if !replicas.contains(&signer) && rules.hold(Rule::Membership) {
                return Err(CertificateFault::Member { vote, signer });
            }
            signed.check(epoch).map_err(|fault| CertificateFault::Vote { vote, fault })?;
            if signed.vote.slice != slice && rules.hold(Rule::Slice) {
                return Err(CertificateFault::Slice { vote });
            }
            if signed.vote.rd != first.vote.rd || signed.vote.claim() != first.vote.claim() {
                return Err(CertificateFault::Disagreement { vote });
            }
        }
        Ok((first.vote.rd, first.vote.claim()))
    }
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (votes, slices, faults) = (self.votes_per_slice, self.slices, self.max_byzantine);
        if self.is_verified() {
            write!(
                f,
                "verified: {votes} equal votes on each of {slices} slices, right unless more than {faults} of a slice lie"
            )
        } else {
            write!(f, "not verified: one node's word for each of {slices} slices")
        }
    }
}

#[cfg(test)]
mod tests;
