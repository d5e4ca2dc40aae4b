//! Two nodes without a driver: the test carries messages and frames itself, in any order that streams allow, while
//! connections come and go.

use std::collections::{BTreeMap, VecDeque};

use futures::FutureExt;
use proptest::prelude::*;

use super::super::identity::RosterMember;
use super::super::port::Delivery;
use super::*;
use crate::clock::ManualClock;
use crate::frame::Frame;
use crate::link::LinkMessage;

const ROOM: Bounds = Bounds { items: 3, bytes: 1 << 10 };
/// What the inbox may hold for a peer beside frames: one *up* and one *down*.
const ENDS_MAX: usize = 2;

/// One node, its stage, and what is on the way from it.
struct Side {
    core: Arc<Core>,
    port: PeerPort,
    session: Option<Arc<Session>>,
    lanes: Vec<Arc<Lane>>,
    messages: VecDeque<LinkMessage>,
    frames: VecDeque<(u16, u64, Frame)>,
    streams: BTreeMap<u16, Arc<Lane>>,
    /// The connection that the stage believes in, with the number of its next frame.
    believed: Option<Option<(u32, u32)>>,
    sent: u32,
    taken: usize,
}

struct World {
    sides: [Side; 2],
    connection: u32,
}

#[derive(Clone, Debug)]
enum Step {
    Connect,
    Disconnect,
    Say(usize),
    Hear(usize),
    Emit(usize),
    Arrive(usize),
    Send(usize),
    Take(usize),
}

fn side(name: &str) -> Side {
    let node = |name: &str| NodeId::parse(name).unwrap();
    let member = || RosterMember { public_key: [2; 33], address: "127.0.0.1:1".parse().unwrap() };
    let members = ["n0", "n1"].map(|name| (node(name), member()));
    let roster = Roster { epoch_digest: [0; 32], members: members.into() };
    let telemetry = Arc::new(Telemetry::new(node(name)));
    let core = Arc::new(Core::new(&node(name), &roster, telemetry, Arc::new(ManualClock::new(0))));
    let lane = core.open_lane(StageName::parse("rows").unwrap(), ROOM).unwrap();
    let port = PeerPort::new(lane, Arc::new(Handle { core: Arc::clone(&core) }));
    Side {
        core,
        port,
        session: None,
        lanes: Vec::new(),
        messages: VecDeque::new(),
        frames: VecDeque::new(),
        streams: BTreeMap::new(),
        believed: None,
        sent: 0,
        taken: 0,
    }
}

impl World {
    fn new() -> Self {
        Self { sides: [side("n0"), side("n1")], connection: 0 }
    }

    fn step(&mut self, step: Step) -> bool {
        match step {
            Step::Connect => self.connect(),
            Step::Disconnect => self.disconnect(),
            Step::Say(from) => self.say(from),
            Step::Hear(to) => self.hear(to),
            Step::Emit(from) => self.emit(from),
            Step::Arrive(to) => self.arrive(to),
            Step::Send(from) => self.send(from),
            Step::Take(at) => self.take(at),
        }
    }

    /// A new connection; an older one ends, and what was on the way is lost.
    fn connect(&mut self) -> bool {
        self.connection += 1;
        let nodes = [self.sides[0].core.node().clone(), self.sides[1].core.node().clone()];
        for (index, side) in self.sides.iter_mut().enumerate() {
            side.session = side.core.attach(&nodes[1 - index], || Duration::ZERO);
            side.forget();
        }
        true
    }

    fn disconnect(&mut self) -> bool {
        for side in &mut self.sides {
            if let Some(session) = side.session.take() {
                side.core.detach(&session, DownReason::Left);
            }
            side.forget();
        }
        true
    }

    fn say(&mut self, from: usize) -> bool {
        let side = &mut self.sides[from];
        let Some(session) = &side.session else { return false };
        let mut bytes = Vec::new();
        let _ = session.messages(&side.core, &mut bytes).now_or_never();
        let mut rest = bytes.as_slice();
        let mut said = false;
        while let Some(message) = LinkMessage::split_off(&mut rest).unwrap() {
            side.messages.push_back(message);
            said = true;
        }
        said
    }

    fn hear(&mut self, to: usize) -> bool {
        let Some(message) = self.sides[1 - to].messages.pop_front() else { return false };
        let side = &self.sides[to];
        side.session.as_ref().unwrap().handle(&side.core, message).expect("a correct peer is believed");
        true
    }

    fn emit(&mut self, from: usize) -> bool {
        let side = &mut self.sides[from];
        let Some(session) = &side.session else { return false };
        side.lanes.extend(session.opened_lanes().now_or_never().into_iter().flatten());
        let mut batch = Vec::new();
        for lane in &side.lanes {
            if let Some(Some(number)) = lane.next_batch(session, &mut batch).now_or_never() {
                side.frames.extend(batch.drain(..).map(|(sequence, frame)| (number, sequence, frame)));
                return true;
            }
        }
        false
    }

    fn arrive(&mut self, to: usize) -> bool {
        let (here, there) = self.sides.split_at_mut(1);
        let (side, from) = if to == 0 { (&mut here[0], &mut there[0]) } else { (&mut there[0], &mut here[0]) };
        let Some((number, ..)) = from.frames.front() else { return false };
        let session = side.session.as_ref().unwrap();
        let lane = match side.streams.get(number) {
            Some(lane) => Arc::clone(lane),
            None => {
                // As a reader does: the first frame waits until the lane is up.
                let lane = side.core.lane(*number).unwrap();
                if lane.until_up(session).now_or_never().is_none() {
                    return false;
                }
                let begun = session.begin_stream(&side.core, *number).now_or_never().unwrap();
                begun.expect("a lane has one stream");
                side.streams.insert(*number, Arc::clone(&lane));
                lane
            }
        };
        let (_, sequence, frame) = from.frames.pop_front().unwrap();
        lane.announce_frame(session, sequence, frame.size_bytes()).expect("a correct peer keeps to its credit");
        lane.deliver(session, frame);
        true
    }

    fn send(&mut self, from: usize) -> bool {
        let peer = self.sides[1 - from].core.node().clone();
        let side = &mut self.sides[from];
        let label = [self.connection.to_le_bytes(), side.sent.to_le_bytes()].concat();
        let sent = side.port.sender().try_send(&peer, Frame::control(&label).unwrap()).is_ok();
        side.sent += u32::from(sent);
        sent
    }

    /// The stage takes a delivery, which must continue what it has seen: up, the frames of one connection, down.
    fn take(&mut self, at: usize) -> bool {
        let side = &mut self.sides[at];
        let Some(delivery) = side.port.try_recv() else { return false };
        side.taken += 1;
        side.believed = match (delivery, side.believed) {
            (Delivery::Up(_), None) => Some(None),
            (Delivery::Down(_), Some(_)) => None,
            (Delivery::Frame { frame, .. }, Some(seen)) => {
                let label = frame.control_bytes().unwrap();
                let connection = u32::from_le_bytes(label[..4].try_into().unwrap());
                let number = u32::from_le_bytes(label[4..].try_into().unwrap());
                assert_eq!((connection, number), seen.unwrap_or((connection, 0)), "in order, once, of one connection");
                Some(Some((connection, number + 1)))
            }
            (delivery, believed) => panic!("{delivery:?} after {believed:?}"),
        };
        true
    }

    /// Lets everything that can happen without a new connection happen.
    fn settle(&mut self) {
        let steps = || {
            (0..2).flat_map(|side| [Step::Say, Step::Hear, Step::Emit, Step::Arrive, Step::Take].map(|step| step(side)))
        };
        while steps().fold(false, |moved, step| self.step(step) | moved) {}
    }
}

impl Side {
    fn forget(&mut self) {
        self.lanes.clear();
        self.messages.clear();
        self.frames.clear();
        self.streams.clear();
        self.sent = 0;
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let side = || 0..2_usize;
    let step = prop_oneof![
        1 => Just(Step::Connect),
        1 => Just(Step::Disconnect),
        6 => side().prop_map(Step::Say),
        6 => side().prop_map(Step::Hear),
        6 => side().prop_map(Step::Emit),
        6 => side().prop_map(Step::Arrive),
        8 => side().prop_map(Step::Send),
        6 => side().prop_map(Step::Take),
    ];
    prop::collection::vec(step, 0..400)
}

proptest! {
    #[test]
    fn whatever_happens_a_stage_sees_up_frames_in_order_down_and_lanes_recover(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
            for side in &world.sides {
                let (items, ends) = side.core.lane(0).unwrap().held();
                prop_assert!(items <= ROOM.items && ends <= ENDS_MAX, "{items} frames and {ends} ends wait");
            }
        }
        // Whatever state this is: on a new connection both stages come up, and all room is there again.
        world.connect();
        world.settle();
        for from in 0..2 {
            prop_assert!(world.sides[from].believed.is_some());
            for _ in 0..ROOM.items {
                prop_assert!(world.send(from));
            }
            prop_assert!(!world.send(from));
        }
        let taken = world.sides.each_ref().map(|side| side.taken);
        world.settle();
        for (side, before) in world.sides.iter().zip(taken) {
            prop_assert_eq!(side.taken, before + ROOM.items);
        }
    }
}
