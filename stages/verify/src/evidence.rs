//! The offline proof that a node said something wrong.
//!
//! Evidence carries the signed votes it rests on and is checked by anyone with the epoch. Two answers of one node to one
//! question are proof of a lie. A vote that f+1 others contradict is not quite: a faulty kernel could frame an honest
//! node, so it is a reason for quarantine and for showing the operator. Silence is never evidence.

use serde::{Deserialize, Serialize};

use crate::boundary::work_tag;
use crate::digest::Digest;
use crate::epoch::{Epoch, NodeIndex};
use crate::receipt::{CertificateFault, SliceCertificate};
use crate::request::Mode;
use crate::rules::Rule;
use crate::text::{self, JsonError};
use crate::vote::{SignedVote, Vote, VoteFault};

/// The version of the evidence's form.
pub const EVIDENCE_VERSION: u32 = 1;

/// A charge against one node of one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// [`EVIDENCE_VERSION`].
    pub version: u32,
    /// The digest of the epoch.
    pub epoch: Digest,
    /// The node charged.
    pub accused: NodeIndex,
    /// What it is charged with, and the votes that show it.
    pub charge: Charge,
}

/// What a node is charged with, and the votes that show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Charge {
    /// Two votes for the same request, slice, positions and input, with different outputs.
    Equivocation {
        /// One vote of the accused.
        first: Box<SignedVote>,
        /// The other.
        second: Box<SignedVote>,
    },
    /// A vote with the same input as f+1 equal ones and another output.
    WrongOutput {
        /// The vote of the accused.
        vote: Box<SignedVote>,
        /// The f+1 votes it contradicts.
        certificate: SliceCertificate,
    },
    /// A vote whose input or positions are not those for which f+1 votes certify its slice.
    WrongInput {
        /// The vote of the accused.
        vote: Box<SignedVote>,
        /// The f+1 votes it contradicts.
        certificate: SliceCertificate,
    },
    /// A vote that agrees, with a work tag that whoever did the work would not have made.
    WrongTag {
        /// The vote of the accused.
        vote: Box<SignedVote>,
        /// The equal vote of another, whose tag belongs to the interior.
        witness: Box<SignedVote>,
        /// What the witness says was computed inside.
        interior: Digest,
    },
}

/// A charge by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvidenceKind {
    /// See [`Charge::Equivocation`].
    Equivocation,
    /// See [`Charge::WrongOutput`].
    WrongOutput,
    /// See [`Charge::WrongInput`].
    WrongInput,
    /// See [`Charge::WrongTag`].
    WrongTag,
}

/// What follows from evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// Quarantine the node and show the operator: it lies, or its kernels are broken.
    Quarantine,
    /// No honest node signs this: exclude it at once.
    Proof,
}

impl EvidenceKind {
    /// The kind as a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Equivocation => "equivocation",
            Self::WrongOutput => "wrong_output",
            Self::WrongInput => "wrong_input",
            Self::WrongTag => "wrong_tag",
        }
    }

    /// What follows from evidence of this kind.
    pub fn grade(self) -> Grade {
        match self {
            Self::Equivocation => Grade::Proof,
            Self::WrongOutput | Self::WrongInput | Self::WrongTag => Grade::Quarantine,
        }
    }
}

/// Which part of evidence does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceFault {
    /// Another version.
    #[error("version: {found}, but this program knows {EVIDENCE_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Another epoch.
    #[error("epoch: the evidence is of epoch {found}, not {expected}")]
    Epoch {
        /// The evidence's.
        found: Digest,
        /// The one given.
        expected: Digest,
    },
    /// A vote is not the accused's.
    #[error("accused: a vote is signed by {signer}, not by the accused")]
    Accused {
        /// Who signed it.
        signer: NodeIndex,
    },
    /// A vote was not signed like this.
    #[error("vote: {0}")]
    Vote(#[from] VoteFault),
    /// The certificate does not hold.
    #[error("certificate: {0}")]
    Certificate(#[from] CertificateFault),
    /// The votes are not for the same request and slice, or the accused does not hold the slice.
    #[error("votes: not for one request and one slice that the accused holds")]
    Unrelated,
    /// The votes do not show what the accused is charged with.
    #[error("charge: the votes do not show it")]
    Unfounded,
}

impl Evidence {
    pub(crate) fn new(epoch: &Epoch, accused: NodeIndex, charge: Charge) -> Self {
        Self { version: EVIDENCE_VERSION, epoch: epoch.digest(), accused, charge }
    }

    /// The charge by name.
    pub fn kind(&self) -> EvidenceKind {
        match self.charge {
            Charge::Equivocation { .. } => EvidenceKind::Equivocation,
            Charge::WrongOutput { .. } => EvidenceKind::WrongOutput,
            Charge::WrongInput { .. } => EvidenceKind::WrongInput,
            Charge::WrongTag { .. } => EvidenceKind::WrongTag,
        }
    }

    /// What follows if it holds.
    pub fn grade(&self) -> Grade {
        self.kind().grade()
    }

    /// The vote of the accused; the first of two.
    pub fn vote(&self) -> &Vote {
        match &self.charge {
            Charge::Equivocation { first: vote, .. }
            | Charge::WrongOutput { vote, .. }
            | Charge::WrongInput { vote, .. }
            | Charge::WrongTag { vote, .. } => &vote.vote,
        }
    }

    /// Checks that the votes are signed and show the charge.
    pub fn verify(&self, epoch: &Epoch) -> Result<Grade, EvidenceFault> {
        if self.version != EVIDENCE_VERSION {
            return Err(EvidenceFault::Version { found: self.version });
        }
        if self.epoch != epoch.digest() && epoch.rules().hold(Rule::Epoch) {
            return Err(EvidenceFault::Epoch { found: self.epoch, expected: epoch.digest() });
        }
        let shown = match &self.charge {
            Charge::Equivocation { first, second } => {
                self.check_own(epoch, first)?;
                self.check_own(epoch, second)?;
                related(&first.vote, &second.vote)?;
                is_equivocation(&first.vote, &second.vote)
            }
            Charge::WrongOutput { vote, certificate } => {
                let by = self.check_against(epoch, vote, certificate)?;
                vote.vote.claim().same_input(&by.claim()) && vote.vote.output_root != by.output_root
            }
            Charge::WrongInput { vote, certificate } => {
                let by = self.check_against(epoch, vote, certificate)?;
                !vote.vote.claim().same_input(&by.claim())
            }
            Charge::WrongTag { vote, witness, interior } => {
                self.check_own(epoch, vote)?;
                witness.check(epoch)?;
                related(&vote.vote, &witness.vote)?;
                vote.vote.claim() == witness.vote.claim()
                    && epoch.replicas(witness.vote.slice).contains(&witness.signer)
                    && tag_fits(witness, interior)
                    && !tag_fits(vote, interior)
            }
        };
        if shown { Ok(self.grade()) } else { Err(EvidenceFault::Unfounded) }
    }

    fn check_own(&self, epoch: &Epoch, vote: &SignedVote) -> Result<(), EvidenceFault> {
        if vote.signer != self.accused {
            return Err(EvidenceFault::Accused { signer: vote.signer });
        }
        if !epoch.replicas(vote.vote.slice).contains(&vote.signer) {
            return Err(EvidenceFault::Unrelated);
        }
        Ok(vote.check(epoch)?)
    }

    /// The accused's vote against a certificate of its slice; returns one of the certificate's votes.
    fn check_against<'a>(
        &self,
        epoch: &Epoch,
        vote: &SignedVote,
        certificate: &'a SliceCertificate,
    ) -> Result<&'a Vote, EvidenceFault> {
        self.check_own(epoch, vote)?;
        let needed = Mode::Full.votes(epoch.parts().max_byzantine);
        certificate.check(epoch, vote.vote.slice, needed)?;
        let by = certificate.votes.first().ok_or(EvidenceFault::Unfounded)?;
        related(&vote.vote, &by.vote)?;
        Ok(&by.vote)
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

/// Whether two votes of one node are different answers to one question.
pub(crate) fn is_equivocation(first: &Vote, second: &Vote) -> bool {
    first.claim().same_input(&second.claim()) && first.output_root != second.output_root
}

/// Whether a vote's tag is the one its signer would make from this interior.
pub(crate) fn tag_fits(signed: &SignedVote, interior: &Digest) -> bool {
    let vote = &signed.vote;
    vote.tag == work_tag(signed.signer, &vote.rd, vote.slice, vote.positions, interior)
}

fn related(one: &Vote, other: &Vote) -> Result<(), EvidenceFault> {
    if one.rd == other.rd && one.slice == other.slice { Ok(()) } else { Err(EvidenceFault::Unrelated) }
}

#[cfg(test)]
mod tests;
