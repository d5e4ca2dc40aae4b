//! One request's votes, from the first until after the verdict.
//!
//! [`Tally::handle`] takes one ballot whose signature has been checked and returns what follows from it. Rules:
//!
//! - Only members of a slice's replica set vote on it. A node's first vote counts; a second with the same input and
//!   another output is proof of a lie.
//! - A slice is certified by enough equal votes: same positions, input root and output root.
//! - A request is decided when every slice is certified, each output is the next input, boundary 0 is what the request and
//!   the answer give, and the answer's root is the last output. Once decided or failed, it stays so.
//! - Votes against a certified slice accuse their signer, before the verdict and after it.
//!
//! The tally knows no time: when to stop waiting is the caller's business, and [`Tally::missing`] names who is silent.
//! Memory is bounded: two votes per replica and slice, one answer per replica of the last slice.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::answer::Answer;
use crate::boundary::{boundary0, work_tag};
use crate::digest::Digest;
use crate::epoch::{Epoch, NodeIndex};
use crate::evidence::{Charge, Evidence, EvidenceKind, is_equivocation, tag_fits};
use crate::receipt::{RECEIPT_VERSION, Receipt, SliceCertificate, follows};
use crate::request::{Mode, Request};
use crate::rules::{Rule, Rules};
use crate::vote::{Claim, SignedBallot, SignedVote};

/// What follows from a ballot.
#[derive(Debug, Clone, PartialEq)]
pub enum TallyEvent {
    /// Enough equal votes on a slice.
    SliceCertified {
        /// The slice.
        slice: u16,
    },
    /// The request is certified. Comes once, and nothing about the answer changes after it.
    Decided {
        /// The proof.
        receipt: Receipt,
        /// The answer it proves.
        answer: Answer,
    },
    /// A node said something wrong.
    Accused(Evidence),
    /// The request can no longer be certified: verification failed. Comes once, and never after `Decided`.
    Impossible {
        /// The slice where it fails.
        slice: u16,
        /// How.
        reason: ImpossibleReason,
    },
    /// The ballot does not count.
    Ignored {
        /// Who signed it.
        signer: NodeIndex,
        /// The slice it names.
        slice: u16,
        /// Why.
        reason: IgnoredReason,
    },
}

/// How a request became impossible to certify.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ImpossibleReason {
    /// The replicas that have not voted cannot bring any group to enough votes.
    Split,
    /// Certified, but not from what the slice before it gave.
    Chain,
    /// Certified, but not from what the request and the answer give.
    Boundary0,
    /// Certified, but the answer is none to this request, or every replica voted and none sent it.
    Answer,
}

/// Why a ballot does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IgnoredReason {
    /// Signed in another epoch.
    OtherEpoch,
    /// A vote for another request.
    OtherRequest,
    /// A slice the plan does not have.
    UnknownSlice,
    /// Its signer does not hold the slice.
    NotMember,
    /// The vote counts, but the answer beside it does not have the root it names.
    WrongAnswer,
}

/// What an audit of one vote's work tag found.
#[derive(Debug, Clone, PartialEq)]
pub enum Audit {
    /// The tag is the one the work gives.
    Agrees,
    /// It is not, and an equal vote with a right tag bears witness.
    Accused(Evidence),
    /// The node has not voted on the slice, or nobody with an equal vote and a right tag can bear witness.
    Unknown,
}

/// The state of one request.
#[derive(Debug, Clone)]
pub struct Tally {
    epoch: Arc<Epoch>,
    request: Request,
    needed: usize,
    slices: Vec<SliceTally>,
    /// Answers that came with votes of the last slice whose root they have.
    answers: BTreeMap<Digest, Answer>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Decided,
    Failed,
}

#[derive(Debug, Clone, Default)]
struct SliceTally {
    heard: BTreeMap<NodeIndex, Heard>,
    /// The claim with most first votes, and how many.
    largest: Option<(Claim, usize)>,
    certified: Option<Claim>,
}

/// What one replica said about one slice.
#[derive(Debug, Clone)]
struct Heard {
    /// The vote that counts.
    first: SignedVote,
    /// The first vote after it that claims something else.
    second: Option<SignedVote>,
    /// What it has been accused of.
    accused: Vec<EvidenceKind>,
}

impl Tally {
    /// No votes yet.
    pub fn new(epoch: Arc<Epoch>, request: Request) -> Self {
        let max_byzantine = epoch.parts().max_byzantine;
        let needed = match epoch.rules().hold(Rule::Threshold) {
            true => request.mode.votes(max_byzantine),
            false => usize::from(max_byzantine).max(1),
        };
        let slices = vec![SliceTally::default(); epoch.parts().slices.len()];
        Self { epoch, request, needed, slices, answers: BTreeMap::new(), state: State::Open }
    }

    /// The request.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Whether the request was decided.
    pub fn is_decided(&self) -> bool {
        self.state == State::Decided
    }

    /// Whether the request can no longer be certified.
    pub fn is_failed(&self) -> bool {
        self.state == State::Failed
    }

    /// Takes one ballot and says what follows.
    pub fn handle(&mut self, ballot: SignedBallot) -> Vec<TallyEvent> {
        let mut events = Vec::new();
        let (signer, slice) = (ballot.signer(), ballot.vote().slice);
        if let Err(reason) = self.admit(&ballot) {
            events.push(TallyEvent::Ignored { signer, slice, reason });
            return events;
        }
        let SignedBallot { signed, answer, .. } = ballot;
        let output_root = signed.vote.output_root;
        let is_kept = self.record(slice, signed, &mut events);
        if let (true, Some(answer)) = (is_kept, answer)
            && !self.keep_answer(slice, output_root, answer)
        {
            events.push(TallyEvent::Ignored { signer, slice, reason: IgnoredReason::WrongAnswer });
        }
        self.certify(slice, &mut events);
        self.settle(&mut events);
        events
    }

    /// Every (slice, replica) that has not voted: unavailable as far as this tally knows, never accused of lying. Replicas
    /// that were not asked to compute are among them; only the caller knows whom it asked.
    pub fn missing(&self) -> Vec<(u16, NodeIndex)> {
        let mut missing = Vec::new();
        for (slice, tally) in (0_u16..).zip(&self.slices) {
            let silent = self.epoch.replicas(slice).iter().filter(|node| !tally.heard.contains_key(node));
            missing.extend(silent.map(|node| (slice, *node)));
        }
        missing
    }

    /// Checks the work tag of a node's vote against the interior that the caller, who computed the slice from the same
    /// input, found.
    pub fn audit(&self, node: NodeIndex, slice: u16, interior: &Digest) -> Audit {
        let Some(tally) = self.slices.get(usize::from(slice)) else { return Audit::Unknown };
        let Some(heard) = tally.heard.get(&node) else { return Audit::Unknown };
        if tag_fits(&heard.first, interior) || (!self.rules().hold(Rule::TagNode) && self.is_copied(heard, interior)) {
            return Audit::Agrees;
        }
        let claim = heard.first.vote.claim();
        let witness = tally
            .heard
            .values()
            .map(|heard| &heard.first)
            .find(|other| other.vote.claim() == claim && tag_fits(other, interior));
        match witness {
            None => Audit::Unknown,
            Some(witness) => {
                let (vote, witness) = (Box::new(heard.first.clone()), Box::new(witness.clone()));
                let charge = Charge::WrongTag { vote, witness, interior: *interior };
                Audit::Accused(Evidence::new(&self.epoch, node, charge))
            }
        }
    }

    /// Whether a tag is the one that another replica would have made.
    fn is_copied(&self, heard: &Heard, interior: &Digest) -> bool {
        let vote = &heard.first.vote;
        let tag_of = |node: &NodeIndex| work_tag(*node, &vote.rd, vote.slice, vote.positions, interior);
        self.epoch.replicas(vote.slice).iter().any(|node| tag_of(node) == vote.tag)
    }

    fn rules(&self) -> Rules {
        self.epoch.rules()
    }

    fn admit(&self, ballot: &SignedBallot) -> Result<(), IgnoredReason> {
        let (vote, rules) = (ballot.vote(), self.rules());
        if ballot.epoch() != self.epoch.digest() && rules.hold(Rule::Epoch) {
            return Err(IgnoredReason::OtherEpoch);
        }
        if vote.rd != self.request.digest() && rules.hold(Rule::Request) {
            return Err(IgnoredReason::OtherRequest);
        }
        if usize::from(vote.slice) >= self.slices.len() {
            return Err(IgnoredReason::UnknownSlice);
        }
        if !self.epoch.replicas(vote.slice).contains(&ballot.signer()) && rules.hold(Rule::Membership) {
            return Err(IgnoredReason::NotMember);
        }
        Ok(())
    }

    /// Notes a vote; finds equivocation, and contradiction of what is certified already. Returns whether the vote is one
    /// of the two kept of its signer.
    fn record(&mut self, slice: u16, signed: SignedVote, events: &mut Vec<TallyEvent>) -> bool {
        let Some(tally) = self.slices.get_mut(usize::from(slice)) else { return false };
        let signer = signed.signer;
        let claim = signed.vote.claim();
        let Some(heard) = tally.heard.get_mut(&signer) else {
            tally.heard.insert(signer, Heard { first: signed, second: None, accused: Vec::new() });
            let equal = tally.heard.values().filter(|heard| heard.first.vote.claim() == claim).count();
            if equal > tally.largest.map_or(0, |(_, count)| count) {
                tally.largest = Some((claim, equal));
            }
            self.accuse(slice, signer, events);
            return true;
        };
        if heard.votes().any(|vote| vote.vote.claim() == claim) {
            return true;
        }
        let is_charged = heard.accused.contains(&EvidenceKind::Equivocation);
        let other = heard.votes().find(|vote| !is_charged && is_equivocation(&vote.vote, &signed.vote)).cloned();
        if let Some(other) = other {
            heard.accused.push(EvidenceKind::Equivocation);
            let charge = Charge::Equivocation { first: Box::new(other), second: Box::new(signed.clone()) };
            events.push(TallyEvent::Accused(Evidence::new(&self.epoch, signer, charge)));
        }
        let is_second = heard.second.is_none();
        if is_second {
            heard.second = Some(signed);
            self.accuse(slice, signer, events);
        }
        is_second
    }

    /// Keeps the answer beside a kept vote of the last slice. Returns whether it is the one the vote names.
    fn keep_answer(&mut self, slice: u16, output_root: Digest, answer: Answer) -> bool {
        let is_last = usize::from(slice).saturating_add(1) == self.slices.len();
        if !is_last || self.state != State::Open || self.answers.contains_key(&output_root) {
            return true;
        }
        if answer.root() != output_root && self.rules().hold(Rule::AnswerRoot) {
            return false;
        }
        self.answers.insert(output_root, answer);
        true
    }

    /// Certifies a slice if its votes do, and accuses whoever contradicts.
    fn certify(&mut self, slice: u16, events: &mut Vec<TallyEvent>) {
        let needed = self.needed;
        let Some(tally) = self.slices.get_mut(usize::from(slice)) else { return };
        let (None, Some((claim, count))) = (tally.certified, tally.largest) else { return };
        if count >= needed {
            tally.certified = Some(claim);
            events.push(TallyEvent::SliceCertified { slice });
            let nodes: Vec<NodeIndex> = tally.heard.keys().copied().collect();
            nodes.into_iter().for_each(|node| self.accuse(slice, node, events));
            return;
        }
        let replicas = self.epoch.replicas(slice);
        let silent = replicas.iter().filter(|node| !tally.heard.contains_key(node)).count();
        if count.saturating_add(silent) < needed {
            self.fail(slice, ImpossibleReason::Split, events);
        }
    }

    /// Charges a node with what it said against a certified slice, each kind once.
    fn accuse(&mut self, slice: u16, node: NodeIndex, events: &mut Vec<TallyEvent>) {
        // One vote certifies nothing against another.
        let full = Mode::Full.votes(self.epoch.parts().max_byzantine);
        let Some(tally) = self.slices.get_mut(usize::from(slice)) else { return };
        let Some(certified) = tally.certified.filter(|_| self.needed == full) else { return };
        let Some(heard) = tally.heard.get(&node) else { return };
        let against: Vec<SignedVote> = heard.votes().filter(|vote| vote.vote.claim() != certified).cloned().collect();
        for signed in against {
            let Some(certificate) = tally.certificate(&certified, full) else { return };
            let Some(heard) = tally.heard.get_mut(&node) else { return };
            let is_output = signed.vote.claim().same_input(&certified);
            let kind = if is_output { EvidenceKind::WrongOutput } else { EvidenceKind::WrongInput };
            // Proof of the same lie says all that a contradicted output could add.
            let is_proven = is_output && heard.accused.contains(&EvidenceKind::Equivocation);
            if heard.accused.contains(&kind) || is_proven {
                continue;
            }
            heard.accused.push(kind);
            let vote = Box::new(signed);
            let charge = match is_output {
                true => Charge::WrongOutput { vote, certificate },
                false => Charge::WrongInput { vote, certificate },
            };
            events.push(TallyEvent::Accused(Evidence::new(&self.epoch, node, charge)));
        }
    }

    /// Decides the request, or finds that it cannot be, as far as the certified slices say.
    fn settle(&mut self, events: &mut Vec<TallyEvent>) {
        if self.state != State::Open {
            return;
        }
        if let Some(slice) = self.broken_chain() {
            return self.fail(slice, ImpossibleReason::Chain, events);
        }
        let certified: Option<Vec<Claim>> = self.slices.iter().map(|tally| tally.certified).collect();
        let ends = certified.as_deref().and_then(|claims| Some((*claims.first()?, *claims.last()?)));
        let Some((first, last)) = ends else { return };
        let last_slice = u16::try_from(self.slices.len().saturating_sub(1)).unwrap_or(u16::MAX);
        let Some(answer) = self.answers.remove(&last.output_root) else {
            let all_voted = self.missing().iter().all(|(slice, _)| *slice != last_slice);
            if all_voted {
                self.fail(last_slice, ImpossibleReason::Answer, events);
            }
            return;
        };
        let Ok((positions, root)) = boundary0(&self.request, &answer) else {
            return self.fail(last_slice, ImpossibleReason::Answer, events);
        };
        let wrong_positions = first.positions != positions && self.rules().hold(Rule::Positions);
        if wrong_positions || (first.input_root != root && self.rules().hold(Rule::Boundary0)) {
            return self.fail(0, ImpossibleReason::Boundary0, events);
        }
        if let Some(receipt) = self.receipt(last.output_root) {
            self.state = State::Decided;
            self.answers.clear();
            events.push(TallyEvent::Decided { receipt, answer });
        }
    }

    /// The first slice that is certified, as is the one before it, and does not go on from it.
    fn broken_chain(&self) -> Option<u16> {
        if !self.rules().hold(Rule::Chain) {
            return None;
        }
        let pairs = self.slices.iter().zip(self.slices.iter().skip(1));
        (1_u16..).zip(pairs).find_map(|(slice, (before, after))| {
            let (before, after) = (before.certified?, after.certified?);
            (!follows(&before, &after)).then_some(slice)
        })
    }

    fn fail(&mut self, slice: u16, reason: ImpossibleReason, events: &mut Vec<TallyEvent>) {
        if self.state == State::Open {
            self.state = State::Failed;
            self.answers.clear();
            events.push(TallyEvent::Impossible { slice, reason });
        }
    }

    fn receipt(&self, answer_root: Digest) -> Option<Receipt> {
        let slices: Option<Vec<SliceCertificate>> =
            self.slices.iter().map(|tally| tally.certificate(&tally.certified?, self.needed)).collect();
        Some(Receipt {
            version: RECEIPT_VERSION,
            epoch: self.epoch.digest(),
            rd: self.request.digest(),
            mode: self.request.mode,
            answer_root,
            slices: slices?,
        })
    }
}

impl Heard {
    /// The votes kept, the one that counts first.
    fn votes(&self) -> impl Iterator<Item = &SignedVote> {
        std::iter::once(&self.first).chain(&self.second)
    }
}

impl SliceTally {
    /// The first votes for a claim by order of signers, exactly as many as needed.
    fn certificate(&self, claim: &Claim, needed: usize) -> Option<SliceCertificate> {
        let equal = self.heard.values().map(|heard| &heard.first).filter(|signed| signed.vote.claim() == *claim);
        let votes: Vec<SignedVote> = equal.take(needed).cloned().collect();
        (votes.len() == needed).then_some(SliceCertificate { votes })
    }
}

#[cfg(test)]
mod tests;
