//! One authenticated connection to a peer, as a driver sees it: messages and frames to carry out, and what to do with
//! those that come in. It is also where a connection ends, once.
//!
//! Invariants: a session that has ended delivers nothing more; a lane has at most one stream in each direction; what a
//! peer can make a session hold is bounded by [`LANES_MAX`].
//!
//! It refuses to know streams, sockets and tasks.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use butterfly_topology::{NodeId, StageName};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::DownReason;
use super::lane::Lane;
use super::mesh::{Core, lock};
use crate::link::{Credit, LANES_MAX, LinkFault, LinkMessage, Open, Outgoing};
use crate::telemetry::PeerMeters;

/// A connection between this node and a peer, after both have proved who they are.
pub(super) struct Session {
    peer: NodeId,
    rtt: Box<dyn Fn() -> Duration + Send + Sync>,
    meters: PeerMeters,
    /// There may be messages to carry out.
    talk: Notify,
    /// Lanes that became able to send, for the driver to give each a stream.
    opened: Mutex<Vec<Arc<Lane>>>,
    opened_some: Notify,
    remote: Mutex<BTreeMap<u16, RemoteLane>>,
    streams: Mutex<BTreeSet<u16>>,
    finishing: CancellationToken,
    ended: CancellationToken,
    reason: OnceLock<DownReason>,
}

/// A lane that the peer has opened, under the peer's number.
struct RemoteLane {
    name: StageName,
    /// Until the stage of this node takes it up.
    waiting: Option<Outgoing>,
}

impl Session {
    pub(super) fn new(peer: NodeId, rtt: Box<dyn Fn() -> Duration + Send + Sync>, meters: PeerMeters) -> Self {
        Self {
            peer,
            rtt,
            meters,
            talk: Notify::new(),
            opened: Mutex::default(),
            opened_some: Notify::new(),
            remote: Mutex::default(),
            streams: Mutex::default(),
            finishing: CancellationToken::new(),
            ended: CancellationToken::new(),
            reason: OnceLock::new(),
        }
    }

    pub(super) fn peer(&self) -> &NodeId {
        &self.peer
    }

    pub(super) fn rtt(&self) -> Duration {
        (self.rtt)()
    }

    pub(super) fn meters(&self) -> &PeerMeters {
        &self.meters
    }

    // What the driver carries out.

    /// Says that there may be messages.
    pub(super) fn wake(&self) {
        self.talk.notify_one();
    }

    /// Waits for messages to carry out, and appends them to `bytes`. Safe to cancel.
    pub(super) async fn messages(self: &Arc<Self>, core: &Core, bytes: &mut Vec<u8>) {
        loop {
            core.lanes().iter().for_each(|lane| lane.poll_messages(self, bytes));
            if !bytes.is_empty() {
                return;
            }
            self.talk.notified().await;
        }
    }

    /// Waits for lanes that became able to send. Safe to cancel.
    pub(super) async fn opened_lanes(&self) -> Vec<Arc<Lane>> {
        loop {
            let lanes = std::mem::take(&mut *lock(&self.opened));
            if !lanes.is_empty() {
                return lanes;
            }
            self.opened_some.notified().await;
        }
    }

    pub(super) fn push_opened(&self, lane: Arc<Lane>) {
        lock(&self.opened).push(lane);
        self.opened_some.notify_one();
    }

    // What comes in.

    /// Takes in a message of the peer.
    ///
    /// # Errors
    /// [`LinkFault`]: the connection must be closed.
    pub(super) fn handle(self: &Arc<Self>, core: &Core, message: LinkMessage) -> Result<(), LinkFault> {
        match message {
            LinkMessage::Open(open) => self.handle_open(core, open),
            LinkMessage::Credit(credit) => self.handle_credit(core, &credit),
            LinkMessage::Blocked { lane, wanted } => {
                core.lane(lane).ok_or(LinkFault::Lane { lane })?.handle_blocked(self, wanted)
            }
            LinkMessage::Shut { lane } => {
                let Some(remote) = lock(&self.remote).get_mut(&lane).map(|remote| {
                    remote.waiting = None;
                    remote.name.clone()
                }) else {
                    return Err(LinkFault::Lane { lane });
                };
                if let Some(lane) = core.lane_named(&remote) {
                    lane.handle_shut(self);
                }
                Ok(())
            }
        }
    }

    fn handle_open(self: &Arc<Self>, core: &Core, open: Open) -> Result<(), LinkFault> {
        let outgoing = Outgoing::open(&open)?;
        {
            let mut remote = lock(&self.remote);
            if remote.len() >= LANES_MAX {
                return Err(LinkFault::Open { what: "too many lanes" });
            }
            if remote.values().any(|other| other.name == open.name) {
                return Err(LinkFault::Open { what: "a name opened twice" });
            }
            match remote.entry(open.lane) {
                Entry::Occupied(_) => return Err(LinkFault::Open { what: "a number opened twice" }),
                Entry::Vacant(entry) => {
                    entry.insert(RemoteLane { name: open.name.clone(), waiting: Some(outgoing) });
                }
            }
        }
        if let Some(lane) = core.lane_named(&open.name) {
            lane.rise(self);
        }
        Ok(())
    }

    fn handle_credit(self: &Arc<Self>, core: &Core, credit: &Credit) -> Result<(), LinkFault> {
        let name = {
            let mut remote = lock(&self.remote);
            let remote = remote.get_mut(&credit.lane).ok_or(LinkFault::Lane { lane: credit.lane })?;
            if let Some(waiting) = &mut remote.waiting {
                return waiting.handle_credit(credit).map(|_| ());
            }
            remote.name.clone()
        };
        match core.lane_named(&name) {
            Some(lane) => lane.handle_credit(self, credit),
            None => Ok(()),
        }
    }

    /// Hands the peer's end of the lane `name` to `take`, if the peer has opened it and nobody took it before.
    ///
    /// `take` runs under the lock under which credits look for it, so none is lost in between.
    pub(super) fn take_waiting(&self, name: &StageName, take: impl FnOnce(Outgoing)) -> bool {
        let mut remote = lock(&self.remote);
        let waiting = remote.values_mut().find(|remote| remote.name == *name).and_then(|remote| remote.waiting.take());
        let found = waiting.is_some();
        if let Some(waiting) = waiting {
            take(waiting);
        }
        found
    }

    /// The lane of a stream that has just begun; waits until the lane is up.
    ///
    /// # Errors
    /// [`LinkFault`] if there is no such lane, or it has a stream already.
    pub(super) async fn begin_stream(self: &Arc<Self>, core: &Core, number: u16) -> Result<Arc<Lane>, LinkFault> {
        let lane = core.lane(number).ok_or(LinkFault::Lane { lane: number })?;
        if !lock(&self.streams).insert(number) {
            return Err(LinkFault::Stream { what: "a second stream for a lane" });
        }
        lane.until_up(self).await;
        Ok(lane)
    }

    // How it ends.

    /// Asks the driver to carry out what is queued and then to end the session.
    pub(super) fn finish(&self) {
        self.finishing.cancel();
    }

    pub(super) fn is_finishing(&self) -> bool {
        self.finishing.is_cancelled()
    }

    pub(super) async fn finishing(&self) {
        self.finishing.cancelled().await;
    }

    /// Marks the session as ended. False if it had ended before.
    pub(super) fn end(&self, reason: DownReason) -> bool {
        let first = self.reason.set(reason).is_ok();
        self.ended.cancel();
        first
    }

    /// Waits for the end, whoever brings it about, and says why.
    pub(super) async fn ended(&self) -> DownReason {
        self.ended.cancelled().await;
        self.reason.get().cloned().unwrap_or(DownReason::ShutDown)
    }
}
