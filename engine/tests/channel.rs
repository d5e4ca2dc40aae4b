//! Edges: exactly what is admitted, in items and in bytes, whatever is cancelled in between.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use butterfly_engine::channel::{
    Bounds, EdgeParts, Item, Permit, Receiver, ReserveError, SendError, Sender, channel, detached_channel, port,
};
use butterfly_engine::clock::ManualClock;
use butterfly_engine::telemetry::{EdgeLabel, EdgeMeters, StageState, StageStates, Telemetry};
use butterfly_topology::{NodeId, WhenFull};
use futures::FutureExt;
use futures::future::BoxFuture;
use proptest::prelude::*;

/// An item that says how large it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parcel {
    id: u64,
    bytes: usize,
}

impl Item for Parcel {
    fn size_bytes(&self) -> usize {
        self.bytes
    }
}

fn parcel(id: u64, bytes: usize) -> Parcel {
    Parcel { id, bytes }
}

fn parts(items: usize, bytes: usize, full: WhenFull) -> EdgeParts {
    let telemetry = Telemetry::new(NodeId::parse("n0").unwrap());
    let bounds = Bounds { items, bytes };
    let meters = telemetry.open_edge(EdgeLabel::new("a.out", "b.in"), bounds);
    let clock = Arc::new(ManualClock::new(0));
    EdgeParts { bounds, full, meters, producer: StageStates::detached(clock) }
}

fn consumer() -> StageStates {
    StageStates::detached(Arc::new(ManualClock::new(0)))
}

fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Sends parcels of one size until one is refused; returns how many were admitted.
fn fill(sender: &Sender<Parcel>, bytes: usize) -> usize {
    (0..).take_while(|id| sender.try_send(parcel(*id, bytes)).is_ok()).count()
}

#[test]
fn an_edge_admits_its_items_or_its_bytes_whichever_is_fewer() {
    for (items, bytes, size, admitted) in [(3, 1000, 10, 3), (100, 1000, 300, 3), (4, 1000, 250, 4), (5, 0, 0, 5)] {
        let (sender, mut receiver) = detached_channel::<Parcel>(items, bytes);
        assert_eq!(fill(&sender, size), admitted, "{items} items, {bytes} bytes, parcels of {size}");
        assert_eq!(receiver.try_recv().unwrap().id, 0);
        assert_eq!(fill(&sender, size), 1, "one taken, one admitted");
    }
}

/// On one thread nobody else runs between a receive and a look at the queue, so what is there has to be given its turn.
#[tokio::test]
async fn a_batch_gathers_what_those_who_can_run_were_about_to_send() {
    let (sender, mut receiver) = detached_channel::<Parcel>(16, 1000);
    sender.try_send(parcel(0, 1)).unwrap();
    for id in 1..=5 {
        let sender = sender.clone();
        tokio::spawn(async move { sender.send(parcel(id, 1)).await.unwrap() });
    }
    let mut batch = receiver.recv_many(16).await;
    assert_eq!(batch, [parcel(0, 1)], "nobody else has run yet");
    receiver.gather(&mut batch, 4).await;
    assert_eq!(batch.iter().map(|parcel| parcel.id).collect::<Vec<_>>(), [0, 1, 2, 3]);
    receiver.gather(&mut batch, 16).await;
    assert_eq!(batch.len(), 6);
    receiver.gather(&mut batch, 16).await;
    assert_eq!(batch.len(), 6, "and waits for nobody");
}

#[test]
fn edges_into_one_port_share_the_queue_and_not_the_budget() {
    let (senders, mut receiver) =
        port::<Parcel>(vec![parts(2, 100, WhenFull::Wait), parts(3, 20, WhenFull::Wait)], consumer());
    assert_eq!(fill(&senders[0], 1), 2);
    assert_eq!(fill(&senders[1], 10), 2, "bounded by its own bytes");
    assert_eq!(receiver.len(), 4);
    assert_eq!(receiver.recv().now_or_never().unwrap().unwrap().bytes, 1);
    assert!(senders[1].try_send(parcel(9, 1)).is_err(), "room of the one edge is not room of the other");
    assert!(senders[0].try_send(parcel(9, 1)).is_ok());
    drop(senders);
    assert_eq!(receiver.recv_many(10).now_or_never().unwrap().len(), 4);
    assert!(receiver.recv().now_or_never().unwrap().is_none());
    assert!(receiver.is_finished());
}

#[test]
fn a_parcel_larger_than_the_edge_is_an_error_and_comes_back() {
    let (sender, _receiver) = detached_channel::<Parcel>(10, 100);
    let refused = sender.try_send(parcel(7, 101)).unwrap_err();
    assert!(matches!(refused, SendError::TooLarge { bytes: 101, bytes_max: 100, .. }));
    assert_eq!(refused.into_item().id, 7);
    let waited = sender.send(parcel(8, 101)).now_or_never().expect("does not wait");
    assert!(matches!(waited, Err(SendError::TooLarge { .. })));
    let (huge, _receiver) = detached_channel::<Parcel>(1, usize::MAX);
    assert!(matches!(huge.try_reserve(usize::MAX).unwrap_err(), ReserveError::TooLarge { .. }));
}

#[test]
fn a_permit_sends_once_reserved_and_returns_what_it_does_not_use() {
    let (sender, mut receiver) = detached_channel::<Parcel>(2, 100);
    let permit = sender.try_reserve(80).unwrap();
    assert_eq!(sender.try_reserve(21).unwrap_err(), ReserveError::Full);
    let refused = sender.try_reserve(20).unwrap().send(parcel(0, 21)).unwrap_err();
    assert_eq!(refused.reason(), ReserveError::TooLarge { bytes: 21, bytes_max: 20 });
    permit.send(parcel(1, 30)).unwrap();
    drop(sender.try_reserve(70).expect("the surplus and the refused parcel's room are back"));
    assert_eq!(receiver.try_recv().unwrap().id, 1);
}

#[test]
fn an_edge_that_rejects_never_waits() {
    let (sender, _receiver) = channel::<Parcel>(parts(1, 100, WhenFull::Reject), consumer());
    sender.send(parcel(0, 1)).now_or_never().unwrap().unwrap();
    let refused = sender.send(parcel(1, 1)).now_or_never().expect("does not wait");
    assert!(matches!(refused, Err(SendError::Full(Parcel { id: 1, .. }))));
}

#[test]
fn a_receiver_that_goes_fails_waiting_senders_and_drops_what_is_queued() {
    let (sender, receiver) = detached_channel::<Parcel>(1, 100);
    sender.try_send(parcel(0, 1)).unwrap();
    let mut waiting = Box::pin(sender.send(parcel(1, 1)));
    let mut closed = Box::pin(sender.closed());
    assert!(poll_once(waiting.as_mut()).is_pending());
    assert!(poll_once(closed.as_mut()).is_pending());
    drop(receiver);
    assert!(matches!(poll_once(waiting.as_mut()), Poll::Ready(Err(SendError::Closed(Parcel { id: 1, .. })))));
    assert!(poll_once(closed.as_mut()).is_ready());
    assert!(sender.is_closed());
}

/// A dropped waiting send of flume may still deliver once room appears. Sends of an edge must not.
#[test]
fn a_cancelled_send_delivers_nothing_even_after_room_appeared() {
    let (sender, mut receiver) = detached_channel::<Parcel>(1, 100);
    sender.try_send(parcel(0, 1)).unwrap();
    let mut waiting = Box::pin(sender.send(parcel(1, 1)));
    assert!(poll_once(waiting.as_mut()).is_pending());
    assert_eq!(receiver.try_recv().unwrap().id, 0);
    drop(waiting);
    assert_eq!(receiver.try_recv(), None);
    assert_eq!(fill(&sender, 1), 1, "the room that the cancelled send was given is back");
}

/// Receives that are cancelled between a wake-up and the next poll must not lose the wake-up of the receive that follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_receives_lose_no_item_and_no_wake_up() {
    const PARCELS: u64 = 20_000;
    const PRODUCERS: u64 = 3;
    let (sender, mut receiver) = detached_channel::<Parcel>(2, 1000);
    let producers: Vec<_> = (0..PRODUCERS)
        .map(|producer| {
            let sender = sender.clone();
            tokio::spawn(async move {
                for id in 0..PARCELS {
                    sender.send(parcel(id * PRODUCERS + producer, 1)).await.unwrap();
                }
            })
        })
        .collect();
    drop(sender);
    let mut next = [0; PRODUCERS as usize];
    let mut note = |parcel: Parcel| {
        let producer = (parcel.id % PRODUCERS) as usize;
        assert_eq!(parcel.id / PRODUCERS, next[producer], "in order, once");
        next[producer] += 1;
    };
    loop {
        // Cancelled: polled with a waker that nobody listens to, then dropped.
        if let Poll::Ready(Some(parcel)) = poll_once(Box::pin(receiver.recv()).as_mut()) {
            note(parcel);
        }
        // Cancelled with the task's own waker.
        let polled = poll_fn(|context| Poll::Ready(Box::pin(receiver.recv()).poll_unpin(context))).await;
        if let Poll::Ready(Some(parcel)) = polled {
            note(parcel);
        }
        // Hangs here if a wake-up got lost.
        match receiver.recv().await {
            Some(parcel) => note(parcel),
            None => break,
        }
    }
    for producer in producers {
        producer.await.unwrap();
    }
    assert_eq!(next, [PARCELS; PRODUCERS as usize]);
}

#[test]
fn waiting_is_accounted_at_both_ends_with_its_exact_time() {
    let clock = ManualClock::new(0);
    let states = || StageStates::detached(Arc::new(clock.clone()));
    let (producer, consumer) = (states(), states());
    let telemetry = Telemetry::with_clock(NodeId::parse("n0").unwrap(), Arc::new(clock.clone()));
    let bounds = Bounds { items: 1, bytes: 10 };
    let meters = telemetry.open_edge(EdgeLabel::new("a.out", "b.in"), bounds);
    let edge = EdgeParts { bounds, full: WhenFull::Wait, meters, producer: producer.clone() };
    let (sender, mut receiver) = channel::<Parcel>(edge, consumer.clone());
    producer.begin();
    consumer.begin();
    let pass = |ms| clock.advance(Duration::from_millis(ms));

    pass(1); // both busy
    let mut receive = Box::pin(receiver.recv());
    assert!(poll_once(receive.as_mut()).is_pending());
    pass(2); // the consumer is starved
    sender.try_send(parcel(0, 1)).unwrap();
    assert!(poll_once(receive.as_mut()).is_ready());
    drop(receive);
    pass(4); // the consumer serves
    sender.try_send(parcel(1, 1)).unwrap();
    let mut send = Box::pin(sender.send(parcel(2, 1)));
    assert!(poll_once(send.as_mut()).is_pending());
    pass(8); // the producer is blocked while the consumer serves
    let checking = consumer.verifying();
    pass(16);
    drop(checking);
    assert_eq!(receiver.try_recv().unwrap().id, 1);
    assert!(poll_once(send.as_mut()).is_ready());
    drop(send);
    pass(32);

    let ms = |states: &StageStates| StageState::ALL.map(|state| states.times().of(state).as_millis());
    assert_eq!(ms(&producer), [1 + 2 + 4 + 32, 0, 8 + 16, 0], "busy, starved, blocked, verifying");
    assert_eq!(ms(&consumer), [1 + 4 + 8 + 32, 2, 0, 16]);
    let profile = telemetry.profile();
    let edge = &profile.edges[0];
    assert_eq!((edge.items, edge.bytes, edge.queued_items, edge.queued_bytes), (3, 3, 1, 1));
    assert_eq!((edge.send.count, edge.queue.count), (3, 2));
    let near = |value: f64, seconds: f64| assert!((value - seconds).abs() <= 0.01 * seconds, "{value} {seconds}");
    near(edge.send.max, 0.024);
    near(edge.queue.max, 0.024);
    consumer.served();
    let service = consumer.service().quantiles();
    assert_eq!(service.count, 2, "the second item joined the batch of the first");
    near(service.mean, (4.0 + 8.0 + 16.0 + 32.0) / 2.0 / 1000.0);
}

#[test]
fn meters_of_an_edge_count_what_is_inside() {
    let meters: Arc<EdgeMeters> = parts(1, 1, WhenFull::Wait).meters;
    let edge = EdgeParts {
        bounds: Bounds { items: 4, bytes: 100 },
        meters: Arc::clone(&meters),
        ..parts(4, 100, WhenFull::Wait)
    };
    let (sender, mut receiver) = channel::<Parcel>(edge, consumer());
    sender.try_send(parcel(0, 30)).unwrap();
    sender.try_send(parcel(1, 40)).unwrap();
    let permit = sender.try_reserve(30).unwrap();
    assert_eq!((meters.queued_items(), meters.queued_bytes()), (2, 70), "a reservation is not in the queue");
    receiver.try_recv().unwrap();
    drop(receiver);
    assert_eq!((meters.queued_items(), meters.queued_bytes()), (0, 0));
    assert!(matches!(permit.send(parcel(2, 30)), Err(SendError::Closed(_))));
    assert_eq!((meters.items(), meters.bytes()), (2, 70));
}

/// One thing that may happen to an edge.
#[derive(Debug, Clone)]
enum Step {
    StartSend(usize),
    PollSend(usize),
    CancelSend(usize),
    TrySend(usize),
    Reserve(usize),
    SendReserved(usize, usize),
    DropReserved(usize),
    Receive,
    TryReceive,
    ReceiveMany(usize),
}

const ITEMS: usize = 3;
const BYTES: usize = 20;

fn step() -> impl Strategy<Value = Step> {
    let (bytes, index) = (0..=BYTES, 0..4usize);
    prop_oneof![
        bytes.clone().prop_map(Step::StartSend),
        index.clone().prop_map(Step::PollSend),
        index.clone().prop_map(Step::CancelSend),
        bytes.clone().prop_map(Step::TrySend),
        bytes.clone().prop_map(Step::Reserve),
        (index.clone(), bytes).prop_map(|(index, bytes)| Step::SendReserved(index, bytes)),
        index.prop_map(Step::DropReserved),
        Just(Step::Receive),
        Just(Step::TryReceive),
        (0..4usize).prop_map(Step::ReceiveMany),
    ]
}

type Sending = BoxFuture<'static, Result<(), SendError<Parcel>>>;

/// An edge beside the queue it should be.
struct Model {
    sender: Sender<Parcel>,
    receiver: Receiver<Parcel>,
    queue: VecDeque<Parcel>,
    sending: Vec<(Parcel, Sending)>,
    reserved: Vec<Permit<Parcel>>,
    next: u64,
}

impl Model {
    fn new() -> Self {
        let (sender, receiver) = detached_channel(ITEMS, BYTES);
        Self { sender, receiver, queue: VecDeque::new(), sending: Vec::new(), reserved: Vec::new(), next: 0 }
    }

    fn parcel(&mut self, bytes: usize) -> Parcel {
        self.next += 1;
        parcel(self.next, bytes)
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::StartSend(bytes) => {
                let (parcel, sender) = (self.parcel(bytes), self.sender.clone());
                self.sending.push((parcel, async move { sender.send(parcel).await }.boxed()));
            }
            Step::PollSend(index) if index < self.sending.len() => self.poll_send(index),
            Step::CancelSend(index) if index < self.sending.len() => drop(self.sending.swap_remove(index)),
            Step::TrySend(bytes) => {
                let parcel = self.parcel(bytes);
                if self.sender.try_send(parcel).is_ok() {
                    self.queue.push_back(parcel);
                }
            }
            Step::Reserve(bytes) => self.reserved.extend(self.sender.try_reserve(bytes)),
            Step::SendReserved(index, bytes) if index < self.reserved.len() => {
                let (permit, parcel) = (self.reserved.swap_remove(index), self.parcel(bytes));
                let room = permit.bytes();
                match permit.send(parcel) {
                    Ok(()) => self.queue.push_back(parcel),
                    Err(error) => assert!(matches!(error, SendError::TooLarge { .. }) && bytes > room),
                }
            }
            Step::DropReserved(index) if index < self.reserved.len() => drop(self.reserved.swap_remove(index)),
            Step::Receive => match poll_once(Box::pin(self.receiver.recv()).as_mut()) {
                Poll::Ready(received) => assert_eq!(received, self.queue.pop_front()),
                Poll::Pending => assert!(self.queue.is_empty()),
            },
            Step::TryReceive => assert_eq!(self.receiver.try_recv(), self.queue.pop_front()),
            Step::ReceiveMany(max) => match poll_once(Box::pin(self.receiver.recv_many(max)).as_mut()) {
                Poll::Ready(received) => {
                    let expected: Vec<_> = self.queue.drain(..max.max(1).min(self.queue.len())).collect();
                    assert_eq!(received, expected);
                }
                Poll::Pending => assert!(self.queue.is_empty()),
            },
            Step::PollSend(_) | Step::CancelSend(_) | Step::SendReserved(..) | Step::DropReserved(_) => {}
        }
        assert_eq!(self.receiver.len(), self.queue.len());
        let reserved_bytes: usize = self.reserved.iter().map(Permit::bytes).sum();
        assert!(self.queue.len() + self.reserved.len() <= ITEMS);
        assert!(self.queue.iter().map(|parcel| parcel.bytes).sum::<usize>() + reserved_bytes <= BYTES);
    }

    fn poll_send(&mut self, index: usize) {
        let (parcel, sending) = &mut self.sending[index];
        if let Poll::Ready(sent) = poll_once(sending.as_mut()) {
            sent.unwrap();
            self.queue.push_back(*parcel);
            drop(self.sending.swap_remove(index));
        }
    }

    /// What still waits is sent as long as someone receives, and then all room is there again.
    fn settle(mut self) {
        self.reserved.clear();
        let rounds = 2 * (self.sending.len() + self.queue.len()) + 1;
        for _ in 0..rounds {
            for index in (0..self.sending.len()).rev() {
                self.poll_send(index);
            }
            assert_eq!(self.receiver.try_recv(), self.queue.pop_front());
        }
        assert!(self.sending.is_empty(), "a send waits although everything was received");
        let all: Vec<_> = (0..ITEMS).map(|_| self.sender.try_reserve(0).expect("items are back")).collect();
        drop(all);
        drop(self.sender.try_reserve(BYTES).expect("bytes are back"));
        drop(self.sender);
        assert_eq!(self.receiver.recv().now_or_never(), Some(None));
    }
}

proptest! {
    /// Whatever is sent, reserved, received and cancelled, in any order: what was sent arrives once and in order, what
    /// was cancelled does not, the bounds hold, and no room is lost.
    #[test]
    fn any_sequence_of_operations_and_cancellations_keeps_the_edge_sound(
        steps in proptest::collection::vec(step(), 0..60)
    ) {
        let mut model = Model::new();
        for step in steps {
            model.apply(step);
        }
        model.settle();
    }
}
