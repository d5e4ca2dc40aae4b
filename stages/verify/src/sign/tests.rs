use super::*;
use crate::request::Mode;
use crate::sim::world::{Shape, World, key, request};
use crate::vote::VoteFault;

fn batch(world: &World, node: u16, count: u8) -> (Vec<u8>, Vec<SignedBallot>) {
    let ballots: Vec<Ballot> =
        (0..count).flat_map(|nonce| world.honest_ballots(NodeIndex(node), &request(nonce, Mode::Full))).collect();
    let sealed = world.signers[usize::from(node)].seal_ballots(ballots).unwrap();
    (sealed.bytes, sealed.ballots)
}

#[test]
fn a_batch_opens_to_what_was_sealed() {
    let world = World::new(&Shape::disjoint(1, 1));
    for count in [1, 2, 3, 7, 8] {
        let (bytes, sealed) = batch(&world, 0, count);
        let opened = world.epoch.open_ballots(&bytes, NodeIndex(0)).unwrap();
        assert_eq!(opened, sealed);
        for ballot in opened {
            assert_eq!(ballot.signed().check(&world.epoch), Ok(()));
        }
    }
}

#[test]
fn signing_is_deterministic_and_low_s() {
    let world = World::new(&Shape::disjoint(1, 1));
    let (bytes, ballots) = batch(&world, 0, 3);
    assert_eq!(batch(&world, 0, 3).0, bytes);
    let signature = Signature::from_slice(&ballots[0].signed().proof.signature.0).unwrap();
    assert_eq!(signature.normalize_s(), signature);
}

/// No changed byte of a batch gives another vote: only answers may change, for they travel beside.
#[test]
fn changed_batches_give_no_other_votes() {
    let world = World::new(&Shape::disjoint(1, 1));
    let (bytes, sealed) = batch(&world, 0, 2);
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        if let Ok(opened) = world.epoch.open_ballots(&changed, NodeIndex(0)) {
            let votes = |ballots: &[SignedBallot]| ballots.iter().map(|ballot| *ballot.vote()).collect::<Vec<_>>();
            assert_eq!(votes(&opened), votes(&sealed), "byte {at}");
            assert_ne!(opened, sealed);
        }
        assert!(world.epoch.open_ballots(&bytes[..at], NodeIndex(0)).is_err());
    }
}

#[test]
fn a_batch_has_one_sender_one_epoch_and_one_purpose() {
    let world = World::new(&Shape::disjoint(1, 1));
    let (mut bytes, ballots) = batch(&world, 0, 2);
    let wrong = OpenError::Sender { claimed: NodeIndex(0), sender: NodeIndex(1) };
    assert_eq!(world.epoch.open_ballots(&bytes, NodeIndex(1)), Err(wrong));
    assert!(matches!(world.epoch.open_pre_prepares(&bytes, NodeIndex(0)), Err(OpenError::Codec(_))));
    let other = World::new(&Shape { weights: 2, ..Shape::disjoint(1, 1) });
    assert_eq!(other.epoch.open_ballots(&bytes, NodeIndex(0)), Err(OpenError::Signature));
    // The leaf is bound to the epoch too, and is looked at before the signature.
    assert_eq!(ballots[0].signed().check(&other.epoch), Err(VoteFault::Vote));
    bytes[2..4].copy_from_slice(&99_u16.to_le_bytes());
    assert_eq!(world.epoch.open_ballots(&bytes, NodeIndex(99)), Err(OpenError::Unknown { sender: NodeIndex(99) }));
}

#[test]
fn pre_prepares_open_to_what_was_signed() {
    let world = World::new(&Shape::disjoint(1, 1));
    let items: Vec<PrePrepare> =
        (0..5).map(|nonce| PrePrepare { request: request(nonce, Mode::Full), attempt: nonce.into() }).collect();
    let bytes = world.signers[2].sign_pre_prepares(items.clone()).unwrap();
    assert_eq!(world.epoch.open_pre_prepares(&bytes, NodeIndex(2)), Ok(items));
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(world.epoch.open_pre_prepares(&changed, NodeIndex(2)).is_err(), "byte {at}");
    }
}

#[test]
fn what_cannot_be_read_is_not_signed() {
    let world = World::new(&Shape::disjoint(1, 1));
    let signer = &world.signers[0];
    assert_eq!(signer.sign_ballots(vec![]), Err(SignError::Items { items: 0 }));
    let ballot = world.honest_ballots(NodeIndex(0), &request(0, Mode::Full)).remove(0);
    let many = vec![Ballot { answer: None, ..ballot.clone() }; BATCH_ITEMS_MAX];
    let bytes = signer.sign_ballots(many.clone()).unwrap();
    assert_eq!(world.epoch.open_ballots(&bytes, NodeIndex(0)).unwrap().len(), BATCH_ITEMS_MAX);
    let too_many = [many, vec![ballot.clone()]].concat();
    assert_eq!(signer.sign_ballots(too_many), Err(SignError::Items { items: BATCH_ITEMS_MAX + 1 }));
    let unreadable = Ballot { answer: Some(Answer::Vector { values: vec![f32::NAN] }), ..ballot };
    assert_eq!(signer.sign_ballots(vec![unreadable]), Err(SignError::Answer { index: 0 }));
    let stranger = Signer::new(key(50), NodeIndex(0), &world.epoch);
    assert!(matches!(stranger, Err(SignError::Key { node: NodeIndex(0) })));
}

/// The bytes that are hashed and signed, pinned: if one of these changes, no receipt of before verifies any more.
#[test]
fn golden_digests() {
    let world = World::new(&Shape::disjoint(1, 1));
    let request = request(0, Mode::Full);
    let (bytes, ballots) = batch(&world, 0, 2);
    let vote = ballots[0].vote();
    let shown = [
        ("epoch", world.epoch.digest().to_string()),
        ("rd", request.digest().to_string()),
        ("answer", ballots[0].answer().unwrap().root().to_string()),
        ("input root", vote.input_root.to_string()),
        ("tag", vote.tag.to_string()),
        ("leaf", ballots[0].signed().proof.leaf.to_string()),
        ("root", ballots[0].signed().proof.root.to_string()),
        ("batch", hash(Purpose::Votes, &[&bytes]).to_string()),
    ];
    let shown: String = shown.iter().map(|(name, digest)| format!("{name} {digest}\n")).collect();
    assert_eq!(shown, include_str!("golden.txt"));
}
