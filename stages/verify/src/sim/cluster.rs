//! One run: plan, messages, delivery, checks.

use std::collections::{BTreeMap, BTreeSet};

use crate::answer::Answer;
use crate::digest::Digest;
use crate::epoch::NodeIndex;
use crate::evidence::{Evidence, EvidenceKind};
use crate::receipt::Receipt;
use crate::request::{Mode, Request};
use crate::rules::Rules;
use crate::sim::liar::{self, Behaviour, Knowledge};
use crate::sim::model::{Element, root_of};
use crate::sim::random::Random;
use crate::sim::world::{Shape, World, request};
use crate::tally::{Audit, Tally, TallyEvent};

/// Everything that a seed decides.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) shape: Shape,
    pub(crate) liars: BTreeMap<NodeIndex, Behaviour>,
    /// Whether nodes go on from what one generator hands them. Otherwise from what f+1 agree on.
    pub(crate) trusts_generator: bool,
    /// Whether a lie of a generator reaches only some.
    pub(crate) targets_some: bool,
    pub(crate) drop_percent: usize,
    pub(crate) duplicate_percent: usize,
    /// Whether votes of an earlier epoch are still on their way.
    pub(crate) has_old_votes: bool,
    /// Whether at most f replicas of every slice lie.
    pub(crate) is_within_bound: bool,
}

/// A property that did not hold.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Violation {
    WrongAnswer { which: usize },
    InvalidReceipt { which: usize, fault: String },
    DecidedTwice,
    DecidedAndImpossible,
    HonestAccused { node: NodeIndex, kind: EvidenceKind },
    InvalidEvidence { fault: String },
    NotDecided { which: usize },
    LiarNotNamed { node: NodeIndex, behaviour: Behaviour },
    HonestMissing { node: NodeIndex },
    SilentNotMissing { node: NodeIndex },
    AuditOfHonest { node: NodeIndex, found: Box<Audit> },
    CopiedTagPassed { node: NodeIndex },
}

impl Plan {
    /// The plan of a seed.
    pub(crate) fn of(seed: u64, rules: Rules) -> Self {
        let mut random = Random::new(seed);
        let max_byzantine = [0, 1, 1, 1, 1, 1, 2, 2][random.below(8)];
        let size = 2 * usize::from(max_byzantine) + 1;
        let slices = 1 + random.below(3);
        let nodes = if random.percent(50) { size * slices } else { size + random.below(3) };
        let mut replicas: Vec<Vec<u16>> = Vec::new();
        let mut order: Vec<u16> = (0..nodes as u16).collect();
        for slice in 0..slices {
            let disjoint = nodes == size * slices;
            if !disjoint {
                random.shuffle(&mut order);
            }
            let from = if disjoint { slice * size } else { 0 };
            replicas.push(order[from..from + size].to_vec());
        }
        let shape = Shape { max_byzantine, replicas, weights: 1 + seed % 100, rules };
        let liars = pick_liars(&shape, usize::from(max_byzantine), &mut random);
        Self {
            seed,
            shape,
            liars,
            trusts_generator: random.percent(40),
            targets_some: random.percent(30),
            drop_percent: if random.percent(50) { 0 } else { random.below(31) },
            duplicate_percent: random.below(40),
            has_old_votes: random.percent(30),
            is_within_bound: true,
        }
    }

    fn is_live(&self, is_fed_lies: bool) -> bool {
        self.is_within_bound && self.drop_percent == 0 && !is_fed_lies
    }
}

/// As many liars as every slice can stand; one way to lie for all, or one each.
fn pick_liars(shape: &Shape, per_slice: usize, random: &mut Random) -> BTreeMap<NodeIndex, Behaviour> {
    let nodes: BTreeSet<u16> = shape.replicas.iter().flatten().copied().collect();
    let mut order: Vec<u16> = nodes.into_iter().collect();
    random.shuffle(&mut order);
    let theme = random.percent(50).then(|| Behaviour::ALL[random.below(Behaviour::ALL.len())]);
    let mut liars = BTreeMap::new();
    for node in order {
        let lying_in = |replicas: &&Vec<u16>| {
            let lying = replicas.iter().filter(|other| liars.contains_key(&NodeIndex(**other))).count();
            replicas.contains(&node) && lying >= per_slice
        };
        if per_slice > 0 && !shape.replicas.iter().any(|replicas| lying_in(&replicas)) && random.percent(90) {
            let own = Behaviour::ALL[random.below(Behaviour::ALL.len())];
            liars.insert(NodeIndex(node), theme.unwrap_or(own));
        }
    }
    liars
}

/// Runs a plan and checks every property.
pub(crate) fn run(plan: &Plan) -> Result<(), Violation> {
    let mut random = Random::new(plan.seed ^ 0xfeed);
    let world = World::new(&plan.shape);
    let old = World::new(&Shape { weights: plan.shape.weights + 100, ..plan.shape.clone() });
    let requests = [request(0, Mode::Full), request(1, Mode::Quorum)];
    let truth = [world.honest_inputs(&requests[0]), world.honest_inputs(&requests[1])];
    let (fed, is_fed_lies) = feed(plan, &world, &requests, &truth, &mut random);
    let messages = messages(plan, &world, &old, &requests, &truth, &fed, &mut random);
    for _ in 0..2 {
        let mut gateway = Gateway::new(plan, &world, &requests, &truth, is_fed_lies);
        for (sender, bytes) in schedule(plan, &messages, &mut random) {
            gateway.receive(sender, &bytes)?;
        }
        gateway.finish()?;
    }
    Ok(())
}

type Inputs = [Vec<Vec<Element>>; 2];
type Message = (NodeIndex, Vec<u8>);

/// What every slice is fed, and whether that is a lie.
fn feed(plan: &Plan, world: &World, requests: &[Request; 2], truth: &Inputs, random: &mut Random) -> (Inputs, bool) {
    let lying = plan
        .liars
        .iter()
        .find(|(_, behaviour)| matches!(behaviour, Behaviour::FeedOtherToken | Behaviour::FeedOtherRows));
    let Some((liar, behaviour)) = lying else { return (truth.clone(), false) };
    let at = random.below(3);
    let mut fed = truth.clone();
    for (which, request) in requests.iter().enumerate() {
        let holds = |slice: &usize| world.epoch.replicas(*slice as u16).contains(liar);
        let lie = match behaviour {
            Behaviour::FeedOtherToken if holds(&world.last()) => Some(Lie::Token { at }),
            _ => (0..world.last()).find(holds).map(|slice| Lie::Row { slice, at }),
        };
        if let Some(lie) = lie {
            fed[which] = fed_by(world, request, lie);
        }
    }
    let is_lie = plan.trusts_generator && fed != *truth;
    (fed, is_lie)
}

/// What a generator hands on once instead of what it computed.
#[derive(Clone, Copy)]
enum Lie {
    /// Another token than the one sampled, so many tokens after the prompt.
    Token { at: usize },
    /// Another row than the slice gave, at a position.
    Row { slice: usize, at: usize },
}

/// What every slice gets when everybody goes on honestly from one lie.
fn fed_by(world: &World, request: &Request, lie: Lie) -> Vec<Vec<Element>> {
    let prompt = request.input.tokens().unwrap();
    let mut fed: Vec<Element> = prompt.iter().map(|token| Element::Token(*token)).collect();
    loop {
        let mut inputs = vec![fed.clone()];
        for slice in 0..world.last() {
            let mut rows = world.model.rows(slice, inputs.last().unwrap());
            if let Lie::Row { slice: lying, at } = lie
                && slice == lying
            {
                rows[at] = Element::Row([-1.0, -1.0]);
            }
            inputs.push(rows);
        }
        let last = inputs.last().unwrap();
        if world.model.replay(world.last(), request, last).is_some() {
            return inputs;
        }
        let token = world.model.token(world.last(), &root_of(last));
        let is_lie = matches!(lie, Lie::Token { at } if fed.len() == prompt.len() + at);
        fed.push(Element::Token(if is_lie { token % 6 + 1 } else { token }));
    }
}

/// Everything that is ever sent.
fn messages(
    plan: &Plan,
    world: &World,
    old: &World,
    requests: &[Request; 2],
    truth: &Inputs,
    fed: &Inputs,
    random: &mut Random,
) -> Vec<Message> {
    let honest: Vec<NodeIndex> = (0..world.slices())
        .map(|slice| {
            let replicas = world.epoch.replicas(slice as u16);
            *replicas.iter().find(|node| !plan.liars.contains_key(node)).unwrap_or(&replicas[0])
        })
        .collect();
    let knowledge = Knowledge { world, old, requests, truth, fed, honest: &honest };
    let mut messages = Vec::new();
    for signer in &world.signers {
        let node = signer.index();
        if plan.has_old_votes {
            let votes = requests.iter().flat_map(|request| old.honest_ballots(node, request)).collect::<Vec<_>>();
            if !votes.is_empty() {
                messages.push((node, old.signers[usize::from(node.0)].sign_ballots(votes).unwrap()));
            }
        }
        if let Some(behaviour) = plan.liars.get(&node) {
            let batches = liar::batches(*behaviour, node, &knowledge, random);
            messages.extend(batches.into_iter().map(|bytes| (node, bytes)));
            continue;
        }
        let is_fed = plan.trusts_generator && (!plan.targets_some || random.percent(50));
        let inputs = if is_fed { fed } else { truth };
        let mut ballots = Vec::new();
        for (request, inputs) in requests.iter().zip(inputs) {
            for (slice, input) in inputs.iter().enumerate() {
                if world.epoch.replicas(slice as u16).contains(&node) {
                    ballots.extend(world.honest_ballot(node, slice, request, input));
                }
            }
        }
        // One batch, or one for each request: it must not matter.
        let split = if random.percent(50) { ballots.len() } else { ballots.len() / 2 };
        for part in [&ballots[..split], &ballots[split..]] {
            if !part.is_empty() {
                messages.push((node, signer.sign_ballots(part.to_vec()).unwrap()));
            }
        }
    }
    messages
}

/// What reaches one gateway, in which order.
fn schedule(plan: &Plan, messages: &[Message], random: &mut Random) -> Vec<Message> {
    let mut scheduled = Vec::new();
    for message in messages {
        if random.percent(plan.drop_percent) {
            continue;
        }
        scheduled.push(message.clone());
        if random.percent(plan.duplicate_percent) {
            scheduled.push(message.clone());
        }
    }
    random.shuffle(&mut scheduled);
    scheduled
}

/// One gateway: a tally for each request, and the checks.
struct Gateway<'a> {
    plan: &'a Plan,
    world: &'a World,
    requests: &'a [Request; 2],
    truth: &'a Inputs,
    is_fed_lies: bool,
    tallies: [Tally; 2],
    decided: [bool; 2],
    impossible: [bool; 2],
    accused: [BTreeSet<NodeIndex>; 2],
}

impl<'a> Gateway<'a> {
    fn new(plan: &'a Plan, world: &'a World, requests: &'a [Request; 2], truth: &'a Inputs, is_fed_lies: bool) -> Self {
        let tally = |request: &Request| Tally::new(world.epoch.clone(), request.clone());
        Self {
            plan,
            world,
            requests,
            truth,
            is_fed_lies,
            tallies: [tally(&requests[0]), tally(&requests[1])],
            decided: [false; 2],
            impossible: [false; 2],
            accused: [BTreeSet::new(), BTreeSet::new()],
        }
    }

    /// Every ballot that opens goes to both tallies: each must know its own.
    fn receive(&mut self, sender: NodeIndex, bytes: &[u8]) -> Result<(), Violation> {
        let Ok(ballots) = self.world.epoch.open_ballots(bytes, sender) else { return Ok(()) };
        for ballot in ballots {
            for which in 0..2 {
                for event in self.tallies[which].handle(ballot.clone()) {
                    self.check(which, event)?;
                }
            }
        }
        Ok(())
    }

    fn check(&mut self, which: usize, event: TallyEvent) -> Result<(), Violation> {
        match event {
            TallyEvent::Decided { receipt, answer } => {
                if self.decided[which] {
                    return Err(Violation::DecidedTwice);
                }
                self.decided[which] = true;
                self.check_decision(which, &receipt, &answer)?;
            }
            TallyEvent::Impossible { .. } => self.impossible[which] = true,
            TallyEvent::Accused(evidence) => self.check_evidence(which, &evidence)?,
            TallyEvent::SliceCertified { .. } | TallyEvent::Ignored { .. } => {}
        }
        if self.decided[which] && self.impossible[which] { Err(Violation::DecidedAndImpossible) } else { Ok(()) }
    }

    fn check_decision(&self, which: usize, receipt: &Receipt, answer: &Answer) -> Result<(), Violation> {
        let request = &self.requests[which];
        if *answer != self.right_answer(which) && self.plan.is_within_bound {
            return Err(Violation::WrongAnswer { which });
        }
        match receipt.verify(&self.world.strict, Some(request), Some(answer)) {
            Err(fault) => Err(Violation::InvalidReceipt { which, fault: fault.to_string() }),
            Ok(verified) if verified.is_verified() != (self.plan.shape.max_byzantine > 0) => {
                Err(Violation::InvalidReceipt { which, fault: verified.to_string() })
            }
            Ok(_) => Ok(()),
        }
    }

    fn check_evidence(&mut self, which: usize, evidence: &Evidence) -> Result<(), Violation> {
        let (node, kind) = (evidence.accused, evidence.kind());
        evidence.verify(&self.world.strict).map_err(|fault| Violation::InvalidEvidence { fault: fault.to_string() })?;
        // Whoever was fed another input than its peers says so itself, and no more than that may follow.
        let is_excusable = self.is_fed_lies && kind == EvidenceKind::WrongInput;
        if self.plan.is_within_bound && !self.plan.liars.contains_key(&node) && !is_excusable {
            return Err(Violation::HonestAccused { node, kind });
        }
        self.accused[which].insert(node);
        Ok(())
    }

    fn right_answer(&self, which: usize) -> Answer {
        let last = self.world.last();
        self.world.model.replay(last, &self.requests[which], &self.truth[which][last]).unwrap().1
    }

    fn finish(&self) -> Result<(), Violation> {
        for which in 0..2 {
            if self.plan.is_live(self.is_fed_lies) {
                self.check_liveness(which)?;
                self.check_audits(which)?;
            }
        }
        Ok(())
    }

    fn check_liveness(&self, which: usize) -> Result<(), Violation> {
        if !self.decided[which] {
            return Err(Violation::NotDecided { which });
        }
        let missing: BTreeSet<NodeIndex> = self.tallies[which].missing().into_iter().map(|(_, node)| node).collect();
        if let Some(node) = missing.iter().find(|node| !self.plan.liars.contains_key(node)) {
            return Err(Violation::HonestMissing { node: *node });
        }
        for (node, behaviour) in &self.plan.liars {
            let holds_some = self.plan.shape.replicas.iter().any(|replicas| replicas.contains(&node.0));
            if behaviour.is_named() && holds_some && !self.accused[which].contains(node) {
                return Err(Violation::LiarNotNamed { node: *node, behaviour: *behaviour });
            }
            let is_silent = matches!(behaviour, Behaviour::Silent | Behaviour::HighS);
            if is_silent && holds_some && !missing.contains(node) {
                return Err(Violation::SilentNotMissing { node: *node });
            }
        }
        Ok(())
    }

    fn check_audits(&self, which: usize) -> Result<(), Violation> {
        for slice in 0..self.world.slices() {
            let input = &self.truth[which][slice];
            let interior: Digest = self.world.model.interior(slice, &root_of(input));
            for node in self.world.epoch.replicas(slice as u16) {
                let found = self.tallies[which].audit(*node, slice as u16, &interior);
                match self.plan.liars.get(node) {
                    None if found != Audit::Agrees => {
                        return Err(Violation::AuditOfHonest { node: *node, found: Box::new(found) });
                    }
                    Some(behaviour) if behaviour.is_lazy() => {
                        let Audit::Accused(evidence) = found else {
                            return Err(Violation::CopiedTagPassed { node: *node });
                        };
                        let verdict = evidence.verify(&self.world.strict);
                        verdict.map_err(|fault| Violation::InvalidEvidence { fault: fault.to_string() })?;
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::forged_answer;

    /// Seeds in the suite.
    const SEEDS: u64 = 400;

    #[test]
    fn every_seed_is_safe_and_live() {
        for seed in 0..SEEDS {
            let plan = Plan::of(seed, Rules::ALL);
            assert_eq!(run(&plan), Ok(()), "seed {seed}: {plan:#?}");
        }
    }

    #[test]
    fn the_suite_covers_every_behaviour_and_every_kind_of_run() {
        let plans: Vec<Plan> = (0..SEEDS).map(|seed| Plan::of(seed, Rules::ALL)).collect();
        for behaviour in Behaviour::ALL {
            let uses = plans.iter().filter(|plan| plan.liars.values().any(|other| *other == behaviour)).count();
            assert!(uses >= 10, "{behaviour:?} in {uses} runs only");
        }
        let count = |holds: fn(&Plan) -> bool| plans.iter().filter(|plan| holds(plan)).count();
        assert!(count(|plan| plan.drop_percent > 0) > 100);
        assert!(count(|plan| plan.drop_percent == 0 && !plan.liars.is_empty()) > 100);
        assert!(count(|plan| plan.trusts_generator) > 100);
        assert!(count(|plan| plan.shape.max_byzantine == 2) > 50);
    }

    /// f+1 who collude on every slice do forge a receipt: the bound is tight.
    #[test]
    fn colluders_beyond_the_bound_forge_a_receipt() {
        for max_byzantine in [1, 2] {
            let mut plan = Plan::of(1, Rules::ALL);
            plan.shape = Shape::disjoint(max_byzantine, 2);
            let colluding = |replicas: &Vec<u16>| replicas[..usize::from(max_byzantine) + 1].to_vec();
            let liars: Vec<u16> = plan.shape.replicas.iter().flat_map(colluding).collect();
            plan.liars = liars.into_iter().map(|node| (NodeIndex(node), Behaviour::Collude)).collect();
            plan.trusts_generator = false;
            plan.drop_percent = 0;
            plan.has_old_votes = false;

            let world = World::new(&plan.shape);
            let requests = [request(0, Mode::Full), request(1, Mode::Full)];
            let truth = [world.honest_inputs(&requests[0]), world.honest_inputs(&requests[1])];
            let mut tally = Tally::new(world.epoch.clone(), requests[0].clone());
            let mut decided = None;
            for (sender, bytes) in messages(&plan, &world, &world, &requests, &truth, &truth, &mut Random::new(0)) {
                for ballot in world.epoch.open_ballots(&bytes, sender).unwrap() {
                    for event in tally.handle(ballot) {
                        if let TallyEvent::Decided { receipt, answer } = event {
                            decided = Some((receipt, answer));
                        }
                    }
                }
            }
            let (receipt, answer) = decided.unwrap();
            assert_eq!(answer, forged_answer(&requests[0]));
            let verified = receipt.verify(&world.strict, Some(&requests[0]), Some(&answer)).unwrap();
            assert!(verified.is_verified() && verified.is_complete());
        }
    }

    /// More than f who lie each in their own way stop the request, and still forge nothing.
    #[test]
    fn liars_beyond_the_bound_who_do_not_collude_forge_nothing() {
        for seed in 0..60 {
            let mut plan = Plan::of(seed, Rules::ALL);
            plan.shape = Shape::disjoint(1, 1);
            let alone = [Behaviour::WrongOutput, Behaviour::WrongInput, Behaviour::SwapToken, Behaviour::Equivocate];
            let mut random = Random::new(seed);
            let (one, step) = (random.below(4), 1 + random.below(3));
            let pair = [alone[one], alone[(one + step) % 4]];
            plan.liars = (0..2).map(NodeIndex).zip(pair).collect();
            plan.trusts_generator = false;
            // Honest nodes may be outvoted and accused, but no wrong answer may come out.
            match run(&plan) {
                Ok(()) | Err(Violation::NotDecided { .. } | Violation::LiarNotNamed { .. }) => {}
                Err(violation) => panic!("seed {seed}: {violation:?}"),
            }
        }
    }
}
