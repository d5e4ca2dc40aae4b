//! What is fixed before any request: who may vote on what, under which model, numerics and limits.
//!
//! An [`Epoch`] is valid by construction and read-only. Its digest enters every signature, so nothing said in one epoch
//! means anything in another. Who signs epochs and how they change is outside this crate.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k256::ecdsa::VerifyingKey;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::codec::Writer;
use crate::digest::{Digest, Purpose, hash};
use crate::limits::{MAX_BYZANTINE_MAX, MEMBERS_MAX, NAME_BYTES_MAX, SLICES_MAX, TOKENS_MAX, VALUES_MAX};
use crate::request::{Input, Request};
use crate::rules::Rules;
use crate::text::{self, JsonError};

/// A node's place in the roster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeIndex(pub u16);

impl fmt::Display for NodeIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// A compressed secp256k1 point, as hex in text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 33]);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl From<[u8; 33]> for PublicKey {
    fn from(bytes: [u8; 33]) -> Self {
        Self(bytes)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        text::hex_bytes::serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text::hex_bytes::deserialize(deserializer).map(Self)
    }
}

/// One node of the roster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// The node's id.
    pub id: String,
    /// Its identity.
    pub public_key: PublicKey,
    /// Who operates it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
}

/// A slice and who holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceReplicas {
    /// The first layer, from 0.
    pub first_layer: u32,
    /// One past the last layer.
    pub last_layer: u32,
    /// Exactly 2f+1 different nodes.
    pub replicas: Vec<NodeIndex>,
}

/// What one request may ask for in this epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Positions of a sequence: prompt and generated tokens.
    pub positions_max: u32,
    /// Values of an input vector.
    pub values_max: u32,
}

impl Default for Limits {
    /// The widest.
    fn default() -> Self {
        let widest = |max: usize| u32::try_from(max).unwrap_or(u32::MAX);
        Self { positions_max: widest(TOKENS_MAX), values_max: widest(VALUES_MAX) }
    }
}

/// The fields of an [`Epoch`], before they are known to be valid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EpochParts {
    /// The cluster's name.
    pub cluster: String,
    /// Counts the cluster's epochs.
    pub number: u64,
    /// f: how many replicas of any one slice may lie.
    pub max_byzantine: u16,
    /// The nodes; a [`NodeIndex`] is a place in this list.
    pub roster: Vec<Member>,
    /// The model's name.
    pub model: String,
    /// The digest over config, tokenizer and weights.
    pub manifest: Digest,
    /// The numerics profile by name.
    pub profile: String,
    /// The digest of the profile's definition.
    pub profile_digest: Digest,
    /// The plan: slices in order of layers.
    pub slices: Vec<SliceReplicas>,
    /// What one request may ask for.
    #[serde(default)]
    pub limits: Limits,
}

/// Which rule of an epoch is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EpochError {
    /// A name is empty or longer than [`NAME_BYTES_MAX`].
    #[error("{field}: a name has 1 to {NAME_BYTES_MAX} bytes")]
    Name {
        /// The field.
        field: &'static str,
    },
    /// More faults than [`MAX_BYZANTINE_MAX`].
    #[error("max_byzantine: {found} is more than {MAX_BYZANTINE_MAX}")]
    MaxByzantine {
        /// f as given.
        found: u16,
    },
    /// No node, or more than [`MEMBERS_MAX`].
    #[error("roster: {found} nodes, but 1 to {MEMBERS_MAX} are allowed")]
    Roster {
        /// Nodes given.
        found: usize,
    },
    /// Two nodes have one id.
    #[error("roster: the id {id} is given twice")]
    DuplicateId {
        /// The id.
        id: String,
    },
    /// Two nodes have one key.
    #[error("roster: {id} has the key of another node")]
    DuplicateKey {
        /// The second of them.
        id: String,
    },
    /// A key is no point of the curve.
    #[error("roster: the public key of {id} is not a compressed secp256k1 point")]
    Key {
        /// The node.
        id: String,
    },
    /// No slice, or more than [`SLICES_MAX`].
    #[error("slices: {found} given, but 1 to {SLICES_MAX} are allowed")]
    Slices {
        /// Slices given.
        found: usize,
    },
    /// A slice is empty or does not begin where the one before it ends.
    #[error("slice {slice} is empty or does not begin where the one before it ends")]
    Layers {
        /// The slice.
        slice: usize,
    },
    /// A replica set is not 2f+1 nodes.
    #[error("slice {slice} has {found} replicas, but 2f+1 = {expected} are needed")]
    Replicas {
        /// The slice.
        slice: usize,
        /// Replicas given.
        found: usize,
        /// 2f+1.
        expected: usize,
    },
    /// A replica is not in the roster, or is named twice.
    #[error("slice {slice}: replica {node} is not in the roster or is named twice")]
    Replica {
        /// The slice.
        slice: usize,
        /// The replica.
        node: NodeIndex,
    },
    /// A limit wider than this crate's.
    #[error("limits: {field} is 0 or more than {max}")]
    Limit {
        /// The field.
        field: &'static str,
        /// The widest allowed.
        max: usize,
    },
}

/// A request that asks for more than the epoch allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: the request needs {found}, but the epoch allows {max}")]
pub struct OverLimit {
    /// What there is too much of.
    pub what: &'static str,
    /// How much the request needs.
    pub found: usize,
    /// How much the epoch allows.
    pub max: u32,
}

impl OverLimit {
    fn check(what: &'static str, found: usize, max: u32) -> Result<(), Self> {
        let fits = u32::try_from(found).is_ok_and(|found| found <= max);
        if fits { Ok(()) } else { Err(Self { what, found, max }) }
    }
}

/// A valid epoch. Reads like its [`EpochParts`].
#[derive(Clone)]
pub struct Epoch {
    parts: EpochParts,
    digest: Digest,
    keys: Vec<VerifyingKey>,
    indices: BTreeMap<String, NodeIndex>,
    rules: Rules,
}

impl Epoch {
    /// Checks the parts.
    pub fn new(parts: EpochParts) -> Result<Self, EpochError> {
        check_names(&parts)?;
        check_limits(&parts.limits)?;
        if parts.max_byzantine > MAX_BYZANTINE_MAX {
            return Err(EpochError::MaxByzantine { found: parts.max_byzantine });
        }
        let keys = check_roster(&parts.roster)?;
        check_slices(&parts)?;
        let indices =
            (0..).map(NodeIndex).zip(&parts.roster).map(|(index, member)| (member.id.clone(), index)).collect();
        let digest = hash(Purpose::Epoch, &[&write(&parts)]);
        Ok(Self { parts, digest, keys, indices, rules: Rules::ALL })
    }

    /// The digest that every signature of this epoch covers.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The fields.
    pub fn parts(&self) -> &EpochParts {
        &self.parts
    }

    /// The place of a node in the roster.
    pub fn index_of(&self, id: &str) -> Option<NodeIndex> {
        self.indices.get(id).copied()
    }

    /// The node at a place of the roster.
    pub fn member(&self, node: NodeIndex) -> Option<&Member> {
        self.parts.roster.get(usize::from(node.0))
    }

    /// The replica set of a slice; empty for a slice that does not exist.
    pub fn replicas(&self, slice: u16) -> &[NodeIndex] {
        self.parts.slices.get(usize::from(slice)).map_or(&[], |slice| &slice.replicas)
    }

    /// Whether a request keeps the limits of this epoch.
    pub fn admits(&self, request: &Request) -> Result<(), OverLimit> {
        let limits = &self.parts.limits;
        match &request.input {
            Input::Vector { values } => OverLimit::check("values", values.len(), limits.values_max),
            Input::Text { tokens, .. } | Input::Chat { tokens, .. } | Input::Tokens { tokens } => {
                // The last token generated takes no position.
                let generated = usize::try_from(request.params.max_tokens).unwrap_or(usize::MAX).saturating_sub(1);
                OverLimit::check("positions", tokens.len().saturating_add(generated), limits.positions_max)
            }
        }
    }

    /// Reads the JSON form.
    pub fn from_json(text: &str) -> Result<Self, JsonError> {
        text::from_json(text)
    }

    /// Writes the JSON form.
    pub fn to_json(&self) -> String {
        text::to_json(self)
    }

    pub(crate) fn key(&self, node: NodeIndex) -> Option<&VerifyingKey> {
        self.keys.get(usize::from(node.0))
    }

    pub(crate) fn rules(&self) -> Rules {
        self.rules
    }

    /// The same epoch with a planted bug.
    #[cfg(test)]
    pub(crate) fn with_rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }
}

impl std::ops::Deref for Epoch {
    type Target = EpochParts;

    fn deref(&self) -> &EpochParts {
        &self.parts
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Epoch").field("digest", &self.digest).field("parts", &self.parts).finish_non_exhaustive()
    }
}

impl Serialize for Epoch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.parts.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Epoch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(EpochParts::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

fn check_names(parts: &EpochParts) -> Result<(), EpochError> {
    let named = |field, name: &str| {
        if name.is_empty() || name.len() > NAME_BYTES_MAX { Err(EpochError::Name { field }) } else { Ok(()) }
    };
    named("cluster", &parts.cluster)?;
    named("model", &parts.model)?;
    named("profile", &parts.profile)?;
    for member in &parts.roster {
        named("roster.id", &member.id)?;
        named("roster.domain", member.domain.as_deref().unwrap_or("-"))?;
    }
    Ok(())
}

fn check_limits(limits: &Limits) -> Result<(), EpochError> {
    let within = |field, limit: u32, max: usize| {
        let fits = limit >= 1 && usize::try_from(limit).is_ok_and(|limit| limit <= max);
        if fits { Ok(()) } else { Err(EpochError::Limit { field, max }) }
    };
    within("positions_max", limits.positions_max, TOKENS_MAX)?;
    within("values_max", limits.values_max, VALUES_MAX)
}

fn check_roster(roster: &[Member]) -> Result<Vec<VerifyingKey>, EpochError> {
    if roster.is_empty() || roster.len() > MEMBERS_MAX {
        return Err(EpochError::Roster { found: roster.len() });
    }
    let mut ids = BTreeSet::new();
    let mut known = BTreeSet::new();
    let mut keys = Vec::with_capacity(roster.len());
    for member in roster {
        let id = || member.id.clone();
        if !ids.insert(&member.id) {
            return Err(EpochError::DuplicateId { id: id() });
        }
        if !known.insert(&member.public_key) {
            return Err(EpochError::DuplicateKey { id: id() });
        }
        let key = VerifyingKey::from_sec1_bytes(&member.public_key.0).map_err(|_| EpochError::Key { id: id() })?;
        keys.push(key);
    }
    Ok(keys)
}

fn check_slices(parts: &EpochParts) -> Result<(), EpochError> {
    if parts.slices.is_empty() || parts.slices.len() > SLICES_MAX {
        return Err(EpochError::Slices { found: parts.slices.len() });
    }
    let expected = usize::from(parts.max_byzantine).saturating_mul(2).saturating_add(1);
    let mut layer = 0;
    for (slice, given) in parts.slices.iter().enumerate() {
        if given.first_layer != layer || given.last_layer <= given.first_layer {
            return Err(EpochError::Layers { slice });
        }
        layer = given.last_layer;
        if given.replicas.len() != expected {
            return Err(EpochError::Replicas { slice, found: given.replicas.len(), expected });
        }
        let mut seen = BTreeSet::new();
        for node in &given.replicas {
            if usize::from(node.0) >= parts.roster.len() || !seen.insert(node) {
                return Err(EpochError::Replica { slice, node: *node });
            }
        }
    }
    Ok(())
}

fn write(parts: &EpochParts) -> Vec<u8> {
    let mut writer = Writer::with_capacity(1024);
    writer.bytes(parts.cluster.as_bytes());
    writer.u64(parts.number);
    writer.u16(parts.max_byzantine);
    writer.length(parts.roster.len());
    for member in &parts.roster {
        writer.bytes(member.id.as_bytes());
        writer.raw(&member.public_key.0);
        writer.flag(member.domain.is_some());
        if let Some(domain) = &member.domain {
            writer.bytes(domain.as_bytes());
        }
    }
    writer.bytes(parts.model.as_bytes());
    writer.digest(&parts.manifest);
    writer.bytes(parts.profile.as_bytes());
    writer.digest(&parts.profile_digest);
    writer.length(parts.slices.len());
    for slice in &parts.slices {
        writer.u32(slice.first_layer);
        writer.u32(slice.last_layer);
        writer.length(slice.replicas.len());
        for node in &slice.replicas {
            writer.u16(node.0);
        }
    }
    writer.u32(parts.limits.positions_max);
    writer.u32(parts.limits.values_max);
    writer.finish()
}

#[cfg(test)]
mod tests;
