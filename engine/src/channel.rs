//! Edges between stages of one node: queues bounded in items and in bytes.
//!
//! Each edge has a budget of items and one of bytes; each input port has one queue, into which all its edges send. A sender
//! first takes from the budget of its edge, which is where it waits, and then puts the item in the queue, which cannot
//! fail for fullness. The budget returns when the receiver takes the item.
//!
//! Invariants: the items in a queue never exceed the budgets of its edges; items of one edge arrive in the order in which
//! they were sent; every wait is safe to cancel, and a cancelled send has sent nothing. The queue is a flume channel, whose
//! own waiting send is never used, since a dropped one may still deliver.
//!
//! Receiving and sending record *starved* and *blocked* in the accounts of the stages at the two ends.
//!
//! It refuses to know what the items are, beyond their size and what they show of themselves to a tap.

use std::sync::Arc;
use std::time::Duration;

use butterfly_topology::WhenFull;
use tokio::sync::{Semaphore, TryAcquireError};
use tokio::task::coop;
use tokio_util::sync::CancellationToken;

use crate::clock::RealClock;
use crate::telemetry::{EdgeLabel, EdgeMeters, StageStates};

/// The largest item any edge carries, in bytes. An edge may have more room than that.
pub const ITEM_BYTES_MAX: usize = u32::MAX as usize;

/// What flows along edges.
pub trait Item: Send + 'static {
    /// What the item counts against the byte budget of an edge: roughly the memory it keeps, its heap included. It must
    /// not change while the item is in a queue.
    fn size_bytes(&self) -> usize;

    /// What the item shows of itself to whoever taps an edge: what it is about, and if `payload`, what is in it. It must
    /// not be larger than a few kilobytes without the payload.
    fn view(&self, _payload: bool) -> serde_json::Value {
        serde_json::Value::Null
    }
}

/// Room of an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Room in items; zero is taken as one.
    pub items: usize,
    /// Room in bytes.
    pub bytes: usize,
}

/// What an edge is made of.
#[derive(Debug, Clone)]
pub struct EdgeParts {
    /// Its room.
    pub bounds: Bounds,
    /// What a waiting send does when there is no room.
    pub full: WhenFull,
    /// Where it is counted.
    pub meters: Arc<EdgeMeters>,
    /// The account of the stage that sends.
    pub producer: StageStates,
}

/// Why an item could not be sent. The item comes back.
#[derive(thiserror::Error)]
pub enum SendError<T> {
    /// There is no room, and the sender does not wait.
    #[error("the edge is full")]
    Full(T),
    /// The receiver is gone, so no item will be taken any more.
    #[error("the receiving end is closed")]
    Closed(T),
    /// The item does not fit the edge even when that is empty, or is larger than the permit it is sent with.
    #[error("an item of {bytes} bytes does not fit into {bytes_max}")]
    TooLarge {
        /// The item.
        item: T,
        /// Its size.
        bytes: usize,
        /// The most that would fit.
        bytes_max: usize,
    },
}

/// Why an item could not be sent without waiting.
pub type TrySendError<T> = SendError<T>;

/// Why room could not be reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// There is no room, and the sender does not wait.
    #[error("the edge is full")]
    Full,
    /// The receiver is gone, so no item will be taken any more.
    #[error("the receiving end is closed")]
    Closed,
    /// So many bytes do not fit the edge even when that is empty.
    #[error("{bytes} bytes do not fit into {bytes_max}")]
    TooLarge {
        /// The size asked for.
        bytes: usize,
        /// The most that would fit.
        bytes_max: usize,
    },
}

/// The sending end of an edge. Clones send into the same edge and share its budget.
pub struct Sender<T> {
    edge: Arc<Edge>,
    queue: flume::Sender<Queued<T>>,
}

/// Room for one item, taken from the budget of an edge. Dropping it gives the room back.
#[must_use = "dropping a permit gives the room back"]
pub struct Permit<T> {
    budget: Budget,
    queue: flume::Sender<Queued<T>>,
}

/// The receiving end of an input port: all its edges in one queue. Owned by one task.
pub struct Receiver<T> {
    edges: Vec<Arc<Edge>>,
    queue: flume::Receiver<Queued<T>>,
    consumer: StageStates,
}

/// An input port with the edges that enter it, in order, each with its sender. With no edges, the port is closed.
pub fn port<T: Item>(edges: Vec<EdgeParts>, consumer: StageStates) -> (Vec<Sender<T>>, Receiver<T>) {
    let edges: Vec<Arc<Edge>> = edges.into_iter().map(|parts| Arc::new(Edge::new(parts))).collect();
    let room = edges.iter().map(|edge| edge.bounds.items).fold(0, usize::saturating_add);
    let (sender, queue) = flume::bounded(room.max(1));
    let senders = edges.iter().map(|edge| Sender { edge: Arc::clone(edge), queue: sender.clone() }).collect();
    (senders, Receiver { edges, queue, consumer })
}

/// One edge into a port of its own.
pub fn channel<T: Item>(edge: EdgeParts, consumer: StageStates) -> (Sender<T>, Receiver<T>) {
    let edge = Arc::new(Edge::new(edge));
    let (sender, queue) = flume::bounded(edge.bounds.items);
    (Sender { edge: Arc::clone(&edge), queue: sender }, Receiver { edges: vec![edge], queue, consumer })
}

/// An edge outside of any graph, on real time, for tests and examples.
pub fn detached_channel<T: Item>(items: usize, bytes: usize) -> (Sender<T>, Receiver<T>) {
    let bounds = Bounds { items, bytes };
    let label = EdgeLabel::new("detached.output", "detached.input");
    let parts = EdgeParts {
        bounds,
        full: WhenFull::Wait,
        meters: Arc::new(EdgeMeters::new(label, items, bytes)),
        producer: StageStates::detached(RealClock::shared()),
    };
    channel(parts, StageStates::detached(RealClock::shared()))
}

impl<T: Item> Sender<T> {
    /// Sends, waiting for room; an edge that rejects when full answers [`SendError::Full`] instead of waiting.
    ///
    /// Safe to cancel: a cancelled send has sent nothing, and the item is dropped.
    pub async fn send(&self, item: T) -> Result<(), SendError<T>> {
        match self.reserve(item.size_bytes()).await {
            Ok(permit) => permit.send(item),
            Err(error) => Err(error.with(item)),
        }
    }

    /// Sends if there is room now.
    pub fn try_send(&self, item: T) -> Result<(), TrySendError<T>> {
        match self.try_reserve(item.size_bytes()) {
            Ok(permit) => permit.send(item),
            Err(error) => Err(error.with(item)),
        }
    }

    /// Takes room for one item of at most `bytes` bytes, waiting for it; an edge that rejects when full answers
    /// [`ReserveError::Full`] instead of waiting. Waiters are served in order.
    ///
    /// Safe to cancel: a cancelled wait keeps no room, but loses its place.
    pub async fn reserve(&self, bytes: usize) -> Result<Permit<T>, ReserveError> {
        coop::consume_budget().await;
        match (self.try_reserve(bytes), self.edge.full) {
            (Err(ReserveError::Full), WhenFull::Wait) => {}
            (result, _) => return result,
        }
        let (edge, count) = (&self.edge, self.edge.bytes_fit(bytes)?);
        let clock = edge.producer.clock();
        let asked = clock.now();
        let acquired = edge.producer.while_blocked(async {
            let item = edge.items_left.acquire().await?;
            let bytes = edge.bytes_left.acquire_many(count).await?;
            item.forget();
            bytes.forget();
            Ok::<(), tokio::sync::AcquireError>(())
        });
        acquired.await.map_err(|_closed| ReserveError::Closed)?;
        edge.meters.send.record(clock.now().saturating_sub(asked));
        Ok(self.permit(bytes))
    }

    /// Takes room for one item of at most `bytes` bytes, if there is room now.
    pub fn try_reserve(&self, bytes: usize) -> Result<Permit<T>, ReserveError> {
        let count = self.edge.bytes_fit(bytes)?;
        let item = self.edge.items_left.try_acquire().map_err(ReserveError::from)?;
        let taken = self.edge.bytes_left.try_acquire_many(count).map_err(ReserveError::from)?;
        item.forget();
        taken.forget();
        self.edge.meters.send.record(Duration::ZERO);
        Ok(self.permit(bytes))
    }

    /// Resolves when the receiver is gone. Safe to cancel.
    pub async fn closed(&self) {
        self.edge.closed.cancelled().await;
    }

    /// Whether the receiver is gone.
    pub fn is_closed(&self) -> bool {
        self.edge.closed.is_cancelled()
    }

    /// What a waiting send does when there is no room.
    pub fn full(&self) -> WhenFull {
        self.edge.full
    }

    /// The two ends of the edge.
    pub fn label(&self) -> &EdgeLabel {
        &self.edge.meters.label
    }

    /// The room of the edge.
    pub fn bounds(&self) -> Bounds {
        self.edge.bounds
    }

    fn permit(&self, bytes: usize) -> Permit<T> {
        Permit { budget: Budget { edge: Arc::clone(&self.edge), bytes }, queue: self.queue.clone() }
    }
}

impl<T: Item> Permit<T> {
    /// Sends into the reserved room. Never fails for fullness; an item smaller than the room gives the rest back.
    pub fn send(mut self, item: T) -> Result<(), SendError<T>> {
        let bytes = item.size_bytes();
        if let Err(bytes_max) = self.budget.shrink(bytes) {
            return Err(SendError::TooLarge { item, bytes, bytes_max });
        }
        let edge = Arc::clone(&self.budget.edge);
        let sent = edge.producer.clock().now();
        // Counted first, so that a receiver that is quicker than this line finds the item counted.
        edge.meters.entered(bytes);
        self.queue.try_send(Queued { item, sent, budget: self.budget }).map_err(|error| {
            edge.meters.refused(bytes);
            match error {
                flume::TrySendError::Disconnected(queued) => SendError::Closed(queued.item),
                flume::TrySendError::Full(queued) => SendError::Full(queued.item),
            }
        })
    }

    /// The room in bytes.
    pub fn bytes(&self) -> usize {
        self.budget.bytes
    }
}

impl<T: Item> Receiver<T> {
    /// The next item, waiting for it; `None` once every sender is gone and the queue is empty.
    ///
    /// Safe to cancel: a cancelled receive has taken nothing.
    pub async fn recv(&mut self) -> Option<T> {
        let first = self.first().await?;
        let now = self.consumer.took(1);
        Some(take(first, now))
    }

    /// Up to `max` items, as many as are there, waiting for the first; none once every sender is gone and the queue is
    /// empty. A `max` of zero is taken as one.
    ///
    /// Safe to cancel: a cancelled receive has taken nothing.
    pub async fn recv_many(&mut self, max: usize) -> Vec<T> {
        let Some(first) = self.first().await else { return Vec::new() };
        let more = max.saturating_sub(1).min(self.queue.len());
        let queued: Vec<Queued<T>> = std::iter::once(first).chain(self.queue.try_iter().take(more)).collect();
        let now = self.consumer.took(queued.len() as u64);
        queued.into_iter().map(|queued| take(queued, now)).collect()
    }

    /// Adds to a batch, up to `max` in all, what is there once everything else that can run now has run. Whoever was about to
    /// send has done so then, so what a batch costs once is shared by more, and nobody waits for time to pass.
    ///
    /// Not safe to cancel in itself: the batch is the caller's.
    pub async fn gather(&mut self, batch: &mut Vec<T>, max: usize) {
        tokio::task::yield_now().await;
        while batch.len() < max
            && let Some(item) = self.try_recv()
        {
            batch.push(item);
        }
    }

    /// The next item, if one is there.
    pub fn try_recv(&mut self) -> Option<T> {
        let queued = self.queue.try_recv().ok()?;
        let now = self.consumer.took_also();
        Some(take(queued, now))
    }

    /// How many items are in the queue.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether the queue is empty.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether every sender is gone and the queue is empty: nothing will come any more.
    pub fn is_finished(&self) -> bool {
        self.queue.is_disconnected() && self.queue.is_empty()
    }

    async fn first(&mut self) -> Option<Queued<T>> {
        coop::consume_budget().await;
        if let Ok(queued) = self.queue.try_recv() {
            return Some(queued);
        }
        self.consumer.served();
        self.consumer.while_starved(self.queue.recv_async()).await.ok()
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { edge: Arc::clone(&self.edge), queue: self.queue.clone() }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        for edge in &self.edges {
            edge.close();
        }
        // What is queued is dropped now, not when the last sender goes: items may hold ends of other channels.
        for queued in self.queue.try_iter() {
            queued.budget.edge.meters.left(queued.budget.bytes);
        }
    }
}

impl<T> std::fmt::Debug for Sender<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Sender").field("edge", &self.edge).finish_non_exhaustive()
    }
}

impl<T> std::fmt::Debug for Permit<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Permit").field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl<T> std::fmt::Debug for Receiver<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Receiver").field("edges", &self.edges).finish_non_exhaustive()
    }
}

/// Without the item, which need not be `Debug`.
impl<T> std::fmt::Debug for SendError<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full(_) => formatter.write_str("Full"),
            Self::Closed(_) => formatter.write_str("Closed"),
            Self::TooLarge { bytes, bytes_max, .. } => {
                let mut debug = formatter.debug_struct("TooLarge");
                debug.field("bytes", bytes).field("bytes_max", bytes_max).finish_non_exhaustive()
            }
        }
    }
}

impl<T> SendError<T> {
    /// The item that was not sent.
    pub fn into_item(self) -> T {
        match self {
            Self::Full(item) | Self::Closed(item) | Self::TooLarge { item, .. } => item,
        }
    }

    /// Why, without the item.
    pub fn reason(&self) -> ReserveError {
        match *self {
            Self::Full(_) => ReserveError::Full,
            Self::Closed(_) => ReserveError::Closed,
            Self::TooLarge { bytes, bytes_max, .. } => ReserveError::TooLarge { bytes, bytes_max },
        }
    }
}

impl ReserveError {
    fn with<T>(self, item: T) -> SendError<T> {
        match self {
            Self::Full => SendError::Full(item),
            Self::Closed => SendError::Closed(item),
            Self::TooLarge { bytes, bytes_max } => SendError::TooLarge { item, bytes, bytes_max },
        }
    }
}

impl From<TryAcquireError> for ReserveError {
    fn from(error: TryAcquireError) -> Self {
        match error {
            TryAcquireError::NoPermits => Self::Full,
            TryAcquireError::Closed => Self::Closed,
        }
    }
}

/// The budget of an edge, shared by its senders, the permits taken from it, and the receiver.
#[derive(Debug)]
struct Edge {
    bounds: Bounds,
    full: WhenFull,
    items_left: Semaphore,
    bytes_left: Semaphore,
    closed: CancellationToken,
    meters: Arc<EdgeMeters>,
    producer: StageStates,
}

impl Edge {
    fn new(parts: EdgeParts) -> Self {
        let bounds = Bounds {
            items: parts.bounds.items.clamp(1, Semaphore::MAX_PERMITS),
            bytes: parts.bounds.bytes.min(Semaphore::MAX_PERMITS),
        };
        Self {
            bounds,
            full: parts.full,
            items_left: Semaphore::new(bounds.items),
            bytes_left: Semaphore::new(bounds.bytes),
            closed: CancellationToken::new(),
            meters: parts.meters,
            producer: parts.producer,
        }
    }

    /// The number of byte permits for an item of this size, if it fits the empty edge.
    fn bytes_fit(&self, bytes: usize) -> Result<u32, ReserveError> {
        let bytes_max = self.bounds.bytes.min(ITEM_BYTES_MAX);
        match u32::try_from(bytes) {
            Ok(count) if bytes <= bytes_max => Ok(count),
            _ => Err(ReserveError::TooLarge { bytes, bytes_max }),
        }
    }

    fn close(&self) {
        self.items_left.close();
        self.bytes_left.close();
        self.closed.cancel();
    }
}

/// Room for one item of so many bytes, taken from an edge; returned when dropped.
#[derive(Debug)]
struct Budget {
    edge: Arc<Edge>,
    bytes: usize,
}

impl Budget {
    /// Keeps `bytes` of the room and returns the rest. Fails with the room if that is less.
    fn shrink(&mut self, bytes: usize) -> Result<(), usize> {
        let surplus = self.bytes.checked_sub(bytes).ok_or(self.bytes)?;
        self.edge.bytes_left.add_permits(surplus);
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        self.edge.bytes_left.add_permits(self.bytes);
        self.edge.items_left.add_permits(1);
    }
}

/// An item in a queue, with the room it occupies and the moment it was sent.
struct Queued<T> {
    item: T,
    sent: Duration,
    budget: Budget,
}

/// Takes an item out of its room.
fn take<T: Item>(queued: Queued<T>, now: Duration) -> T {
    let Queued { item, sent, budget } = queued;
    let meters = &budget.edge.meters;
    if meters.taps.is_open() {
        let unix_ms = budget.edge.producer.clock().unix_ms();
        meters.taps.show(&meters.label, (now, unix_ms), budget.bytes, |payload| item.view(payload));
    }
    budget.edge.meters.left(budget.bytes);
    budget.edge.meters.queue.record(now.saturating_sub(sent));
    item
}
