//! Links over QUIC: one endpoint per node, one connection per pair of nodes, dialled by the lesser id.
//!
//! The encryption layer is TLS 1.3 with both sides authenticated by raw public keys that were made for this process. Who
//! the peer is, it proves inside, before anything else: see [`identity`](super::identity). Each lane has a stream of its
//! own in each direction, so a long tensor on one does not hold up another; messages have the stream of the greeting.
//!
//! Invariants: a peer that has not been welcomed may open one stream, hold [`UNPROVED_WINDOW_BYTES`] of memory and take
//! the greeting timeout of time, and only so many may do so at once; no data is sent before the welcome; a connection that
//! failed is retried as the breaker says; datagrams stay below the size at which batches of them vanish in the kernel.
//!
//! It refuses to know what lanes carry.

mod encryption;
mod greeting;
mod reset;
mod streams;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use butterfly_topology::NodeId;
use quinn::{
    Connection, ConnectionError, Endpoint, EndpointConfig, Incoming, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use self::greeting::Greeted;
use self::streams::Streams;
use super::breaker::{Breaker, Circuit};
use super::identity::{Greeter, LinkIdentity, Refusal, Roster};
use super::mesh::{Core, lock};
use super::session::Session;
use super::{DownReason, NetworkError};
use crate::link::{LANES_MAX, LinkFault};
use crate::telemetry::CircuitState;

/// A peer is given up after this time without a sign of life.
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);
/// A link without traffic gives a sign of life this often.
const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// Longest time for hello and welcome, unless the configuration says otherwise.
const GREETING_MAX: Duration = Duration::from_secs(3);
/// Bytes that a peer may have in flight before it is welcomed.
const UNPROVED_WINDOW_BYTES: u32 = 4 << 10;
/// Bytes that a peer may have in flight afterwards, beyond what lanes have taken off their streams.
const WINDOW_BYTES: u32 = 16 << 20;
/// The same for one stream.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Round-trip time assumed at first: a lost first datagram is sent again after three times as much.
const RTT_EXPECTED: Duration = Duration::from_millis(100);
/// How often the round-trip time is shown.
const RTT_SHOWN_EVERY: Duration = Duration::from_secs(5);
/// A warning about strangers is given at most this often; the rest is for debugging.
const WARNING_EVERY: Duration = Duration::from_secs(1);
/// Buffers of the socket: the default loses datagrams in bursts.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Largest datagram. The kernel takes batches of ten of them and rejects more than 64 KiB, which looks like loss.
const DATAGRAM_BYTES_MAX: u16 = 6_500;
/// Connections that may be greeting at a time, from addresses of the roster.
const GREETINGS_MAX: usize = 32;
/// The same from other addresses, apart so that strangers do not keep members out.
const STRANGERS_MAX: usize = 8;
/// Connections not yet looked at that the endpoint keeps.
const INCOMING_MAX: usize = 64;
/// A link that lasted less counts as a failed attempt.
const SETTLED: Duration = Duration::from_secs(1);
/// How long a closing endpoint waits until the peers know.
const CLOSE_MAX: Duration = Duration::from_millis(500);

const CODE_LEFT: u32 = 0;
const CODE_FAULT: u32 = 1;
const CODE_REPLACED: u32 = 2;
/// Refusals follow from here, in the order of their codes.
const CODE_REFUSED: u32 = 16;

/// What links over QUIC need.
#[derive(Debug)]
pub struct QuicConfig {
    /// This node.
    pub identity: LinkIdentity,
    /// The members of the epoch.
    pub roster: Roster,
    /// A bound socket, instead of one bound to the roster's address of this node.
    pub socket: Option<UdpSocket>,
    /// A peer is given up after this time without a sign of life; one is given four times as often.
    pub idle_timeout: Duration,
    /// Longest time for the handshake of the encryption layer, and again for hello and welcome.
    pub greeting_timeout: Duration,
}

impl QuicConfig {
    /// The usual settings: a peer that is silent for two seconds is down.
    #[must_use]
    pub fn new(identity: LinkIdentity, roster: Roster) -> Self {
        Self { identity, roster, socket: None, idle_timeout: IDLE_TIMEOUT, greeting_timeout: GREETING_MAX }
    }
}

/// The driver of one node.
struct Node {
    core: Arc<Core>,
    greeter: Greeter,
    greeting_timeout: Duration,
    endpoint: Endpoint,
    addresses: BTreeMap<NodeId, SocketAddr>,
    sessions: TaskTracker,
    /// When the last warning about a stranger was given.
    warned: Mutex<Option<Duration>>,
}

/// Binds, listens and dials.
pub(super) fn start(config: QuicConfig, core: &Arc<Core>) -> Result<(), NetworkError> {
    let QuicConfig { identity, roster, socket, idle_timeout, greeting_timeout } = config;
    let (own, reset_secret) = (identity.node().clone(), identity.reset_secret());
    let addresses: BTreeMap<_, _> =
        roster.members.iter().map(|(node, member)| (node.clone(), member.address)).collect();
    let greeter = Greeter::new(identity, roster)?;
    let endpoint = endpoint(reset::endpoint_config(reset_secret), addresses.get(&own), socket, idle_timeout)?;
    let node = Arc::new(Node {
        core: Arc::clone(core),
        greeter,
        greeting_timeout,
        endpoint,
        addresses,
        sessions: TaskTracker::new(),
        warned: Mutex::default(),
    });
    core.spawn(Arc::clone(&node).accept());
    for peer in node.addresses.keys().filter(|peer| **peer > own) {
        core.spawn(Arc::clone(&node).keep_dialled(peer.clone()));
    }
    core.spawn(async move {
        node.core.closing().cancelled().await;
        node.sessions.close();
        node.sessions.wait().await;
        node.endpoint.close(VarInt::from_u32(CODE_LEFT), b"");
        // Whoever is not told in time finds out by the idle timeout.
        let _ = tokio::time::timeout(CLOSE_MAX, node.endpoint.wait_idle()).await;
    });
    Ok(())
}

fn endpoint(
    mut config: EndpointConfig,
    address: Option<&SocketAddr>,
    socket: Option<UdpSocket>,
    idle_timeout: Duration,
) -> Result<Endpoint, NetworkError> {
    let encryption = |reason: &dyn std::fmt::Display| NetworkError::Encryption { reason: reason.to_string() };
    let bind = |source| NetworkError::Bind { address: address.map(ToString::to_string).unwrap_or_default(), source };
    let socket = match (socket, address) {
        (Some(socket), _) => socket,
        (None, Some(address)) => UdpSocket::bind(address).map_err(bind)?,
        (None, None) => return Err(bind(std::io::ErrorKind::AddrNotAvailable.into())),
    };
    let options = socket2::SockRef::from(&socket);
    let sized = options
        .set_recv_buffer_size(SOCKET_BUFFER_BYTES)
        .and_then(|()| options.set_send_buffer_size(SOCKET_BUFFER_BYTES));
    if let Err(error) = sized {
        tracing::warn!(%error, "socket buffers stay small, bursts may lose datagrams");
    }
    let mut transport = TransportConfig::default();
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(DATAGRAM_BYTES_MAX);
    transport
        .max_idle_timeout(Some(idle_timeout.try_into().map_err(|error| encryption(&error))?))
        .keep_alive_interval(Some(KEEP_ALIVE.min(idle_timeout / 4)))
        .mtu_discovery_config(Some(discovery))
        .initial_rtt(RTT_EXPECTED)
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .receive_window(VarInt::from_u32(UNPROVED_WINDOW_BYTES))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .datagram_receive_buffer_size(None);
    let transport = Arc::new(transport);
    let keys = encryption::Keys::generate().map_err(|error| encryption(&error))?;
    let mut server = keys.server().map_err(|error| encryption(&error))?;
    server
        .transport_config(Arc::clone(&transport))
        .migration(false)
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(u64::from(UNPROVED_WINDOW_BYTES))
        .incoming_buffer_size_total(u64::from(UNPROVED_WINDOW_BYTES) * INCOMING_MAX as u64);
    let mut client = keys.client().map_err(|error| encryption(&error))?;
    client.transport_config(transport);
    config.max_udp_payload_size(DATAGRAM_BYTES_MAX).map_err(|error| encryption(&error))?;
    let runtime = quinn::default_runtime().ok_or(NetworkError::NoRuntime)?;
    let mut endpoint = Endpoint::new(config, Some(server), socket, runtime).map_err(bind)?;
    endpoint.set_default_client_config(client);
    Ok(endpoint)
}

impl Node {
    // Accepting.

    async fn accept(self: Arc<Self>) {
        let known: BTreeSet<IpAddr> = self.addresses.values().map(|address| address.ip().to_canonical()).collect();
        let members = Arc::new(Semaphore::new(GREETINGS_MAX));
        let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
        loop {
            let incoming = tokio::select! {
                () = self.core.closing().cancelled() => return,
                incoming = self.endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else { return };
            let (permits, most) = if known.contains(&incoming.remote_address().ip().to_canonical()) {
                (&members, GREETINGS_MAX)
            } else {
                (&strangers, STRANGERS_MAX)
            };
            // When it gets crowded, only those are let in that prove to own their address.
            if permits.available_permits() < most / 2 && incoming.may_retry() && !incoming.remote_address_validated() {
                // A failed retry means that the datagram is dropped, and the peer sends another.
                let _ = incoming.retry();
                continue;
            }
            match Arc::clone(permits).try_acquire_owned() {
                Ok(permit) => {
                    self.sessions.spawn(Arc::clone(&self).admit(incoming, permit));
                }
                Err(_) => incoming.ignore(),
            }
        }
    }

    async fn admit(self: Arc<Self>, incoming: Incoming, permit: OwnedSemaphorePermit) {
        let remote = incoming.remote_address();
        let greeted = tokio::select! {
            () = self.core.closing().cancelled() => return,
            greeted = greeting::accept(&self.greeter, incoming, self.greeting_timeout) => greeted,
        };
        drop(permit);
        match greeted {
            Ok(greeted) => {
                self.run(greeted).await;
            }
            Err(reason) if self.may_warn() => {
                tracing::warn!(node = %self.core.node(), %remote, %reason, "an incoming connection was not admitted");
            }
            Err(reason) => {
                tracing::debug!(node = %self.core.node(), %remote, %reason, "an incoming connection was not admitted");
            }
        }
    }

    /// Strangers must not be able to fill the log.
    fn may_warn(&self) -> bool {
        let (now, mut warned) = (self.core.clock().now(), lock(&self.warned));
        let may = warned.is_none_or(|last| now.saturating_sub(last) >= WARNING_EVERY);
        if may {
            *warned = Some(now);
        }
        may
    }

    // Dialling.

    async fn keep_dialled(self: Arc<Self>, peer: NodeId) {
        let mut breaker = Breaker::new();
        loop {
            tokio::select! {
                () = self.core.closing().cancelled() => return,
                () = self.pause(&peer, &mut breaker) => {}
            }
            let dialled = tokio::select! {
                () = self.core.closing().cancelled() => return,
                dialled = self.dial(&peer) => dialled,
            };
            match dialled {
                Ok(greeted) => {
                    let (before, since) = (breaker.clone(), self.core.clock().now());
                    breaker.succeeded();
                    self.show_circuit(&peer, &breaker);
                    self.sessions.track_future(self.run(greeted)).await;
                    let now = self.core.clock().now();
                    if now.saturating_sub(since) < SETTLED {
                        breaker = before;
                        breaker.failed(now);
                    }
                }
                Err(reason) => {
                    match self.core.stay_down(&peer, reason.clone()) {
                        // It said that it stops, so it is no surprise that it does not answer.
                        Some(DownReason::Left) => {
                            tracing::debug!(node = %self.core.node(), %peer, %reason, "a peer that left is not back");
                        }
                        Some(_) => tracing::warn!(node = %self.core.node(), %peer, %reason, "could not connect"),
                        None => {}
                    }
                    breaker.failed(self.core.clock().now());
                }
            }
            self.show_circuit(&peer, &breaker);
            if let Some(meters) = self.core.meters(&peer) {
                meters.retries_total.inc();
            }
        }
    }

    async fn pause(&self, peer: &NodeId, breaker: &mut Breaker) {
        loop {
            let pause = breaker.pause(self.core.clock().now());
            if pause.is_zero() {
                self.show_circuit(peer, breaker);
                return;
            }
            self.core.clock().sleep(pause).await;
        }
    }

    async fn dial(&self, peer: &NodeId) -> Result<Greeted, DownReason> {
        let address =
            self.addresses.get(peer).ok_or_else(|| DownReason::Unreachable("no address is known".to_owned()))?;
        let connecting = self
            .endpoint
            .connect(*address, encryption::SERVER_NAME)
            .map_err(|error| DownReason::Unreachable(error.to_string()))?;
        greeting::dial(&self.greeter, connecting, peer, self.greeting_timeout).await
    }

    fn show_circuit(&self, peer: &NodeId, breaker: &Breaker) {
        if let Some(meters) = self.core.meters(peer) {
            let state = match breaker.circuit() {
                Circuit::Closed => CircuitState::Closed,
                Circuit::Open { .. } => CircuitState::Open,
                Circuit::HalfOpen => CircuitState::HalfOpen,
            };
            meters.circuit_state.set(state.number());
        }
    }

    // Both.

    /// Keeps the metric current; never ends.
    async fn show_rtt(&self, session: &Session) -> DownReason {
        loop {
            self.core.clock().sleep(RTT_SHOWN_EVERY).await;
            session.meters().peer_rtt_seconds.set(session.rtt().as_secs_f64());
        }
    }

    /// Carries a connection from its welcome to its end.
    async fn run(&self, greeted: Greeted) {
        let Greeted { peer, connection, send, receive } = greeted;
        let rtt = {
            let connection = connection.clone();
            move || connection.rtt()
        };
        let Some(session) = self.core.attach(&peer.peer, rtt) else {
            connection.close(VarInt::from_u32(CODE_LEFT), b"");
            return;
        };
        tracing::debug!(node = %self.core.node(), peer = %peer.peer, incarnation = peer.incarnation, "welcomed");
        connection.set_max_concurrent_uni_streams(VarInt::from_u32(u32::try_from(LANES_MAX).unwrap_or(u32::MAX)));
        connection.set_receive_window(VarInt::from_u32(WINDOW_BYTES));
        let mut streams = Streams::new(&self.core, &session, &connection, send, receive);
        let reason = tokio::select! {
            reason = session.ended() => reason,
            reason = self.show_rtt(&session) => reason,
            served = streams.serve() => match served {
                Ok(()) => DownReason::ShutDown,
                Err(_) if connection.close_reason().is_some() => {
                    tokio::select! {
                        reason = session.ended() => reason,
                        () = streams.drain() => reason_of(connection.closed().await),
                    }
                }
                Err(reason) => reason,
            },
        };
        drop(streams);
        if let DownReason::Fault(fault) = &reason {
            tracing::warn!(node = %self.core.node(), peer = %peer.peer, %fault, "a peer broke the protocol");
        }
        close(&connection, &reason);
        self.core.detach(&session, reason);
    }
}

/// Closes a connection so that the peer learns as much of the reason as concerns it.
fn close(connection: &Connection, reason: &DownReason) {
    let code = match reason {
        DownReason::Fault(_) => CODE_FAULT,
        DownReason::Replaced => CODE_REPLACED,
        DownReason::Distrusted(refusal) => CODE_REFUSED.saturating_add(refusal.code()),
        _ => CODE_LEFT,
    };
    connection.close(VarInt::from_u32(code), b"");
}

fn reason_of(error: ConnectionError) -> DownReason {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            let code = u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX);
            match code {
                CODE_LEFT => DownReason::Left,
                CODE_FAULT => DownReason::Accused,
                CODE_REPLACED => DownReason::Replaced,
                code => match code.checked_sub(CODE_REFUSED).and_then(Refusal::from_code) {
                    Some(refusal) => DownReason::Refused(refusal),
                    None => DownReason::Unreachable(format!("closed with code {code}")),
                },
            }
        }
        ConnectionError::LocallyClosed => DownReason::ShutDown,
        error => DownReason::Unreachable(error.to_string()),
    }
}

fn fault(fault: impl Into<LinkFault>) -> DownReason {
    DownReason::Fault(fault.into())
}
