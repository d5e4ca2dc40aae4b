//! The links of a node to every other of its roster, whichever driver makes them.
//!
//! Invariants: at most one session per peer, and a newer one ends the older; every lane knows of every session; when the
//! last [`Mesh`], port and sender are gone, so are all connections.
//!
//! It refuses to know how connections are made.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use butterfly_topology::{NodeId, StageName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::identity::{LinkIdentity, Roster};
use super::lane::Lane;
use super::local::LocalHub;
use super::port::PeerPort;
use super::quic::QuicConfig;
use super::session::Session;
use super::{DownReason, NetworkError, PeerState, local, quic};
use crate::channel::Bounds;
use crate::clock::Clock;
use crate::link::{LANE_BYTES_MAX, LANE_ITEMS_MAX, LANES_MAX, PEER_BYTES_MAX};
use crate::telemetry::{Event, PeerMeters, Telemetry};

/// How long a shutdown waits for what is queued to be carried out, and then for the connections to close.
const FINISH_MAX: Duration = Duration::from_secs(2);

/// The links of one node. Clones share them.
#[derive(Clone)]
pub struct Mesh {
    handle: Arc<Handle>,
}

/// Keeps the links alive.
pub(super) struct Handle {
    core: Arc<Core>,
}

/// What drivers, lanes and sessions share.
pub(super) struct Core {
    node: NodeId,
    peers: BTreeMap<NodeId, PeerCell>,
    lanes: RwLock<Vec<Arc<Lane>>>,
    states: watch::Sender<BTreeMap<NodeId, PeerState>>,
    clock: Arc<dyn Clock>,
    telemetry: Arc<Telemetry>,
    /// No connection is made any more.
    closing: CancellationToken,
    /// The driver's tasks, all of which end once `closing` is cancelled and their sessions have ended.
    tasks: TaskTracker,
}

struct PeerCell {
    session: Mutex<Option<Arc<Session>>>,
    meters: PeerMeters,
}

impl Mesh {
    /// Links over QUIC. Starts to connect at once, and needs a tokio runtime.
    ///
    /// # Errors
    /// [`NetworkError`] if the identity does not fit the roster, or the address cannot be bound.
    pub fn quic(config: QuicConfig, telemetry: Arc<Telemetry>, clock: Arc<dyn Clock>) -> Result<Self, NetworkError> {
        let core = Arc::new(Core::new(config.identity.node(), &config.roster, telemetry, clock));
        quic::start(config, &core)?;
        Ok(Self { handle: Arc::new(Handle { core }) })
    }

    /// Links to the other nodes on `hub`, in this process. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`NetworkError`] if the identity does not fit the roster, or the node is on the hub already.
    pub fn local(
        hub: &LocalHub,
        identity: LinkIdentity,
        roster: Roster,
        telemetry: Arc<Telemetry>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, NetworkError> {
        let core = Arc::new(Core::new(identity.node(), &roster, telemetry, clock));
        local::join(hub, identity, roster, &core)?;
        Ok(Self { handle: Arc::new(Handle { core }) })
    }

    /// This node.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        &self.handle.core.node
    }

    /// The port of the stage `lane`, with room for `bounds` from each peer. A stage has one port in the life of a mesh.
    ///
    /// # Errors
    /// [`NetworkError`] if the lane is taken, or a limit is exceeded.
    pub fn port(&self, lane: StageName, bounds: Bounds) -> Result<PeerPort, NetworkError> {
        let lane = self.handle.core.open_lane(lane, bounds)?;
        Ok(PeerPort::new(lane, Arc::clone(&self.handle)))
    }

    /// The state of every peer, this node not among them.
    #[must_use]
    pub fn peers(&self) -> watch::Receiver<BTreeMap<NodeId, PeerState>> {
        self.handle.core.states.subscribe()
    }

    /// The current round-trip time to a peer that is up.
    #[must_use]
    pub fn rtt(&self, peer: &NodeId) -> Option<Duration> {
        self.handle.core.session(peer).map(|session| session.rtt())
    }

    /// Carries out what is queued, tells the peers, and closes all links. Bounded in time. Ports end after what they hold.
    pub async fn shutdown(&self) {
        let core = &self.handle.core;
        for lane in core.lanes().iter() {
            lane.stop_sending();
        }
        for session in core.sessions() {
            session.finish();
        }
        core.closing.cancel();
        core.tasks.close();
        if crate::clock::timeout(&*core.clock, FINISH_MAX, core.tasks.wait()).await.is_none() {
            tracing::warn!(node = %core.node, "links did not finish in time; what was queued is lost");
        }
        core.close();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.close();
    }
}

impl Core {
    fn new(node: &NodeId, roster: &Roster, telemetry: Arc<Telemetry>, clock: Arc<dyn Clock>) -> Self {
        let since = clock.now();
        let others = || roster.members.keys().filter(|peer| *peer != node);
        let states =
            others().map(|peer| (peer.clone(), PeerState::Down { since, reason: DownReason::NotYet })).collect();
        let cell = |peer| PeerCell { session: Mutex::default(), meters: telemetry.peer(peer) };
        Self {
            node: node.clone(),
            peers: others().map(|peer| (peer.clone(), cell(peer))).collect(),
            lanes: RwLock::default(),
            states: watch::Sender::new(states),
            clock,
            telemetry,
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    pub(super) fn node(&self) -> &NodeId {
        &self.node
    }

    pub(super) fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    pub(super) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    pub(super) fn meters(&self, peer: &NodeId) -> Option<&PeerMeters> {
        self.peers.get(peer).map(|cell| &cell.meters)
    }

    /// Runs a task of the driver.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    // Lanes.

    pub(super) fn lanes(&self) -> RwLockReadGuard<'_, Vec<Arc<Lane>>> {
        self.lanes.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lane(&self, number: u16) -> Option<Arc<Lane>> {
        self.lanes().get(usize::from(number)).cloned()
    }

    pub(super) fn lane_named(&self, name: &StageName) -> Option<Arc<Lane>> {
        self.lanes().iter().find(|lane| lane.name() == name).cloned()
    }

    fn open_lane(&self, name: StageName, bounds: Bounds) -> Result<Arc<Lane>, NetworkError> {
        let mut lanes = self.lanes.write().unwrap_or_else(PoisonError::into_inner);
        if lanes.iter().any(|lane| *lane.name() == name) {
            return Err(NetworkError::LaneTaken { lane: name });
        }
        let fault = |what| Err(NetworkError::LaneBounds { lane: name.clone(), what });
        let number = match u16::try_from(lanes.len()) {
            Ok(number) if usize::from(number) < LANES_MAX => number,
            _ => return fault("too many lanes"),
        };
        if bounds.items == 0 || bounds.items as u64 > LANE_ITEMS_MAX {
            return fault("room for no item, or for too many");
        }
        if bounds.bytes < crate::frame::HEADER_BYTES || bounds.bytes as u64 > LANE_BYTES_MAX {
            return fault("room for not even a header, or for too many bytes");
        }
        let bytes = lanes.iter().map(|lane| lane.bounds().bytes as u64).fold(bounds.bytes as u64, u64::saturating_add);
        if bytes > PEER_BYTES_MAX {
            return fault("too many bytes for one peer over all lanes");
        }
        let lane = Arc::new(Lane::new(number, name, self.node.clone(), bounds, self.peers.keys()));
        lanes.push(Arc::clone(&lane));
        // Sessions attach under the lanes' lock, so each meets this lane exactly once: here or there.
        for session in self.sessions() {
            lane.attach(&session);
            lane.rise(&session);
        }
        if self.closing.is_cancelled() {
            lane.close();
        }
        Ok(lane)
    }

    // Sessions.

    pub(super) fn session(&self, peer: &NodeId) -> Option<Arc<Session>> {
        lock(&self.peers.get(peer)?.session).clone()
    }

    fn sessions(&self) -> Vec<Arc<Session>> {
        self.peers.values().filter_map(|cell| lock(&cell.session).clone()).collect()
    }

    /// A peer has proved who it is. An older session with it ends. `None` if there is no such peer or the mesh closes.
    pub(super) fn attach(
        &self,
        peer: &NodeId,
        rtt: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> Option<Arc<Session>> {
        let cell = self.peers.get(peer)?;
        let session = Arc::new(Session::new(peer.clone(), Box::new(rtt), cell.meters.clone()));
        let rtt = session.rtt();
        loop {
            let older = {
                let lanes = self.lanes();
                let mut current = lock(&cell.session);
                match &*current {
                    Some(older) => Arc::clone(older),
                    None if self.closing.is_cancelled() => return None,
                    None => {
                        *current = Some(Arc::clone(&session));
                        self.set_state(peer, PeerState::Up { rtt });
                        for lane in lanes.iter() {
                            lane.attach(&session);
                        }
                        break;
                    }
                }
            };
            self.detach(&older, DownReason::Replaced);
        }
        cell.meters.peer_rtt_seconds.set(rtt.as_secs_f64());
        self.telemetry.events().emit(Event::new("link_up").node(peer).with("rtt_us", rtt.as_micros()));
        tracing::info!(node = %self.node, %peer, ?rtt, "link up");
        Some(session)
    }

    /// A session ends, whoever brings it about; once.
    pub(super) fn detach(&self, session: &Arc<Session>, reason: DownReason) {
        let Some(cell) = self.peers.get(session.peer()) else {
            return;
        };
        {
            let lanes = self.lanes();
            let mut current = lock(&cell.session);
            if !session.end(reason.clone()) {
                return;
            }
            if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, session)) {
                *current = None;
                self.set_state(session.peer(), PeerState::Down { since: self.clock.now(), reason: reason.clone() });
                for lane in lanes.iter() {
                    lane.detach(session);
                }
            }
        }
        self.telemetry.events().emit(Event::new("link_down").node(session.peer()).with("reason", &reason));
        tracing::info!(node = %self.node, peer = %session.peer(), %reason, "link down");
    }

    /// Tells why a peer stays down. Without effect while it is up. Returns the reason before, if that was another.
    pub(super) fn stay_down(&self, peer: &NodeId, why: DownReason) -> Option<DownReason> {
        let mut before = None;
        self.states.send_if_modified(|states| match states.get_mut(peer) {
            Some(PeerState::Down { reason, .. }) if *reason != why => {
                before = Some(std::mem::replace(reason, why));
                true
            }
            _ => false,
        });
        before
    }

    /// Called under the lock of the peer's cell, so that states follow in the order of the sessions.
    fn set_state(&self, peer: &NodeId, state: PeerState) {
        self.states.send_if_modified(|states| match states.get_mut(peer) {
            Some(known) => {
                *known = state;
                true
            }
            None => false,
        });
    }

    fn close(&self) {
        self.closing.cancel();
        self.tasks.close();
        for session in self.sessions() {
            self.detach(&session, DownReason::ShutDown);
        }
        for lane in self.lanes().iter() {
            lane.close();
        }
    }
}

/// Locks, and goes on with the data of a thread that panicked: every critical section leaves them consistent.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Mesh {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Mesh").field("node", &self.handle.core.node).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
