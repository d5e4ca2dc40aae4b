use super::*;
use crate::evidence::Grade;
use crate::sim::world::{Shape, World, request};
use crate::vote::Ballot;

fn ballots(world: &World, node: u16, request: &Request) -> Vec<SignedBallot> {
    signed(world, node, world.honest_ballots(NodeIndex(node), request))
}

fn signed(world: &World, node: u16, ballots: Vec<Ballot>) -> Vec<SignedBallot> {
    world.signers[usize::from(node)].seal_ballots(ballots).unwrap().ballots
}

/// A node's ballots, changed before they are signed.
fn changed(world: &World, node: u16, request: &Request, change: impl Fn(&mut Ballot)) -> Vec<SignedBallot> {
    let mut ballots = world.honest_ballots(NodeIndex(node), request);
    ballots.iter_mut().for_each(change);
    signed(world, node, ballots)
}

fn handle_all(tally: &mut Tally, ballots: Vec<SignedBallot>) -> Vec<TallyEvent> {
    ballots.into_iter().flat_map(|ballot| tally.handle(ballot)).collect()
}

fn accused(events: &[TallyEvent]) -> Vec<(NodeIndex, EvidenceKind)> {
    let evidence = |event: &TallyEvent| match event {
        TallyEvent::Accused(evidence) => Some((evidence.accused, evidence.kind())),
        _ => None,
    };
    events.iter().filter_map(evidence).collect()
}

fn is_decided(events: &[TallyEvent]) -> bool {
    events.iter().any(|event| matches!(event, TallyEvent::Decided { .. }))
}

fn wrong_output(ballot: &mut Ballot) {
    ballot.answer = None;
    ballot.vote.output_root = Digest([0xbb; 32]);
}

fn one_slice() -> (World, Request, Tally) {
    let world = World::new(&Shape::disjoint(1, 1));
    let request = request(0, Mode::Full);
    let tally = Tally::new(world.epoch.clone(), request.clone());
    (world, request, tally)
}

#[test]
fn the_second_equal_vote_of_three_decides() {
    let (world, request, mut tally) = one_slice();
    assert_eq!(handle_all(&mut tally, ballots(&world, 2, &request)), []);
    let events = handle_all(&mut tally, ballots(&world, 0, &request));
    assert_eq!(events[0], TallyEvent::SliceCertified { slice: 0 });
    assert!(is_decided(&events) && tally.is_decided());
    assert_eq!(tally.missing(), [(0, NodeIndex(1))]);
    assert_eq!(handle_all(&mut tally, ballots(&world, 1, &request)), []);
    assert_eq!(tally.missing(), []);
}

#[test]
fn a_repeated_vote_counts_once() {
    let (world, request, mut tally) = one_slice();
    for _ in 0..3 {
        assert_eq!(handle_all(&mut tally, ballots(&world, 0, &request)), []);
    }
    assert_eq!(tally.missing().len(), 2);
}

#[test]
fn a_vote_against_a_certified_slice_accuses_before_and_after() {
    for liar_first in [true, false] {
        let (world, request, mut tally) = one_slice();
        let lie = changed(&world, 1, &request, wrong_output);
        let mut events = Vec::new();
        if liar_first {
            events.extend(handle_all(&mut tally, lie.clone()));
            assert_eq!(accused(&events), [], "nothing is certified yet");
        }
        events.extend(handle_all(&mut tally, ballots(&world, 0, &request)));
        events.extend(handle_all(&mut tally, ballots(&world, 2, &request)));
        if !liar_first {
            events.extend(handle_all(&mut tally, lie.clone()));
        }
        assert_eq!(accused(&events), [(NodeIndex(1), EvidenceKind::WrongOutput)]);
        // Saying it again adds nothing.
        assert_eq!(handle_all(&mut tally, lie), []);
    }
}

#[test]
fn two_outputs_for_one_input_are_proof() {
    let (world, request, mut tally) = one_slice();
    handle_all(&mut tally, ballots(&world, 1, &request));
    let events = handle_all(&mut tally, changed(&world, 1, &request, wrong_output));
    assert_eq!(accused(&events), [(NodeIndex(1), EvidenceKind::Equivocation)]);
    let [TallyEvent::Accused(evidence)] = &events[..] else { panic!("{events:?}") };
    assert_eq!(evidence.verify(&world.strict), Ok(Grade::Proof));
    // The first vote still counts, and the node is not charged again for the same lie.
    let events = handle_all(&mut tally, ballots(&world, 0, &request));
    assert!(is_decided(&events));
    assert_eq!(accused(&events), []);
}

#[test]
fn two_inputs_are_no_proof_but_count_against_what_is_certified() {
    let (world, request, mut tally) = one_slice();
    handle_all(&mut tally, changed(&world, 1, &request, |ballot| ballot.vote.input_root = Digest([1; 32])));
    assert_eq!(accused(&handle_all(&mut tally, ballots(&world, 1, &request))), []);
    handle_all(&mut tally, ballots(&world, 0, &request));
    let events = handle_all(&mut tally, ballots(&world, 2, &request));
    assert!(is_decided(&events));
    assert_eq!(accused(&events), [(NodeIndex(1), EvidenceKind::WrongInput)]);
}

#[test]
fn three_different_votes_are_impossible_and_the_last_one_says_so() {
    let (world, request, mut tally) = one_slice();
    handle_all(&mut tally, ballots(&world, 0, &request));
    assert_eq!(handle_all(&mut tally, changed(&world, 1, &request, wrong_output)), []);
    let other = |ballot: &mut Ballot| ballot.vote.output_root = Digest([0xcc; 32]);
    let events = handle_all(&mut tally, changed(&world, 2, &request, other));
    let split = TallyEvent::Impossible { slice: 0, reason: ImpossibleReason::Split };
    assert!(events.contains(&split) && tally.is_failed());
    assert!(!handle_all(&mut tally, ballots(&world, 1, &request)).contains(&split), "once only");
}

#[test]
fn impossible_comes_as_soon_as_the_silent_cannot_help() {
    let world = World::new(&Shape::disjoint(2, 1));
    let request = request(0, Mode::Full);
    let mut tally = Tally::new(world.epoch.clone(), request.clone());
    let different = |tally: &mut Tally, node: u16| {
        let root = Digest([node as u8; 32]);
        handle_all(tally, changed(&world, node, &request, |ballot| ballot.vote.output_root = root))
    };
    // Of five with three needed, three that differ leave two: two and one make three.
    for node in 0..3 {
        let events = different(&mut tally, node);
        assert!(!events.iter().any(|event| matches!(event, TallyEvent::Impossible { .. })), "after {node}");
    }
    let events = different(&mut tally, 3);
    assert!(events.contains(&TallyEvent::Impossible { slice: 0, reason: ImpossibleReason::Split }));
}

#[test]
fn ballots_that_do_not_count_are_reported() {
    let world = World::new(&Shape::disjoint(1, 2));
    let request = request(0, Mode::Full);
    let mut tally = Tally::new(world.epoch.clone(), request.clone());
    let reason = |events: Vec<TallyEvent>| match &events[..] {
        [TallyEvent::Ignored { reason, .. }] => *reason,
        _ => panic!("{events:?}"),
    };
    let other = crate::sim::world::request(1, Mode::Full);
    assert_eq!(reason(handle_all(&mut tally, ballots(&world, 0, &other))), IgnoredReason::OtherRequest);
    let moved = changed(&world, 0, &request, |ballot| ballot.vote.slice = 1);
    assert_eq!(reason(handle_all(&mut tally, moved)), IgnoredReason::NotMember);
    let beyond = changed(&world, 0, &request, |ballot| ballot.vote.slice = 2);
    assert_eq!(reason(handle_all(&mut tally, beyond)), IgnoredReason::UnknownSlice);
    let elsewhere = World::new(&Shape { weights: 2, ..Shape::disjoint(1, 2) });
    assert_eq!(reason(handle_all(&mut tally, ballots(&elsewhere, 0, &request))), IgnoredReason::OtherEpoch);
    let beside = changed(&world, 5, &request, |ballot| ballot.answer = Some(Answer::Vector { values: vec![1.0] }));
    assert_eq!(reason(handle_all(&mut tally, beside)), IgnoredReason::WrongAnswer);
    assert_eq!(tally.missing().len(), 5, "the vote itself counts");
}

#[test]
fn an_answer_left_out_may_follow_and_cannot_be_crowded_out() {
    let (world, request, mut tally) = one_slice();
    // A liar brings in answer after answer, each with a vote of its own.
    for lie in 0..50_u8 {
        let made_up = |ballot: &mut Ballot| {
            let answer = Answer::Vector { values: vec![f32::from(lie)] };
            ballot.vote.output_root = answer.root();
            ballot.answer = Some(answer);
        };
        handle_all(&mut tally, changed(&world, 1, &request, made_up));
    }
    assert!(tally.answers.len() <= 2);
    let bare = |ballot: &mut Ballot| ballot.answer = None;
    handle_all(&mut tally, changed(&world, 0, &request, bare));
    let events = handle_all(&mut tally, ballots(&world, 2, &request));
    assert!(is_decided(&events));
}

#[test]
fn certified_without_an_answer_is_impossible_when_all_have_voted() {
    let (world, request, mut tally) = one_slice();
    let bare = |ballot: &mut Ballot| ballot.answer = None;
    handle_all(&mut tally, changed(&world, 0, &request, bare));
    let events = handle_all(&mut tally, changed(&world, 1, &request, bare));
    assert_eq!(events, [TallyEvent::SliceCertified { slice: 0 }], "the third may bring it");
    let events = handle_all(&mut tally, changed(&world, 2, &request, bare));
    assert_eq!(events, [TallyEvent::Impossible { slice: 0, reason: ImpossibleReason::Answer }]);
}

#[test]
fn broken_chains_and_boundary_0_are_impossible() {
    let world = World::new(&Shape::disjoint(1, 2));
    let request = request(0, Mode::Full);
    let run = |change: fn(&mut Ballot)| {
        let mut tally = Tally::new(world.epoch.clone(), request.clone());
        let events: Vec<_> =
            (0..6).flat_map(|node| handle_all(&mut tally, changed(&world, node, &request, change))).collect();
        assert!(!is_decided(&events));
        events.into_iter().find_map(|event| match event {
            TallyEvent::Impossible { slice, reason } => Some((slice, reason)),
            _ => None,
        })
    };
    let at = |slice: u16, ballot: &Ballot| ballot.vote.slice == slice;
    assert!(at(0, &world.honest_ballots(NodeIndex(0), &request)[0]));
    let chain = run(|ballot| {
        if ballot.vote.slice == 1 {
            ballot.vote.input_root = Digest([9; 32]);
        }
    });
    assert_eq!(chain, Some((1, ImpossibleReason::Chain)));
    let boundary0 = run(|ballot| {
        if ballot.vote.slice == 0 {
            ballot.vote.input_root = Digest([9; 32]);
        }
    });
    assert_eq!(boundary0, Some((0, ImpossibleReason::Boundary0)));
    let positions = run(|ballot| ballot.vote.positions += 1);
    assert_eq!(positions, Some((0, ImpossibleReason::Boundary0)));
    let misfit = run(|ballot| {
        if let Some(Answer::Text { choice, .. }) = &mut ballot.answer {
            *choice = 7;
            ballot.vote.output_root = ballot.answer.as_ref().unwrap().root();
        }
    });
    assert_eq!(misfit, Some((1, ImpossibleReason::Answer)));
}

#[test]
fn one_vote_decides_without_verification_and_accuses_nobody() {
    let world = World::new(&Shape::disjoint(1, 1));
    let request = request(0, Mode::None);
    let mut tally = Tally::new(world.epoch.clone(), request.clone());
    let events = handle_all(&mut tally, ballots(&world, 0, &request));
    assert!(is_decided(&events));
    assert_eq!(accused(&handle_all(&mut tally, changed(&world, 1, &request, wrong_output))), []);
    // Two answers to one question are proof whatever the mode.
    let events = handle_all(&mut tally, ballots(&world, 1, &request));
    assert_eq!(accused(&events), [(NodeIndex(1), EvidenceKind::Equivocation)]);
}

#[test]
fn numeric_outcomes_are_decided_like_answers() {
    let (world, request, mut tally) = one_slice();
    let answer = Answer::Numeric { tokens: vec![5, 4], prompt_tokens: 3, choice: 0 };
    let (positions, root) = boundary0(&request, &answer).unwrap();
    assert_eq!(positions, 5);
    let numeric = |ballot: &mut Ballot| {
        ballot.vote.positions = positions;
        ballot.vote.input_root = root;
        ballot.vote.output_root = answer.root();
        ballot.answer = Some(answer.clone());
    };
    handle_all(&mut tally, changed(&world, 0, &request, numeric));
    let events = handle_all(&mut tally, changed(&world, 1, &request, numeric));
    assert!(is_decided(&events));
}
