//! One request of this gateway while its votes come in.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::telemetry::{VerificationLabels, VerificationResult};
use butterfly_topology::NodeId;
use butterfly_verify::{Answer, Audit, Epoch, Evidence, NodeIndex, Receipt, Request, SignedBallot, Tally, TallyEvent};

use crate::compute::Gate;
use crate::consensus::audit::Audits;
use crate::model::Sampled;
use crate::services::Services;

/// How long the last tokens are waited for after the answer was decided.
const LAST_TOKENS: Duration = Duration::from_secs(2);

/// What follows from a ballot.
pub(crate) enum Verdict {
    /// One more slice is certified.
    SliceCertified,
    /// Every slice is certified.
    Certified { receipt: Receipt, answer: Answer },
    /// Every slice is certified, but too few replicas of the last one sent the log-probabilities.
    Incomplete,
    /// The replicas of the slice contradict each other beyond repair.
    Impossible { slice: u16 },
    /// A node was caught.
    Accused(Evidence),
}

/// The state of one request.
pub(crate) struct Open {
    tally: Tally,
    /// Tokens of the replicas of the last slice; `need` equal ones are released.
    tokens: Gate<Sampled>,
    /// What was decided, and when, while tokens are still to be released.
    held: Option<(Duration, Receipt, Answer)>,
    audited: BTreeSet<(u16, NodeIndex)>,
    bad_tags: BTreeMap<(u16, NodeIndex), BTreeSet<NodeIndex>>,
    voted: BTreeSet<(u16, NodeIndex)>,
    settled_at: Option<Duration>,
    needed: usize,
}

impl Open {
    pub(crate) fn new(epoch: Arc<Epoch>, request: Request, last: Vec<NodeId>) -> Self {
        let needed = request.mode.votes(epoch.parts().max_byzantine);
        let scored = u32::try_from(request.scored_tokens()).unwrap_or(u32::MAX);
        let tokens = Gate::new(last, needed, scored.saturating_add(request.params.max_tokens));
        Self {
            tally: Tally::new(epoch, request),
            tokens,
            held: None,
            audited: BTreeSet::new(),
            bad_tags: BTreeMap::new(),
            voted: BTreeSet::new(),
            settled_at: None,
            needed,
        }
    }

    /// When the request was decided, failed or abandoned.
    pub(crate) fn settled_at(&self) -> Option<Duration> {
        self.settled_at
    }

    /// Nothing more is decided about it.
    pub(crate) fn settle(&mut self, now: Duration) {
        self.settled_at.get_or_insert(now);
    }

    /// Takes a ballot into the tally and audits tags as far as the own outcome allows.
    pub(crate) fn ballot(
        &mut self,
        ballot: SignedBallot,
        audits: &Audits,
        services: &Services,
        now: Duration,
    ) -> Vec<Verdict> {
        let (slice, signer) = (ballot.vote().slice, ballot.signer());
        self.voted.insert((slice, signer));
        let mut verdicts = Vec::new();
        let was_settled = self.settled_at.is_some();
        let mut accused = false;
        for event in self.tally.handle(ballot) {
            match event {
                TallyEvent::Decided { receipt, answer } if !was_settled => {
                    self.held = Some((now, receipt, answer));
                    verdicts.extend(self.certified(now));
                }
                TallyEvent::Impossible { slice, .. } if !was_settled => {
                    self.settle(now);
                    verdicts.push(Verdict::Impossible { slice });
                }
                TallyEvent::Accused(evidence) => {
                    accused |= evidence.accused == signer;
                    count(services, evidence.accused, VerificationResult::Mismatch);
                    verdicts.push(Verdict::Accused(evidence));
                }
                TallyEvent::SliceCertified { .. } => verdicts.push(Verdict::SliceCertified),
                TallyEvent::Decided { .. } | TallyEvent::Impossible { .. } => {}
                TallyEvent::Ignored { signer, reason, .. } => {
                    tracing::debug!(?signer, ?reason, "a vote does not count")
                }
            }
        }
        if !accused {
            count(services, signer, VerificationResult::Agree);
        }
        if let Some(interior) = audits.interior(&self.tally.request().digest(), slice) {
            let voters: Vec<NodeIndex> =
                self.voted.iter().filter(|(of, _)| *of == slice).map(|(_, node)| *node).collect();
            for node in voters.into_iter().filter(|node| *node != services.index) {
                if self.audited.contains(&(slice, node)) {
                    continue;
                }
                match self.tally.audit(node, slice, interior) {
                    Audit::Agrees => {
                        self.audited.insert((slice, node));
                        services.standing.agreed(node);
                    }
                    Audit::Accused(evidence) => {
                        self.audited.insert((slice, node));
                        verdicts.push(Verdict::Accused(evidence));
                    }
                    Audit::Unknown => {}
                }
            }
        }
        verdicts
    }

    /// Takes sampled tokens. Returns those that enough replicas agree on, with the index of the first.
    pub(crate) fn delta(&mut self, from: &NodeId, index: u32, tokens: Vec<Sampled>) -> Option<(u32, Vec<Sampled>)> {
        for (offset, token) in (0u32..).zip(tokens) {
            self.tokens.offer(from, index.saturating_add(offset), token);
        }
        let first = self.tokens.next();
        let released: Vec<Sampled> = std::iter::from_fn(|| self.tokens.take()).collect();
        (!released.is_empty() && self.settled_at.is_none()).then_some((first, released))
    }

    /// What was decided, once it may be told. Log-probabilities come with the tokens and are not in the answer, so a request
    /// that asks for them waits a short while for tokens that f+1 replicas have voted for but not all sent. Without them it
    /// is not answered.
    pub(crate) fn certified(&mut self, now: Duration) -> Option<Verdict> {
        let (since, _, answer) = self.held.as_ref()?;
        let request = self.tally.request();
        let told = match answer {
            Answer::Text { tokens, .. } if request.params.logprobs.is_some() => request.scored_tokens() + tokens.len(),
            _ => 0,
        };
        let is_whole = self.tokens.next() as usize >= told;
        if !is_whole && now.saturating_sub(*since) < LAST_TOKENS {
            return None;
        }
        self.settle(now);
        let (_, receipt, answer) = self.held.take()?;
        Some(if is_whole { Verdict::Certified { receipt, answer } } else { Verdict::Incomplete })
    }

    /// Notes that a replica found another's tag wrong. Returns how many have.
    pub(crate) fn bad_tag(&mut self, slice: u16, accused: NodeIndex, reporter: NodeIndex) -> usize {
        let reporters = self.bad_tags.entry((slice, accused)).or_default();
        if reporters.insert(reporter) { reporters.len() } else { 0 }
    }

    /// A slice whose votes and replicas that live, or may be back in a moment, together no longer make enough.
    pub(crate) fn short_of_nodes(&self, services: &Services) -> Option<usize> {
        if self.held.is_some() {
            return None;
        }
        let peers = services.peers.borrow();
        services.plan.slices.iter().enumerate().find_map(|(slice, held)| {
            let may_vote = |node: &&NodeId| {
                services.is_expected(node, &peers)
                    || services
                        .epoch
                        .index_of(node.as_ref())
                        .is_some_and(|index| self.voted.contains(&(slice as u16, index)))
            };
            (held.replicas.iter().filter(may_vote).count() < self.needed).then_some(slice)
        })
    }

    /// Who has not voted on a slice it holds.
    pub(crate) fn silent(&self) -> BTreeSet<NodeIndex> {
        if !self.tally.is_decided() {
            // A request that was cancelled or failed owes nobody a vote.
            return BTreeSet::new();
        }
        self.tally.missing().into_iter().map(|(_, node)| node).collect()
    }
}

/// Counts what was found of a node's vote.
pub(crate) fn count(services: &Services, node: NodeIndex, result: VerificationResult) {
    if let Some(node) = services.node_id(node) {
        let labels = VerificationLabels { node: node.to_string(), result };
        services.telemetry.metrics().verifications_total.of(&labels).inc();
    }
}
