//! What targets and seeds share: metadata of a frame, and a small cluster with known keys.

use butterfly_verify::{Digest, Epoch, EpochParts, Limits, Member, NodeIndex, PublicKey, SliceReplicas};
use k256::ecdsa::SigningKey;

/// Metadata with what metadata has: fixed fields, a list, text.
#[derive(rkyv::Archive, rkyv::Serialize)]
pub struct Meta {
    pub request: [u8; 32],
    pub slice: u16,
    pub positions: Vec<u32>,
    pub label: Option<String>,
}

/// The key of node `index`, known to everybody.
pub fn key(index: u8) -> SigningKey {
    SigningKey::from_slice(&[index + 1; 32]).expect("a scalar below the order")
}

/// Three nodes, one of which may lie, and a model cut in two.
pub fn epoch() -> Epoch {
    let member = |index: u8| {
        let public_key = key(index).verifying_key().to_sec1_point(true);
        Member {
            id: format!("n{index}"),
            public_key: PublicKey(public_key.as_bytes().try_into().expect("compressed")),
            domain: None,
        }
    };
    let slice =
        |first_layer, last_layer| SliceReplicas { first_layer, last_layer, replicas: (0..3).map(NodeIndex).collect() };
    Epoch::new(EpochParts {
        cluster: "fuzz".to_owned(),
        number: 1,
        max_byzantine: 1,
        roster: (0..3).map(member).collect(),
        model: "model".to_owned(),
        manifest: Digest([7; 32]),
        profile: "cpu-1".to_owned(),
        profile_digest: Digest([8; 32]),
        slices: vec![slice(0, 4), slice(4, 8)],
        limits: Limits::default(),
    })
    .expect("a valid epoch")
}
