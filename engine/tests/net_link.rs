//! The state of a link under every order of events: nothing overruns, nothing is lost, and nothing gets stuck.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::VecDeque;

use butterfly_engine::channel::Bounds;
use butterfly_engine::link::{
    Credit, Incoming, LANE_ITEMS_MAX, LinkFault, LinkMessage, MESSAGE_BYTES_MAX, Open, Outgoing, Refusal, Totals,
};
use butterfly_topology::StageName;
use proptest::prelude::*;

const LANE: u16 = 5;

fn open(capacity: Totals, granted: Totals) -> Open {
    Open { lane: LANE, name: StageName::parse("transfer").unwrap(), capacity, granted }
}

/// One direction of a lane, with frames and messages on the way in order, each stream at its own pace.
struct Direction {
    sender_bounds: Bounds,
    receiver_bounds: Bounds,
    outgoing: Outgoing,
    incoming: Incoming,
    frames: VecDeque<(u64, usize)>,
    to_sender: VecDeque<LinkMessage>,
    to_receiver: VecDeque<LinkMessage>,
    inbox: VecDeque<usize>,
    sent: u64,
    received: u64,
}

impl Direction {
    fn new(sender_bounds: Bounds, receiver_bounds: Bounds) -> Self {
        let mut incoming = Incoming::new(receiver_bounds);
        let (capacity, granted) = incoming.open(LANE);
        let outgoing = Outgoing::open(&open(capacity, granted)).unwrap().within(sender_bounds);
        Self {
            sender_bounds,
            receiver_bounds,
            outgoing,
            incoming,
            frames: VecDeque::new(),
            to_sender: VecDeque::new(),
            to_receiver: VecDeque::new(),
            inbox: VecDeque::new(),
            sent: 0,
            received: 0,
        }
    }

    fn frame_bytes_max(&self) -> usize {
        self.sender_bounds.bytes.min(self.receiver_bounds.bytes)
    }

    fn send(&mut self, bytes: usize) -> Result<(), Refusal> {
        let admitted = self.outgoing.admit(bytes);
        self.to_receiver.extend(self.outgoing.poll_blocked());
        let sequence = admitted?;
        assert_eq!(sequence, self.sent, "frames are numbered without gaps");
        self.sent += 1;
        self.frames.push_back((sequence, bytes));
        Ok(())
    }

    fn frame_arrives(&mut self) -> bool {
        let Some((sequence, bytes)) = self.frames.pop_front() else { return false };
        self.incoming.receive(sequence, bytes).expect("what was admitted was granted");
        self.received += 1;
        self.inbox.push_back(bytes);
        let occupied = self.incoming.occupied();
        assert!(occupied.fits(Totals::filling(self.receiver_bounds)), "the inbox overran: {occupied:?}");
        assert!(self.outgoing.unacknowledged().fits(Totals::filling(self.sender_bounds)));
        true
    }

    fn message_arrives_at_sender(&mut self) -> bool {
        let Some(message) = self.to_sender.pop_front() else { return false };
        let LinkMessage::Credit(credit) = message else { panic!("only credits go to the sender") };
        self.outgoing.handle_credit(&credit).expect("a correct receiver is believed");
        true
    }

    fn message_arrives_at_receiver(&mut self) -> bool {
        let Some(message) = self.to_receiver.pop_front() else { return false };
        let LinkMessage::Blocked { lane, wanted } = message else { panic!("only needs go to the receiver") };
        self.incoming.handle_blocked(lane, wanted).unwrap();
        true
    }

    fn consume(&mut self) -> bool {
        let Some(bytes) = self.inbox.pop_front() else { return false };
        self.incoming.consume(bytes);
        true
    }

    fn say_credit(&mut self) -> bool {
        let credit = self.incoming.poll_credit();
        self.to_sender.extend(credit.map(LinkMessage::Credit));
        credit.is_some()
    }

    fn settle(&mut self) {
        while self.frame_arrives()
            | self.message_arrives_at_receiver()
            | self.consume()
            | self.say_credit()
            | self.message_arrives_at_sender()
        {}
    }

    /// The connection is lost with all that is under way; what is in the inbox stays.
    fn reconnect(&mut self) {
        (self.sent, self.received) = (0, 0);
        self.frames.clear();
        self.to_sender.clear();
        self.to_receiver.clear();
        self.incoming.close();
        let (capacity, granted) = self.incoming.open(LANE);
        self.outgoing = Outgoing::open(&open(capacity, granted)).unwrap().within(self.sender_bounds);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    FrameArrives,
    ToSender,
    ToReceiver,
    Consume,
    SayCredit,
    Reconnect,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1_usize..1200).prop_map(Step::Send),
        5 => Just(Step::FrameArrives),
        3 => Just(Step::ToSender),
        3 => Just(Step::ToReceiver),
        4 => Just(Step::Consume),
        4 => Just(Step::SayCredit),
        1 => Just(Step::Reconnect),
    ];
    prop::collection::vec(step, 0..300)
}

fn bounds() -> impl Strategy<Value = Bounds> {
    (1_usize..9, 64_usize..1200).prop_map(|(items, bytes)| Bounds { items, bytes })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn frames_arrive_in_order_once_within_bounds_and_never_get_stuck(
        sender in bounds(), receiver in bounds(), steps in steps(), last in 0.0_f64..1.0,
    ) {
        let mut lane = Direction::new(sender, receiver);
        for step in steps {
            match step {
                Step::Send(bytes) => {
                    let refused = lane.send(bytes);
                    let too_large = matches!(refused, Err(Refusal::TooLarge { .. }));
                    prop_assert_eq!(too_large, bytes > lane.frame_bytes_max());
                }
                Step::FrameArrives => _ = lane.frame_arrives(),
                Step::ToSender => _ = lane.message_arrives_at_sender(),
                Step::ToReceiver => _ = lane.message_arrives_at_receiver(),
                Step::Consume => _ = lane.consume(),
                Step::SayCredit => _ = lane.say_credit(),
                Step::Reconnect => lane.reconnect(),
            }
        }
        // However it stands: once the receiver has taken everything, any frame that fits the lane can go.
        let bytes = (lane.frame_bytes_max() as f64 * last) as usize + 1;
        let bytes = bytes.min(lane.frame_bytes_max());
        if lane.send(bytes).is_err() {
            lane.settle();
            prop_assert_eq!(lane.send(bytes), Ok(()));
        }
        lane.settle();
        prop_assert_eq!(lane.received, lane.sent);
        prop_assert_eq!(lane.incoming.occupied(), Totals::default());
    }

    #[test]
    fn exactly_what_the_inbox_holds_is_admitted(bounds in bounds(), bytes in 1_usize..400) {
        let mut lane = Direction::new(bounds, bounds);
        let mut admitted = 0;
        while lane.send(bytes).is_ok() {
            admitted += 1;
        }
        prop_assert_eq!(admitted, if bytes > bounds.bytes { 0 } else { bounds.items.min(bounds.bytes / bytes) });
        // Each frame that the receiver takes makes room for one more.
        while lane.frame_arrives() {}
        for _ in 0..admitted {
            while lane.message_arrives_at_receiver() {}
            lane.consume();
            lane.say_credit();
            while lane.message_arrives_at_sender() {}
            prop_assert_eq!(lane.send(bytes), Ok(()));
            prop_assert_eq!(lane.send(bytes), Err(Refusal::Full));
        }
    }

    #[test]
    fn hostile_messages_are_faults_and_nothing_worse(
        items in any::<u64>(), bytes in any::<u64>(), received in any::<u64>(), sequence in any::<u64>(),
        length in any::<usize>(),
    ) {
        let bounds = Bounds { items: 4, bytes: 1000 };
        let mut lane = Direction::new(bounds, bounds);
        lane.send(100).unwrap();
        let credit = Credit {
            lane: LANE,
            received: Totals { items: received, bytes: received },
            granted: Totals { items, bytes },
        };
        if lane.outgoing.handle_credit(&credit).is_ok() {
            prop_assert!(lane.outgoing.unacknowledged().items <= 1);
        }
        while lane.outgoing.admit(1).is_ok() {
            prop_assert!(lane.outgoing.unacknowledged().fits(Totals::filling(bounds)));
        }
        lane.incoming.handle_blocked(LANE, Totals { items, bytes }).unwrap();
        let _ = lane.incoming.poll_credit();
        if lane.incoming.receive(sequence, length).is_ok() {
            prop_assert!(lane.incoming.occupied().fits(Totals::filling(bounds)));
        }
    }

    #[test]
    fn messages_decode_to_what_was_encoded_and_back(
        lane in any::<u16>(), one in any::<(u64, u64)>(), two in any::<(u64, u64)>(), which in 0..4,
        name in "[a-z0-9][a-z0-9_-]{0,62}",
    ) {
        let totals = |(items, bytes)| Totals { items, bytes };
        let name = StageName::parse(&name).unwrap();
        let message = match which {
            0 => LinkMessage::Open(Open { lane, name, capacity: totals(one), granted: totals(two) }),
            1 => LinkMessage::Credit(Credit { lane, received: totals(one), granted: totals(two) }),
            2 => LinkMessage::Blocked { lane, wanted: totals(one) },
            _ => LinkMessage::Shut { lane },
        };
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        prop_assert!(bytes.len() <= MESSAGE_BYTES_MAX + 2);
        for length in 0..bytes.len() {
            prop_assert_eq!(LinkMessage::split_off(&mut &bytes[..length]), Ok(None));
        }
        let mut rest = bytes.as_slice();
        prop_assert_eq!(LinkMessage::split_off(&mut rest), Ok(Some(message)));
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn hostile_message_bytes_are_refused_or_canonical(bytes in prop::collection::vec(any::<u8>(), 0..140), tag in 0_u8..6) {
        let tagged = [&[tag], &bytes[..]].concat();
        if let Ok(message) = LinkMessage::decode(&tagged) {
            let mut again = Vec::new();
            message.encode(&mut again);
            prop_assert_eq!(&again[2..], &tagged[..]);
        }
        let _ = LinkMessage::split_off(&mut bytes.as_slice());
    }
}

#[test]
fn a_frame_out_of_order_or_beyond_the_grant_is_a_fault() {
    let mut incoming = Incoming::new(Bounds { items: 2, bytes: 100 });
    assert!(matches!(incoming.receive(0, 10), Err(LinkFault::Stream { .. })), "before the lane is open");
    incoming.open(LANE);
    assert_eq!(incoming.receive(1, 10), Err(LinkFault::Sequence { expected: 0, found: 1 }));
    assert_eq!(incoming.receive(0, 101), Err(LinkFault::Overrun));
    incoming.receive(0, 10).unwrap();
    assert_eq!(incoming.receive(0, 10), Err(LinkFault::Sequence { expected: 1, found: 0 }), "a repeated frame");
    incoming.receive(1, 10).unwrap();
    assert_eq!(incoming.receive(2, 10), Err(LinkFault::Overrun));
    assert_eq!(incoming.handle_blocked(LANE + 1, Totals::default()), Err(LinkFault::Lane { lane: LANE + 1 }));
}

#[test]
fn a_lane_opened_beyond_limits_or_capacity_is_a_fault() {
    let some = Totals { items: 4, bytes: 100 };
    let more = Totals { items: 5, bytes: 100 };
    let endless = Totals { items: LANE_ITEMS_MAX + 1, bytes: 100 };
    assert!(Outgoing::open(&open(some, some)).is_ok());
    assert!(matches!(Outgoing::open(&open(some, more)), Err(LinkFault::Open { .. })));
    assert!(matches!(Outgoing::open(&open(endless, some)), Err(LinkFault::Open { .. })));
}

/// In quiet traffic a credit for every frame would double the datagrams.
#[test]
fn no_credit_is_said_while_plenty_is_granted() {
    let bounds = Bounds { items: 16, bytes: 1 << 20 };
    let mut lane = Direction::new(bounds, bounds);
    let mut credits = 0;
    for _ in 0..160 {
        lane.send(100).unwrap();
        lane.frame_arrives();
        lane.consume();
        credits += usize::from(lane.say_credit());
        lane.message_arrives_at_sender();
    }
    assert_eq!(credits, 160 / 9);
}
