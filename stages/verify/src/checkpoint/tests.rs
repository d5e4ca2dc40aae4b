use proptest::prelude::*;

use super::*;
use crate::sim::world::{Shape, World};

const PUBLISHER: NodeIndex = NodeIndex(0);

fn entries(first: u8, count: u8) -> Vec<Entry> {
    (first..first + count).map(|n| Entry { rd: Digest([n; 32]), answer_root: Digest([n ^ 0xff; 32]) }).collect()
}

/// What every honest replica found.
fn computed(rd: &Digest) -> Option<Digest> {
    Some(Digest(rd.0.map(|byte| byte ^ 0xff)))
}

fn propose(world: &World, publisher: NodeIndex, sequence: u64, previous: Digest, entries: Vec<Entry>) -> Proposal {
    let checkpoint = Checkpoint::over(&world.epoch, publisher, sequence, previous, &entries).unwrap();
    let signature = world.signers[usize::from(publisher.0)].sign_checkpoint(&world.epoch, &checkpoint).unwrap();
    Proposal { checkpoint, entries, signature }
}

fn vouch(world: &World, node: u16, checkpoint: &Checkpoint) -> SignatureBytes {
    world.signers[usize::from(node)].sign_checkpoint(&world.epoch, checkpoint).unwrap()
}

#[test]
fn a_chain_of_segments_is_vouched_for_and_certified_by_f_plus_one() {
    let world = World::new(&Shape::disjoint(1, 1));
    let mut witness = Witness::default();
    let mut previous = Digest::default();
    for sequence in 1..=3 {
        let proposal = propose(&world, PUBLISHER, sequence, previous, entries(sequence as u8 * 10, 5));
        let travelled = Proposal::decode(&proposal.encode()).unwrap();
        assert_eq!(travelled, proposal);
        assert_eq!(witness.judge(&world.epoch, &travelled, computed), Ok(()));
        assert_eq!(witness.judge(&world.epoch, &travelled, computed), Ok(()), "asked again after a loss");
        let mut collector = Collector::new(&world.epoch, proposal.checkpoint);
        previous = collector.digest();
        let mut add = |node| collector.add(&world.epoch, NodeIndex(node), vouch(&world, node, &proposal.checkpoint));
        assert_eq!(add(0), Ok(None));
        assert_eq!(add(0), Ok(None), "one node counts once");
        let certificate = add(2).unwrap().expect("two of three are f+1");
        assert_eq!(certificate.check(&world.epoch), Ok(()));
        let text = serde_json::to_string(&certificate).unwrap();
        assert_eq!(serde_json::from_str::<CheckpointCertificate>(&text).unwrap(), certificate);
    }
}

#[test]
fn nobody_vouches_for_what_is_wrong_unknown_or_a_fork() {
    let world = World::new(&Shape::disjoint(1, 1));
    let epoch = &world.epoch;
    let good = propose(&world, PUBLISHER, 7, Digest([1; 32]), entries(0, 4));
    let fresh = |proposal: &Proposal| Witness::default().judge(epoch, proposal, computed);
    assert_eq!(fresh(&good), Ok(()));
    let mut other = good.clone();
    other.signature = vouch(&world, 1, &good.checkpoint);
    assert_eq!(fresh(&other), Err(CheckpointFault::Signature(PUBLISHER)));
    let mut other = good.clone();
    other.entries.swap(0, 1);
    assert_eq!(fresh(&other), Err(CheckpointFault::Root));
    let mut other = good.clone();
    other.entries.pop();
    assert_eq!(fresh(&other), Err(CheckpointFault::Root));
    let mut forged = entries(0, 4);
    forged[2].answer_root = Digest([9; 32]);
    let forged = propose(&world, PUBLISHER, 7, Digest([1; 32]), forged);
    assert_eq!(fresh(&forged), Err(CheckpointFault::Differs(Digest([2; 32]))));
    let unknown = |rd: &Digest| computed(rd).filter(|_| rd.0[0] != 3);
    assert_eq!(Witness::default().judge(epoch, &good, unknown), Err(CheckpointFault::Unknown(Digest([3; 32]))));

    let mut witness = Witness::default();
    witness.judge(epoch, &good, computed).unwrap();
    let after = |sequence, previous, first| propose(&world, PUBLISHER, sequence, previous, entries(first, 4));
    let judged = |proposal: Proposal| witness.clone().judge(epoch, &proposal, computed);
    assert_eq!(judged(after(7, Digest([1; 32]), 50)), Err(CheckpointFault::Fork(7)));
    assert_eq!(judged(after(8, Digest([2; 32]), 50)), Err(CheckpointFault::Fork(8)));
    assert_eq!(judged(after(6, Digest([1; 32]), 50)), Err(CheckpointFault::Stale { sequence: 6, last: 7 }));
    assert_eq!(judged(after(8, good.checkpoint.digest(epoch), 50)), Ok(()));
    assert_eq!(
        judged(propose(&world, NodeIndex(1), 1, Digest::default(), entries(50, 4))),
        Ok(()),
        "another's numbers"
    );
    // What was refused is not remembered.
    let mut witness = Witness::default();
    assert!(witness.judge(epoch, &forged, computed).is_err());
    assert_eq!(witness.judge(epoch, &good, computed), Ok(()));
}

#[test]
fn a_certificate_needs_f_plus_one_replicas_of_the_last_slice_in_this_epoch() {
    let world = World::new(&Shape::disjoint(1, 2));
    let last: Vec<NodeIndex> = world.epoch.replicas(1).to_vec();
    let first = world.epoch.replicas(0)[0];
    let checkpoint = propose(&world, PUBLISHER, 1, Digest::default(), entries(0, 2)).checkpoint;
    let mut collector = Collector::new(&world.epoch, checkpoint);
    let of_first = vouch(&world, first.0, &checkpoint);
    assert_eq!(collector.add(&world.epoch, first, of_first), Err(CheckpointFault::Signature(first)));
    let signatures: Vec<_> = last[..2].iter().map(|node| (*node, vouch(&world, node.0, &checkpoint))).collect();
    let whole = CheckpointCertificate { checkpoint, signatures: signatures.clone() };
    assert_eq!(whole.check(&world.epoch), Ok(()));
    let twice = CheckpointCertificate { checkpoint, signatures: vec![signatures[0]; 2] };
    assert_eq!(twice.check(&world.epoch), Err(CheckpointFault::Signatures { found: 1, needed: 2 }));
    let stranger = CheckpointCertificate { checkpoint, signatures: vec![signatures[0], (first, of_first)] };
    assert_eq!(stranger.check(&world.epoch), Err(CheckpointFault::Signature(first)));
    let changed = Checkpoint { sequence: 2, ..checkpoint };
    let changed = CheckpointCertificate { checkpoint: changed, signatures };
    assert!(matches!(changed.check(&world.epoch), Err(CheckpointFault::Signature(_))));
    let other = World::new(&Shape { weights: 2, ..Shape::disjoint(1, 2) });
    assert!(matches!(whole.check(&other.epoch), Err(CheckpointFault::Signature(_))));
}

#[test]
fn a_segment_has_between_one_receipt_and_as_many_as_fit() {
    let world = World::new(&Shape::disjoint(1, 1));
    let over = |entries: &[Entry]| Checkpoint::over(&world.epoch, PUBLISHER, 1, Digest::default(), entries);
    assert_eq!(over(&[]), None);
    let many = vec![entries(1, 1)[0]; CHECKPOINT_RECEIPTS_MAX + 1];
    assert_eq!(over(&many), None);
    assert!(over(&many[1..]).is_some());
}

proptest! {
    /// Whatever a peer sends, reading it ends, and what is read is canonical.
    #[test]
    fn garbage_is_refused_or_canonical(bytes in prop::collection::vec(any::<u8>(), 0..400), count in 0u32..4) {
        let mut bytes = bytes;
        if let Some(place) = bytes.get_mut(78..82) {
            place.copy_from_slice(&count.to_le_bytes());
        }
        if let Ok(proposal) = Proposal::decode(&bytes) {
            prop_assert_eq!(proposal.encode(), bytes);
        }
    }
}
