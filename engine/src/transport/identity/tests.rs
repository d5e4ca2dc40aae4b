//! What a greeting proves, and what every attempt to misuse one comes to.

use proptest::prelude::*;

use super::*;

type Exporter = [u8; EXPORTER_BYTES];

const HERE: Exporter = [1; EXPORTER_BYTES];
const ELSEWHERE: Exporter = [2; EXPORTER_BYTES];
const EPOCH: [u8; 32] = [9; 32];

fn node(name: &str) -> NodeId {
    NodeId::parse(name).unwrap()
}

fn identity(name: &str, seed: u8) -> LinkIdentity {
    LinkIdentity::new(node(name), SigningKey::from_slice(&[seed; 32]).unwrap())
}

fn roster(identities: &[LinkIdentity]) -> Roster {
    let address = "127.0.0.1:1".parse().unwrap();
    let members = identities
        .iter()
        .map(|identity| (identity.node.clone(), RosterMember { public_key: identity.public_key(), address }));
    Roster { epoch_digest: EPOCH, members: members.collect() }
}

fn members() -> [LinkIdentity; 3] {
    [identity("n0", 1), identity("n1", 2), identity("n2", 3)]
}

fn greeter(index: usize) -> Greeter {
    Greeter::new(members()[index].clone(), roster(&members())).unwrap()
}

fn hello(from: &Greeter, to: &str) -> Vec<u8> {
    from.greet(Role::Hello, &node(to), &HERE).unwrap()
}

#[test]
fn hello_and_welcome_prove_both_ends() {
    let (n0, n1) = (greeter(0), greeter(1));
    let proved = n1.judge_hello(&hello(&n0, "n1"), &HERE).unwrap();
    assert_eq!((proved.peer.as_str(), proved.incarnation), ("n0", n0.incarnation));
    let welcome = n1.greet(Role::Welcome, &proved.peer, &HERE).unwrap();
    let proved = n0.judge_welcome(&welcome, &node("n1"), &HERE).unwrap();
    assert_eq!((proved.peer.as_str(), proved.incarnation), ("n1", n1.incarnation));
}

#[test]
fn a_greeting_replayed_on_another_connection_proves_nothing() {
    let (n0, n1) = (greeter(0), greeter(1));
    assert_eq!(n1.judge_hello(&hello(&n0, "n1"), &ELSEWHERE), Err(Refusal::Unproved));
    let welcome = n1.greet(Role::Welcome, &node("n0"), &HERE).unwrap();
    assert_eq!(n0.judge_welcome(&welcome, &node("n1"), &ELSEWHERE), Err(Refusal::Unproved));
}

#[test]
fn a_reflected_hello_is_no_welcome() {
    let n0 = greeter(0);
    let hello = hello(&n0, "n1");
    assert_eq!(n0.judge_welcome(&hello, &node("n1"), &HERE), Err(Refusal::Malformed));
    // With the role and the names exchanged as a welcome has them, the signature does not fit.
    let mut reflected = Greeting::decode(&hello).unwrap();
    reflected.role = Role::Welcome;
    (reflected.from, reflected.to) = (reflected.to, reflected.from);
    assert_eq!(n0.judge_welcome(&reflected.encode(), &node("n1"), &HERE), Err(Refusal::Unproved));
}

#[test]
fn a_greeting_in_the_wrong_role_is_refused() {
    let (n0, n1) = (greeter(0), greeter(1));
    let welcome = n0.greet(Role::Welcome, &node("n1"), &HERE).unwrap();
    assert_eq!(n1.judge_hello(&welcome, &HERE), Err(Refusal::Malformed));
    let mut changed = Greeting::decode(&welcome).unwrap();
    changed.role = Role::Hello;
    assert_eq!(n1.judge_hello(&changed.encode(), &HERE), Err(Refusal::Unproved));
}

#[test]
fn another_epoch_is_refused_even_under_a_right_signature() {
    let mut other = roster(&members());
    other.epoch_digest = [8; 32];
    let (n0, n1) = (Greeter::new(members()[0].clone(), other).unwrap(), greeter(1));
    assert_eq!(n1.judge_hello(&hello(&n0, "n1"), &HERE), Err(Refusal::Epoch));
    let mut relabelled = Greeting::decode(&hello(&n0, "n1")).unwrap();
    relabelled.epoch_digest = EPOCH;
    assert_eq!(n1.judge_hello(&relabelled.encode(), &HERE), Err(Refusal::Unproved));
}

#[test]
fn a_stranger_is_refused_under_its_own_name_and_under_another() {
    let n1 = greeter(1);
    let stranger = [identity("m0", 7), identity("n1", 2)];
    let stranger = Greeter::new(stranger[0].clone(), roster(&stranger)).unwrap();
    assert_eq!(n1.judge_hello(&hello(&stranger, "n1"), &HERE), Err(Refusal::Stranger));
    let pretender = [identity("n0", 7), identity("n1", 2)];
    let pretender = Greeter::new(pretender[0].clone(), roster(&pretender)).unwrap();
    assert_eq!(n1.judge_hello(&hello(&pretender, "n1"), &HERE), Err(Refusal::Unproved));
}

#[test]
fn only_the_addressed_node_and_only_the_expected_one_will_do() {
    let (n0, n1, n2) = (greeter(0), greeter(1), greeter(2));
    assert_eq!(n2.judge_hello(&hello(&n0, "n1"), &HERE), Err(Refusal::WrongNode));
    let welcome = n2.greet(Role::Welcome, &node("n0"), &HERE).unwrap();
    assert_eq!(n0.judge_welcome(&welcome, &node("n1"), &HERE), Err(Refusal::WrongNode));
    assert_eq!(
        n0.judge_welcome(&n1.greet(Role::Welcome, &node("n2"), &HERE).unwrap(), &node("n1"), &HERE),
        Err(Refusal::WrongNode)
    );
}

#[test]
fn nobody_welcomes_itself_or_a_dialler_with_a_greater_name() {
    let (n1, n2) = (greeter(1), greeter(2));
    assert_eq!(n1.judge_hello(&hello(&n1, "n1"), &HERE), Err(Refusal::WrongNode));
    assert_eq!(n1.judge_hello(&hello(&n2, "n1"), &HERE), Err(Refusal::Direction));
}

#[test]
fn every_changed_byte_of_a_hello_is_noticed() {
    let (n0, n1) = (greeter(0), greeter(1));
    let hello = hello(&n0, "n1");
    for index in 0..hello.len() {
        for bit in 0..8 {
            let mut changed = hello.clone();
            changed[index] ^= 1 << bit;
            assert!(n1.judge_hello(&changed, &HERE).is_err(), "byte {index} bit {bit}");
        }
    }
    for length in 0..hello.len() {
        assert!(n1.judge_hello(&hello[..length], &HERE).is_err());
    }
    assert_eq!(n1.judge_hello(&[&hello[..], &[0]].concat(), &HERE), Err(Refusal::Malformed));
}

#[test]
fn an_identity_must_fit_its_roster() {
    let roster = roster(&members());
    let check = |name, seed| roster.check(&identity(name, seed));
    assert_eq!(check("n0", 1), Ok(()));
    assert_eq!(check("n0", 2), Err(IdentityError::WrongKey { node: node("n0") }));
    assert_eq!(check("n3", 1), Err(IdentityError::NotInRoster { node: node("n3") }));
    let mut broken = roster.clone();
    broken.members.get_mut(&node("n2")).unwrap().public_key = [5; 33];
    assert_eq!(broken.check(&identity("n0", 1)), Err(IdentityError::InvalidKey { node: node("n2") }));
}

#[test]
fn the_secret_key_is_not_in_debug_output() {
    let text = format!("{:?} {:?}", members()[0], greeter(0));
    assert!(!text.contains("010101") && !text.contains("1, 1, 1"), "{text}");
    assert!(!text.to_lowercase().contains("signingkey"), "{text}");
}

#[test]
fn refusals_survive_as_codes() {
    for refusal in Refusal::ALL {
        assert_eq!(Refusal::from_code(refusal.code()), Some(refusal));
    }
    assert_eq!(Refusal::from_code(8), None);
    assert_eq!(Refusal::from_code(u32::MAX), None);
}

proptest! {
    #[test]
    fn hostile_greetings_are_refused_or_canonical(bytes in prop::collection::vec(any::<u8>(), 0..300), honest in 0_usize..60) {
        let start = greeter(0).greet(Role::Hello, &node("n1"), &HERE).unwrap();
        for bytes in [bytes.clone(), [&start[..honest], &bytes[..]].concat()] {
            prop_assert!(greeter(1).judge_hello(&bytes, &HERE).is_err());
            if let Ok(greeting) = Greeting::decode(&bytes) {
                prop_assert_eq!(greeting.encode(), bytes);
            }
        }
    }
}
