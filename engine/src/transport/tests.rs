//! Clusters of meshes for tests, over either driver.

mod by_hand;
mod hostile;
mod meshes;

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use k256::ecdsa::SigningKey;

use super::*;
use crate::channel::Bounds;
use crate::clock::RealClock;
use crate::frame::Frame;
use crate::telemetry::{Telemetry, TextFormat};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    Local,
    Quic,
}

fn node(name: &str) -> NodeId {
    NodeId::parse(name).unwrap()
}

fn lane(name: &str) -> StageName {
    StageName::parse(name).unwrap()
}

fn bounds(items: usize, bytes: usize) -> Bounds {
    Bounds { items, bytes }
}

fn identity(name: &str) -> LinkIdentity {
    identity_with(name, name.bytes().next_back().unwrap_or(1))
}

fn identity_with(name: &str, seed: u8) -> LinkIdentity {
    LinkIdentity::new(node(name), SigningKey::from_slice(&[seed; 32]).unwrap())
}

/// A control frame that says `number`.
fn numbered(number: u64) -> Frame {
    Frame::control(&number.to_le_bytes()).unwrap()
}

struct Cluster {
    driver: Driver,
    hub: LocalHub,
    roster: Roster,
    sockets: BTreeMap<NodeId, UdpSocket>,
    telemetry: BTreeMap<NodeId, Arc<Telemetry>>,
    idle_timeout: Duration,
    greeting_timeout: Duration,
}

impl Cluster {
    fn new(driver: Driver, names: &[&str]) -> Self {
        let (mut sockets, mut members) = (BTreeMap::new(), BTreeMap::new());
        for name in names {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let address = socket.local_addr().unwrap();
            members.insert(node(name), RosterMember { public_key: identity(name).public_key(), address });
            sockets.insert(node(name), socket);
        }
        Self {
            driver,
            hub: LocalHub::new(),
            roster: Roster { epoch_digest: [7; 32], members },
            sockets,
            telemetry: BTreeMap::new(),
            // Longer than in use: a loaded test machine is not a dead peer.
            idle_timeout: Duration::from_secs(20),
            greeting_timeout: Duration::from_secs(20),
        }
    }

    fn address(&self, name: &str) -> SocketAddr {
        self.roster.members[&node(name)].address
    }

    /// The metrics of a node that was started, as text.
    fn metrics(&self, name: &str) -> String {
        self.telemetry[&node(name)].render(TextFormat::Classic)
    }

    fn mesh(&mut self, name: &str) -> Mesh {
        let roster = self.roster.clone();
        self.mesh_as(identity(name), roster).unwrap()
    }

    /// Binds the address of a node again once its earlier process has let go of it.
    fn socket(&mut self, name: &NodeId) -> UdpSocket {
        self.sockets.remove(name).unwrap_or_else(|| {
            let address = self.roster.members[name].address;
            loop {
                match UdpSocket::bind(address) {
                    Ok(socket) => return socket,
                    Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => std::thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
            }
        })
    }

    fn mesh_as(&mut self, identity: LinkIdentity, roster: Roster) -> Result<Mesh, NetworkError> {
        let telemetry = Arc::new(Telemetry::new(identity.node().clone()));
        self.telemetry.insert(identity.node().clone(), Arc::clone(&telemetry));
        match self.driver {
            Driver::Local => Mesh::local(&self.hub, identity, roster, telemetry, RealClock::shared()),
            Driver::Quic => {
                let socket = self.socket(identity.node());
                let mut config = QuicConfig::new(identity, roster);
                config.socket = Some(socket);
                config.idle_timeout = self.idle_timeout;
                config.greeting_timeout = self.greeting_timeout;
                Mesh::quic(config, telemetry, RealClock::shared())
            }
        }
    }
}

/// The next delivery, which must be that the peer is up.
async fn up(port: &mut PeerPort, peer: &str) {
    assert_eq!(port.recv().await, Some(Delivery::Up(node(peer))));
}

/// The next delivery, which must be that the peer is down.
async fn down(port: &mut PeerPort, peer: &str) {
    assert_eq!(port.recv().await, Some(Delivery::Down(node(peer))));
}

/// The next delivery, which must be a frame from the peer.
async fn frame(port: &mut PeerPort, peer: &str) -> Frame {
    match port.recv().await {
        Some(Delivery::Frame { from, frame }) if from == node(peer) => frame,
        other => panic!("expected a frame from {peer}, got {other:?}"),
    }
}

/// The next delivery, which must be the control frame that says `number`.
async fn expect(port: &mut PeerPort, peer: &str, number: u64) {
    assert_eq!(frame(port, peer).await, numbered(number));
}

/// Waits until the state of a peer fulfils a condition.
async fn state(mesh: &Mesh, peer: &str, condition: impl Fn(&PeerState) -> bool) -> PeerState {
    let mut states = mesh.peers();
    let states = states.wait_for(|states| condition(&states[&node(peer)])).await.unwrap();
    states[&node(peer)].clone()
}

/// Waits until a peer is down for a certain reason.
async fn down_because(mesh: &Mesh, peer: &str, because: impl Fn(&DownReason) -> bool) -> DownReason {
    let is_so = |state: &PeerState| matches!(state, PeerState::Down { reason, .. } if because(reason));
    match state(mesh, peer, is_so).await {
        PeerState::Down { reason, .. } => reason,
        PeerState::Up { .. } => unreachable!(),
    }
}
