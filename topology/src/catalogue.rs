//! The catalogue: the signature of every stage kind, as data.
//!
//! The crate that implements the kinds hands the catalogue over, and the check works from it alone: which ports a kind
//! has, what flows on them, which keys it takes and within which bounds. A signature says nothing about behaviour.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::value;

/// What the check knows of a stage kind.
#[derive(Clone, Debug)]
pub struct KindSignature {
    /// The kind as written in the file: `kind = "compute"`.
    pub kind: &'static str,
    /// One sentence for help texts.
    pub doc: &'static str,
    /// Ports that items enter by. Several edges may enter one port.
    pub inputs: &'static [PortSpec],
    /// Ports that items leave by. Each feeds exactly one edge. `required` here means the port must feed one.
    pub outputs: &'static [PortSpec],
    /// Keys beside the common ones ([`COMMON_KEYS`]).
    pub keys: &'static [KeySpec],
    /// Whether the stage talks to its counterparts on other nodes, and so runs where none of its inputs does.
    pub networked: bool,
    /// What the stage may do when an edge it sends on is full. The first is the default; empty means [`WhenFull::Wait`].
    pub full: &'static [WhenFull],
}

impl KindSignature {
    /// The input port of this name.
    #[must_use]
    pub fn input(&self, name: &str) -> Option<&'static PortSpec> {
        self.inputs.iter().find(|port| port.name == name)
    }

    /// The output port of this name.
    #[must_use]
    pub fn output(&self, name: &str) -> Option<&'static PortSpec> {
        self.outputs.iter().find(|port| port.name == name)
    }

    /// The key of this name, common keys excepted.
    #[must_use]
    pub fn key(&self, name: &str) -> Option<&'static KeySpec> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// What the stage does when an edge is full and the file does not say.
    #[must_use]
    pub fn full_default(&self) -> WhenFull {
        self.full.first().copied().unwrap_or(WhenFull::Wait)
    }
}

/// A typed end of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// Name within the stage, as in `compute.boundary`.
    pub name: &'static str,
    /// Name of the item type. An edge joins ports of the same item.
    pub item: &'static str,
    /// Whether the graph is wrong without an edge here.
    pub required: bool,
}

/// A key of a stage table.
#[derive(Clone, Copy, Debug)]
pub struct KeySpec {
    /// The key as written in the file.
    pub name: &'static str,
    /// One sentence for help texts.
    pub doc: &'static str,
    /// What it may be set to.
    pub value: ValueSpec,
    /// The value when the key is absent, as it would be written (without quotes).
    pub default: Option<&'static str>,
    /// Whether the key must be there. A key with a default is never missing.
    pub required: bool,
}

/// What a key may be set to. All bounds are inclusive.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ValueSpec {
    /// Any text.
    Text,
    /// A path, relative to what the stage says.
    Path,
    /// An IP address and a port: `127.0.0.1:9000`.
    SocketAddress,
    /// A whole number.
    Integer {
        /// Least value.
        min: i64,
        /// Greatest value.
        max: i64,
    },
    /// A number.
    Number {
        /// Least value.
        min: f64,
        /// Greatest value.
        max: f64,
    },
    /// `true` or `false`.
    Flag,
    /// One of a closed list of words.
    Choice(&'static [&'static str]),
    /// A number of bytes, as an integer or as text with a unit: `"4 GiB"`.
    Bytes {
        /// Fewest bytes.
        min: u64,
        /// Most bytes.
        max: u64,
    },
}

/// What a sender does when an edge is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenFull {
    /// Waits for room: backpressure.
    Wait,
    /// Refuses the item at once and tells its client.
    Reject,
}

impl WhenFull {
    /// The word of the file.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            WhenFull::Wait => "wait",
            WhenFull::Reject => "reject",
        }
    }
}

/// Keys that every stage takes, with a sentence each.
pub const COMMON_KEYS: &[(&str, &str)] = &[
    ("kind", "which of the stage kinds this is"),
    ("name", "name of the stage within the graph; the kind when absent"),
    ("input", "where its items come from: a stage, `stage.port`, or a list of these"),
    ("on", "ids of the nodes that run it; all when absent"),
    ("capacity", "bound of each edge it sends on, in items"),
    ("capacity_bytes", "bound of each edge it sends on, in bytes"),
    ("full", "what it does when such an edge is full"),
];

/// The kinds that a topology may use.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    kinds: BTreeMap<&'static str, KindSignature>,
}

impl Catalogue {
    /// A catalogue of these kinds. Of two signatures with the same kind the later one counts.
    #[must_use]
    pub fn new(kinds: Vec<KindSignature>) -> Self {
        Self { kinds: kinds.into_iter().map(|signature| (signature.kind, signature)).collect() }
    }

    /// The signature of a kind.
    #[must_use]
    pub fn kind(&self, kind: &str) -> Option<&KindSignature> {
        self.kinds.get(kind)
    }

    /// All signatures, by name.
    pub fn kinds(&self) -> impl Iterator<Item = &KindSignature> {
        self.kinds.values()
    }

    /// What is wrong with the signatures themselves, for a test of the crate that wrote them: a key that shadows a
    /// common one, a default outside its own bounds, two ports or keys of one name. Empty when all is well.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for signature in self.kinds() {
            let kind = signature.kind;
            for (index, key) in signature.keys.iter().enumerate() {
                if COMMON_KEYS.iter().any(|(common, _)| *common == key.name) {
                    faults.push(format!("{kind}: key `{}` shadows a common key", key.name));
                }
                if signature.keys.iter().take(index).any(|earlier| earlier.name == key.name) {
                    faults.push(format!("{kind}: key `{}` is listed twice", key.name));
                }
                if key.default.is_some_and(|text| value::default_value(&key.value, text).is_none()) {
                    faults.push(format!("{kind}: the default of `{}` is not a value it may take", key.name));
                }
            }
            for ports in [signature.inputs, signature.outputs] {
                for (index, port) in ports.iter().enumerate() {
                    if ports.iter().take(index).any(|earlier| earlier.name == port.name) {
                        faults.push(format!("{kind}: port `{}` is listed twice", port.name));
                    }
                }
            }
        }
        faults
    }
}
