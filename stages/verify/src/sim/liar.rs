//! What lying nodes send.

use k256::ecdsa::Signature;

use crate::answer::{Answer, Finish};
use crate::boundary::{boundary0, work_tag};
use crate::digest::Digest;
use crate::epoch::NodeIndex;
use crate::request::Request;
use crate::sim::model::{Element, root_of, text_answer};
use crate::sim::random::Random;
use crate::sim::world::World;
use crate::vote::{Ballot, Vote};

/// One way to lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// The right input, another output.
    WrongOutput,
    /// Another input.
    WrongInput,
    /// Other positions, all roots right.
    WrongPositions,
    /// The right vote and a wrong one.
    Equivocate,
    /// Another node's vote, tag and all, under its own signature.
    CopyVote,
    /// The right roots, and a tag made of nothing.
    RandomTag,
    /// Nothing.
    Silent,
    /// An answer cut short, with everything that follows from it.
    EarlyStop,
    /// An answer with one token changed.
    SwapToken,
    /// As generator, samples one token and feeds back another.
    FeedOtherToken,
    /// As generator, hands on other rows than it votes for.
    FeedOtherRows,
    /// Votes of another request under this one's name.
    ReplayOther,
    /// Forged votes on every slice, its own or not.
    OtherSlice,
    /// Forged votes signed in another epoch.
    OtherEpoch,
    /// Damaged batches and noise.
    Garbage,
    /// The right vote with another answer beside it.
    WrongAnswer,
    /// The vote that all colluders cast: one forged answer with everything that follows from it.
    Collude,
    /// Batches in another node's name.
    Impersonate,
    /// One wrong vote over and over.
    Stuff,
    /// The other signature of the pair.
    HighS,
}

impl Behaviour {
    pub(crate) const ALL: [Self; 20] = [
        Self::WrongOutput,
        Self::WrongInput,
        Self::WrongPositions,
        Self::Equivocate,
        Self::CopyVote,
        Self::RandomTag,
        Self::Silent,
        Self::EarlyStop,
        Self::SwapToken,
        Self::FeedOtherToken,
        Self::FeedOtherRows,
        Self::ReplayOther,
        Self::OtherSlice,
        Self::OtherEpoch,
        Self::Garbage,
        Self::WrongAnswer,
        Self::Collude,
        Self::Impersonate,
        Self::Stuff,
        Self::HighS,
    ];

    /// Whether every tally that hears all of it must name the liar.
    pub(crate) fn is_named(self) -> bool {
        matches!(
            self,
            Self::WrongOutput
                | Self::WrongInput
                | Self::WrongPositions
                | Self::Equivocate
                | Self::EarlyStop
                | Self::SwapToken
                | Self::ReplayOther
                | Self::Collude
                | Self::Stuff
        )
    }

    /// Whether its votes add up, with tags that no work gave.
    pub(crate) fn is_lazy(self) -> bool {
        matches!(self, Self::CopyVote | Self::RandomTag)
    }
}

/// What a liar knows: everything.
pub(crate) struct Knowledge<'a> {
    pub(crate) world: &'a World,
    /// The same nodes in an epoch before.
    pub(crate) old: &'a World,
    pub(crate) requests: &'a [Request; 2],
    /// What every slice gets if nobody lies, for each request.
    pub(crate) truth: &'a [Vec<Vec<Element>>; 2],
    /// What every slice was in fact fed.
    pub(crate) fed: &'a [Vec<Vec<Element>>; 2],
    /// A node that does not lie, for each slice.
    pub(crate) honest: &'a [NodeIndex],
}

/// The batches that a liar sends.
pub(crate) fn batches(
    behaviour: Behaviour,
    node: NodeIndex,
    knowledge: &Knowledge<'_>,
    random: &mut Random,
) -> Vec<Vec<u8>> {
    let world = knowledge.world;
    let signer = &world.signers[usize::from(node.0)];
    let seal = |ballots: Vec<Ballot>| signer.sign_ballots(ballots).unwrap();
    let right = || every(knowledge, node, |which, slice| honest(knowledge, node, which, slice));
    let wrong = |random: &mut Random| {
        let mut ballots = right();
        ballots.iter_mut().for_each(|ballot| spoil(ballot, random));
        ballots
    };
    match behaviour {
        Behaviour::Silent => vec![],
        Behaviour::WrongOutput => vec![seal(wrong(random))],
        Behaviour::Equivocate => {
            let mut both = vec![seal(right()), seal(wrong(random))];
            random.shuffle(&mut both);
            both
        }
        Behaviour::Stuff => {
            let ballots = wrong(random);
            let thrice = [ballots.clone(), ballots.clone(), ballots.clone()].concat();
            vec![seal(ballots.clone()), seal(thrice), seal(ballots)]
        }
        Behaviour::Garbage => garbage(&seal(right()), random),
        Behaviour::Impersonate => {
            let victim = knowledge.honest[0];
            let relayed = world.signers[usize::from(victim.0)]
                .sign_ballots(every(knowledge, victim, |which, slice| honest(knowledge, victim, which, slice)))
                .unwrap();
            let mut forged = seal(forged_ballots(knowledge, node, true));
            forged[2..4].copy_from_slice(&victim.0.to_le_bytes());
            vec![relayed, forged]
        }
        Behaviour::HighS => {
            let mut bytes = seal(right());
            let at = bytes.len() - 64;
            let twin = high_s(&bytes[at..]);
            bytes[at..].copy_from_slice(&twin);
            vec![bytes]
        }
        Behaviour::Collude => vec![seal(forged_ballots(knowledge, node, false))],
        Behaviour::OtherSlice => vec![seal(forged_ballots(knowledge, node, true))],
        Behaviour::OtherEpoch => {
            let old = &knowledge.old.signers[usize::from(node.0)];
            vec![old.sign_ballots(forged_ballots(knowledge, node, true)).unwrap()]
        }
        _ => vec![seal(every(knowledge, node, |which, slice| lie(behaviour, node, knowledge, random, which, slice)))],
    }
}

/// The lies that change one ballot at a time.
fn lie(
    behaviour: Behaviour,
    node: NodeIndex,
    knowledge: &Knowledge<'_>,
    random: &mut Random,
    which: usize,
    slice: usize,
) -> Option<Ballot> {
    let world = knowledge.world;
    let request = &knowledge.requests[which];
    let mut ballot = honest(knowledge, node, which, slice)?;
    match behaviour {
        Behaviour::WrongInput => ballot.vote.input_root = Digest(random.bytes()),
        Behaviour::WrongPositions => ballot.vote.positions += 1,
        Behaviour::RandomTag => ballot.vote.tag = Digest(random.bytes()),
        Behaviour::CopyVote => {
            ballot = honest(knowledge, knowledge.honest[slice], which, slice)?;
        }
        Behaviour::SwapToken => match &mut ballot.answer {
            Some(Answer::Text { tokens, .. }) => {
                let at = random.below(tokens.len());
                tokens[at] = tokens[at] % 6 + 1;
                ballot.vote.output_root = ballot.answer.as_ref()?.root();
            }
            _ => spoil(&mut ballot, random),
        },
        Behaviour::WrongAnswer => {
            if let Some(Answer::Text { text, .. }) = &mut ballot.answer {
                text.extend_from_slice(b" and more");
            }
        }
        Behaviour::EarlyStop => ballot = early_stop(knowledge, ballot, which, slice)?,
        Behaviour::ReplayOther => {
            ballot = honest(knowledge, node, 1 - which, slice)?;
            ballot.vote.rd = request.digest();
        }
        Behaviour::FeedOtherToken | Behaviour::FeedOtherRows => {
            ballot = world.honest_ballot(node, slice, request, &knowledge.fed[which][slice])?;
        }
        _ => unreachable!("{behaviour:?} is not a lie about one ballot"),
    }
    Some(ballot)
}

/// The answer without its last token, with the right roots of everything up to there.
fn early_stop(knowledge: &Knowledge<'_>, ballot: Ballot, which: usize, slice: usize) -> Option<Ballot> {
    let (world, request) = (knowledge.world, &knowledge.requests[which]);
    let last = &knowledge.truth[which][world.last()];
    let (_, answer) = world.model.replay(world.last(), request, last)?;
    let Answer::Text { mut tokens, .. } = answer else { return None };
    tokens.pop();
    let short = text_answer(request, tokens, Finish::Stop);
    let (positions, _) = boundary0(request, &short).unwrap();
    let input = &knowledge.truth[which][slice][..positions as usize];
    let mut vote = ballot.vote;
    vote.positions = positions;
    vote.input_root = root_of(input);
    if slice == world.last() {
        vote.output_root = short.root();
        return Some(Ballot { vote, answer: Some(short) });
    }
    vote.output_root = root_of(&world.model.rows(slice, input));
    Some(Ballot { vote, answer: None })
}

/// What all colluders sign: a wrong answer, boundary 0 that fits it, and invented roots between.
fn forged_ballots(knowledge: &Knowledge<'_>, node: NodeIndex, everywhere: bool) -> Vec<Ballot> {
    let world = knowledge.world;
    let mut ballots = Vec::new();
    for request in knowledge.requests {
        let answer = forged_answer(request);
        let (positions, boundary0) = boundary0(request, &answer).unwrap();
        let root = |boundary: usize| match boundary {
            0 => boundary0,
            _ if boundary == world.slices() => answer.root(),
            _ => Digest([boundary as u8; 32]),
        };
        for slice in 0..world.slices() {
            if everywhere || world.epoch.replicas(slice as u16).contains(&node) {
                let rd = request.digest();
                let tag = work_tag(node, &rd, slice as u16, positions, &Digest([0; 32]));
                let (input_root, output_root) = (root(slice), root(slice + 1));
                let vote = Vote { rd, slice: slice as u16, positions, input_root, output_root, tag };
                ballots.push(Ballot { vote, answer: (slice == world.last()).then(|| answer.clone()) });
            }
        }
    }
    ballots
}

/// The wrong answer that colluders agree on.
pub(crate) fn forged_answer(request: &Request) -> Answer {
    text_answer(request, vec![6; request.params.max_tokens as usize], Finish::Length)
}

/// Another output; for the last slice another answer with it.
fn spoil(ballot: &mut Ballot, random: &mut Random) {
    match &mut ballot.answer {
        Some(Answer::Text { text, .. }) => {
            text.extend_from_slice(random.next().to_string().as_bytes());
            ballot.vote.output_root = ballot.answer.as_ref().unwrap().root();
        }
        _ => ballot.vote.output_root = Digest(random.bytes()),
    }
}

fn garbage(batch: &[u8], random: &mut Random) -> Vec<Vec<u8>> {
    let mut flipped = batch.to_vec();
    let at = random.below(flipped.len());
    flipped[at] ^= 1 << random.below(8);
    let cut = batch[..random.below(batch.len())].to_vec();
    let long = [batch, &random.bytes()[..]].concat();
    let mut unsigned = batch.to_vec();
    let at = unsigned.len() - 64;
    unsigned[at..].fill(0);
    vec![flipped, cut, long, unsigned, random.bytes().to_vec(), vec![]]
}

/// The signature with s negated.
pub(crate) fn high_s(signature: &[u8]) -> [u8; 64] {
    let signature = Signature::from_slice(signature).unwrap();
    let (r, s) = signature.split_scalars();
    Signature::from_scalars(r, -s).unwrap().to_bytes().into()
}

fn honest(knowledge: &Knowledge<'_>, node: NodeIndex, which: usize, slice: usize) -> Option<Ballot> {
    knowledge.world.honest_ballot(node, slice, &knowledge.requests[which], &knowledge.truth[which][slice])
}

/// A node's ballots for both requests.
fn every(
    knowledge: &Knowledge<'_>,
    node: NodeIndex,
    mut ballot: impl FnMut(usize, usize) -> Option<Ballot>,
) -> Vec<Ballot> {
    let mut ballots = Vec::new();
    for which in 0..knowledge.requests.len() {
        for slice in 0..knowledge.world.slices() {
            if knowledge.world.epoch.replicas(slice as u16).contains(&node) {
                ballots.extend(ballot(which, slice));
            }
        }
    }
    ballots
}
