//! The state of a link: what one node may send to another on a lane, and what it owes in return. Sans-IO.
//!
//! A *lane* joins a stage to its counterpart of the same name on the peer. Each direction of a lane is one [`Outgoing`]
//! at the sender and one [`Incoming`] at the receiver, which agree through [`LinkMessage`]s:
//!
//! - The receiver opens the lane with its capacity and a first grant, and raises the grant as its inbox empties. Grants
//!   are totals since the opening, so a repeated or late one does no harm. A grant never exceeds what was received plus
//!   what is free, hence whatever is sent finds room.
//! - Every frame carries its sequence number. A receiver that sees another than the next one, or more than it granted,
//!   gives up the link ([`LinkFault`]): frames arrive in order, once, or not at all and the stage is told.
//! - Each [`Credit`] acknowledges what was received. A sender holds at most its own bounds unacknowledged, whatever the
//!   peer grants, so a peer cannot make it buffer.
//! - While plenty is granted no credit is sent. A sender that runs out says so once ([`LinkMessage::Blocked`]), and is
//!   then told of every change that helps, which also serves a frame larger than half of the capacity.
//!
//! Invariants: occupied never exceeds the capacity; totals never decrease; no sequence of peer messages panics or makes
//! this state grow.
//!
//! It refuses to know frames, peers, queues, streams, and time.

mod message;

pub use message::{Credit, LinkMessage, MESSAGE_BYTES_MAX, MessageError, Open};

use crate::channel::Bounds;

/// Most lanes of one link.
pub const LANES_MAX: usize = 64;
/// Most items that a lane may hold.
pub const LANE_ITEMS_MAX: u64 = 1 << 20;
/// Most bytes that a lane may hold.
pub const LANE_BYTES_MAX: u64 = 1 << 36;
/// Most bytes that all inboxes of a node together hold for one peer.
pub const PEER_BYTES_MAX: u64 = 1 << 36;

/// Items and bytes, counted since a lane was opened or held at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Number of frames.
    pub items: u64,
    /// Their length in bytes, headers included.
    pub bytes: u64,
}

impl Totals {
    /// The totals that fill `bounds`.
    #[must_use]
    pub fn filling(bounds: Bounds) -> Self {
        Self { items: bounds.items as u64, bytes: bounds.bytes as u64 }
    }

    /// Whether neither count exceeds that of `other`.
    #[must_use]
    pub fn fits(self, other: Self) -> bool {
        self.items <= other.items && self.bytes <= other.bytes
    }

    fn plus(self, other: Self) -> Self {
        Self { items: self.items.saturating_add(other.items), bytes: self.bytes.saturating_add(other.bytes) }
    }

    fn minus(self, other: Self) -> Self {
        Self { items: self.items.saturating_sub(other.items), bytes: self.bytes.saturating_sub(other.bytes) }
    }

    fn min(self, other: Self) -> Self {
        Self { items: self.items.min(other.items), bytes: self.bytes.min(other.bytes) }
    }

    fn max(self, other: Self) -> Self {
        Self { items: self.items.max(other.items), bytes: self.bytes.max(other.bytes) }
    }

    fn one(bytes: u64) -> Self {
        Self { items: 1, bytes }
    }
}

/// What a peer did that no correct peer does. The link goes down.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkFault {
    /// A frame out of order, repeated, or missing.
    #[error("frame {found} on a lane where {expected} was next")]
    Sequence {
        /// The next sequence number.
        expected: u64,
        /// The one found.
        found: u64,
    },
    /// More items or bytes than were granted.
    #[error("more frames or bytes than were granted")]
    Overrun,
    /// A grant or an acknowledgement went back, or beyond what can be.
    #[error("credit that cannot be: {what}")]
    Credit {
        /// Which rule it breaks.
        what: &'static str,
    },
    /// A lane was opened twice, or with bounds beyond the limits.
    #[error("lane opened wrongly: {what}")]
    Open {
        /// Which rule it breaks.
        what: &'static str,
    },
    /// A message or frame names a lane that is not open.
    #[error("no lane {lane} is open")]
    Lane {
        /// The number named.
        lane: u16,
    },
    /// A stream of frames changed its lane, a lane has a second stream, or a stream ended inside a frame.
    #[error("stream of a lane: {what}")]
    Stream {
        /// Which rule it breaks.
        what: &'static str,
    },
    /// Bytes on the control stream that are no message.
    #[error("control message: {0}")]
    Message(#[from] MessageError),
    /// Bytes on the stream of a lane that are no frame.
    #[error("frame: {0}")]
    Frame(#[from] crate::frame::FrameError),
}

/// Why a frame cannot be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The credits are used up.
    Full,
    /// The frame exceeds what the lane can ever hold.
    TooLarge {
        /// The most bytes that a frame of this lane may have.
        bytes_max: u64,
    },
}

/// The sending end of one direction of a lane, for one connection.
#[derive(Clone, Debug)]
pub struct Outgoing {
    lane: u16,
    /// The most that may be unacknowledged: the lesser of both ends' bounds.
    window: Totals,
    /// The receiver's capacity.
    capacity: Totals,
    granted: Totals,
    sent: Totals,
    received: Totals,
    /// What the receiver was told is needed, since its last credit.
    asked: Totals,
    /// What is needed and the receiver must still be told.
    to_ask: Option<Totals>,
}

impl Outgoing {
    /// The state after the receiver's [`Open`].
    ///
    /// # Errors
    /// [`LinkFault::Open`] for bounds beyond the limits or a grant beyond the capacity.
    pub fn open(open: &Open) -> Result<Self, LinkFault> {
        let most = Totals { items: LANE_ITEMS_MAX, bytes: LANE_BYTES_MAX };
        if !open.capacity.fits(most) {
            return Err(LinkFault::Open { what: "capacity beyond the limit" });
        }
        if !open.granted.fits(open.capacity) {
            return Err(LinkFault::Open { what: "grant beyond the capacity" });
        }
        Ok(Self {
            lane: open.lane,
            window: open.capacity,
            capacity: open.capacity,
            granted: open.granted,
            sent: Totals::default(),
            received: Totals::default(),
            asked: Totals::default(),
            to_ask: None,
        })
    }

    /// Holds at most `bounds` unacknowledged from now on: this node's own for the lane.
    #[must_use]
    pub fn within(mut self, bounds: Bounds) -> Self {
        self.window = Totals::filling(bounds).min(self.capacity);
        self
    }

    /// The receiver's number for the lane.
    #[must_use]
    pub fn lane(&self) -> u16 {
        self.lane
    }

    /// Takes credit for a frame of `bytes` and gives it its sequence number.
    ///
    /// # Errors
    /// [`Refusal`]; nothing is taken then.
    pub fn admit(&mut self, bytes: usize) -> Result<u64, Refusal> {
        let bytes = bytes as u64;
        if bytes > self.window.bytes {
            return Err(Refusal::TooLarge { bytes_max: self.window.bytes });
        }
        let wanted = self.sent.plus(Totals::one(bytes));
        if !wanted.fits(self.granted.min(self.received.plus(self.window))) {
            if !wanted.fits(self.asked) {
                self.asked = self.asked.max(wanted);
                self.to_ask = Some(self.asked);
            }
            return Err(Refusal::Full);
        }
        let sequence = self.sent.items;
        self.sent = wanted;
        Ok(sequence)
    }

    /// Takes in a credit. True if there is more room than before.
    ///
    /// # Errors
    /// [`LinkFault::Credit`] for one that no correct receiver sends.
    pub fn handle_credit(&mut self, credit: &Credit) -> Result<bool, LinkFault> {
        let fault = |what| Err(LinkFault::Credit { what });
        if !self.granted.fits(credit.granted) || !self.received.fits(credit.received) {
            return fault("a total decreased");
        }
        if !credit.received.fits(self.sent) {
            return fault("more acknowledged than sent");
        }
        if !credit.granted.fits(credit.received.plus(self.capacity)) {
            return fault("a grant beyond the capacity");
        }
        let more = credit.granted != self.granted || credit.received != self.received;
        self.granted = credit.granted;
        self.received = credit.received;
        self.asked = Totals::default();
        Ok(more)
    }

    /// The message to send since an [`admit`](Self::admit) was refused for want of credit; at most once for each need.
    pub fn poll_blocked(&mut self) -> Option<LinkMessage> {
        let wanted = self.to_ask.take()?;
        Some(LinkMessage::Blocked { lane: self.lane, wanted })
    }

    /// Whether [`poll_blocked`](Self::poll_blocked) has one.
    #[must_use]
    pub fn is_blocked_due(&self) -> bool {
        self.to_ask.is_some()
    }

    /// What was sent and is not acknowledged.
    #[must_use]
    pub fn unacknowledged(&self) -> Totals {
        self.sent.minus(self.received)
    }
}

/// The receiving end of one direction of a lane. It outlives connections, because what the stage has not taken yet
/// still occupies the inbox after the link went down.
#[derive(Clone, Debug)]
pub struct Incoming {
    capacity: Totals,
    occupied: Totals,
    opened: Option<Opened>,
}

#[derive(Clone, Copy, Debug)]
struct Opened {
    lane: u16,
    received: Totals,
    announced: Credit,
    /// What the sender said it needs; cleared once it has it.
    wanted: Option<Totals>,
}

impl Opened {
    /// Whether everything has arrived that the sender had sent when it last said what it needs.
    fn all_arrived(&self) -> bool {
        self.wanted.is_some_and(|wanted| self.received.items.saturating_add(1) >= wanted.items)
    }
}

impl Incoming {
    /// An empty inbox of `bounds`, with no connection.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self { capacity: Totals::filling(bounds), occupied: Totals::default(), opened: None }
    }

    /// Starts anew for a connection. Returns capacity and first grant, for an [`Open`] message.
    pub fn open(&mut self, lane: u16) -> (Totals, Totals) {
        let granted = self.capacity.minus(self.occupied);
        let announced = Credit { lane, received: Totals::default(), granted };
        self.opened = Some(Opened { lane, received: Totals::default(), announced, wanted: None });
        (self.capacity, granted)
    }

    /// Forgets the connection; what is in the inbox stays.
    pub fn close(&mut self) {
        self.opened = None;
    }

    /// Whether a connection has this lane open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.opened.is_some()
    }

    /// Accounts for a frame whose header has arrived: from here on it occupies the inbox.
    ///
    /// # Errors
    /// [`LinkFault`] if it is not the next one, not granted, or the lane is not open.
    pub fn receive(&mut self, sequence: u64, bytes: usize) -> Result<(), LinkFault> {
        let Some(opened) = &mut self.opened else {
            return Err(LinkFault::Stream { what: "frame on a lane that is not open" });
        };
        if sequence != opened.received.items {
            return Err(LinkFault::Sequence { expected: opened.received.items, found: sequence });
        }
        let frame = Totals::one(bytes as u64);
        let received = opened.received.plus(frame);
        if !received.fits(opened.announced.granted) {
            return Err(LinkFault::Overrun);
        }
        opened.received = received;
        self.occupied = self.occupied.plus(frame);
        Ok(())
    }

    /// Accounts for a frame that left the inbox: taken by the stage, or lost with its connection while half received.
    pub fn consume(&mut self, bytes: usize) {
        self.occupied = self.occupied.minus(Totals::one(bytes as u64));
    }

    /// Takes in what the sender says it needs in order to go on.
    ///
    /// # Errors
    /// [`LinkFault::Lane`] if the lane is not open.
    pub fn handle_blocked(&mut self, lane: u16, wanted: Totals) -> Result<(), LinkFault> {
        match &mut self.opened {
            Some(opened) if opened.lane == lane => {
                opened.wanted = Some(wanted);
                Ok(())
            }
            _ => Err(LinkFault::Lane { lane }),
        }
    }

    /// Whether [`poll_credit`](Self::poll_credit) has one.
    #[must_use]
    pub fn is_credit_due(&self) -> bool {
        let Some(opened) = &self.opened else {
            return false;
        };
        let granted = self.grantable(opened);
        let risen = granted != opened.announced.granted;
        if opened.wanted.is_some() {
            // All that the sender had sent when it said so has arrived: it may wait for just this acknowledgement.
            return risen || (opened.all_arrived() && opened.received != opened.announced.received);
        }
        let left = opened.announced.granted.minus(opened.received);
        let low =
            left.items.saturating_mul(2) < self.capacity.items || left.bytes.saturating_mul(2) < self.capacity.bytes;
        risen && low
    }

    /// The credit to send now, if one is due.
    pub fn poll_credit(&mut self) -> Option<Credit> {
        if !self.is_credit_due() {
            return None;
        }
        let granted = self.grantable(self.opened.as_ref()?);
        let opened = self.opened.as_mut()?;
        opened.announced = Credit { lane: opened.lane, received: opened.received, granted };
        if opened.all_arrived() && opened.wanted.is_some_and(|wanted| wanted.fits(granted)) {
            opened.wanted = None;
        }
        Some(opened.announced)
    }

    fn grantable(&self, opened: &Opened) -> Totals {
        opened.received.plus(self.capacity.minus(self.occupied)).max(opened.announced.granted)
    }

    /// What the inbox holds.
    #[must_use]
    pub fn occupied(&self) -> Totals {
        self.occupied
    }
}
