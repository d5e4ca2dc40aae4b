//! Hostile peers over QUIC: before they are welcomed, and after.

use std::time::Duration;

use quinn::{Connection, ConnectionError, Endpoint};

use super::super::{Delivery, DownReason, Mesh, PeerPort, PeerState};
use super::by_hand::{self, Encryption, Hello, closed_with, connect, header, message, open, welcomed};
use super::{Cluster, Driver, bounds, down, down_because, expect, frame, lane, node, up};
use crate::frame::Frame;

const FAULT: u64 = 1;
const REFUSED: u64 = 16;
const MALFORMED: u64 = REFUSED;
const VERSION: u64 = REFUSED + 1;
const EPOCH: u64 = REFUSED + 2;
const STRANGER: u64 = REFUSED + 3;
const WRONG_NODE: u64 = REFUSED + 4;
const DIRECTION: u64 = REFUSED + 5;
const UNPROVED: u64 = REFUSED + 6;
const LATE: u64 = REFUSED + 7;

fn honest() -> Hello<'static> {
    Hello { from: "n0", to: "n1", epoch: [7; 32], key: by_hand::seed_of(&node("n0")) }
}

/// The node under attack, the port of its only stage, and the attacker's endpoint.
fn attacked() -> (Cluster, Mesh, PeerPort, Endpoint) {
    let mut cluster = Cluster::new(Driver::Quic, &["n0", "n1", "n2"]);
    let mesh = cluster.mesh("n1");
    let port = mesh.port(lane("rows"), bounds(4, 1000)).unwrap();
    (cluster, mesh, port, by_hand::endpoint(Encryption::Proper))
}

#[tokio::test]
async fn the_encryption_layer_wants_a_key_and_this_application() {
    let (cluster, _mesh, mut port, _) = attacked();
    for encryption in [Encryption::Keyless, Encryption::OtherApplication] {
        let endpoint = by_hand::endpoint(encryption);
        // A dialler may believe itself connected before it has been judged.
        let error = match connect(&endpoint, cluster.address("n1")).await {
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        };
        assert!(matches!(error, ConnectionError::ConnectionClosed(_)), "{error}");
    }
    assert_eq!(port.try_recv(), None);
}

#[tokio::test]
async fn a_bad_hello_closes_the_connection_with_its_reason() {
    let (cluster, mesh, mut port, endpoint) = attacked();
    let elsewhere = connect(&endpoint, cluster.address("n1")).await.unwrap();
    let long = [&1000_u16.to_le_bytes()[..], &[0; 1000]].concat();
    type Make<'a> = Box<dyn Fn(&Connection) -> Vec<u8> + 'a>;
    let made = |hello: Hello<'static>| -> Make<'static> { Box::new(move |connection| hello.bytes(connection)) };
    let bytes = |bytes: Vec<u8>| -> Make<'static> { Box::new(move |_| bytes.clone()) };
    let hellos: Vec<(&str, Make<'_>, u64)> = vec![
        ("nothing", bytes(vec![0, 0]), MALFORMED),
        ("noise", bytes([&64_u16.to_le_bytes()[..], &[1; 64]].concat()), VERSION),
        ("too long", bytes(long), MALFORMED),
        ("another epoch", made(Hello { epoch: [8; 32], ..honest() }), EPOCH),
        ("a stranger", made(Hello { from: "m0", ..honest() }), STRANGER),
        ("another addressee", made(Hello { to: "n2", ..honest() }), WRONG_NODE),
        ("the node itself", made(Hello { from: "n1", ..honest() }), WRONG_NODE),
        (
            "against the direction",
            made(Hello { from: "n2", key: by_hand::seed_of(&node("n2")), ..honest() }),
            DIRECTION,
        ),
        ("another key", made(Hello { key: [9; 32], ..honest() }), UNPROVED),
        ("replayed", Box::new(|_| honest().bytes(&elsewhere)), UNPROVED),
    ];
    for (what, hello, code) in hellos {
        let connection = connect(&endpoint, cluster.address("n1")).await.unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(&hello(&connection)).await.unwrap();
        assert_eq!(closed_with(&connection).await, code, "{what}");
    }
    // A stream that ends inside the hello is malformed too.
    let connection = connect(&endpoint, cluster.address("n1")).await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    send.write_all(&honest().bytes(&connection)[..50]).await.unwrap();
    send.finish().unwrap();
    assert_eq!(closed_with(&connection).await, MALFORMED);
    assert_eq!(port.try_recv(), None);
    assert!(mesh.peers().borrow().values().all(|state| matches!(state, PeerState::Down { .. })));
}

#[tokio::test]
async fn nothing_is_taken_before_the_welcome() {
    let (cluster, _mesh, mut port, endpoint) = attacked();
    let connection = connect(&endpoint, cluster.address("n1")).await.unwrap();
    // No stream of frames is granted.
    let stream = connection.open_uni();
    tokio::pin!(stream);
    assert!(futures::poll!(&mut stream).is_pending());
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    let second = connection.open_bi();
    tokio::pin!(second);
    assert!(futures::poll!(&mut second).is_pending());
    // Messages and frames behind an invalid hello have no effect.
    let invalid = Hello { key: [9; 32], ..honest() }.bytes(&connection);
    send.write_all(&[invalid, open(0, "rows", 4, 1000), header(1, 0, 0, 0, 0)].concat()).await.unwrap();
    assert_eq!(closed_with(&connection).await, UNPROVED);
    assert_eq!(port.try_recv(), None);
}

#[tokio::test]
async fn a_peer_that_does_not_greet_is_let_go_and_a_flood_keeps_nobody_out() {
    let mut cluster = Cluster::new(Driver::Quic, &["n0", "n1"]);
    cluster.greeting_timeout = Duration::from_millis(200);
    let n1 = cluster.mesh("n1");
    let mut port = n1.port(lane("rows"), bounds(4, 1000)).unwrap();
    let endpoint = by_hand::endpoint(Encryption::Proper);
    let address = cluster.address("n1");
    let silent = connect(&endpoint, address).await.unwrap();
    assert_eq!(closed_with(&silent).await, LATE);
    let flood: Vec<_> = (0..200)
        .map(|_| {
            let endpoint = endpoint.clone();
            tokio::spawn(async move {
                let connection = connect(&endpoint, address).await?;
                Err::<(), _>(connection.closed().await)
            })
        })
        .collect();
    cluster.greeting_timeout = Duration::from_secs(20);
    let n0 = cluster.mesh("n0");
    let _there = n0.port(lane("rows"), bounds(4, 1000)).unwrap();
    up(&mut port, "n0").await;
    flood.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_peer_made_by_hand_speaks_the_protocol_as_described() {
    let (cluster, _mesh, mut port, endpoint) = attacked();
    let (connection, mut send, _receive) = welcomed(&endpoint, cluster.address("n1"), &honest()).await;
    send.write_all(&open(9, "rows", 2, 500)).await.unwrap();
    up(&mut port, "n0").await;
    let mut stream = connection.open_uni().await.unwrap();
    for sequence in 0..3_u64 {
        let frame = [header(1, 0, 0, 8, sequence), sequence.to_le_bytes().to_vec()].concat();
        // Cut where it hurts: each byte of the header comes alone.
        for byte in &frame[..64] {
            stream.write_all(&[*byte]).await.unwrap();
        }
        stream.write_all(&frame[64..]).await.unwrap();
        expect(&mut port, "n0", sequence).await;
    }
    port.sender().try_send(&node("n0"), Frame::control(b"back").unwrap()).unwrap();
    let mut back = connection.accept_uni().await.unwrap();
    let mut bytes = [0; 68];
    back.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes[..64], header(1, 9, 0, 4, 0));
    assert_eq!(&bytes[64..], b"back");
}

/// What a welcomed peer may do wrong: bytes on the stream of messages, then bytes on streams of frames.
struct Offence {
    what: &'static str,
    messages: Vec<u8>,
    streams: Vec<Vec<u8>>,
    ends: bool,
}

fn offences() -> Vec<Offence> {
    let on_messages = |what, messages: Vec<u8>| Offence { what, messages, streams: Vec::new(), ends: false };
    let on_stream = |what, bytes: Vec<u8>| Offence { what, messages: Vec::new(), streams: vec![bytes], ends: false };
    let control = |sequence, payload: &[u8]| [&header(1, 0, 0, payload.len() as u64, sequence), payload].concat();
    let credit = |received: u64, granted: u64| {
        let totals = |items: u64| [items.to_le_bytes(), (items * 100).to_le_bytes()].concat();
        message(&[&[2], &9_u16.to_le_bytes(), &totals(received), &totals(granted)])
    };
    let mut meta_in_control = header(1, 0, 8, 0, 0);
    meta_in_control.extend_from_slice(&[0; 64]);
    let mut dirty = header(2, 0, 8, 0, 0);
    dirty.extend_from_slice(&[1; 64]);
    vec![
        on_messages("noise for messages", vec![0xff; 300]),
        on_messages("an empty message", vec![0, 0]),
        on_messages("an unknown tag", message(&[&[99]])),
        on_messages("a message cut short", message(&[&[2], &[1, 2, 3]])),
        on_messages("a lane opened twice", open(9, "rows", 4, 1000)),
        on_messages("a number used twice", open(9, "votes", 4, 1000)),
        on_messages("a lane without end", open(10, "votes", u64::MAX, u64::MAX)),
        on_messages("a lane with a bad name", open(10, "../etc/passwd", 4, 1000)),
        on_messages("too many lanes", (0..200).flat_map(|lane| open(10 + lane, &format!("l{lane}"), 1, 64)).collect()),
        on_messages("a credit for no lane", message(&[&[2], &7_u16.to_le_bytes(), &[0; 32]])),
        on_messages("a credit that goes back", credit(0, 0)),
        on_messages("an acknowledgement of nothing", credit(3, 4)),
        on_messages("a grant beyond the capacity", credit(0, 40)),
        on_messages("a need on no lane", message(&[&[3], &7_u16.to_le_bytes(), &[0; 16]])),
        on_messages("an end of no lane", message(&[&[4], &7_u16.to_le_bytes()])),
        on_stream("noise for a frame", vec![0xaa; 64]),
        on_stream("a lane that does not exist", header(1, 5, 0, 0, 0)),
        on_stream("a frame left out", control(1, b"x")),
        on_stream("a frame repeated", [control(0, b"x"), control(0, b"x")].concat()),
        on_stream("more than was granted", (0..5).flat_map(|sequence| control(sequence, b"x")).collect()),
        on_stream("more bytes than were granted", header(2, 0, 0, 1000, 0)),
        on_stream("a payload beyond every limit", header(2, 0, 0, u64::MAX, 0)),
        on_stream("metadata beyond every limit", header(2, 0, u32::MAX, 0, 0)),
        on_stream("metadata in a control frame", meta_in_control),
        on_stream("padding that is not zero", dirty),
        on_stream("a stream that changes its lane", [control(0, b"x"), header(1, 1, 0, 0, 1)].concat()),
        Offence {
            what: "a second stream for a lane",
            messages: Vec::new(),
            streams: vec![control(0, b"x"), control(1, b"x")],
            ends: false,
        },
        Offence {
            what: "a stream that ends inside a frame",
            messages: Vec::new(),
            streams: vec![header(1, 0, 0, 100, 0)],
            ends: true,
        },
    ]
}

#[tokio::test]
async fn a_welcomed_peer_that_breaks_the_protocol_is_down_and_nobody_else() {
    let (mut cluster, mesh, mut port, endpoint) = attacked();
    let n2 = cluster.mesh("n2");
    let mut there = n2.port(lane("rows"), bounds(4, 1000)).unwrap();
    up(&mut port, "n2").await;
    up(&mut there, "n1").await;
    for Offence { what, messages, streams, ends } in offences() {
        let (connection, mut send, _receive) = welcomed(&endpoint, cluster.address("n1"), &honest()).await;
        send.write_all(&open(9, "rows", 4, 1000)).await.unwrap();
        up(&mut port, "n0").await;
        // The end of the connection may come before all is written.
        let _ = send.write_all(&messages).await;
        let mut open_streams = Vec::new();
        for bytes in streams {
            let mut stream = connection.open_uni().await.unwrap();
            let _ = stream.write_all(&bytes).await;
            if ends {
                stream.finish().unwrap();
            }
            open_streams.push(stream);
        }
        assert_eq!(closed_with(&connection).await, FAULT, "{what}");
        let reason = down_because(&mesh, "n0", |reason| *reason != DownReason::NotYet).await;
        assert!(matches!(reason, DownReason::Fault(_)), "{what}: {reason}");
        // Frames that were in order may have been delivered before; then the end.
        loop {
            match port.recv().await.unwrap() {
                Delivery::Frame { from, .. } => assert_eq!(from, node("n0"), "{what}"),
                other => {
                    assert_eq!(other, Delivery::Down(node("n0")), "{what}");
                    break;
                }
            }
        }
        there.sender().send(&node("n1"), Frame::control(what.as_bytes()).unwrap()).await.unwrap();
        assert_eq!(frame(&mut port, "n2").await.control_bytes(), Some(what.as_bytes()));
    }
}

#[tokio::test]
async fn a_newer_connection_of_a_member_replaces_the_older() {
    let (cluster, mesh, mut port, endpoint) = attacked();
    let (older, mut send, _keep) = welcomed(&endpoint, cluster.address("n1"), &honest()).await;
    send.write_all(&open(9, "rows", 4, 1000)).await.unwrap();
    up(&mut port, "n0").await;
    let mut stale = older.open_uni().await.unwrap();
    let (newer, mut send, _keep) = welcomed(&endpoint, cluster.address("n1"), &honest()).await;
    assert_eq!(closed_with(&older).await, 2);
    send.write_all(&open(9, "rows", 4, 1000)).await.unwrap();
    let _ = stale.write_all(&header(1, 0, 0, 0, 0)).await;
    down(&mut port, "n0").await;
    up(&mut port, "n0").await;
    let mut stream = newer.open_uni().await.unwrap();
    stream.write_all(&[header(1, 0, 0, 8, 0), 5_u64.to_le_bytes().to_vec()].concat()).await.unwrap();
    expect(&mut port, "n0", 5).await;
    assert!(matches!(mesh.peers().borrow()[&node("n0")], PeerState::Up { .. }));
}

/// A runtime that can be dropped with everything in it, as a process that is killed.
fn process() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn a_peer_that_crashes_is_noticed() {
    let mut cluster = Cluster::new(Driver::Quic, &["n0", "n1"]);
    cluster.idle_timeout = Duration::from_millis(800);
    let (staying, crashing) = (process(), process());
    let mesh = staying.block_on(async { cluster.mesh("n0") });
    let mut port = mesh.port(lane("rows"), bounds(4, 1000)).unwrap();
    let peer = crashing.block_on(async { cluster.mesh("n1") });
    let _there = peer.port(lane("rows"), bounds(4, 1000)).unwrap();
    staying.block_on(up(&mut port, "n1"));
    crashing.shutdown_background();
    staying.block_on(down(&mut port, "n1"));
    staying.block_on(down_because(&mesh, "n1", |reason| matches!(reason, DownReason::Unreachable(_))));
}

#[test]
fn a_peer_that_crashes_and_restarts_is_taken_back_without_waiting_for_silence() {
    // The one that dials says hello again; the one that accepts answers that it knows of no such connection.
    for (stays, crashes) in [("n1", "n0"), ("n0", "n1")] {
        let mut cluster = Cluster::new(Driver::Quic, &["n0", "n1"]);
        cluster.idle_timeout = Duration::from_secs(3600);
        let staying = process();
        let mesh = staying.block_on(async { cluster.mesh(stays) });
        let mut port = mesh.port(lane("rows"), bounds(4, 1000)).unwrap();
        for round in 0..3 {
            let living = process();
            let peer = living.block_on(async { cluster.mesh(crashes) });
            let mut there = peer.port(lane("rows"), bounds(4, 1000)).unwrap();
            if round > 0 {
                staying.block_on(down(&mut port, crashes));
            }
            staying.block_on(up(&mut port, crashes));
            living.block_on(up(&mut there, stays));
            // Its tasks stop where they are; nothing says goodbye.
            living.shutdown_background();
        }
    }
}
