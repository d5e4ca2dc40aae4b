//! Which kinds of stages exist: an explicit list of signatures and factories, and of the items on their ports.
//!
//! Kinds are data to the check (through [`Registry::catalogue`]) and functions to the wiring, from the same entry, so the
//! two cannot disagree. Items are registered by name with their type, which lets the wiring make typed channels from
//! names; a factory takes its ports back by type, and a wrong type is an error of building.
//!
//! Invariants: every port of a signature that has an edge must be taken by the factory, or building fails.
//!
//! It refuses to know any kind by name.

use std::any::{Any, TypeId, type_name};
use std::collections::BTreeMap;

use butterfly_topology::{Catalogue, KindSignature, NodeId, PortSpec, StageName, StageSpec, Topology};
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::channel::{EdgeParts, Item, Receiver, SendError, Sender, port};
use crate::stage::{Accountable, Cause, Fault, Stage, StageContext, StageError};
use crate::telemetry::StageStates;

/// The kinds and items that a graph may use. Faults of the registry itself are reported when a graph is compiled.
#[derive(Default)]
pub struct Registry {
    items: BTreeMap<&'static str, ItemType>,
    kinds: BTreeMap<&'static str, Kind>,
    items_twice: Vec<&'static str>,
    kinds_twice: Vec<&'static str>,
    not_one_to_one: Vec<&'static str>,
}

/// What a factory is given.
pub struct Build<'a> {
    /// The stage's table, checked.
    pub spec: &'a StageSpec,
    /// The node it will run on.
    pub node: &'a NodeId,
    /// Its ports, to be taken.
    pub ports: &'a mut Ports,
    /// The whole topology.
    pub topology: &'a Topology,
}

/// The ports of one stage, each to be taken once by its type.
pub struct Ports {
    stage: StageName,
    inputs: BTreeMap<&'static str, Slot>,
    outputs: BTreeMap<&'static str, Slot>,
}

/// Why a stage could not be built, or the graph not be wired.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The topology has no such node.
    #[error("node `{node}` is not in the topology")]
    UnknownNode {
        /// The node asked for.
        node: NodeId,
    },
    /// No such kind is registered.
    #[error("stage `{stage}`: no kind `{kind}` is registered")]
    UnknownKind {
        /// The stage.
        stage: StageName,
        /// Its kind.
        kind: String,
    },
    /// Two entries of the registry have the same kind.
    #[error("kind `{kind}` is registered twice")]
    KindTwice {
        /// The kind.
        kind: &'static str,
    },
    /// Two entries of the registry have the same item name.
    #[error("item `{item}` is registered twice")]
    ItemTwice {
        /// The item.
        item: &'static str,
    },
    /// A signature names an item that is not registered.
    #[error("kind `{kind}`, port `{port}`: no item `{item}` is registered")]
    UnknownItem {
        /// The kind.
        kind: &'static str,
        /// Its port.
        port: &'static str,
        /// The item.
        item: &'static str,
    },
    /// A kind made by [`Registry::map`] must have one input port and one output port.
    #[error("kind `{kind}` maps items to items, so it has one input and one output")]
    NotOneToOne {
        /// The kind.
        kind: &'static str,
    },
    /// The factory asked for a port that its signature does not have, or that it took already.
    #[error("stage `{stage}` has no {direction} port `{port}` left to take")]
    NoPort {
        /// The stage.
        stage: StageName,
        /// "input" or "output".
        direction: &'static str,
        /// The port.
        port: String,
    },
    /// The factory asked for a port with another type than the one registered for its item.
    #[error("stage `{stage}`, port `{port}`: carries `{item}`, which is not a `{asked}`")]
    PortType {
        /// The stage.
        stage: StageName,
        /// The port.
        port: String,
        /// The item's name.
        item: &'static str,
        /// The type asked for.
        asked: &'static str,
    },
    /// The factory left a port that has an edge.
    #[error("stage `{stage}` did not take its port `{port}`, which has an edge")]
    PortLeft {
        /// The stage.
        stage: StageName,
        /// The port.
        port: &'static str,
    },
    /// The kind talks to other nodes and there is no network.
    #[error("stage `{stage}` talks to other nodes, and there is no network to do it over")]
    NoNetwork {
        /// The stage.
        stage: StageName,
    },
    /// The network refused the stage a lane.
    #[error("stage `{stage}`: no lane to other nodes")]
    NoLane {
        /// The stage.
        stage: StageName,
        /// Why.
        #[source]
        source: Cause,
    },
    /// The stage itself could not be built.
    #[error("stage `{stage}`")]
    Stage {
        /// The stage.
        stage: StageName,
        /// Why.
        #[source]
        source: StageError,
    },
}

impl Registry {
    /// Nothing registered.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers the type of an item under the name that signatures use.
    #[must_use]
    pub fn item<T: Item>(mut self, name: &'static str) -> Self {
        let item = ItemType { id: TypeId::of::<T>(), make: make_port::<T> };
        if self.items.insert(name, item).is_some_and(|earlier| earlier.id != item.id) {
            self.items_twice.push(name);
        }
        self
    }

    /// Registers a kind with its factory.
    #[must_use]
    pub fn with<F>(mut self, signature: KindSignature, factory: F) -> Self
    where
        F: Fn(Build<'_>) -> Result<Box<dyn Stage>, BuildError> + Send + Sync + 'static,
    {
        let kind = signature.kind;
        if self.kinds.insert(kind, Kind { signature, factory: Box::new(factory) }).is_some() {
            self.kinds_twice.push(kind);
        }
        self
    }

    /// Registers a kind that maps each item to at most one item.
    ///
    /// `build` is called once for each stage and returns the mapping, an async function; `None` drops the item.
    #[must_use]
    pub fn map<A, B, F, R>(
        mut self,
        signature: KindSignature,
        build: impl Fn(&StageSpec) -> Result<F, StageError> + Send + Sync + 'static,
    ) -> Self
    where
        A: Item,
        B: Item,
        F: FnMut(A) -> R + Send + 'static,
        R: Future<Output = Option<B>> + Send + 'static,
    {
        let ([input], [output]) = (signature.inputs, signature.outputs) else {
            self.not_one_to_one.push(signature.kind);
            return self;
        };
        self.with(signature, move |given| {
            let mapping = build(given.spec).map_err(|error| given.failed(error))?;
            let input = given.ports.input::<A>(input.name)?;
            let output = given.ports.output::<B>(output.name)?;
            Ok(Box::new(Map { input, output, mapping }))
        })
    }

    /// The signatures of all kinds, for checking a topology.
    pub fn catalogue(&self) -> Catalogue {
        Catalogue::new(self.kinds.values().map(|kind| kind.signature.clone()).collect())
    }

    pub(crate) fn kind(&self, kind: &str) -> Option<&Kind> {
        self.kinds.get(kind)
    }

    pub(crate) fn item_type(&self, item: &str) -> Option<ItemType> {
        self.items.get(item).copied()
    }

    /// What is wrong with the registry itself, whatever the graph: names used twice, items that no one registered.
    pub fn faults(&self) -> Vec<BuildError> {
        let mut faults: Vec<BuildError> = self.kinds_twice.iter().map(|kind| BuildError::KindTwice { kind }).collect();
        faults.extend(self.items_twice.iter().map(|item| BuildError::ItemTwice { item }));
        faults.extend(self.not_one_to_one.iter().map(|kind| BuildError::NotOneToOne { kind }));
        for kind in self.kinds.values() {
            let signature = &kind.signature;
            let ports = signature.inputs.iter().chain(signature.outputs);
            let unknown = ports.filter(|port| !self.items.contains_key(port.item));
            faults.extend(unknown.map(|port| BuildError::UnknownItem {
                kind: signature.kind,
                port: port.name,
                item: port.item,
            }));
        }
        faults
    }
}

impl Build<'_> {
    /// The error of this stage not being buildable for a reason of its own.
    pub fn failed(&self, source: StageError) -> BuildError {
        BuildError::Stage { stage: self.spec.name.clone(), source }
    }

    /// The error of a key whose value cannot work.
    pub fn configuration(&self, key: &'static str, problem: impl Into<String>) -> BuildError {
        self.failed(StageError::configuration(key, problem))
    }
}

impl Ports {
    pub(crate) fn new(stage: StageName) -> Self {
        Self { stage, inputs: BTreeMap::new(), outputs: BTreeMap::new() }
    }

    pub(crate) fn add_input(&mut self, port: &PortSpec, receiver: AnyEnd, connected: bool) {
        self.inputs.insert(port.name, Slot { item: port.item, end: receiver, connected });
    }

    pub(crate) fn add_output(&mut self, port: &PortSpec, sender: AnyEnd, connected: bool) {
        self.outputs.insert(port.name, Slot { item: port.item, end: sender, connected });
    }

    /// Takes an input port. A port that no edge of this node enters is closed: it receives nothing and says so at once.
    pub fn input<T: Item>(&mut self, name: &str) -> Result<Receiver<T>, BuildError> {
        Self::take(&self.stage, "input", &mut self.inputs, name, type_name::<T>())
    }

    /// Takes an output port. A port whose edge does not end on this node is closed: sending on it fails as closed.
    pub fn output<T: Item>(&mut self, name: &str) -> Result<Sender<T>, BuildError> {
        Self::take(&self.stage, "output", &mut self.outputs, name, type_name::<T>())
    }

    /// Whether a port that is not yet taken has an edge on this node.
    pub fn is_connected(&self, name: &str) -> bool {
        [&self.inputs, &self.outputs].iter().any(|slots| slots.get(name).is_some_and(|slot| slot.connected))
    }

    /// The ports with an edge that were not taken.
    pub(crate) fn left(self) -> Vec<BuildError> {
        let slots = self.inputs.into_iter().chain(self.outputs);
        let left = slots.filter(|(_, slot)| slot.connected);
        left.map(|(port, _)| BuildError::PortLeft { stage: self.stage.clone(), port }).collect()
    }

    fn take<E: 'static>(
        stage: &StageName,
        direction: &'static str,
        slots: &mut BTreeMap<&'static str, Slot>,
        name: &str,
        asked: &'static str,
    ) -> Result<E, BuildError> {
        let Some((port, slot)) = slots.remove_entry(name) else {
            return Err(BuildError::NoPort { stage: stage.clone(), direction, port: name.to_owned() });
        };
        let item = slot.item;
        match slot.end.downcast::<E>() {
            Ok(end) => Ok(*end),
            Err(end) => {
                slots.insert(port, Slot { end, ..slot });
                Err(BuildError::PortType { stage: stage.clone(), port: name.to_owned(), item, asked })
            }
        }
    }
}

impl BuildError {
    /// The stage it is about, if it is about one.
    pub fn stage(&self) -> Option<&StageName> {
        match self {
            Self::UnknownKind { stage, .. }
            | Self::NoPort { stage, .. }
            | Self::PortType { stage, .. }
            | Self::PortLeft { stage, .. }
            | Self::NoNetwork { stage }
            | Self::NoLane { stage, .. }
            | Self::Stage { stage, .. } => Some(stage),
            Self::UnknownNode { .. }
            | Self::KindTwice { .. }
            | Self::ItemTwice { .. }
            | Self::UnknownItem { .. }
            | Self::NotOneToOne { .. } => None,
        }
    }
}

impl Accountable for BuildError {
    fn fault(&self) -> Fault {
        match self {
            Self::UnknownNode { .. } | Self::UnknownKind { .. } | Self::NoLane { .. } => Fault::Operator,
            Self::Stage { source, .. } => source.fault(),
            Self::KindTwice { .. }
            | Self::ItemTwice { .. }
            | Self::UnknownItem { .. }
            | Self::NotOneToOne { .. }
            | Self::NoPort { .. }
            | Self::PortType { .. }
            | Self::PortLeft { .. }
            | Self::NoNetwork { .. } => Fault::Program,
        }
    }

    fn node(&self) -> Option<&NodeId> {
        match self {
            Self::UnknownNode { node } => Some(node),
            Self::Stage { source, .. } => source.node(),
            _ => None,
        }
    }
}

/// A kind: what the check knows of it, and how it is built.
pub(crate) struct Kind {
    pub(crate) signature: KindSignature,
    pub(crate) factory: Factory,
}

type Factory = Box<dyn Fn(Build<'_>) -> Result<Box<dyn Stage>, BuildError> + Send + Sync>;

/// A `Sender<T>` or a `Receiver<T>` whose `T` only the registry of items and the stage know.
pub(crate) type AnyEnd = Box<dyn Any + Send>;

/// An item's type, as the wiring uses it.
#[derive(Clone, Copy)]
pub(crate) struct ItemType {
    id: TypeId,
    make: fn(Vec<EdgeParts>, StageStates) -> (Vec<AnyEnd>, AnyEnd),
}

impl ItemType {
    /// An input port for items of this type, with a sender for each edge that enters it.
    pub(crate) fn port(self, edges: Vec<EdgeParts>, consumer: StageStates) -> (Vec<AnyEnd>, AnyEnd) {
        (self.make)(edges, consumer)
    }
}

fn make_port<T: Item>(edges: Vec<EdgeParts>, consumer: StageStates) -> (Vec<AnyEnd>, AnyEnd) {
    let (senders, receiver) = port::<T>(edges, consumer);
    (senders.into_iter().map(|sender| Box::new(sender) as AnyEnd).collect(), Box::new(receiver))
}

/// A port that is not yet taken.
struct Slot {
    item: &'static str,
    end: AnyEnd,
    /// Whether an edge of this node is behind it.
    connected: bool,
}

/// The stage that [`Registry::map`] makes.
struct Map<A, B, F> {
    input: Receiver<A>,
    output: Sender<B>,
    mapping: F,
}

impl<A, B, F, R> Stage for Map<A, B, F>
where
    A: Item,
    B: Item,
    F: FnMut(A) -> R + Send + 'static,
    R: Future<Output = Option<B>> + Send + 'static,
{
    fn run(mut self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            context.ready();
            loop {
                let item = tokio::select! {
                    biased;
                    () = context.shutdown.completing() => return Ok(()),
                    item = self.input.recv() => item,
                };
                let Some(item) = item else { return Ok(()) };
                let Some(mapped) = (self.mapping)(item).await else { continue };
                let sent = tokio::select! {
                    biased;
                    sent = self.output.send(mapped) => sent,
                    () = context.shutdown.completing() => return Ok(()),
                };
                match sent {
                    // An edge that rejects when full drops what has no room.
                    Ok(()) | Err(SendError::Full(_)) => {}
                    Err(SendError::Closed(_)) => return Ok(()),
                    Err(error @ SendError::TooLarge { .. }) => {
                        return Err(StageError::unsendable(&self.output, &error));
                    }
                }
            }
        }
        .boxed()
    }
}
