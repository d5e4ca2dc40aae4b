//! Control of the tests: with any one rule switched off something must go wrong that a test sees.

use crate::answer::Answer;
use crate::boundary::boundary0;
use crate::codec::Writer;
use crate::digest::Purpose;
use crate::epoch::NodeIndex;
use crate::receipt::Receipt;
use crate::request::{Mode, Request, RequestParts};
use crate::rules::{Rule, Rules};
use crate::sim::world::{Shape, World, request};
use crate::sim::{Plan, Violation, forged_answer, high_s, run};
use crate::vote::{Ballot, SignatureBytes, Vote};

/// Seeds tried before a planted bug counts as not found.
const SEEDS: u64 = 600;

/// Whether a violation is the one that a planted bug should lead to.
type Expected = fn(&Violation) -> bool;

#[test]
fn the_simulation_finds_planted_bugs() {
    let is_wrong_answer: Expected = |violation| matches!(violation, Violation::WrongAnswer { .. });
    let is_any: Expected = |_| true;
    let is_tag: Expected = |violation| matches!(violation, Violation::CopiedTagPassed { .. });
    let planted: [(Rule, Expected); 8] = [
        (Rule::Threshold, is_wrong_answer),
        (Rule::Boundary0, is_wrong_answer),
        (Rule::Chain, is_wrong_answer),
        (Rule::Membership, is_any),
        (Rule::AnswerRoot, is_wrong_answer),
        (Rule::Request, is_any),
        (Rule::LowS, is_any),
        (Rule::TagNode, is_tag),
    ];
    for (rule, is_expected) in planted {
        let found = (0..SEEDS).find(|seed| {
            let plan = Plan::of(*seed, Rules::without(rule));
            run(&plan).is_err_and(|violation| is_expected(&violation))
        });
        assert!(found.is_some(), "{rule:?} switched off is not found");
    }
}

/// An attack on one rule: whether it gets through under the rules given.
type Attack = fn(Rules) -> bool;

#[test]
fn attacks_get_through_exactly_where_their_rule_is_off() {
    let attacks: [(Rule, Attack); 12] = [
        (Rule::Purpose, relabelled_purpose),
        (Rule::Epoch, relabelled_epoch),
        (Rule::Distinct, one_vote_twice),
        (Rule::Positions, other_positions),
        (Rule::LowS, twin_signature),
        (Rule::Leaf, borrowed_leaf),
        (Rule::Sender, sent_by_another),
        (Rule::Slice, votes_of_another_slice),
        (Rule::Signature, unsigned),
        (Rule::Threshold, too_few_votes),
        (Rule::Request, relabelled_request),
        (Rule::AnswerRoot, exchanged_answer),
    ];
    for (rule, attack) in attacks {
        assert!(!attack(Rules::ALL), "the attack on {rule:?} gets through");
        assert!(attack(Rules::without(rule)), "{rule:?} switched off lets nothing through");
    }
}

fn world(rules: Rules) -> World {
    World::new(&Shape { rules, ..Shape::disjoint(1, 1) })
}

fn holds(world: &World, receipt: &Receipt, request: &Request, answer: &Answer) -> bool {
    receipt.verify(&world.epoch, Some(request), Some(answer)).is_ok()
}

/// Bytes signed as something else are presented as votes.
fn relabelled_purpose(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let signer = &world.signers[0];
    let vote = world.honest_ballots(NodeIndex(0), &request)[0].vote.encode();
    let (_, signature) = signer.sign(Purpose::PrePrepares, [&vote[..]], 1).unwrap();
    let mut writer = Writer::default();
    writer.raw(&[1, Purpose::Votes as u8, 0, 0, 1, 0, 0, 0]);
    writer.raw(&vote);
    writer.flag(false);
    writer.raw(&signature.0);
    world.epoch.open_ballots(&writer.finish(), NodeIndex(0)).is_ok()
}

/// A receipt of one epoch is presented in another with the same nodes.
fn relabelled_epoch(rules: Rules) -> bool {
    let request = request(0, Mode::Full);
    let (mut receipt, answer) = world(rules).decide(&request);
    let other = World::new(&Shape { weights: 2, rules, ..Shape::disjoint(1, 1) });
    receipt.epoch = other.epoch.digest();
    holds(&other, &receipt, &request, &answer)
}

/// One vote stands for two.
fn one_vote_twice(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let (mut receipt, answer) = world.decide(&request);
    let votes = &mut receipt.slices[0].votes;
    votes[1] = votes[0].clone();
    holds(&world, &receipt, &request, &answer)
}

/// Votes changed before they are signed, by every node: more than may lie.
fn signed_by_all(world: &World, request: &Request, change: fn(&mut Vote)) -> (Receipt, Answer) {
    let (mut receipt, answer) = world.decide(request);
    for signed in receipt.slices.iter_mut().flat_map(|certificate| &mut certificate.votes) {
        let mut ballot = Ballot { vote: signed.vote, answer: None };
        change(&mut ballot.vote);
        let signer = &world.signers[usize::from(signed.signer.0)];
        *signed = signer.seal_ballots(vec![ballot]).unwrap().ballots[0].signed().clone();
    }
    (receipt, answer)
}

/// All roots are right, for positions that the answer does not have.
fn other_positions(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let (receipt, answer) = signed_by_all(&world, &request, |vote| vote.positions += 1);
    holds(&world, &receipt, &request, &answer)
}

/// Votes that name another slice stand for this one.
fn votes_of_another_slice(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let (receipt, answer) = signed_by_all(&world, &request, |vote| vote.slice = 3);
    holds(&world, &receipt, &request, &answer)
}

/// The signature is exchanged for the other one that verifies.
fn twin_signature(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let (mut receipt, answer) = world.decide(&request);
    let signature = &mut receipt.slices[0].votes[0].proof.signature;
    *signature = SignatureBytes(high_s(&signature.0));
    holds(&world, &receipt, &request, &answer)
}

/// A vote nobody signed borrows the leaf, path and signature of one that was.
fn borrowed_leaf(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let (mut receipt, _) = world.decide(&request);
    let forged = forged_answer(&request);
    let (positions, root) = boundary0(&request, &forged).unwrap();
    for signed in &mut receipt.slices[0].votes {
        signed.vote.positions = positions;
        signed.vote.input_root = root;
        signed.vote.output_root = forged.root();
    }
    receipt.answer_root = forged.root();
    holds(&world, &receipt, &request, &forged)
}

/// One node hands in another's batch.
fn sent_by_another(rules: Rules) -> bool {
    let world = world(rules);
    let ballots = world.honest_ballots(NodeIndex(0), &request(0, Mode::Full));
    let bytes = world.signers[0].sign_ballots(ballots).unwrap();
    world.epoch.open_ballots(&bytes, NodeIndex(1)).is_ok()
}

/// Nobody signed.
fn unsigned(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let (mut receipt, answer) = world.decide(&request);
    receipt.slices[0].votes.iter_mut().for_each(|signed| signed.proof.signature = SignatureBytes([1; 64]));
    holds(&world, &receipt, &request, &answer)
}

/// f votes instead of f+1.
fn too_few_votes(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let (mut receipt, answer) = world.decide(&request);
    receipt.slices[0].votes.truncate(1);
    holds(&world, &receipt, &request, &answer)
}

/// The proof of one request is presented for another that differs in its nonce alone.
fn relabelled_request(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let (mut receipt, answer) = world.decide(&request);
    let other = Request::new(RequestParts { nonce: [0xee; 32], ..request.parts().clone() }).unwrap();
    receipt.rd = other.digest();
    holds(&world, &receipt, &other, &answer)
}

/// The receipt names an answer that no vote does.
fn exchanged_answer(rules: Rules) -> bool {
    let world = world(rules);
    let request = request(0, Mode::Full);
    let (mut receipt, mut answer) = world.decide(&request);
    if let Answer::Text { text, .. } = &mut answer {
        text.push(b'!');
    }
    receipt.answer_root = answer.root();
    holds(&world, &receipt, &request, &answer)
}
