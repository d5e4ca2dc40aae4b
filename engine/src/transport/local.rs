//! Links between nodes of one process.
//!
//! A [`LocalHub`] takes the place of the network. Sessions, lanes, credits and messages are those of every driver;
//! messages pass through their encoding, frames share their buffers.
//!
//! Invariants: two nodes are joined only if their epochs are equal and each finds the other's key in its own roster.
//!
//! It refuses to simulate delay, loss or lies.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use butterfly_topology::NodeId;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::task::coop;

use super::identity::{LinkIdentity, Refusal, Roster};
use super::lane::Lane;
use super::mesh::{Core, lock};
use super::session::Session;
use super::{DownReason, NetworkError};
use crate::link::{LinkFault, LinkMessage};

/// The place where nodes of one process find each other. Clones are the same place.
#[derive(Clone, Default)]
pub struct LocalHub {
    nodes: Arc<Mutex<BTreeMap<NodeId, LocalNode>>>,
}

#[derive(Clone)]
struct LocalNode {
    core: Weak<Core>,
    public_key: [u8; 33],
    roster: Arc<Roster>,
}

impl LocalHub {
    /// An empty hub.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl std::fmt::Debug for LocalHub {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("LocalHub").field("nodes", &lock(&self.nodes).keys()).finish()
    }
}

/// Puts the node on the hub and joins it to those that are there.
pub(super) fn join(
    hub: &LocalHub,
    identity: LinkIdentity,
    roster: Roster,
    core: &Arc<Core>,
) -> Result<(), NetworkError> {
    roster.check(&identity)?;
    tokio::runtime::Handle::try_current().map_err(|_| NetworkError::NoRuntime)?;
    let own = LocalNode { core: Arc::downgrade(core), public_key: identity.public_key(), roster: Arc::new(roster) };
    let mut nodes = lock(&hub.nodes);
    nodes.retain(|_, node| node.core.upgrade().is_some_and(|core| !core.closing().is_cancelled()));
    match nodes.entry(core.node().clone()) {
        Entry::Occupied(_) => return Err(NetworkError::NodeTaken { node: core.node().clone() }),
        Entry::Vacant(entry) => {
            entry.insert(own.clone());
        }
    }
    for (peer, node) in nodes.iter().filter(|(peer, _)| *peer != core.node()) {
        let Some(peer_core) = node.core.upgrade() else { continue };
        let judged = judge(&own, peer, node).and_then(|()| judge(node, core.node(), &own));
        match judged {
            Ok(()) => connect(core, &peer_core),
            Err(refusal) => {
                core.stay_down(peer, DownReason::Refused(refusal));
                peer_core.stay_down(core.node(), DownReason::Refused(refusal));
            }
        }
    }
    Ok(())
}

/// Whether `judge` trusts `node` to be the member `id` of its epoch.
fn judge(judge: &LocalNode, id: &NodeId, node: &LocalNode) -> Result<(), Refusal> {
    if judge.roster.epoch_digest != node.roster.epoch_digest {
        return Err(Refusal::Epoch);
    }
    match judge.roster.members.get(id) {
        None => Err(Refusal::Stranger),
        Some(member) if member.public_key != node.public_key => Err(Refusal::Unproved),
        Some(_) => Ok(()),
    }
}

fn connect(one: &Arc<Core>, other: &Arc<Core>) {
    let no_time = || Duration::ZERO;
    let Some(here) = one.attach(other.node(), no_time) else {
        return;
    };
    let Some(there) = other.attach(one.node(), no_time) else {
        one.detach(&here, DownReason::Left);
        return;
    };
    one.spawn(carry(End::new(one, &here), End::new(other, &there)));
    other.spawn(carry(End::new(other, &there), End::new(one, &here)));
}

#[derive(Clone)]
struct End {
    core: Arc<Core>,
    session: Arc<Session>,
}

impl End {
    fn new(core: &Arc<Core>, session: &Arc<Session>) -> Self {
        Self { core: Arc::clone(core), session: Arc::clone(session) }
    }
}

/// Carries what one end has to say and to send to the other, until either session ends.
async fn carry(from: End, to: End) {
    tokio::select! {
        fault = carry_all(&from, &to) => {
            match fault {
                // Nothing is left to carry, and the other end has everything.
                Ok(()) => {
                    to.core.detach(&to.session, DownReason::Left);
                    from.core.detach(&from.session, DownReason::ShutDown);
                }
                Err(fault) => {
                    to.core.detach(&to.session, DownReason::Fault(fault));
                    from.core.detach(&from.session, DownReason::Accused);
                }
            }
        }
        _ = from.session.ended() => to.core.detach(&to.session, DownReason::Left),
        _ = to.session.ended() => from.core.detach(&from.session, DownReason::Left),
    }
}

async fn carry_all(from: &End, to: &End) -> Result<(), LinkFault> {
    let mut lanes: FuturesUnordered<BoxFuture<'_, Result<(), LinkFault>>> = FuturesUnordered::new();
    let mut bytes = Vec::new();
    loop {
        tokio::select! {
            // A lane that is opened has frames to carry out, which finishing waits for.
            biased;
            opened = from.session.opened_lanes() => {
                for lane in opened {
                    lanes.push(Box::pin(carry_lane(from, to, lane)));
                }
            }
            Some(done) = lanes.next(), if !lanes.is_empty() => done?,
            () = from.session.messages(&from.core, &mut bytes) => {
                let mut rest = bytes.as_slice();
                while let Some(message) = LinkMessage::split_off(&mut rest)? {
                    to.session.handle(&to.core, message)?;
                }
                bytes.clear();
            }
            () = from.session.finishing(), if lanes.is_empty() => return Ok(()),
        }
    }
}

async fn carry_lane(from: &End, to: &End, lane: Arc<Lane>) -> Result<(), LinkFault> {
    let mut batch = Vec::new();
    let mut target = None;
    while let Some(number) = lane.next_batch(&from.session, &mut batch).await {
        let target = match &mut target {
            Some(target) => target,
            none => none.insert(to.session.begin_stream(&to.core, number).await?),
        };
        for (sequence, frame) in batch.drain(..) {
            target.announce_frame(&to.session, sequence, frame.size_bytes())?;
            target.deliver(&to.session, frame);
        }
        coop::consume_budget().await;
    }
    Ok(())
}
