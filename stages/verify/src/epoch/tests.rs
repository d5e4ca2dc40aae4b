use super::*;
use crate::request::{Mode, Request, RequestParts};
use crate::sim::world::{Shape, World, request};

fn parts() -> EpochParts {
    World::new(&Shape::disjoint(1, 2)).epoch.parts().clone()
}

fn error(change: fn(&mut EpochParts)) -> EpochError {
    let mut parts = parts();
    change(&mut parts);
    Epoch::new(parts).unwrap_err()
}

#[test]
fn an_epoch_is_valid_or_none() {
    assert_eq!(error(|parts| parts.cluster.clear()), EpochError::Name { field: "cluster" });
    assert_eq!(error(|parts| parts.roster[3].id = "x".repeat(257)), EpochError::Name { field: "roster.id" });
    assert_eq!(error(|parts| parts.max_byzantine = 1000), EpochError::MaxByzantine { found: 1000 });
    assert_eq!(error(|parts| parts.roster.clear()), EpochError::Roster { found: 0 });
    assert_eq!(error(|parts| parts.roster[1].id = "n0".into()), EpochError::DuplicateId { id: "n0".into() });
    let key = error(|parts| parts.roster[1].public_key = parts.roster[0].public_key);
    assert_eq!(key, EpochError::DuplicateKey { id: "n1".into() });
    let key = error(|parts| parts.roster[1].public_key = PublicKey([5; 33]));
    assert_eq!(key, EpochError::Key { id: "n1".into() });
    assert_eq!(error(|parts| parts.slices.clear()), EpochError::Slices { found: 0 });
    assert_eq!(error(|parts| parts.slices[1].first_layer = 5), EpochError::Layers { slice: 1 });
    assert_eq!(error(|parts| parts.slices[1].last_layer = 4), EpochError::Layers { slice: 1 });
    let replicas = error(|parts| parts.slices[0].replicas.truncate(2));
    assert_eq!(replicas, EpochError::Replicas { slice: 0, found: 2, expected: 3 });
    let twice = error(|parts| parts.slices[0].replicas[1] = NodeIndex(0));
    assert_eq!(twice, EpochError::Replica { slice: 0, node: NodeIndex(0) });
    let unknown = error(|parts| parts.slices[1].replicas[1] = NodeIndex(77));
    assert_eq!(unknown, EpochError::Replica { slice: 1, node: NodeIndex(77) });
    assert!(matches!(error(|parts| parts.limits.positions_max = 0), EpochError::Limit { .. }));
}

#[test]
fn every_field_is_in_the_digest() {
    let digest = |change: fn(&mut EpochParts)| {
        let mut parts = parts();
        change(&mut parts);
        Epoch::new(parts).unwrap().digest()
    };
    let all = [
        digest(|_| {}),
        digest(|parts| parts.cluster.push('x')),
        digest(|parts| parts.number += 1),
        digest(|parts| parts.roster[0].id.push('x')),
        digest(|parts| parts.roster.swap(0, 1)),
        digest(|parts| parts.roster[0].domain = None),
        digest(|parts| parts.model.push('x')),
        digest(|parts| parts.manifest.0[0] ^= 1),
        digest(|parts| parts.profile.push('x')),
        digest(|parts| parts.profile_digest.0[0] ^= 1),
        digest(|parts| parts.slices[1].last_layer += 1),
        digest(|parts| parts.slices[0].replicas.swap(0, 1)),
        digest(|parts| parts.limits.positions_max -= 1),
        digest(|parts| parts.limits.values_max -= 1),
    ];
    let distinct: BTreeSet<Digest> = all.iter().copied().collect();
    assert_eq!(distinct.len(), all.len());
}

#[test]
fn the_json_form_returns_the_same_epoch_and_takes_nothing_else() {
    let epoch = World::new(&Shape::disjoint(1, 2)).epoch;
    let json = epoch.to_json();
    assert_eq!(Epoch::from_json(&json).unwrap().digest(), epoch.digest());
    assert!(Epoch::from_json(&json.replacen("\"cluster\"", "\"clusters\"", 1)).is_err());
    assert!(Epoch::from_json(&json.replacen("\"number\": 1", "\"number\": 1, \"extra\": 1", 1)).is_err());
    assert!(Epoch::from_json(&json.replacen("\"max_byzantine\": 1", "\"max_byzantine\": 2", 1)).is_err());
    assert!(Epoch::from_json("").is_err());
    assert!(Epoch::from_json(&"[".repeat(100_000)).is_err());
}

#[test]
fn nodes_are_found_by_id_and_place() {
    let epoch = World::new(&Shape::disjoint(1, 2)).epoch;
    assert_eq!(epoch.index_of("n4"), Some(NodeIndex(4)));
    assert_eq!(epoch.index_of("n6"), None);
    assert_eq!(epoch.member(NodeIndex(4)).unwrap().id, "n4");
    assert!(epoch.member(NodeIndex(6)).is_none());
    assert!(epoch.replicas(2).is_empty());
}

#[test]
fn limits_of_the_epoch_bound_requests() {
    let mut parts = parts();
    parts.limits.positions_max = 8;
    let epoch = Epoch::new(parts).unwrap();
    let request = request(0, Mode::Full);
    assert_eq!(epoch.admits(&request), Ok(()), "3 tokens and 6 more, the last of which takes no position");
    let mut longer: RequestParts = request.parts().clone();
    longer.params.max_tokens = 7;
    let over = epoch.admits(&Request::new(longer).unwrap()).unwrap_err();
    assert_eq!(over, OverLimit { what: "positions", found: 9, max: 8 });
}
