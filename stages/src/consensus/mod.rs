//! The consensus stage: outcomes become votes, votes become decisions.
//!
//! On every node it signs what compute found out, in batches, and sends it to the gateway of the request. On a gateway it
//! tallies: f+1 equal votes on every slice decide, and the rules of that are the verify crate's. Tokens are released to a
//! stream when f+1 replicas of the last slice name the same one.
//!
//! A request stays open for a while after it was decided, so that a late vote can still agree or accuse, and so that silence
//! is told from lying. Time only ever ends waiting; it accuses nobody.
//!
//! What the gateway certified goes into checkpoints, for which those vouch who computed it.

mod audit;
mod checkpoints;
mod open;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::channel::{Receiver, Sender};
use butterfly_engine::frame::{Frame, FrameError};
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_engine::telemetry::{Event, Mark, PhaseLabels, VerificationResult};
use butterfly_engine::transport::{Delivery, PeerPort, PeerSender};
use butterfly_topology::NodeId;
use butterfly_verify::{
    Ballot, CheckpointFault, Digest, Evidence, EvidenceKind, Grade, NodeIndex, Proposal, SignatureBytes, SignedBallot,
    Vote, work_tag,
};
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::consensus::audit::Audits;
use crate::consensus::checkpoints::{Checkpoints, Kept, Overdue};
use crate::consensus::open::{Open, Verdict};
use crate::consensus::wire::{BadTag, Delta, Message};
use crate::error::{ButterflyError, CoordinationError};
use crate::items::{Decided, Finished, Outcome, RequestId, answer_bytes};
use crate::services::Services;
use crate::transfer::by_bytes;

#[cfg(feature = "adversary")]
use crate::adversary::Behaviour;

/// Outcomes that are voted on together.
const OUTCOMES_AT_ONCE_MAX: usize = 256;
/// Requests of this gateway that are open or were decided a short while ago.
const OPEN_MAX: usize = 65_536;
/// How long late votes are listened to.
const LATE_VOTES: Duration = Duration::from_secs(2);
/// How often waiting is looked at.
const SWEEP: Duration = Duration::from_millis(250);
/// Pieces of evidence kept of one node and kind; more show nothing new.
const EVIDENCE_KEPT_MAX: u64 = 32;

const fn phase(phase: &'static str, result: &'static str) -> PhaseLabels {
    PhaseLabels { phase, result }
}

/// A request was decided, by f+1 votes on every slice.
const CERTIFIED: PhaseLabels = phase("commit", "certified");
/// No f+1 votes can agree any more.
const CONTRADICTED: PhaseLabels = phase("commit", "contradicted");
/// Fewer than f+1 replicas are there to vote.
const SHORT: PhaseLabels = phase("commit", "short");
/// A slice got its f+1 votes.
const SLICE_CERTIFIED: PhaseLabels = phase("prepare", "certified");
/// A node did not vote in time.
const SILENT: PhaseLabels = phase("prepare", "silent");
/// A node was caught.
const ACCUSED: PhaseLabels = phase("prepare", "accused");

/// The stage.
pub struct ConsensusStage {
    /// Outcomes of the own slices, in.
    pub outcome: Receiver<Outcome>,
    /// Decisions, out.
    pub decided: Sender<Decided>,
    /// The node's shared things.
    pub services: Services,
}

impl Stage for ConsensusStage {
    fn run(mut self: Box<Self>, mut context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            let mut port: PeerPort =
                context.peers.take().ok_or(StageError::Bug { invariant: "the consensus stage is networked" })?;
            let mut state = State::new(self.services.clone(), port.sender());
            let mut next_sweep = context.clock.now() + SWEEP;
            let mut outcomes_open = true;
            context.ready();
            loop {
                tokio::select! {
                    mut batch = self.outcome.recv_many(OUTCOMES_AT_ONCE_MAX), if outcomes_open => {
                        outcomes_open = !batch.is_empty();
                        // A signature for many costs what one for one costs.
                        self.outcome.gather(&mut batch, OUTCOMES_AT_ONCE_MAX).await;
                        state.outcomes(&context, batch);
                    }
                    delivery = port.recv() => match delivery {
                        Some(Delivery::Frame { from, frame }) => state.deliver(&context, &from, &frame),
                        Some(Delivery::Up(_) | Delivery::Down(_)) => {}
                        None => break,
                    },
                    () = context.clock.sleep(next_sweep.saturating_sub(context.clock.now())) => {
                        next_sweep = context.clock.now() + SWEEP;
                        state.sweep(context.clock.now());
                        state.tend_checkpoints(context.clock.now());
                    }
                    () = context.shutdown.completing() => break,
                }
                for decided in state.decided.drain(..) {
                    if self.decided.send(decided).await.is_err() {
                        return Ok(());
                    }
                }
            }
            Ok(())
        }
        .boxed()
    }
}

/// What the stage keeps between events.
struct State {
    services: Services,
    peers: PeerSender,
    open: BTreeMap<RequestId, Open>,
    audits: Audits,
    checkpoints: Checkpoints,
    evidence_kept: BTreeMap<(NodeIndex, &'static str), u64>,
    decided: Vec<Decided>,
}

impl State {
    fn new(services: Services, peers: PeerSender) -> Self {
        let metrics = services.telemetry.metrics();
        metrics.declare_phases(&[CERTIFIED, CONTRADICTED, SHORT], &[SLICE_CERTIFIED], &[SILENT, ACCUSED]);
        let commit = services.topology.graph.of_kind("commit").next();
        let every = commit.and_then(|stage| usize::try_from(stage.config.integer("checkpoint_every")?).ok());
        let checkpoint_every = every.unwrap_or(usize::MAX);
        Self {
            services,
            peers,
            open: BTreeMap::new(),
            audits: Audits::default(),
            checkpoints: Checkpoints::new(checkpoint_every),
            evidence_kept: BTreeMap::new(),
            decided: Vec::new(),
        }
    }

    /// Turns outcomes of the own slices into deltas and votes for their gateways.
    fn outcomes(&mut self, context: &StageContext, batch: Vec<Outcome>) {
        #[cfg(feature = "adversary")]
        if self.services.behaviour == Some(Behaviour::Silent) {
            return;
        }
        let mut deltas: BTreeMap<NodeId, Vec<Delta>> = BTreeMap::new();
        let mut ballots: BTreeMap<BTreeSet<NodeId>, Vec<Ballot>> = BTreeMap::new();
        for outcome in batch {
            match outcome {
                Outcome::Delta { rd, gateway, index, tokens, .. } => {
                    deltas.entry(gateway).or_default().push(Delta { rd, index, tokens });
                }
                Outcome::Finished(finished) => {
                    let audience = self.audience(&finished);
                    let failed = self.audits.finished(&finished);
                    self.report(&finished.gateway, failed);
                    let cast = self.ballots_of(*finished);
                    ballots.entry(audience).or_default().extend(cast);
                }
            }
        }
        for (gateway, deltas) in deltas {
            if gateway == self.services.node {
                self.deltas(&gateway, deltas, context.clock.now());
            } else {
                deltas.chunks(wire::ENTRIES_MAX).for_each(|chunk| self.send(&gateway, wire::deltas(chunk)));
            }
        }
        for (audience, ballots) in ballots {
            self.vote(context, &audience, ballots);
        }
    }

    /// Who hears the vote: the gateway, and where it does not hold the slice itself, the other replicas, who audit the tag.
    fn audience(&self, finished: &Finished) -> BTreeSet<NodeId> {
        let mut audience = BTreeSet::from([finished.gateway.clone()]);
        let replicas = self.services.plan.slices.get(usize::from(finished.slice)).map(|slice| &slice.replicas);
        if let Some(replicas) = replicas.filter(|replicas| !replicas.contains(&finished.gateway)) {
            audience.extend(replicas.iter().filter(|node| **node != self.services.node).cloned());
        }
        audience
    }

    /// The ballot for an own outcome; a liar may cast others.
    fn ballots_of(&self, finished: Finished) -> Vec<Ballot> {
        let Finished { rd, slice, positions, input_root, output_root, interior, answer, .. } = finished;
        let tag = work_tag(self.services.index, &rd, slice, positions, &interior);
        let ballot = Ballot { vote: Vote { rd, slice, positions, input_root, output_root, tag }, answer };
        #[cfg(feature = "adversary")]
        if let Some(behaviour) = self.services.behaviour {
            return behaviour.ballots(ballot);
        }
        vec![ballot]
    }

    /// Signs ballots once and sends them to everybody who should hear them.
    fn vote(&mut self, context: &StageContext, audience: &BTreeSet<NodeId>, ballots: Vec<Ballot>) {
        for ballots in by_bytes(ballots, |ballot| ballot.answer.as_ref().map_or(0, answer_bytes)) {
            self.vote_together(context, audience, ballots);
        }
    }

    fn vote_together(&mut self, context: &StageContext, audience: &BTreeSet<NodeId>, ballots: Vec<Ballot>) {
        let sealed = match self.services.signer.seal_ballots(ballots) {
            Ok(sealed) => sealed,
            Err(error) => {
                tracing::error!(%error, "votes could not be signed");
                return;
            }
        };
        for vote in sealed.ballots.iter().map(SignedBallot::vote) {
            self.services.telemetry.traces().mark_last(&vote.rd.0, Mark::new("consensus", "voted").slice(vote.slice));
        }
        let frame = wire::ballots(&sealed.bytes);
        for node in audience {
            if *node == self.services.node {
                sealed.ballots.iter().for_each(|ballot| self.ballot_came(context, ballot.clone()));
            } else {
                self.send(node, frame.clone());
            }
        }
    }

    /// A peer that takes no frames loses the vote; f+1 others decide.
    fn send(&self, node: &NodeId, frame: Result<Frame, FrameError>) {
        match frame {
            Ok(frame) => {
                if let Err(error) = self.peers.try_send(node, frame) {
                    tracing::debug!(%node, %error, "a vote was shed");
                }
            }
            Err(error) => tracing::error!(%node, %error, "a vote does not fit a frame"),
        }
    }

    fn report(&mut self, gateway: &NodeId, failed: Vec<BadTag>) {
        if failed.is_empty() {
            return;
        }
        if *gateway == self.services.node {
            // A gateway that holds the slice audits with its own tally, which has the signed votes to show.
            return;
        }
        self.send(gateway, wire::bad_tags(&failed));
    }

    fn deliver(&mut self, context: &StageContext, from: &NodeId, frame: &Frame) {
        match frame.control_bytes().ok_or(wire::Malformed).and_then(wire::read) {
            Ok(Message::Ballots(batch)) => self.ballots(context, from, batch),
            Ok(Message::Deltas(deltas)) => self.deltas(from, deltas, context.clock.now()),
            Ok(Message::BadTags(reports)) => self.bad_tags(from, &reports),
            Ok(Message::Checkpoint(proposal)) => self.checkpoint_came(context, from, proposal),
            Ok(Message::Vouch(digest, signature)) => self.vouched(from, &digest, signature),
            Err(error) => tracing::warn!(%from, %error, "a peer sent what is no message"),
        }
    }

    fn ballots(&mut self, context: &StageContext, from: &NodeId, batch: &[u8]) {
        let _verifying = context.states.verifying();
        let began = context.clock.now();
        let Some(sender) = self.services.epoch.index_of(from.as_ref()) else { return };
        match self.services.epoch.open_ballots(batch, sender) {
            Ok(ballots) => ballots.into_iter().for_each(|ballot| {
                let vote = ballot.vote();
                let hop = Mark::new("consensus", "hop").peer(from).slice(vote.slice);
                self.services.telemetry.traces().mark_last(&vote.rd.0, hop);
                self.ballot_came(context, ballot);
            }),
            Err(error) => tracing::warn!(%from, %error, "a batch of votes does not hold"),
        }
        let elapsed = context.clock.now().saturating_sub(began);
        self.services.telemetry.metrics().verification_seconds.record(elapsed);
    }

    /// Takes one checked ballot: into the tally of the own request, or to the audit of another gateway's.
    fn ballot_came(&mut self, context: &StageContext, ballot: SignedBallot) {
        let (rd, signer) = (ballot.vote().rd, ballot.signer());
        if !self.ensure_open(&rd) {
            if signer != self.services.index
                && let Some((gateway, failed)) = self.audits.vote(signer, ballot.vote())
            {
                self.report(&gateway, vec![failed]);
            }
            return;
        }
        let Some(open) = self.open.get_mut(&rd) else { return };
        let verdicts = open.ballot(ballot, &self.audits, &self.services, context.clock.now());
        for verdict in verdicts {
            self.verdict(rd, verdict);
        }
    }

    /// Opens the tally of a request of this gateway, if it lives and is not open yet.
    fn ensure_open(&mut self, rd: &RequestId) -> bool {
        if self.open.contains_key(rd) {
            return true;
        }
        let Some(request) = self.services.board.request(rd) else { return false };
        if self.open.len() >= OPEN_MAX {
            return false;
        }
        let last = self.services.plan.slices.last().map(|slice| slice.replicas.clone()).unwrap_or_default();
        self.open.insert(*rd, Open::new(Arc::clone(&self.services.epoch), request.clone(), last));
        true
    }

    fn verdict(&mut self, rd: RequestId, verdict: Verdict) {
        let metrics = self.services.telemetry.metrics();
        match verdict {
            Verdict::SliceCertified => {
                metrics.phase_transitions_total.of(&SLICE_CERTIFIED).inc();
            }
            Verdict::Certified { receipt, answer } => {
                self.services.telemetry.traces().mark_last(&rd.0, Mark::new("consensus", "decided"));
                metrics.consensus_rounds_total.of(&CERTIFIED).inc();
                self.decided.push(Decided::Certified { rd, receipt: Box::new(receipt), answer: Box::new(answer) });
            }
            Verdict::Incomplete => {
                metrics.consensus_rounds_total.of(&SHORT).inc();
                let slice = self.services.plan.slices.len().saturating_sub(1);
                let error = CoordinationError::InsufficientNodes { slice };
                self.decided.push(Decided::Failed { rd, error: error.into() });
            }
            Verdict::Impossible { slice } => {
                self.services.telemetry.traces().mark_last(&rd.0, Mark::new("consensus", "impossible").slice(slice));
                metrics.consensus_rounds_total.of(&CONTRADICTED).inc();
                let error = CoordinationError::ByzantineViolation { slice: usize::from(slice) };
                self.decided.push(Decided::Failed { rd, error: error.into() });
            }
            Verdict::Accused(evidence) => self.accused(&rd, evidence),
        }
    }

    /// Shows evidence: on the event bus, in the standing, and to commit for keeping.
    fn accused(&mut self, rd: &RequestId, evidence: Evidence) {
        let kind = evidence.kind().name();
        let accused = evidence.accused;
        let is_changed = self.services.standing.accused(accused, kind, evidence.grade());
        let Some(node) = self.services.node_id(accused) else { return };
        let span = self.services.telemetry.traces().span(&rd.0);
        span.in_scope(|| tracing::warn!(%node, %rd, kind, grade = ?evidence.grade(), "a node was caught"));
        if is_changed && evidence.grade() == Grade::Proof {
            tracing::error!(%node, kind, "a node is excluded: it is proven to lie, and gets no more work from this gateway");
        }
        let metrics = self.services.telemetry.metrics();
        metrics.evidence_total.of(&(&node).into()).inc();
        metrics.node_failures_total.of(&ACCUSED).inc();
        self.services.telemetry.events().emit_with(|| {
            Event::new("accused")
                .node(&node)
                .request(rd)
                .with("kind", kind)
                .with("grade", format!("{:?}", evidence.grade()))
        });
        let kept = self.evidence_kept.entry((accused, kind)).or_default();
        if *kept < EVIDENCE_KEPT_MAX {
            *kept += 1;
            self.decided.push(Decided::Accused { evidence: Box::new(evidence) });
        }
    }

    fn deltas(&mut self, from: &NodeId, deltas: Vec<Delta>, now: Duration) {
        for Delta { rd, index, tokens } in deltas {
            if !self.ensure_open(&rd) {
                continue;
            }
            let Some(open) = self.open.get_mut(&rd) else { continue };
            if let Some((index, tokens)) = open.delta(from, index, tokens) {
                self.decided.push(Decided::Progress { rd, index, tokens });
            }
            if let Some(certified) = open.certified(now) {
                self.verdict(rd, certified);
            }
        }
    }

    /// Replicas that computed a slice say that another's tag is not that of the work. f+1 of them cannot all be lying.
    fn bad_tags(&mut self, from: &NodeId, reports: &[BadTag]) {
        let Some(reporter) = self.services.epoch.index_of(from.as_ref()) else { return };
        let needed = self.services.topology.cluster.max_byzantine + 1;
        for report in reports {
            let holds_slice = self.services.epoch.replicas(report.slice).contains(&reporter);
            let Some(open) = self.open.get_mut(&report.rd).filter(|_| holds_slice) else { continue };
            if open.bad_tag(report.slice, report.accused, reporter) == needed {
                let kind = EvidenceKind::WrongTag;
                self.services.standing.accused(report.accused, kind.name(), kind.grade());
                let Some(node) = self.services.node_id(report.accused) else { continue };
                tracing::warn!(%node, rd = %report.rd, "f+1 replicas say that a node did not do the work it voted on");
                self.services
                    .telemetry
                    .events()
                    .emit_with(|| Event::new("accused").node(&node).request(report.rd).with("kind", kind.name()));
            }
        }
    }

    /// Begins a checkpoint when one is due, and asks again or gives up where nobody vouches.
    fn tend_checkpoints(&mut self, now: Duration) {
        let journal = &self.services.journal;
        if self.checkpoints.is_due(now, journal.uncovered(), journal.covered()) {
            let segment = match journal.next_segment(&self.services.epoch, self.checkpoints.receipts_max()) {
                Ok(segment) => segment,
                Err(error) => return tracing::error!(%error, "the receipts of a checkpoint cannot be read"),
            };
            let begun = self.checkpoints.begin(now, &self.services.epoch, &self.services.signer, segment);
            match begun {
                Ok(Some(proposal)) => self.propose(&proposal),
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "a checkpoint could not be signed"),
            }
        }
        match self.checkpoints.overdue(now) {
            Some(Overdue::AskAgain(proposal)) => self.propose(&proposal),
            Some(Overdue::GiveUp(kept)) => {
                tracing::warn!(
                    sequence = kept.certificate.checkpoint.sequence,
                    signatures = kept.certificate.signatures.len(),
                    "a checkpoint is kept without f+1 signatures: replicas that restarted do not know what they computed"
                );
                self.keep(kept);
            }
            None => {}
        }
    }

    /// Sends a checkpoint to the replicas of the last slice, this node among them.
    fn propose(&mut self, proposal: &Proposal) {
        let last = self.services.plan.slices.last().map(|slice| slice.replicas.clone()).unwrap_or_default();
        let frame = wire::checkpoint(&proposal.encode());
        for node in last {
            if node == self.services.node {
                let (digest, signature) = (proposal.checkpoint.digest(&self.services.epoch), proposal.signature);
                // The publisher's signature is over the same bytes as one that vouches.
                if self.judge(proposal) {
                    self.vouched(&node, &digest, signature);
                }
            } else if !self.services.is_excluded(&node) {
                self.send(&node, frame.clone());
            }
        }
    }

    /// Vouches for another's checkpoint if this node found the same.
    fn checkpoint_came(&mut self, context: &StageContext, from: &NodeId, proposal: &[u8]) {
        let _verifying = context.states.verifying();
        let proposal = match Proposal::decode(proposal) {
            Ok(proposal) => proposal,
            Err(error) => return tracing::warn!(%from, %error, "a peer sent what is no checkpoint"),
        };
        let is_own = self.services.epoch.index_of(from.as_ref()) == Some(proposal.checkpoint.publisher);
        if !is_own || !self.judge(&proposal) {
            return;
        }
        let epoch = &self.services.epoch;
        match self.services.signer.sign_checkpoint(epoch, &proposal.checkpoint) {
            Ok(signature) => self.send(from, wire::vouch(&proposal.checkpoint.digest(epoch), &signature)),
            Err(error) => tracing::error!(%error, "a checkpoint could not be signed"),
        }
    }

    fn judge(&mut self, proposal: &Proposal) -> bool {
        let Some(last) = self.services.plan.slices.len().checked_sub(1) else { return false };
        let (audits, publisher) = (&self.audits, proposal.checkpoint.publisher);
        let computed = |rd: &RequestId| audits.output_root(rd, last as u16);
        match self.checkpoints.witness.judge(&self.services.epoch, proposal, computed) {
            Ok(()) => true,
            // Forgotten in a restart, or shed: this node cannot say.
            Err(error @ CheckpointFault::Unknown(_)) => {
                tracing::debug!(?publisher, %error, "not vouching for a checkpoint");
                false
            }
            Err(error) => {
                tracing::warn!(?publisher, %error, "not vouching for a checkpoint");
                false
            }
        }
    }

    fn vouched(&mut self, from: &NodeId, digest: &Digest, signature: SignatureBytes) {
        let Some(signer) = self.services.epoch.index_of(from.as_ref()) else { return };
        if let Some(kept) = self.checkpoints.vouched(&self.services.epoch, signer, digest, signature) {
            self.keep(kept);
        }
    }

    fn keep(&mut self, kept: Kept) {
        let Kept { certificate, through, is_certified } = kept;
        let certificate = Box::new(certificate);
        self.decided.push(Decided::Checkpoint { certificate, through, is_certified });
    }

    /// Ends waiting: late votes after a while, and requests that can no longer get f+1 votes because nodes are gone.
    fn sweep(&mut self, now: Duration) {
        let mut over = Vec::new();
        let mut certified = Vec::new();
        for (rd, open) in &mut self.open {
            certified.extend(open.certified(now).map(|verdict| (*rd, verdict)));
            if let Some(settled) = open.settled_at() {
                if now.saturating_sub(settled) >= LATE_VOTES {
                    over.push(*rd);
                }
            } else if !self.services.board.is_living(rd) {
                open.settle(now);
            } else if let Some(slice) = open.short_of_nodes(&self.services) {
                open.settle(now);
                self.services.telemetry.metrics().consensus_rounds_total.of(&SHORT).inc();
                let error = ButterflyError::from(CoordinationError::InsufficientNodes { slice });
                self.decided.push(Decided::Failed { rd: *rd, error });
            }
        }
        for (rd, verdict) in certified {
            self.verdict(rd, verdict);
        }
        for rd in over {
            if let Some(open) = self.open.remove(&rd) {
                self.unavailable(&rd, &open);
            }
        }
    }

    /// Reports whoever did not vote. Silence is unavailability, never lying. One that is up may still be at it, perhaps for
    /// rows that were lost and will never come, and is told to stop.
    fn unavailable(&self, rd: &RequestId, open: &Open) {
        let mut is_at_it = false;
        for index in open.silent().into_iter().filter(|index| !self.services.standing.is_excluded(*index)) {
            self.services.standing.silent(index);
            let Some(node) = self.services.node_id(index) else { continue };
            is_at_it |= self.services.is_useful(&node, &self.services.peers.borrow());
            let span = self.services.telemetry.traces().span(&rd.0);
            span.in_scope(|| tracing::info!(%node, %rd, "no vote came in time"));
            open::count(&self.services, index, VerificationResult::Timeout);
            self.services.telemetry.metrics().node_failures_total.of(&SILENT).inc();
            self.services.telemetry.events().emit_with(|| Event::new("unavailable").node(&node).request(rd));
        }
        if is_at_it {
            self.services.board.stop(rd);
        }
    }
}
