//! Everything of the protocol that strangers send: nothing panics, everything accepted is canonical, and a batch that was
//! changed in transit is never opened.
#![no_main]

use std::sync::LazyLock;

use butterfly_fuzz::{epoch, key};
use butterfly_verify::{Answer, Ballot, Digest, Epoch, Evidence, NodeIndex, Receipt, Request, Signer, Vote};
use libfuzzer_sys::fuzz_target;

static EPOCH: LazyLock<Epoch> = LazyLock::new(epoch);
static SIGNER: LazyLock<Signer> =
    LazyLock::new(|| Signer::new(key(0), NodeIndex(0), &EPOCH).expect("n0 is in the roster"));

fuzz_target!(|data: &[u8]| {
    let Some((&operation, data)) = data.split_first() else { return };
    match operation % 9 {
        0 => drop(EPOCH.open_ballots(data, sender(data))),
        1 => drop(EPOCH.open_pre_prepares(data, sender(data))),
        2 => {
            if let Ok(request) = Request::decode(data) {
                assert_eq!(request.encode(), data, "an accepted request is canonical");
                let again = Request::from_json(&request.to_json()).expect("a request survives JSON");
                assert_eq!(again.digest(), request.digest());
            }
        }
        3 => {
            if let Ok(answer) = Answer::decode(data) {
                assert_eq!(answer.encode(), data, "an accepted answer is canonical");
            }
        }
        4 => text(data, |text| {
            if let Ok(receipt) = Receipt::from_json(text) {
                assert!(receipt.verify(&EPOCH, None, None).is_err(), "nobody but the nodes can make a receipt");
            }
        }),
        5 => text(data, |text| {
            if let Ok(evidence) = Evidence::from_json(text) {
                std::hint::black_box(evidence.verify(&EPOCH).is_ok());
            }
        }),
        6 => text(data, |text| {
            if let Ok(epoch) = Epoch::from_json(text) {
                let again = Epoch::from_json(&epoch.to_json()).expect("an epoch survives JSON");
                assert_eq!(again.digest(), epoch.digest());
            }
        }),
        7 => text(data, |text| drop((Request::from_json(text), Answer::from_json(text)))),
        _ => changed_in_transit(data),
    }
});

/// Signs honest ballots made from the data, changes one byte, and opens.
fn changed_in_transit(data: &[u8]) {
    let Some((place, rest)) = data.split_first_chunk::<3>() else { return };
    let (change, fields) = rest.split_first().unwrap_or((&0, &[]));
    let ballots: Vec<Ballot> = fields
        .chunks(4)
        .take(8)
        .map(|part| {
            let byte = |index: usize| part.get(index).copied().unwrap_or_default();
            Ballot {
                vote: Vote {
                    rd: Digest([byte(0); 32]),
                    slice: u16::from(byte(1)),
                    positions: u32::from(byte(2)),
                    input_root: Digest([byte(3); 32]),
                    output_root: Digest([byte(0) ^ byte(3); 32]),
                    tag: Digest([byte(1); 32]),
                },
                answer: None,
            }
        })
        .collect();
    let Ok(mut bytes) = SIGNER.sign_ballots(ballots.clone()) else { return };
    let opened = EPOCH.open_ballots(&bytes, NodeIndex(0)).expect("an honest batch opens");
    assert!(opened.iter().map(|ballot| ballot.vote()).eq(ballots.iter().map(|ballot| &ballot.vote)));
    assert!(EPOCH.open_ballots(&bytes, NodeIndex(1)).is_err(), "a batch opens only as its signer's");

    let place = u32::from_le_bytes([place[0], place[1], place[2], 0]) as usize % bytes.len();
    bytes[place] ^= (*change).max(1);
    assert!(EPOCH.open_ballots(&bytes, NodeIndex(0)).is_err(), "byte {place} was changed");
}

fn text(data: &[u8], read: impl FnOnce(&str)) {
    if let Ok(text) = std::str::from_utf8(data) {
        read(text);
    }
}

/// One of the three nodes, or one that does not exist.
fn sender(data: &[u8]) -> NodeIndex {
    NodeIndex(u16::from(data.last().copied().unwrap_or_default() % 4))
}
