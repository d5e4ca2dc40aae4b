use proptest::prelude::*;

use super::*;

fn context() -> Context {
    Context::new(Purpose::Votes, &Digest([1; 32]), NodeIndex(2), Rules::ALL)
}

fn items(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|item| vec![item as u8; item % 5]).collect()
}

fn tree(items: &[Vec<u8>]) -> BatchTree {
    BatchTree::build(&context(), items.iter().map(Vec::as_slice)).unwrap()
}

#[test]
fn every_leaf_of_every_size_proves_itself() {
    for count in (1..=70).chain([127, 128, 129, 1023, 1024]) {
        let items = items(count);
        let tree = tree(&items);
        for (index, item) in items.iter().enumerate() {
            let (proven, path) = tree.prove(index as u32).unwrap();
            assert_eq!(proven, leaf(&context(), index as u64, item));
            assert_eq!(root_of(&proven, index as u32, count as u32, &path), Ok(tree.root()));
            assert!(path.len() <= 10);
        }
        assert!(tree.prove(count as u32).is_none());
        assert!(tree.prove(u32::MAX).is_none());
    }
}

#[test]
fn a_batch_has_1_to_1024_items() {
    assert!(BatchTree::build(&context(), []).is_none());
    assert!(BatchTree::build(&context(), [&b""[..]; BATCH_ITEMS_MAX]).is_some());
    assert!(BatchTree::build(&context(), [&b""[..]; BATCH_ITEMS_MAX + 1]).is_none());
    assert_eq!(root_of(&Digest::default(), 0, 0, &[]), Err(PathError::Place));
    assert_eq!(root_of(&Digest::default(), 0, 1025, &[]), Err(PathError::Place));
    assert_eq!(root_of(&Digest::default(), u32::MAX, u32::MAX, &[]), Err(PathError::Place));
}

/// The whole tree: inner nodes by place, leaves last.
fn nodes(tree: &BatchTree) -> Vec<Digest> {
    tree.tree.nodes().to_vec()
}

#[test]
fn an_inner_node_is_no_leaf() {
    let items = items(8);
    let tree = tree(&items);
    let all = nodes(&tree);
    for (place, node) in all.iter().enumerate().take(7) {
        // An inner node stands where a leaf of a smaller tree would, with the true siblings above it.
        let (mut path, mut at) = (Vec::new(), place);
        while at > 0 {
            path.push(all[if at % 2 == 1 { at + 1 } else { at - 1 }]);
            at = (at - 1) / 2;
        }
        for count in 1..=8_u32 {
            for index in 0..count {
                assert_ne!(root_of(node, index, count, &path), Ok(tree.root()), "node {place} as {index} of {count}");
            }
        }
    }
    // And no item's bytes make an inner node: leaf and node are hashed apart.
    let forged = [&all[3].0[..], &all[4].0[..]].concat();
    assert_ne!(leaf(&context(), 0, &forged), all[1]);
}

#[test]
fn a_shorter_tree_has_another_root() {
    let all = items(16);
    let roots: Vec<Digest> = (1..=16).map(|count| tree(&all[..count]).root()).collect();
    for (one, root) in roots.iter().enumerate() {
        assert!(!roots[..one].contains(root));
    }
    let same = vec![vec![1_u8]; 4];
    assert_ne!(tree(&same[..2]).root(), tree(&same[..3]).root());
    assert_ne!(tree(&same[..3]).root(), tree(&same[..4]).root());
}

#[test]
fn equal_items_have_distinct_leaves() {
    let tree = tree(&vec![vec![1_u8]; 9]);
    let leaves: std::collections::BTreeSet<Digest> = tree.leaves.iter().copied().collect();
    assert_eq!(leaves.len(), 9);
}

#[test]
fn a_leaf_is_bound_to_purpose_epoch_and_signer() {
    let of = |purpose, epoch, signer| leaf(&Context::new(purpose, &Digest([epoch; 32]), signer, Rules::ALL), 0, b"x");
    let one = of(Purpose::Votes, 1, NodeIndex(1));
    assert_ne!(one, of(Purpose::PrePrepares, 1, NodeIndex(1)));
    assert_ne!(one, of(Purpose::Votes, 2, NodeIndex(1)));
    assert_ne!(one, of(Purpose::Votes, 1, NodeIndex(2)));
}

/// One way to make a proof say something else.
#[derive(Debug, Clone)]
enum Mutation {
    OtherItem(Vec<u8>),
    OtherIndex(u32),
    OtherCount(u32),
    FlipPath { at: usize, bit: u8 },
    DropFirst,
    DropLast,
    DoubleFirst,
    DoubleLast,
    Append([u8; 32]),
    Reverse,
    Swap,
    NodeAsLeaf { place: usize },
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..70).prop_map(Mutation::OtherItem),
        prop_oneof![0..40_u32, any::<u32>()].prop_map(Mutation::OtherIndex),
        prop_oneof![0..40_u32, any::<u32>()].prop_map(Mutation::OtherCount),
        (any::<usize>(), any::<u8>()).prop_map(|(at, bit)| Mutation::FlipPath { at, bit }),
        Just(Mutation::DropFirst),
        Just(Mutation::DropLast),
        Just(Mutation::DoubleFirst),
        Just(Mutation::DoubleLast),
        any::<[u8; 32]>().prop_map(Mutation::Append),
        Just(Mutation::Reverse),
        Just(Mutation::Swap),
        any::<usize>().prop_map(|place| Mutation::NodeAsLeaf { place }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Mutated proofs never verify: whatever verifies is the item that was signed, in its place, with its path.
    #[test]
    fn mutated_proofs_never_verify(
        count in 1..40_usize,
        pick in any::<usize>(),
        mutations in proptest::collection::vec(mutation(), 1..4),
    ) {
        let items = items(count);
        let tree = tree(&items);
        let index = pick % count;
        let (proven, path) = tree.prove(index as u32).unwrap();
        let original = (proven, index as u32, count as u32, path);
        let (mut forged, mut item) = (original.clone(), items[index].clone());
        let mut is_raw = false;
        for mutation in mutations {
            let path = &mut forged.3;
            match mutation {
                Mutation::OtherItem(other) => item = other,
                Mutation::OtherIndex(other) => forged.1 = other,
                Mutation::OtherCount(other) => forged.2 = other,
                Mutation::FlipPath { at, bit } if !path.is_empty() => {
                    let at = at % (path.len() * 32);
                    path[at / 32].0[at % 32] ^= 1 << (bit % 8);
                }
                Mutation::DropFirst if !path.is_empty() => { path.remove(0); }
                Mutation::DropLast => { path.pop(); }
                Mutation::DoubleFirst if !path.is_empty() => path.insert(0, path[0]),
                Mutation::DoubleLast if !path.is_empty() => path.push(path[path.len() - 1]),
                Mutation::Append(bytes) => path.push(Digest(bytes)),
                Mutation::Reverse => path.reverse(),
                Mutation::Swap if path.len() > 1 => path.swap(0, 1),
                Mutation::NodeAsLeaf { place } => {
                    let all = nodes(&tree);
                    forged.0 = all[place % all.len()];
                    is_raw = true;
                }
                _ => {}
            }
        }
        if !is_raw {
            forged.0 = leaf(&context(), u64::from(forged.1), &item);
        }
        // A true leaf given by its own digest, with its own place and path, is no forgery.
        if forged != original {
            prop_assert_ne!(root_of(&forged.0, forged.1, forged.2, &forged.3), Ok(tree.root()));
        }
    }
}
