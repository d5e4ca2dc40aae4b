//! The lane of one stage of this node: its inbox, and for each peer what waits to be sent and how much more may be.
//!
//! Per peer and lane there is at most one session, and a stage sees of it: *up*, frames in order, *down*. A lane opens to
//! a new session only once its stage has taken the *down* of the one before. So per peer the inbox holds at most its
//! capacity in frames, one *up* and one *down*, however often connections come and go.
//!
//! Invariants: a frame is in the queue of a peer only if its credit is taken; a frame enters the inbox only from the
//! session that is up; locks are taken in the order inbox, session, outbox, and never across an await.
//!
//! It refuses to know how frames travel.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use butterfly_topology::{NodeId, StageName};
use tokio::sync::Notify;

use super::mesh::lock;
use super::port::{Delivery, PeerSendError};
use super::session::Session;
use crate::channel::Bounds;
use crate::frame::{Frame, Header};
use crate::link::{Credit, Incoming, LinkFault, LinkMessage, Open, Outgoing, Refusal, Totals};

/// Most frames handed to a driver at a time.
const BATCH_FRAMES_MAX: usize = 64;
/// Bytes after which a batch takes no further frame.
const BATCH_BYTES_ENOUGH: usize = 1 << 20;

/// One lane of this node.
pub(super) struct Lane {
    number: u16,
    name: StageName,
    own: NodeId,
    bounds: Bounds,
    inbox: Mutex<Inbox>,
    arrived: Notify,
    /// Room in one's own part of the inbox, for frames to oneself.
    own_room: Notify,
    links: BTreeMap<NodeId, LaneLink>,
}

/// The sending half towards one peer.
#[derive(Default)]
struct LaneLink {
    outbox: Mutex<Outbox>,
    /// There are frames to carry out.
    work: Notify,
    /// There may be room to send, or no hope of any.
    room: Notify,
    /// The lane came up, or its session ended.
    changed: Notify,
}

#[derive(Default)]
struct Outbox {
    session: Option<Arc<Session>>,
    outgoing: Option<Outgoing>,
    /// Frames whose credit is taken, hence bounded by the lane's bounds.
    queue: VecDeque<(u64, Frame)>,
    lane: u16,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Taker {
    /// The stage has its port.
    Present,
    /// The stage dropped its port.
    Gone,
    /// The mesh is closed; what is in the queue may still be taken.
    Closed,
}

struct Inbox {
    queue: VecDeque<Delivery>,
    mailboxes: BTreeMap<NodeId, Mailbox>,
    own: Totals,
    taker: Taker,
}

/// What concerns one peer.
struct Mailbox {
    incoming: Incoming,
    session: Option<Arc<Session>>,
    up: bool,
    down_unread: bool,
    shut_said: bool,
    /// Length of the frame that is arriving: accounted for, not delivered.
    arriving: Option<usize>,
}

impl Lane {
    pub(super) fn new<'a>(
        number: u16,
        name: StageName,
        own: NodeId,
        bounds: Bounds,
        peers: impl Iterator<Item = &'a NodeId> + Clone,
    ) -> Self {
        let mailbox = || Mailbox {
            incoming: Incoming::new(bounds),
            session: None,
            up: false,
            down_unread: false,
            shut_said: false,
            arriving: None,
        };
        let mailboxes = peers.clone().map(|peer| (peer.clone(), mailbox())).collect();
        let inbox = Inbox { queue: VecDeque::new(), mailboxes, own: Totals::default(), taker: Taker::Present };
        let links = peers.map(|peer| (peer.clone(), LaneLink::default())).collect();
        let (arrived, own_room) = (Notify::new(), Notify::new());
        Self { number, name, own, bounds, inbox: Mutex::new(inbox), arrived, own_room, links }
    }

    pub(super) fn number(&self) -> u16 {
        self.number
    }

    pub(super) fn name(&self) -> &StageName {
        &self.name
    }

    pub(super) fn own(&self) -> &NodeId {
        &self.own
    }

    pub(super) fn bounds(&self) -> Bounds {
        self.bounds
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = &NodeId> {
        self.links.keys()
    }

    // Connections that come and go.

    /// A session with a peer has begun. It has no predecessor: that was detached.
    pub(super) fn attach(&self, session: &Arc<Session>) {
        if let Some(mailbox) = self.inbox().mailboxes.get_mut(session.peer()) {
            mailbox.session = Some(Arc::clone(session));
        }
        session.wake();
    }

    /// A session has ended: what it still had to carry is lost, and the stage is told.
    pub(super) fn detach(&self, session: &Arc<Session>) {
        let Some(link) = self.links.get(session.peer()) else {
            return;
        };
        let mut inbox = self.inbox();
        let Inbox { queue, mailboxes, taker, .. } = &mut *inbox;
        let Some(mailbox) = mailboxes.get_mut(session.peer()).filter(|mailbox| mailbox.is_of(session)) else {
            return;
        };
        mailbox.session = None;
        mailbox.incoming.close();
        if let Some(bytes) = mailbox.arriving.take() {
            mailbox.incoming.consume(bytes);
        }
        if std::mem::take(&mut mailbox.up) && *taker != Taker::Gone {
            mailbox.down_unread = true;
            queue.push_back(Delivery::Down(session.peer().clone()));
        }
        *lock(&link.outbox) = Outbox::default();
        drop(inbox);
        self.arrived.notify_one();
        link.room.notify_waiters();
        link.changed.notify_waiters();
    }

    /// The lane comes up if the peer has opened it and the stage has taken the end of the session before.
    pub(super) fn rise(self: &Arc<Self>, session: &Arc<Session>) {
        self.rise_locked(&mut self.inbox(), session);
    }

    fn rise_locked(self: &Arc<Self>, inbox: &mut Inbox, session: &Arc<Session>) {
        let (Some(link), Some(mailbox)) = (self.links.get(session.peer()), inbox.mailboxes.get_mut(session.peer()))
        else {
            return;
        };
        if inbox.taker != Taker::Present || mailbox.up || mailbox.down_unread || !mailbox.is_of(session) {
            return;
        }
        let taken = session.take_waiting(&self.name, |outgoing| {
            let mut outbox = lock(&link.outbox);
            outbox.session = Some(Arc::clone(session));
            outbox.lane = outgoing.lane();
            outbox.outgoing = Some(outgoing.within(self.bounds));
        });
        if !taken {
            return;
        }
        mailbox.up = true;
        inbox.queue.push_back(Delivery::Up(session.peer().clone()));
        session.push_opened(Arc::clone(self));
        self.arrived.notify_one();
        link.room.notify_waiters();
        link.changed.notify_waiters();
    }

    /// Waits until the lane is up for `session`, or the session has ended. Safe to cancel.
    pub(super) async fn until_up(&self, session: &Arc<Session>) {
        let Some(link) = self.links.get(session.peer()) else {
            return;
        };
        loop {
            let mut changed = std::pin::pin!(link.changed.notified());
            changed.as_mut().enable();
            let waiting =
                self.inbox().mailboxes.get(session.peer()).is_some_and(|mailbox| mailbox.is_of(session) && !mailbox.up);
            if !waiting {
                return;
            }
            changed.await;
        }
    }

    // Messages.

    /// Appends what must be said about this lane.
    pub(super) fn poll_messages(&self, session: &Arc<Session>, bytes: &mut Vec<u8>) {
        let Some(link) = self.links.get(session.peer()) else {
            return;
        };
        let mut inbox = self.inbox();
        let taker = inbox.taker;
        let Some(mailbox) = inbox.mailboxes.get_mut(session.peer()).filter(|mailbox| mailbox.is_of(session)) else {
            return;
        };
        if taker == Taker::Present {
            if !mailbox.incoming.is_open() && !mailbox.down_unread {
                let (capacity, granted) = mailbox.incoming.open(self.number);
                let open = Open { lane: self.number, name: self.name.clone(), capacity, granted };
                LinkMessage::Open(open).encode(bytes);
            }
            if let Some(credit) = mailbox.incoming.poll_credit() {
                LinkMessage::Credit(credit).encode(bytes);
            }
        } else if mailbox.incoming.is_open() && !std::mem::replace(&mut mailbox.shut_said, true) {
            LinkMessage::Shut { lane: self.number }.encode(bytes);
        }
        drop(inbox);
        let mut outbox = lock(&link.outbox);
        if let Some(blocked) = outbox.of(session).and_then(Outgoing::poll_blocked) {
            blocked.encode(bytes);
        }
    }

    pub(super) fn handle_credit(&self, session: &Arc<Session>, credit: &Credit) -> Result<(), LinkFault> {
        let Some(link) = self.links.get(session.peer()) else {
            return Ok(());
        };
        let more = match lock(&link.outbox).of(session) {
            Some(outgoing) => outgoing.handle_credit(credit)?,
            // The stage of this node has ended, or the peer's has.
            None => false,
        };
        if more {
            link.room.notify_waiters();
        }
        Ok(())
    }

    pub(super) fn handle_blocked(&self, session: &Arc<Session>, wanted: Totals) -> Result<(), LinkFault> {
        let mut inbox = self.inbox();
        let Some(mailbox) = inbox.mailboxes.get_mut(session.peer()).filter(|mailbox| mailbox.is_of(session)) else {
            return Ok(());
        };
        mailbox.incoming.handle_blocked(self.number, wanted)?;
        if mailbox.incoming.is_credit_due() {
            session.wake();
        }
        Ok(())
    }

    /// The peer's stage takes nothing more. What it has sent still arrives.
    pub(super) fn handle_shut(&self, session: &Arc<Session>) {
        let Some(link) = self.links.get(session.peer()) else {
            return;
        };
        {
            let mut outbox = lock(&link.outbox);
            if outbox.of(session).is_some() {
                outbox.outgoing = None;
                outbox.queue.clear();
            }
        }
        link.room.notify_waiters();
    }

    // Frames that come in.

    /// A header has arrived: the frame takes its place in the inbox before anything is allocated for it.
    pub(super) fn announce(&self, session: &Arc<Session>, header: &Header) -> Result<(), LinkFault> {
        self.announce_frame(session, header.sequence(), header.frame_bytes())
    }

    /// As [`announce`](Self::announce), for a frame that is not read off a stream.
    pub(super) fn announce_frame(&self, session: &Arc<Session>, sequence: u64, bytes: usize) -> Result<(), LinkFault> {
        let mut inbox = self.inbox();
        // An ended session delivers nothing, so its frames need no place.
        if let Some(mailbox) = inbox.mailboxes.get_mut(session.peer()).filter(|mailbox| mailbox.is_of(session)) {
            mailbox.incoming.receive(sequence, bytes)?;
            mailbox.arriving = Some(bytes);
        }
        Ok(())
    }

    /// The announced frame is complete.
    pub(super) fn deliver(&self, session: &Arc<Session>, frame: Frame) {
        let mut inbox = self.inbox();
        let Inbox { queue, mailboxes, taker, .. } = &mut *inbox;
        let Some(mailbox) = mailboxes.get_mut(session.peer()).filter(|mailbox| mailbox.is_of(session)) else {
            return;
        };
        mailbox.arriving = None;
        session.meters().messages_received_total.inc();
        session.meters().bytes_transferred_total.inc_by(frame.size_bytes() as u64);
        if *taker == Taker::Gone {
            mailbox.incoming.consume(frame.size_bytes());
            return;
        }
        queue.push_back(Delivery::Frame { from: session.peer().clone(), frame });
        if mailbox.incoming.is_credit_due() {
            session.wake();
        }
        drop(inbox);
        self.arrived.notify_one();
    }

    // Frames that go out.

    /// Takes credit for `frame` and queues it.
    pub(super) fn try_send(&self, to: &NodeId, frame: Frame) -> Result<(), PeerSendError> {
        if *to == self.own {
            return self.try_send_to_self(frame);
        }
        let link = self.links.get(to).ok_or_else(|| PeerSendError::Unknown(to.clone()))?;
        let mut outbox = lock(&link.outbox);
        let outbox = &mut *outbox;
        let (Some(session), Some(outgoing)) = (&outbox.session, &mut outbox.outgoing) else {
            return Err(PeerSendError::Down(to.clone()));
        };
        match outgoing.admit(frame.size_bytes()) {
            Ok(sequence) => {
                outbox.queue.push_back((sequence, frame));
                if outbox.queue.len() == 1 {
                    link.work.notify_one();
                }
                Ok(())
            }
            Err(Refusal::Full) => {
                if outgoing.is_blocked_due() {
                    session.wake();
                }
                Err(PeerSendError::Full(to.clone()))
            }
            Err(Refusal::TooLarge { bytes_max }) => {
                Err(PeerSendError::TooLarge { bytes: frame.size_bytes() as u64, bytes_max })
            }
        }
    }

    fn try_send_to_self(&self, frame: Frame) -> Result<(), PeerSendError> {
        let mut inbox = self.inbox();
        let (bytes, capacity) = (frame.size_bytes() as u64, Totals::filling(self.bounds));
        if bytes > capacity.bytes {
            return Err(PeerSendError::TooLarge { bytes, bytes_max: capacity.bytes });
        }
        if inbox.taker != Taker::Present {
            return Err(PeerSendError::Down(self.own.clone()));
        }
        let own = Totals { items: inbox.own.items.saturating_add(1), bytes: inbox.own.bytes.saturating_add(bytes) };
        if !own.fits(capacity) {
            return Err(PeerSendError::Full(self.own.clone()));
        }
        inbox.own = own;
        inbox.queue.push_back(Delivery::Frame { from: self.own.clone(), frame });
        drop(inbox);
        self.arrived.notify_one();
        Ok(())
    }

    /// Queues `frame` as soon as there is credit. Safe to cancel: then nothing was queued.
    pub(super) async fn send(&self, to: &NodeId, frame: Frame) -> Result<(), PeerSendError> {
        let room = match self.links.get(to) {
            Some(link) => &link.room,
            None => &self.own_room,
        };
        loop {
            let mut changed = std::pin::pin!(room.notified());
            changed.as_mut().enable();
            match self.try_send(to, frame.clone()) {
                Err(PeerSendError::Full(_)) => changed.await,
                decided => return decided,
            }
        }
    }

    /// Moves the next frames to carry out into `batch`, and returns the peer's number for the lane. Waits for frames;
    /// `None` once the session is finishing and there are no more, or it has ended. Safe to cancel.
    pub(super) async fn next_batch(&self, session: &Arc<Session>, batch: &mut Vec<(u64, Frame)>) -> Option<u16> {
        let link = self.links.get(session.peer())?;
        loop {
            {
                let mut outbox = lock(&link.outbox);
                if !outbox.session.as_ref().is_some_and(|current| Arc::ptr_eq(current, session)) {
                    return None;
                }
                let mut bytes = 0_usize;
                while batch.len() < BATCH_FRAMES_MAX && bytes < BATCH_BYTES_ENOUGH {
                    let Some((sequence, frame)) = outbox.queue.pop_front() else { break };
                    bytes = bytes.saturating_add(frame.size_bytes());
                    batch.push((sequence, frame));
                }
                if !batch.is_empty() {
                    session.meters().messages_sent_total.inc_by(batch.len() as u64);
                    session.meters().bytes_transferred_total.inc_by(bytes as u64);
                    return Some(outbox.lane);
                }
            }
            if session.is_finishing() {
                return None;
            }
            tokio::select! {
                () = link.work.notified() => {}
                () = session.finishing() => {}
            }
        }
    }

    // The stage's side.

    /// The next delivery, which gives back its credit. `Err` tells that there will be none.
    pub(super) fn take(self: &Arc<Self>) -> Result<Option<Delivery>, Closed> {
        let mut inbox = self.inbox();
        let Some(delivery) = inbox.queue.pop_front() else {
            return if inbox.taker == Taker::Present { Ok(None) } else { Err(Closed) };
        };
        match &delivery {
            Delivery::Frame { from, frame } if *from == self.own => {
                inbox.own.items = inbox.own.items.saturating_sub(1);
                inbox.own.bytes = inbox.own.bytes.saturating_sub(frame.size_bytes() as u64);
                self.own_room.notify_waiters();
            }
            Delivery::Frame { from, frame } => {
                if let Some(mailbox) = inbox.mailboxes.get_mut(from) {
                    mailbox.incoming.consume(frame.size_bytes());
                    if let Some(session) = &mailbox.session
                        && mailbox.incoming.is_credit_due()
                    {
                        session.wake();
                    }
                }
            }
            Delivery::Up(_) => {}
            Delivery::Down(peer) => {
                let session = inbox.mailboxes.get_mut(peer).and_then(|mailbox| {
                    mailbox.down_unread = false;
                    mailbox.session.clone()
                });
                if let Some(session) = session {
                    self.rise_locked(&mut inbox, &session);
                    session.wake();
                }
            }
        }
        Ok(Some(delivery))
    }

    /// Waits until there may be a delivery. Safe to cancel.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// The stage is gone: the peers are told, and what arrives is dropped.
    pub(super) fn leave(&self) {
        let mut inbox = self.inbox();
        inbox.queue.clear();
        inbox.taker = Taker::Gone;
        for session in inbox.mailboxes.values().filter_map(|mailbox| mailbox.session.as_ref()) {
            session.wake();
        }
        drop(inbox);
        self.own_room.notify_waiters();
    }

    /// No more is sent; what is queued may still be carried out.
    pub(super) fn stop_sending(&self) {
        for link in self.links.values() {
            lock(&link.outbox).outgoing = None;
            link.room.notify_waiters();
        }
    }

    /// No session will come any more.
    pub(super) fn close(&self) {
        {
            let mut inbox = self.inbox();
            if inbox.taker == Taker::Present {
                inbox.taker = Taker::Closed;
            }
        }
        self.arrived.notify_one();
        self.own_room.notify_waiters();
    }

    /// How many frames, and how many other deliveries, wait for the stage.
    #[cfg(test)]
    pub(super) fn held(&self) -> (usize, usize) {
        let inbox = self.inbox();
        let frames = inbox.queue.iter().filter(|delivery| matches!(delivery, Delivery::Frame { .. })).count();
        (frames, inbox.queue.len() - frames)
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        lock(&self.inbox)
    }
}

/// There will be no delivery any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Closed;

impl Mailbox {
    fn is_of(&self, session: &Arc<Session>) -> bool {
        self.session.as_ref().is_some_and(|current| Arc::ptr_eq(current, session))
    }
}

impl Outbox {
    fn of(&mut self, session: &Arc<Session>) -> Option<&mut Outgoing> {
        match &self.session {
            Some(current) if Arc::ptr_eq(current, session) => self.outgoing.as_mut(),
            _ => None,
        }
    }
}
