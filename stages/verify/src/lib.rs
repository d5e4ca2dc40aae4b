//! The protocol of votes, certificates, receipts and evidence, as pure functions and one state machine.
//!
//! Votes go in, votes and verdicts come out. Everything here is a function of its arguments: the crate knows no clock,
//! no thread, no socket and no file, refuses to know models and kernels, and imports nothing of the workspace. What
//! others sent is never trusted before it has been checked here, and no input of theirs can make it panic.
//!
//! | part | module |
//! | --- | --- |
//! | what is fixed before any request: roster, plan, model, limits | [`epoch`] |
//! | what is asked and what is answered | [`request`], [`answer`] |
//! | running roots of what passes between slices, and the work tag | [`boundary`] |
//! | one node's claim about one slice | [`vote`] |
//! | batches under one signature, made and opened | [`sign`] |
//! | one request's votes until the verdict, and after it | [`tally`] |
//! | offline proof of an answer | [`receipt`] |
//! | offline proof of a lie | [`evidence`] |
//! | what a gateway certified so far, vouched for by others | [`checkpoint`] |
//!
//! Invariants:
//!
//! - Everything signed or hashed is bytes of the canonical codec: `decode(encode(x)) == x`, and bytes that decode encode
//!   to themselves.
//! - Each kind of thing is hashed under a purpose of its own, and everything signed also under the digest of its epoch.
//! - In a build that is not this crate's own test, no rule of the protocol can be switched off.

pub mod answer;
pub mod boundary;
pub mod checkpoint;
mod codec;
pub mod digest;
pub mod epoch;
pub mod evidence;
pub mod limits;
mod merkle;
pub mod receipt;
pub mod request;
mod rules;
pub mod sign;
pub mod tally;
mod text;
pub mod vote;

#[cfg(test)]
mod sim;

pub use answer::{Answer, Finish, Misfit};
pub use boundary::{BoundaryRoot, Interior, boundary0, work_tag};
pub use checkpoint::{Checkpoint, CheckpointCertificate, CheckpointFault, Collector, Entry, Proposal, Witness};
pub use codec::{DecodeError, DecodeProblem};
pub use digest::Digest;
pub use epoch::{Epoch, EpochError, EpochParts, Limits, Member, NodeIndex, OverLimit, PublicKey, SliceReplicas};
pub use evidence::{Charge, Evidence, EvidenceFault, EvidenceKind, Grade};
pub use receipt::{CertificateFault, Receipt, ReceiptFault, SliceCertificate, Verified};
pub use request::{Input, Mode, Params, Request, RequestError, RequestParts};
pub use sign::{OpenError, PrePrepare, SealedBallots, SignError, Signer};
pub use tally::{Audit, IgnoredReason, ImpossibleReason, Tally, TallyEvent};
pub use text::JsonError;
pub use vote::{Ballot, BatchProof, SignatureBytes, SignedBallot, SignedVote, Vote, VoteFault};
