use super::*;
use crate::request::Request;
use crate::sim::world::{Shape, World, request};
use crate::tally::{Audit, Tally, TallyEvent};
use crate::vote::Ballot;

fn signed(world: &World, node: u16, vote: Vote) -> SignedVote {
    let ballots = vec![Ballot { vote, answer: None }; 3];
    world.signers[usize::from(node)].seal_ballots(ballots).unwrap().ballots[1].signed().clone()
}

fn vote(world: &World, node: u16, request: &Request) -> Vote {
    world.honest_ballots(NodeIndex(node), request)[0].vote
}

/// Evidence of every kind against node 1 of three.
fn every_kind(world: &World) -> Vec<Evidence> {
    let request = request(0, Mode::Full);
    let (right, other) = (vote(world, 1, &request), Digest([9; 32]));
    let mut tally = Tally::new(world.epoch.clone(), request.clone());
    for node in [0, 2] {
        let ballots = world.honest_ballots(NodeIndex(node), &request);
        for ballot in world.signers[usize::from(node)].seal_ballots(ballots).unwrap().ballots {
            tally.handle(ballot);
        }
    }
    let mut found = Vec::new();
    let accuse = |vote: Vote, tally: &Tally| {
        let mut tally = tally.clone();
        let mut evidence = Vec::new();
        for vote in [right, vote] {
            let ballots = vec![Ballot { vote, answer: None }];
            for ballot in world.signers[1].seal_ballots(ballots).unwrap().ballots {
                evidence.extend(tally.handle(ballot).into_iter().filter_map(|event| match event {
                    TallyEvent::Accused(evidence) => Some(evidence),
                    _ => None,
                }));
            }
        }
        evidence
    };
    found.extend(accuse(Vote { output_root: other, ..right }, &tally));
    found.extend(accuse(Vote { input_root: other, ..right }, &tally));
    let certificate =
        SliceCertificate { votes: [0, 2].map(|node| signed(world, node, vote(world, node, &request))).to_vec() };
    let against = Box::new(signed(world, 1, Vote { output_root: other, ..right }));
    let charge = Charge::WrongOutput { vote: against, certificate };
    found.push(Evidence::new(&world.epoch, NodeIndex(1), charge));
    let interior = world.model.interior(0, &right.input_root);
    let copied = Ballot { vote: Vote { tag: vote(world, 0, &request).tag, ..right }, answer: None };
    tally.handle(world.signers[1].seal_ballots(vec![copied]).unwrap().ballots.remove(0));
    let Audit::Accused(evidence) = tally.audit(NodeIndex(1), 0, &interior) else { panic!("the copied tag passes") };
    found.push(evidence);
    found
}

#[test]
fn every_kind_holds_and_has_its_grade() {
    let world = World::new(&Shape::disjoint(1, 1));
    let found = every_kind(&world);
    let kinds: Vec<EvidenceKind> = found.iter().map(Evidence::kind).collect();
    let expected =
        [EvidenceKind::Equivocation, EvidenceKind::WrongInput, EvidenceKind::WrongOutput, EvidenceKind::WrongTag];
    assert_eq!(kinds, expected);
    for evidence in found {
        assert_eq!(evidence.accused, NodeIndex(1));
        let grade = if evidence.kind() == EvidenceKind::Equivocation { Grade::Proof } else { Grade::Quarantine };
        assert_eq!(evidence.verify(&world.strict), Ok(grade));
        assert_eq!(Evidence::from_json(&evidence.to_json()).unwrap(), evidence);
    }
}

/// Nobody can be framed by changing evidence: every digit and letter of it counts.
#[test]
fn any_changed_character_of_the_json_is_found() {
    let world = World::new(&Shape::disjoint(1, 1));
    for evidence in every_kind(&world) {
        let json = evidence.to_json();
        for (at, byte) in json.bytes().enumerate().filter(|(_, byte)| byte.is_ascii_alphanumeric()) {
            let mut changed = json.clone().into_bytes();
            changed[at] = if byte == b'1' { b'2' } else { b'1' };
            let Ok(changed) = Evidence::from_json(std::str::from_utf8(&changed).unwrap()) else { continue };
            assert!(changed.verify(&world.strict).is_err(), "{:?} character {at}", evidence.kind());
        }
    }
}

#[test]
fn honest_votes_make_no_evidence() {
    let world = World::new(&Shape::disjoint(1, 2));
    let (one, other) = (request(0, Mode::Full), request(1, Mode::Full));
    let certificate = |request: &Request| SliceCertificate {
        votes: [0, 2].map(|node| signed(&world, node, vote(&world, node, request))).to_vec(),
    };
    let of = |node: u16, request: &Request| Box::new(signed(&world, node, vote(&world, node, request)));
    let fault = |charge: Charge| Evidence::new(&world.epoch, NodeIndex(1), charge).verify(&world.strict).unwrap_err();

    let both = Charge::Equivocation { first: of(1, &one), second: of(1, &one) };
    assert_eq!(fault(both), EvidenceFault::Unfounded);
    let two_requests = Charge::Equivocation { first: of(1, &one), second: of(1, &other) };
    assert_eq!(fault(two_requests), EvidenceFault::Unrelated);
    let two_nodes = Charge::Equivocation { first: of(1, &one), second: of(2, &one) };
    assert_eq!(fault(two_nodes), EvidenceFault::Accused { signer: NodeIndex(2) });
    let agreeing = Charge::WrongOutput { vote: of(1, &one), certificate: certificate(&one) };
    assert_eq!(fault(agreeing), EvidenceFault::Unfounded);
    let agreeing = Charge::WrongInput { vote: of(1, &one), certificate: certificate(&one) };
    assert_eq!(fault(agreeing), EvidenceFault::Unfounded);
    let unrelated = Charge::WrongInput { vote: of(1, &one), certificate: certificate(&other) };
    assert_eq!(fault(unrelated), EvidenceFault::Unrelated);
    let right_tag = Charge::WrongTag {
        vote: of(1, &one),
        witness: of(0, &one),
        interior: world.model.interior(0, &vote(&world, 1, &one).input_root),
    };
    assert_eq!(fault(right_tag), EvidenceFault::Unfounded);
    // An interior that the witness's own tag does not bear out frames nobody.
    let invented = Charge::WrongTag { vote: of(1, &one), witness: of(0, &one), interior: Digest([1; 32]) };
    assert_eq!(fault(invented), EvidenceFault::Unfounded);
    let too_few = Charge::WrongOutput {
        vote: of(1, &one),
        certificate: SliceCertificate { votes: certificate(&one).votes[..1].to_vec() },
    };
    assert!(matches!(fault(too_few), EvidenceFault::Certificate(_)));
}
