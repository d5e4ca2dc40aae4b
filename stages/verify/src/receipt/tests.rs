use super::*;
use crate::request::Request;
use crate::sim::world::{Shape, World, request};
use crate::tally::{Tally, TallyEvent};

/// A receipt over two slices whose votes were signed among those of five other requests.
fn certified() -> (World, Request, Receipt, Answer) {
    let world = World::new(&Shape::disjoint(1, 2));
    let request = request(0, Mode::Full);
    let others: Vec<Request> = (1..6).map(|nonce| crate::sim::world::request(nonce, Mode::Full)).collect();
    let mut tally = Tally::new(world.epoch.clone(), request.clone());
    for signer in &world.signers {
        let mut ballots = world.honest_ballots(signer.index(), &others[usize::from(signer.index().0) % 5]);
        ballots.extend(world.honest_ballots(signer.index(), &request));
        ballots.extend(others.iter().flat_map(|other| world.honest_ballots(signer.index(), other)));
        for ballot in signer.seal_ballots(ballots).unwrap().ballots {
            for event in tally.handle(ballot) {
                if let TallyEvent::Decided { receipt, answer } = event {
                    return (world, request, receipt, answer);
                }
            }
        }
    }
    panic!("not decided")
}

fn flip(bytes: &mut [u8], at: usize) {
    bytes[at] ^= 1 << (at % 8);
}

fn flip_u32(value: &mut u32, at: usize) {
    let mut bytes = value.to_le_bytes();
    flip(&mut bytes, at);
    *value = u32::from_le_bytes(bytes);
}

fn flip_u16(value: &mut u16, at: usize) {
    let mut bytes = value.to_le_bytes();
    flip(&mut bytes, at);
    *value = u16::from_le_bytes(bytes);
}

/// A field of a vote: its name, its bytes, how one of them is changed, and which fault must name it.
struct Field {
    name: &'static str,
    bytes: usize,
    change: fn(&mut SignedVote, usize),
    is_named: fn(&VoteFault) -> bool,
}

fn vote_fields(path: usize) -> Vec<Field> {
    let is_vote = |fault: &VoteFault| *fault == VoteFault::Vote;
    let is_path = |fault: &VoteFault| *fault == VoteFault::Path;
    let is_count =
        |fault: &VoteFault| matches!(fault, VoteFault::Place { .. } | VoteFault::PathLength { .. } | VoteFault::Path);
    let field = |name, bytes, change, is_named| Field { name, bytes, change, is_named };
    vec![
        field("rd", 32, |signed, at| flip(&mut signed.vote.rd.0, at), is_vote),
        field("slice", 2, |signed, at| flip_u16(&mut signed.vote.slice, at), is_vote),
        field("positions", 4, |signed, at| flip_u32(&mut signed.vote.positions, at), is_vote),
        field("input_root", 32, |signed, at| flip(&mut signed.vote.input_root.0, at), is_vote),
        field("output_root", 32, |signed, at| flip(&mut signed.vote.output_root.0, at), is_vote),
        field("tag", 32, |signed, at| flip(&mut signed.vote.tag.0, at), is_vote),
        field("count", 4, |signed, at| flip_u32(&mut signed.proof.count, at), is_count),
        field("index", 4, |signed, at| flip_u32(&mut signed.proof.index, at), is_vote),
        field("leaf", 32, |signed, at| flip(&mut signed.proof.leaf.0, at), is_vote),
        field("path", path * 32, |signed, at| flip(&mut signed.proof.path[at / 32].0, at % 32), is_path),
        field("root", 32, |signed, at| flip(&mut signed.proof.root.0, at), |fault| *fault == VoteFault::Root),
        field(
            "signature",
            64,
            |signed, at| flip(&mut signed.proof.signature.0, at),
            |fault| *fault == VoteFault::Signature,
        ),
    ]
}

#[test]
fn any_changed_byte_of_a_vote_is_found_and_named() {
    let (world, request, receipt, answer) = certified();
    for slice in 0..receipt.slices.len() {
        for vote in 0..receipt.slices[slice].votes.len() {
            let path = receipt.slices[slice].votes[vote].proof.path.len();
            assert!(path >= 2, "the test wants paths");
            for field in vote_fields(path) {
                for at in 0..field.bytes {
                    let mut changed = receipt.clone();
                    (field.change)(&mut changed.slices[slice].votes[vote], at);
                    let fault = changed.verify(&world.epoch, Some(&request), Some(&answer)).unwrap_err();
                    let is_named = matches!(
                        &fault,
                        ReceiptFault::Certificate { slice: s, fault: CertificateFault::Vote { vote: v, fault } }
                            if (*s, *v) == (slice, vote) && (field.is_named)(fault)
                    );
                    assert!(is_named, "slice {slice}, vote {vote}, {} byte {at}: {fault}", field.name);
                }
            }
            for at in 0..2 {
                let mut changed = receipt.clone();
                flip_u16(&mut changed.slices[slice].votes[vote].signer.0, at);
                let fault = changed.verify(&world.epoch, Some(&request), Some(&answer)).unwrap_err();
                assert!(matches!(fault, ReceiptFault::Certificate { slice: s, .. } if s == slice), "signer: {fault}");
            }
        }
    }
}

#[test]
fn any_changed_byte_of_the_head_is_found_and_named() {
    let (world, request, receipt, answer) = certified();
    let fault = |change: &dyn Fn(&mut Receipt)| {
        let mut changed = receipt.clone();
        change(&mut changed);
        changed.verify(&world.epoch, Some(&request), Some(&answer)).unwrap_err()
    };
    for at in 0..4 {
        assert!(matches!(fault(&|receipt| flip_u32(&mut receipt.version, at)), ReceiptFault::Version { .. }));
    }
    for at in 0..32 {
        assert!(matches!(fault(&|receipt| flip(&mut receipt.epoch.0, at)), ReceiptFault::Epoch { .. }));
        assert_eq!(fault(&|receipt| flip(&mut receipt.rd.0, at)), ReceiptFault::Rd);
        assert_eq!(fault(&|receipt| flip(&mut receipt.answer_root.0, at)), ReceiptFault::AnswerRoot);
    }
    assert_eq!(fault(&|receipt| receipt.mode = Mode::Quorum), ReceiptFault::Mode);
    let is_count = |fault: &ReceiptFault| matches!(fault, ReceiptFault::Certificate { fault: CertificateFault::Count { expected, .. }, .. } if *expected > 0);
    assert!(is_count(&fault(&|receipt| receipt.mode = Mode::None)));
}

#[test]
fn parts_left_out_doubled_or_moved_are_found_and_named() {
    let (world, request, receipt, answer) = certified();
    let fault = |change: &dyn Fn(&mut Receipt)| {
        let mut changed = receipt.clone();
        change(&mut changed);
        changed.verify(&world.epoch, Some(&request), Some(&answer)).unwrap_err()
    };
    let at = |slice, fault| ReceiptFault::Certificate { slice, fault };
    let too_few = at(1, CertificateFault::Count { found: 1, expected: 2 });
    assert_eq!(fault(&|receipt| receipt.slices[1].votes.truncate(1)), too_few);
    let too_many = at(0, CertificateFault::Count { found: 3, expected: 2 });
    assert_eq!(fault(&|receipt| receipt.slices[0].votes.extend_from_within(..1)), too_many);
    let none = at(0, CertificateFault::Count { found: 0, expected: 2 });
    assert_eq!(fault(&|receipt| receipt.slices[0].votes.clear()), none);
    let order = at(0, CertificateFault::Order { vote: 1 });
    assert_eq!(fault(&|receipt| receipt.slices[0].votes.reverse()), order);
    assert_eq!(fault(&|receipt| receipt.slices[0].votes[1] = receipt.slices[0].votes[0].clone()), order);
    let member = at(0, CertificateFault::Member { vote: 0, signer: NodeIndex(3) });
    assert_eq!(fault(&|receipt| receipt.slices.reverse()), member);
    assert_eq!(fault(&|receipt| receipt.slices.truncate(1)), ReceiptFault::Slices { found: 1, expected: 2 });
    assert_eq!(fault(&|receipt| receipt.slices.clear()), ReceiptFault::Slices { found: 0, expected: 2 });
    let long = |receipt: &mut Receipt| receipt.slices[0].votes[0].proof.path.extend([Digest::default(); 1000]);
    assert!(matches!(
        fault(&long),
        ReceiptFault::Certificate { fault: CertificateFault::Vote { fault: VoteFault::PathLength { .. }, .. }, .. }
    ));
}

#[test]
fn any_changed_byte_of_the_request_is_found() {
    let (world, request, receipt, answer) = certified();
    let bytes = request.encode();
    let mut changed_requests = 0;
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            let Ok(changed) = Request::decode(&changed) else { continue };
            changed_requests += 1;
            let fault = receipt.verify(&world.epoch, Some(&changed), Some(&answer)).unwrap_err();
            assert!(matches!(fault, ReceiptFault::Request { .. }), "byte {at}: {fault}");
        }
    }
    assert!(changed_requests > bytes.len());
}

#[test]
fn any_changed_byte_of_the_answer_is_found() {
    let (world, request, receipt, answer) = certified();
    let bytes = answer.encode();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            let Ok(changed) = Answer::decode(&changed) else { continue };
            let fault = receipt.verify(&world.epoch, Some(&request), Some(&changed)).unwrap_err();
            assert!(matches!(fault, ReceiptFault::Answer { .. }), "byte {at}: {fault}");
        }
    }
}

/// Every digit and letter of the JSON form counts.
#[test]
fn any_changed_character_of_the_json_is_found() {
    let (world, request, receipt, answer) = certified();
    let json = receipt.to_json();
    assert_eq!(Receipt::from_json(&json).unwrap(), receipt);
    for (at, byte) in json.bytes().enumerate().filter(|(_, byte)| byte.is_ascii_alphanumeric()) {
        let mut changed = json.clone().into_bytes();
        changed[at] = if byte == b'1' { b'2' } else { b'1' };
        let Ok(changed) = Receipt::from_json(std::str::from_utf8(&changed).unwrap()) else { continue };
        assert!(changed.verify(&world.epoch, Some(&request), Some(&answer)).is_err(), "character {at}");
    }
}

#[test]
fn what_was_checked_is_said() {
    let (world, request, receipt, answer) = certified();
    let bare = receipt.verify(&world.epoch, None, None).unwrap();
    assert!(bare.is_verified() && !bare.is_complete());
    let whole = receipt.verify(&world.epoch, Some(&request), Some(&answer)).unwrap();
    assert!(whole.is_verified() && whole.is_complete());
    assert_eq!((whole.slices, whole.votes_per_slice), (2, 2));
}

#[test]
fn a_single_vote_is_never_called_verified() {
    let world = World::new(&Shape::disjoint(1, 2));
    let request = request(0, Mode::None);
    let (receipt, answer) = world.decide(&request);
    assert!(receipt.slices.iter().all(|slice| slice.votes.len() == 1));
    let verified = receipt.verify(&world.epoch, Some(&request), Some(&answer)).unwrap();
    assert!(!verified.is_verified());
    assert!(verified.to_string().starts_with("not verified"));

    let trusting = World::new(&Shape::disjoint(0, 1));
    let request = crate::sim::world::request(0, Mode::Full);
    let (receipt, answer) = trusting.decide(&request);
    let verified = receipt.verify(&trusting.epoch, Some(&request), Some(&answer)).unwrap();
    assert!(!verified.is_verified());
}

/// Two nodes that collude put their names to boundaries that do not follow from one another.
#[test]
fn boundaries_must_follow_from_one_another() {
    let (world, request, receipt, answer) = certified();
    let resign = |slice: usize, change: fn(&mut crate::Vote)| {
        let mut receipt = receipt.clone();
        for signed in &mut receipt.slices[slice].votes {
            change(&mut signed.vote);
            let ballot = crate::Ballot { vote: signed.vote, answer: None };
            let signer = &world.signers[usize::from(signed.signer.0)];
            *signed = signer.seal_ballots(vec![ballot]).unwrap().ballots[0].signed().clone();
        }
        receipt.verify(&world.epoch, Some(&request), Some(&answer)).unwrap_err()
    };
    assert_eq!(resign(1, |vote| vote.input_root = Digest([3; 32])), ReceiptFault::Chain { slice: 1 });
    assert_eq!(resign(0, |vote| vote.output_root = Digest([3; 32])), ReceiptFault::Chain { slice: 1 });
    assert_eq!(resign(1, |vote| vote.positions += 1), ReceiptFault::Chain { slice: 1 });
    assert_eq!(resign(0, |vote| vote.input_root = Digest([3; 32])), ReceiptFault::Boundary0);
    assert_eq!(resign(1, |vote| vote.output_root = Digest([3; 32])), ReceiptFault::AnswerRoot);
}
