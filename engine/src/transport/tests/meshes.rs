//! What a stage may rely on between nodes, over every driver alike.

use std::time::Duration;

use super::super::{Delivery, DownReason, Mesh, PeerSendError, PeerSender, PeerState, Refusal};
use super::{
    Cluster, Driver, bounds, down, down_because, expect, frame, identity, identity_with, lane, node, numbered, state,
    up,
};
use crate::frame::{ALIGNMENT, Frame, FrameBuilder};

const ROOMY: (usize, usize) = (64, 64 << 20);

/// Each property, once per driver.
macro_rules! over_every_driver {
    ($($test:ident),* $(,)?) => {
        mod local {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() { super::$test(super::Driver::Local).await; })*
        }
        mod quic {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() { super::$test(super::Driver::Quic).await; })*
        }
    };
}

over_every_driver!(
    frames_arrive_in_order_both_ways_on_each_lane,
    tensors_arrive_equal_and_aligned,
    exactly_what_the_inbox_holds_is_admitted,
    a_frame_of_the_whole_capacity_passes,
    a_waiting_send_resumes_when_there_is_room,
    frames_to_oneself_come_back_within_bounds,
    a_lane_opened_late_comes_up,
    a_slow_lane_does_not_hold_up_another,
    a_restarted_peer_is_down_then_up,
    a_lane_opens_again_only_after_its_end_was_taken,
    unread_frames_keep_their_place_across_restarts,
    shutdown_carries_out_what_was_queued,
    a_stage_that_left_takes_no_more,
    unknown_absent_and_oversized_are_told_apart,
    another_epoch_is_refused,
    another_key_is_refused,
    a_member_that_the_peer_does_not_know_is_refused,
    links_are_counted,
    dropping_the_last_handle_ends_the_links,
);

fn pair(driver: Driver) -> (Cluster, Mesh, Mesh) {
    let mut cluster = Cluster::new(driver, &["n0", "n1"]);
    let (n0, n1) = (cluster.mesh("n0"), cluster.mesh("n1"));
    (cluster, n0, n1)
}

async fn frames_arrive_in_order_both_ways_on_each_lane(driver: Driver) {
    const FRAMES: u64 = 500;
    let mut cluster = Cluster::new(driver, &["n0", "n1", "n2"]);
    let meshes: Vec<_> = ["n0", "n1", "n2"].map(|name| cluster.mesh(name)).into();
    let mut stages = Vec::new();
    for mesh in &meshes {
        for name in ["rows", "votes"] {
            let mut port = mesh.port(lane(name), bounds(8, 1 << 20)).unwrap();
            let (own, sender, peers) = (mesh.node().clone(), port.sender(), port.peers().count() as u64);
            stages.push(tokio::spawn(async move {
                let (mut next, mut sending) = (std::collections::BTreeMap::new(), Vec::new());
                while next.values().sum::<u64>() < FRAMES * peers {
                    for delivery in port.recv_many(16).await {
                        match delivery {
                            Delivery::Up(peer) => {
                                assert_eq!(next.insert(peer.clone(), 0), None, "{own}: up once");
                                let sender = sender.clone();
                                sending.push(tokio::spawn(async move {
                                    for number in 0..FRAMES {
                                        sender.send(&peer, numbered(number)).await.unwrap();
                                    }
                                }));
                            }
                            Delivery::Frame { from, frame } => {
                                let next = next.get_mut(&from).unwrap();
                                assert_eq!(frame, numbered(*next), "{own}");
                                *next += 1;
                            }
                            Delivery::Down(peer) => panic!("{own}: {peer} is down"),
                        }
                    }
                }
                for sending in sending {
                    sending.await.unwrap();
                }
                port
            }));
        }
    }
    // No port goes before all are done.
    futures::future::try_join_all(stages).await.unwrap();
}

async fn tensors_arrive_equal_and_aligned(driver: Driver) {
    let (_cluster, n0, n1) = pair(driver);
    let mut here = n0.port(lane("rows"), bounds(4, 40 << 20)).unwrap();
    let mut there = n1.port(lane("rows"), bounds(4, 40 << 20)).unwrap();
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    let sizes = [0, 1, 63, 64, 65, 1900, 2000, 2100, 8 << 20, (8 << 20) + 1, 31 << 20];
    let tensor = |size: usize| {
        let mut builder = FrameBuilder::tensor(&(size as u64), size).unwrap();
        builder.payload_mut().iter_mut().enumerate().for_each(|(index, byte)| *byte = (index * 31 + size) as u8);
        builder.finish().unwrap()
    };
    let sender = here.sender();
    let send = async {
        for size in sizes {
            sender.send(&node("n1"), tensor(size)).await.unwrap();
        }
    };
    let receive = async {
        for size in sizes {
            let received = frame(&mut there, "n0").await;
            assert_eq!(received.meta::<u64>().unwrap().to_native(), size as u64);
            assert_eq!(received.payload().as_ptr() as usize % ALIGNMENT, 0);
            assert!(received.payload() == tensor(size).payload(), "payload of {size} bytes");
        }
    };
    tokio::join!(send, receive);
}

#[tokio::test]
async fn nodes_of_one_process_share_the_buffers_of_frames() {
    let (_cluster, n0, n1) = pair(Driver::Local);
    let mut here = n0.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
    let mut there = n1.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    let tensor = Frame::tensor(&(), &[1; 5000]).unwrap();
    here.sender().try_send(&node("n1"), tensor.clone()).unwrap();
    assert_eq!(frame(&mut there, "n0").await.payload().as_ptr(), tensor.payload().as_ptr());
}

/// Sends numbered frames until there is no room, and says how many went.
fn fill(sender: &PeerSender, to: &str, from: u64) -> u64 {
    let mut number = from;
    loop {
        match sender.try_send(&node(to), numbered(number)) {
            Ok(()) => number += 1,
            Err(PeerSendError::Full(peer)) => {
                assert_eq!(peer, node(to));
                return number - from;
            }
            Err(other) => panic!("{other}"),
        }
    }
}

async fn exactly_what_the_inbox_holds_is_admitted(driver: Driver) {
    let (_cluster, n0, n1) = pair(driver);
    let bytes = numbered(0).size_bytes();
    // Bound by items, and by bytes.
    for (name, room, admitted) in [("by-items", bounds(5, 1 << 20), 5), ("by-bytes", bounds(100, 7 * bytes + 1), 7)] {
        let mut here = n0.port(lane(name), room).unwrap();
        let mut there = n1.port(lane(name), room).unwrap();
        up(&mut here, "n1").await;
        up(&mut there, "n0").await;
        let sender = here.sender();
        let mut sent = fill(&sender, "n1", 0);
        assert_eq!(sent, admitted);
        for taken in 0..20 {
            expect(&mut there, "n0", taken).await;
            // One was taken, so there is room for exactly one.
            sender.send(&node("n1"), numbered(sent)).await.unwrap();
            sent += 1;
            assert_eq!(fill(&sender, "n1", sent), 0);
        }
        for taken in 20..sent {
            expect(&mut there, "n0", taken).await;
        }
    }
}

async fn a_frame_of_the_whole_capacity_passes(driver: Driver) {
    let (_cluster, n0, n1) = pair(driver);
    let large = Frame::tensor(&(), &[3; 100_000]).unwrap();
    let room = bounds(16, large.size_bytes());
    let mut here = n0.port(lane("rows"), room).unwrap();
    let mut there = n1.port(lane("rows"), room).unwrap();
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    let sender = here.sender();
    for round in 0..20 {
        // The small frame leaves more than half of the grant, for which alone no credit would be said.
        sender.send(&node("n1"), numbered(round)).await.unwrap();
        let (sent, ()) = tokio::join!(async { sender.send(&node("n1"), large.clone()).await }, async {
            expect(&mut there, "n0", round).await;
            assert_eq!(frame(&mut there, "n0").await, large);
        });
        sent.unwrap();
    }
}

async fn a_waiting_send_resumes_when_there_is_room(driver: Driver) {
    let (_cluster, n0, n1) = pair(driver);
    let mut here = n0.port(lane("rows"), bounds(2, 1 << 20)).unwrap();
    let mut there = n1.port(lane("rows"), bounds(2, 1 << 20)).unwrap();
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    let sender = here.sender();
    assert_eq!(fill(&sender, "n1", 0), 2);
    // A cancelled send has sent nothing.
    {
        let to = node("n1");
        let waiting = sender.send(&to, numbered(99));
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
    }
    let (sent, ()) = tokio::join!(async { sender.send(&node("n1"), numbered(2)).await }, async {
        for number in 0..3 {
            expect(&mut there, "n0", number).await;
        }
    });
    sent.unwrap();
    // A send that waits learns of the end.
    for number in 3..5 {
        sender.send(&node("n1"), numbered(number)).await.unwrap();
    }
    let (sent, ()) = tokio::join!(async { sender.send(&node("n1"), numbered(0)).await }, async {
        n1.shutdown().await;
    });
    assert_eq!(sent, Err(PeerSendError::Down(node("n1"))));
}

async fn frames_to_oneself_come_back_within_bounds(driver: Driver) {
    let mut cluster = Cluster::new(driver, &["n0"]);
    let mesh = cluster.mesh("n0");
    let mut port = mesh.port(lane("rows"), bounds(3, 1 << 20)).unwrap();
    let sender = port.sender();
    for round in 0..3 {
        assert_eq!(fill(&sender, "n0", 3 * round), 3);
        for number in 0..3 {
            expect(&mut port, "n0", 3 * round + number).await;
        }
    }
    assert_eq!(fill(&sender, "n0", 0), 3);
    let (sent, ()) = tokio::join!(async { sender.send(&node("n0"), numbered(3)).await }, async {
        expect(&mut port, "n0", 0).await;
    });
    sent.unwrap();
    drop(port);
    assert_eq!(sender.try_send(&node("n0"), numbered(0)), Err(PeerSendError::Down(node("n0"))));
}

async fn a_lane_opened_late_comes_up(driver: Driver) {
    let (_cluster, n0, n1) = pair(driver);
    state(&n0, "n1", |state| matches!(state, PeerState::Up { .. })).await;
    let mut here = n0.port(lane("late"), bounds(2, 1 << 20)).unwrap();
    assert_eq!(here.sender().try_send(&node("n1"), numbered(0)), Err(PeerSendError::Down(node("n1"))));
    state(&n1, "n0", |state| matches!(state, PeerState::Up { .. })).await;
    let mut there = n1.port(lane("late"), bounds(2, 1 << 20)).unwrap();
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    here.sender().try_send(&node("n1"), numbered(1)).unwrap();
    expect(&mut there, "n0", 1).await;
}

async fn a_slow_lane_does_not_hold_up_another(driver: Driver) {
    let (_cluster, n0, n1) = pair(driver);
    let room = bounds(8, 64 << 20);
    let mut slow = n0.port(lane("rows"), room).unwrap();
    let mut slow_there = n1.port(lane("rows"), room).unwrap();
    let mut quick = n0.port(lane("votes"), room).unwrap();
    let mut quick_there = n1.port(lane("votes"), room).unwrap();
    up(&mut slow, "n1").await;
    up(&mut quick, "n1").await;
    up(&mut quick_there, "n0").await;
    let large = Frame::tensor(&(), &vec![1; 4 << 20]).unwrap();
    let sender = slow.sender();
    while sender.try_send(&node("n1"), large.clone()).is_ok() {}
    for number in 0..100 {
        quick.sender().send(&node("n1"), numbered(number)).await.unwrap();
        expect(&mut quick_there, "n0", number).await;
    }
    up(&mut slow_there, "n0").await;
    for _ in 0..8 {
        assert_eq!(frame(&mut slow_there, "n0").await, large);
    }
}

async fn a_restarted_peer_is_down_then_up(driver: Driver) {
    // Each side restarts once: the one that dials and the one that accepts.
    for (stays, restarts) in [("n0", "n1"), ("n1", "n0")] {
        let mut cluster = Cluster::new(driver, &["n0", "n1"]);
        let (mesh, peer) = (cluster.mesh(stays), cluster.mesh(restarts));
        let mut port = mesh.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
        let mut there = peer.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
        up(&mut port, restarts).await;
        up(&mut there, stays).await;
        there.sender().try_send(&node(stays), numbered(1)).unwrap();
        peer.shutdown().await;
        drop((peer, there));
        expect(&mut port, restarts, 1).await;
        down(&mut port, restarts).await;
        let peer = cluster.mesh(restarts);
        let mut there = peer.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
        up(&mut port, restarts).await;
        up(&mut there, stays).await;
        // The lanes start anew, with all their room and from the first frame.
        assert_eq!(fill(&port.sender(), restarts, 0), 4);
        for number in 0..4 {
            expect(&mut there, stays, number).await;
        }
    }
}

async fn a_lane_opens_again_only_after_its_end_was_taken(driver: Driver) {
    let mut cluster = Cluster::new(driver, &["n0", "n1"]);
    let n0 = cluster.mesh("n0");
    let mut here = n0.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
    let mut peer = cluster.mesh("n1");
    let mut there = peer.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    // However often the peer comes and goes meanwhile, one end is in the inbox.
    for _ in 0..3 {
        peer.shutdown().await;
        drop((peer, there));
        state(&n0, "n1", |state| matches!(state, PeerState::Down { .. })).await;
        peer = cluster.mesh("n1");
        there = peer.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
        state(&n0, "n1", |state| matches!(state, PeerState::Up { .. })).await;
        assert_eq!(here.sender().try_send(&node("n1"), numbered(0)), Err(PeerSendError::Down(node("n1"))));
        assert_eq!(there.try_recv(), None);
    }
    down(&mut here, "n1").await;
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    assert_eq!(here.try_recv(), None);
}

async fn unread_frames_keep_their_place_across_restarts(driver: Driver) {
    let mut cluster = Cluster::new(driver, &["n0", "n1"]);
    let n0 = cluster.mesh("n0");
    let mut here = n0.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
    let peer = cluster.mesh("n1");
    let mut there = peer.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    assert_eq!(fill(&there.sender(), "n0", 0), 4);
    peer.shutdown().await;
    drop((peer, there));
    for number in 0..4 {
        expect(&mut here, "n1", number).await;
    }
    down(&mut here, "n1").await;
    let peer = cluster.mesh("n1");
    let mut there = peer.port(lane("rows"), bounds(4, 1 << 20)).unwrap();
    up(&mut there, "n0").await;
    up(&mut here, "n1").await;
    assert_eq!(fill(&there.sender(), "n0", 10), 4);
    for number in 10..14 {
        expect(&mut here, "n1", number).await;
    }
}

async fn shutdown_carries_out_what_was_queued(driver: Driver) {
    let (_cluster, n0, n1) = pair(driver);
    let (items, bytes) = ROOMY;
    let mut here = n0.port(lane("rows"), bounds(items, bytes)).unwrap();
    let mut there = n1.port(lane("rows"), bounds(items, bytes)).unwrap();
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    let sender = here.sender();
    let large = Frame::tensor(&(), &vec![5; 4 << 20]).unwrap();
    sender.try_send(&node("n1"), large.clone()).unwrap();
    let sent = fill(&sender, "n1", 0);
    n0.shutdown().await;
    assert_eq!(sender.try_send(&node("n1"), numbered(0)), Err(PeerSendError::Down(node("n1"))));
    assert_eq!(frame(&mut there, "n0").await, large);
    for number in 0..sent {
        expect(&mut there, "n0", number).await;
    }
    down(&mut there, "n0").await;
    assert_eq!(down_because(&n1, "n0", |reason| *reason != DownReason::NotYet).await, DownReason::Left);
    // The port that was shut down says so and ends.
    down(&mut here, "n1").await;
    assert_eq!(here.recv().await, None);
    assert!(here.recv_many(9).await.is_empty());
}

async fn a_stage_that_left_takes_no_more(driver: Driver) {
    let (_cluster, n0, n1) = pair(driver);
    let mut here = n0.port(lane("rows"), bounds(2, 1 << 20)).unwrap();
    let mut there = n1.port(lane("rows"), bounds(2, 1 << 20)).unwrap();
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    let back = there.sender();
    back.try_send(&node("n0"), numbered(7)).unwrap();
    drop(there);
    let sender = here.sender();
    let refused = loop {
        if let Err(refused) = sender.send(&node("n1"), numbered(0)).await {
            break refused;
        }
    };
    assert_eq!(refused, PeerSendError::Down(node("n1")));
    // What it had sent still arrives, and its senders still send.
    expect(&mut here, "n1", 7).await;
    back.try_send(&node("n0"), numbered(8)).unwrap();
    expect(&mut here, "n1", 8).await;
    assert!(n1.port(lane("rows"), bounds(2, 1 << 20)).is_err(), "a lane is opened once");
}

async fn unknown_absent_and_oversized_are_told_apart(driver: Driver) {
    let mut cluster = Cluster::new(driver, &["n0", "n1", "n2"]);
    let (n0, n1) = (cluster.mesh("n0"), cluster.mesh("n1"));
    let mut here = n0.port(lane("rows"), bounds(2, 1000)).unwrap();
    let _there = n1.port(lane("rows"), bounds(2, 500)).unwrap();
    up(&mut here, "n1").await;
    let sender = here.sender();
    let large = Frame::tensor(&(), &[0; 600]).unwrap();
    let bytes = large.size_bytes() as u64;
    assert_eq!(sender.try_send(&node("n9"), numbered(0)), Err(PeerSendError::Unknown(node("n9"))));
    assert_eq!(sender.try_send(&node("n2"), numbered(0)), Err(PeerSendError::Down(node("n2"))));
    let too_large = Err(PeerSendError::TooLarge { bytes, bytes_max: 500 });
    assert_eq!(sender.try_send(&node("n1"), large.clone()), too_large);
    assert_eq!(sender.send(&node("n1"), large).await, too_large);
    assert!(n0.port(lane("none"), bounds(0, 1000)).is_err());
    assert!(n0.port(lane("less"), bounds(1, 63)).is_err());
    assert!(n0.port(lane("much"), bounds(1, usize::MAX)).is_err());
}

async fn another_epoch_is_refused(driver: Driver) {
    let mut cluster = Cluster::new(driver, &["n0", "n1", "n2"]);
    let n1 = cluster.mesh("n1");
    let mut port = n1.port(lane("rows"), bounds(2, 1000)).unwrap();
    let mut other = cluster.roster.clone();
    other.epoch_digest = [8; 32];
    // One that dials, and one that is dialled.
    for (name, refused_here) in [("n0", false), ("n2", true)] {
        let stray = cluster.mesh_as(identity(name), other.clone()).unwrap();
        let mut theirs = stray.port(lane("rows"), bounds(2, 1000)).unwrap();
        let refusal = |reason: &DownReason| *reason == DownReason::Refused(Refusal::Epoch);
        if refused_here {
            down_because(&n1, name, refusal).await;
        } else {
            down_because(&stray, "n1", refusal).await;
        }
        assert_eq!((port.try_recv(), theirs.try_recv()), (None, None));
    }
    // The one who belongs is let in all the same.
    let n0 = cluster.mesh("n0");
    let _here = n0.port(lane("rows"), bounds(2, 1000)).unwrap();
    up(&mut port, "n0").await;
}

async fn another_key_is_refused(driver: Driver) {
    let mut cluster = Cluster::new(driver, &["n0", "n1"]);
    let n1 = cluster.mesh("n1");
    let mut port = n1.port(lane("rows"), bounds(2, 1000)).unwrap();
    let pretender = identity_with("n0", 99);
    let unfit = cluster.mesh_as(pretender.clone(), cluster.roster.clone());
    assert!(unfit.is_err(), "a key that is not the roster's is noticed at home");
    let mut forged = cluster.roster.clone();
    forged.members.get_mut(&node("n0")).unwrap().public_key = pretender.public_key();
    let stray = cluster.mesh_as(pretender, forged).unwrap();
    let _theirs = stray.port(lane("rows"), bounds(2, 1000)).unwrap();
    down_because(&stray, "n1", |reason| *reason == DownReason::Refused(Refusal::Unproved)).await;
    assert_eq!(port.try_recv(), None);
}

async fn a_member_that_the_peer_does_not_know_is_refused(driver: Driver) {
    let mut cluster = Cluster::new(driver, &["m0", "n1"]);
    let whole = cluster.roster.clone();
    cluster.roster.members.remove(&node("m0"));
    let n1 = cluster.mesh("n1");
    let mut port = n1.port(lane("rows"), bounds(2, 1000)).unwrap();
    let stray = cluster.mesh_as(identity("m0"), whole).unwrap();
    let _theirs = stray.port(lane("rows"), bounds(2, 1000)).unwrap();
    down_because(&stray, "n1", |reason| *reason == DownReason::Refused(Refusal::Stranger)).await;
    assert_eq!(port.try_recv(), None);
}

async fn links_are_counted(driver: Driver) {
    let (cluster, n0, n1) = pair(driver);
    let mut here = n0.port(lane("rows"), bounds(4, 1000)).unwrap();
    let mut there = n1.port(lane("rows"), bounds(4, 1000)).unwrap();
    let up_state = state(&n0, "n1", |state| matches!(state, PeerState::Up { .. })).await;
    assert!(matches!(up_state, PeerState::Up { rtt } if rtt < Duration::from_secs(5)));
    assert!(n0.rtt(&node("n1")).is_some() && n0.rtt(&node("n0")).is_none());
    up(&mut here, "n1").await;
    up(&mut there, "n0").await;
    here.sender().try_send(&node("n1"), numbered(0)).unwrap();
    expect(&mut there, "n0", 0).await;
    assert_eq!(n1.peers().borrow().len(), 1);
    let bytes = numbered(0).size_bytes();
    for (name, peer, counted) in [("n0", "n1", "messages_sent"), ("n1", "n0", "messages_received")] {
        let metrics = cluster.metrics(name);
        for line in [
            format!("butterfly_{counted}_total{{node=\"{peer}\"}} 1"),
            format!("butterfly_bytes_transferred_total{{node=\"{peer}\"}} {bytes}"),
            format!("butterfly_circuit_state{{node=\"{peer}\"}} 0"),
        ] {
            assert!(metrics.lines().any(|given| given == line), "{line} is not in\n{metrics}");
        }
    }
}

async fn dropping_the_last_handle_ends_the_links(driver: Driver) {
    let (_cluster, n0, n1) = pair(driver);
    let mut here = n0.port(lane("rows"), bounds(4, 1000)).unwrap();
    let there = n1.port(lane("rows"), bounds(4, 1000)).unwrap();
    up(&mut here, "n1").await;
    let sender = there.sender();
    drop((n1, there));
    assert_eq!(n0.peers().borrow().len(), 1);
    here.sender().try_send(&node("n1"), numbered(0)).ok();
    // A sender alone keeps the links.
    assert!(matches!(n0.peers().borrow()[&node("n1")], PeerState::Up { .. }));
    drop(sender);
    down(&mut here, "n1").await;
}
