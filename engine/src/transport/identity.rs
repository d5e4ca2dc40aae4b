//! Who a node is, and how it proves that on a fresh encrypted connection.
//!
//! The encryption layer knows only keys made for this process. The dialling side says [`Hello`], the other judges it and
//! answers [`Welcome`]; each is signed with the node's k256 key over
//!
//! ```text
//! SHA-256( "butterfly-link-v1" ‖ role ‖ epoch digest ‖ exporter ‖ incarnation ‖ len(dialler) ‖ dialler ‖ len(accepter) ‖ accepter )
//! ```
//!
//! where *exporter* is 32 bytes that only the two ends of this very connection can derive. So neither message is of use
//! on another connection, in the other direction, towards another node, or in another epoch.
//!
//! Invariants: parsing is total and checks every length; a peer is what it says only after its signature has been
//! verified against the roster's key; the lesser id dials, so one pair of nodes has one link and no node welcomes itself.
//!
//! It refuses to know sockets and time.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use butterfly_topology::NodeId;
use k256::ecdsa::signature::hazmat::{PrehashSigner, PrehashVerifier};
use k256::ecdsa::{Signature, SigningKey, VerifyingKey};
use sha2::{Digest, Sha256};

/// Longest hello or welcome, in bytes.
pub(super) const HELLO_BYTES_MAX: usize = 256;
/// Length of the exporter value, in bytes.
pub(super) const EXPORTER_BYTES: usize = 32;
/// Label of the exporter value.
pub(super) const EXPORTER_LABEL: &[u8] = b"EXPORTER-butterfly-link-v1";

const CONTEXT: &[u8] = b"butterfly-link-v1";
const VERSION: u16 = 1;
const SIGNATURE_BYTES: usize = 64;

/// Why an identity cannot be used with a roster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The roster lacks this node.
    #[error("node `{node}` is not in the roster")]
    NotInRoster {
        /// The node.
        node: NodeId,
    },
    /// The roster has another key for this node.
    #[error("the roster has another public key for node `{node}`")]
    WrongKey {
        /// The node.
        node: NodeId,
    },
    /// A key of the roster is no point of the curve.
    #[error("the public key of node `{node}` is invalid")]
    InvalidKey {
        /// The node.
        node: NodeId,
    },
    /// A node could not sign or make its keys.
    #[error("cannot make keys or signatures")]
    Crypto,
}

/// Why a peer is not welcome. Each end learns no more than this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// Not a hello or welcome, or too long.
    #[error("malformed greeting")]
    Malformed,
    /// It speaks another version.
    #[error("another protocol version")]
    Version,
    /// It has another epoch: other members, model, profile or plan.
    #[error("another epoch: its roster, model, numerics profile or plan differs; compare the epoch.json of both nodes")]
    Epoch,
    /// It is not in the roster.
    #[error("not in the roster")]
    Stranger,
    /// It wants, or is, another node than expected.
    #[error("not the node that was expected")]
    WrongNode,
    /// It dialled although the other end should.
    #[error("the lesser node id dials")]
    Direction,
    /// Its signature does not prove its identity on this connection.
    #[error("identity not proved")]
    Unproved,
    /// It did not greet in time.
    #[error("no greeting in time")]
    Late,
}

impl Refusal {
    /// Every refusal, in the order of its code.
    const ALL: [Self; 8] = [
        Self::Malformed,
        Self::Version,
        Self::Epoch,
        Self::Stranger,
        Self::WrongNode,
        Self::Direction,
        Self::Unproved,
        Self::Late,
    ];

    /// The number that stands for it on the wire.
    pub(super) fn code(self) -> u32 {
        self as u32
    }

    pub(super) fn from_code(code: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(code).ok()?).copied()
    }
}

/// The id and the secret key of this node.
#[derive(Clone)]
pub struct LinkIdentity {
    node: NodeId,
    key: SigningKey,
}

impl LinkIdentity {
    /// An identity.
    #[must_use]
    pub fn new(node: NodeId, key: SigningKey) -> Self {
        Self { node, key }
    }

    /// The node's id.
    #[must_use]
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// The compressed public key, as a roster has it.
    #[must_use]
    pub fn public_key(&self) -> [u8; 33] {
        let point = self.key.verifying_key().to_sec1_point(true);
        let mut bytes = [0; 33];
        if point.as_bytes().len() == bytes.len() {
            bytes.copy_from_slice(point.as_bytes());
        }
        bytes
    }

    /// A secret that only this node can derive, in every process that it runs.
    pub(super) fn reset_secret(&self) -> [u8; 32] {
        Sha256::new().chain_update(b"butterfly-reset-v1").chain_update(self.key.to_bytes()).finalize().into()
    }

    fn sign(&self, digest: &[u8; 32]) -> Result<[u8; SIGNATURE_BYTES], IdentityError> {
        let signature: Signature = self.key.sign_prehash(digest).map_err(|_| IdentityError::Crypto)?;
        let mut bytes = [0; SIGNATURE_BYTES];
        bytes.copy_from_slice(&signature.normalize_s().to_bytes());
        Ok(bytes)
    }
}

impl std::fmt::Debug for LinkIdentity {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("LinkIdentity").field("node", &self.node).finish_non_exhaustive()
    }
}

/// A member of a roster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RosterMember {
    /// The compressed k256 public key.
    pub public_key: [u8; 33],
    /// Where the node listens for its peers.
    pub address: SocketAddr,
}

/// Who belongs to an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roster {
    /// The digest over everything that the members must agree on.
    pub epoch_digest: [u8; 32],
    /// The members, this node included.
    pub members: BTreeMap<NodeId, RosterMember>,
}

impl Roster {
    /// Checks that `identity` is a member under its own key, and that every key is one.
    ///
    /// # Errors
    /// [`IdentityError`] naming the node concerned.
    pub fn check(&self, identity: &LinkIdentity) -> Result<(), IdentityError> {
        for (node, member) in &self.members {
            VerifyingKey::from_sec1_bytes(&member.public_key)
                .map_err(|_| IdentityError::InvalidKey { node: node.clone() })?;
        }
        match self.members.get(identity.node()) {
            None => Err(IdentityError::NotInRoster { node: identity.node().clone() }),
            Some(member) if member.public_key != identity.public_key() => {
                Err(IdentityError::WrongKey { node: identity.node().clone() })
            }
            Some(_) => Ok(()),
        }
    }
}

/// Which of the two greetings: who dialled says hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// From the dialling side.
    Hello = 1,
    /// From the accepting side.
    Welcome = 2,
}

/// What both greetings say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    role: Role,
    epoch_digest: [u8; 32],
    /// Drawn when the process started: another one means that the peer has restarted.
    incarnation: u64,
    from: NodeId,
    to: NodeId,
    signature: [u8; SIGNATURE_BYTES],
}

/// A peer that has proved who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proved {
    pub(super) peer: NodeId,
    pub(super) incarnation: u64,
}

/// This node as one end of the connections it greets on.
#[derive(Clone, Debug)]
pub(super) struct Greeter {
    identity: LinkIdentity,
    roster: Roster,
    incarnation: u64,
}

impl Greeter {
    /// # Errors
    /// [`IdentityError`] if the identity does not fit the roster, or there is no randomness.
    pub(super) fn new(identity: LinkIdentity, roster: Roster) -> Result<Self, IdentityError> {
        roster.check(&identity)?;
        let incarnation = getrandom::u64().map_err(|_| IdentityError::Crypto)?;
        Ok(Self { identity, roster, incarnation })
    }

    /// This node's greeting to `to` on the connection with this `exporter` value.
    ///
    /// # Errors
    /// [`IdentityError::Crypto`].
    pub(super) fn greet(
        &self,
        role: Role,
        to: &NodeId,
        exporter: &[u8; EXPORTER_BYTES],
    ) -> Result<Vec<u8>, IdentityError> {
        let mut greeting = Greeting {
            role,
            epoch_digest: self.roster.epoch_digest,
            incarnation: self.incarnation,
            from: self.identity.node.clone(),
            to: to.clone(),
            signature: [0; SIGNATURE_BYTES],
        };
        greeting.signature = self.identity.sign(&greeting.digest(exporter))?;
        Ok(greeting.encode())
    }

    /// Judges the hello of whoever dialled.
    ///
    /// # Errors
    /// [`Refusal`]; the connection must be closed then.
    pub(super) fn judge_hello(&self, bytes: &[u8], exporter: &[u8; EXPORTER_BYTES]) -> Result<Proved, Refusal> {
        let greeting = self.judge(bytes, Role::Hello, exporter)?;
        if greeting.from >= self.identity.node {
            return Err(Refusal::Direction);
        }
        Ok(Proved { peer: greeting.from, incarnation: greeting.incarnation })
    }

    /// Judges the welcome of `expected`, which this node dialled.
    ///
    /// # Errors
    /// [`Refusal`]; the connection must be closed then.
    pub(super) fn judge_welcome(
        &self,
        bytes: &[u8],
        expected: &NodeId,
        exporter: &[u8; EXPORTER_BYTES],
    ) -> Result<Proved, Refusal> {
        let greeting = self.judge(bytes, Role::Welcome, exporter)?;
        if greeting.from != *expected {
            return Err(Refusal::WrongNode);
        }
        Ok(Proved { peer: greeting.from, incarnation: greeting.incarnation })
    }

    fn judge(&self, bytes: &[u8], role: Role, exporter: &[u8; EXPORTER_BYTES]) -> Result<Greeting, Refusal> {
        let greeting = Greeting::decode(bytes)?;
        if greeting.role != role {
            return Err(Refusal::Malformed);
        }
        if greeting.epoch_digest != self.roster.epoch_digest {
            return Err(Refusal::Epoch);
        }
        if greeting.to != self.identity.node || greeting.from == self.identity.node {
            return Err(Refusal::WrongNode);
        }
        let member = self.roster.members.get(&greeting.from).ok_or(Refusal::Stranger)?;
        let key = VerifyingKey::from_sec1_bytes(&member.public_key).map_err(|_| Refusal::Unproved)?;
        let signature = Signature::from_slice(&greeting.signature).map_err(|_| Refusal::Unproved)?;
        key.verify_prehash(&greeting.digest(exporter), &signature).map_err(|_| Refusal::Unproved)?;
        Ok(greeting)
    }
}

impl Greeting {
    fn digest(&self, exporter: &[u8; EXPORTER_BYTES]) -> [u8; 32] {
        let (dialler, accepter) = match self.role {
            Role::Hello => (&self.from, &self.to),
            Role::Welcome => (&self.to, &self.from),
        };
        let mut digest = Sha256::new();
        digest.update(CONTEXT);
        digest.update([self.role as u8]);
        digest.update(self.epoch_digest);
        digest.update(exporter);
        digest.update(self.incarnation.to_le_bytes());
        for node in [dialler, accepter] {
            digest.update((node.as_str().len() as u64).to_le_bytes());
            digest.update(node.as_str());
        }
        digest.finalize().into()
    }

    /// ```text
    /// version u16 ‖ role u8 ‖ epoch digest 32 ‖ incarnation u64 ‖ len u8 ‖ from ‖ len u8 ‖ to ‖ signature 64
    /// ```
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HELLO_BYTES_MAX);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.push(self.role as u8);
        bytes.extend_from_slice(&self.epoch_digest);
        bytes.extend_from_slice(&self.incarnation.to_le_bytes());
        for node in [&self.from, &self.to] {
            // Node ids have at most 63 bytes.
            bytes.push(u8::try_from(node.as_str().len()).unwrap_or(u8::MAX));
            bytes.extend_from_slice(node.as_str().as_bytes());
        }
        bytes.extend_from_slice(&self.signature);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        if bytes.len() > HELLO_BYTES_MAX {
            return Err(Refusal::Malformed);
        }
        let mut rest = bytes;
        if u16::from_le_bytes(take(&mut rest)?) != VERSION {
            return Err(Refusal::Version);
        }
        let role = match take::<1>(&mut rest)? {
            [1] => Role::Hello,
            [2] => Role::Welcome,
            _ => return Err(Refusal::Malformed),
        };
        let epoch_digest = take(&mut rest)?;
        let incarnation = u64::from_le_bytes(take(&mut rest)?);
        let (from, to) = (take_node(&mut rest)?, take_node(&mut rest)?);
        let signature = take(&mut rest)?;
        if !rest.is_empty() {
            return Err(Refusal::Malformed);
        }
        Ok(Self { role, epoch_digest, incarnation, from, to, signature })
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Refusal> {
    let (value, rest) = bytes.split_first_chunk::<N>().ok_or(Refusal::Malformed)?;
    *bytes = rest;
    Ok(*value)
}

fn take_node(bytes: &mut &[u8]) -> Result<NodeId, Refusal> {
    let [length] = take::<1>(bytes)?;
    let (name, rest) = bytes.split_at_checked(usize::from(length)).ok_or(Refusal::Malformed)?;
    *bytes = rest;
    let text = std::str::from_utf8(name).map_err(|_| Refusal::Malformed)?;
    NodeId::parse(text).map_err(|_| Refusal::Malformed)
}

#[cfg(test)]
mod tests;
