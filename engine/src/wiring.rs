//! From a checked graph and a node to stages that are built and not yet running.
//!
//! A stage that does not run on the node is left out; the ports its edges would have joined are closed. Several edges may
//! enter one input port. All errors are found before anything runs, and reported together.
//!
//! Invariants: only a checked [`Topology`] is wired; compiling starts no task.
//!
//! It refuses to know kinds: it matches on nothing but what signatures say.

use std::collections::BTreeMap;
use std::sync::Arc;

use butterfly_topology::{EdgeSpec, NodeId, PortRef, PortSpec, StageName, StageSpec, Topology, WhenFull};

use crate::channel::{Bounds, EdgeParts};
use crate::clock::Clock;
use crate::registry::{AnyEnd, Build, BuildError, Kind, Ports, Registry};
use crate::running::Running;
use crate::stage::Stage;
use crate::telemetry::{EdgeLabel, EdgeMeters, StageStates, Telemetry};
use crate::transport::{Mesh, PeerPort};

/// Frames that wait for a networked stage, from each peer, if its table does not say (`peer_capacity`).
pub const PEER_ITEMS_DEFAULT: usize = 256;

/// Bytes that wait for a networked stage, from each peer, if its table does not say (`peer_capacity_bytes`).
pub const PEER_BYTES_DEFAULT: usize = 64 << 20;

/// The compiler of graphs.
#[derive(Debug)]
pub struct Wiring;

/// Stages that are built and wired, and not yet running.
pub struct Unspawned {
    pub(crate) node: NodeId,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) telemetry: Arc<Telemetry>,
    /// Upstream first.
    pub(crate) stages: Vec<UnspawnedStage>,
}

/// One stage with what it will be given.
pub(crate) struct UnspawnedStage {
    pub(crate) name: StageName,
    pub(crate) stage: Box<dyn Stage>,
    pub(crate) states: StageStates,
    pub(crate) peers: Option<PeerPort>,
}

impl Wiring {
    /// Builds every stage of `topology` that runs on `node` and wires them.
    ///
    /// `clock` is the time the stages see. Give the telemetry the same one.
    ///
    /// # Errors
    /// All of them at once.
    pub fn compile(
        topology: &Topology,
        node: &NodeId,
        registry: &Registry,
        telemetry: Arc<Telemetry>,
        mesh: Option<Mesh>,
        clock: Arc<dyn Clock>,
    ) -> Result<Unspawned, Vec<BuildError>> {
        let mut errors = registry.faults();
        if topology.cluster.node(node).is_none() {
            errors.push(BuildError::UnknownNode { node: node.clone() });
        }
        let running = topology.graph.running_on(node, &registry.catalogue());
        let specs = topology.graph.stages.iter().filter(|spec| running.contains(&spec.name));
        let mut parts = Vec::new();
        for spec in specs {
            match registry.kind(&spec.kind) {
                Some(kind) => parts.push(Part { spec, kind, states: telemetry.open_stage(&spec.name) }),
                None => {
                    let (stage, kind) = (spec.name.clone(), spec.kind.clone());
                    errors.push(BuildError::UnknownKind { stage, kind });
                }
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let mut assembly = Assembly { topology, node, registry, telemetry: &telemetry, mesh, parts: &parts, errors };
        let ports = assembly.ports();
        let stages = assembly.stages(ports);
        if assembly.errors.is_empty() {
            Ok(Unspawned { node: node.clone(), clock, telemetry, stages })
        } else {
            Err(assembly.errors)
        }
    }
}

impl Unspawned {
    /// The names of the stages, upstream first.
    pub fn stages(&self) -> impl Iterator<Item = &StageName> {
        self.stages.iter().map(|stage| &stage.name)
    }

    /// Starts every stage, the most downstream one first. Needs a tokio runtime.
    pub fn start(self) -> Running {
        Running::start(self)
    }
}

/// A stage of this node that is being built.
struct Part<'a> {
    spec: &'a StageSpec,
    kind: &'a Kind,
    states: StageStates,
}

struct Assembly<'a> {
    topology: &'a Topology,
    node: &'a NodeId,
    registry: &'a Registry,
    telemetry: &'a Telemetry,
    mesh: Option<Mesh>,
    parts: &'a [Part<'a>],
    errors: Vec<BuildError>,
}

impl<'a> Assembly<'a> {
    /// Makes the ports of every part, in the order of the parts.
    fn ports(&mut self) -> Vec<Ports> {
        let mut senders: BTreeMap<PortRef, AnyEnd> = BTreeMap::new();
        let mut all = Vec::with_capacity(self.parts.len());
        for part in self.parts {
            let mut ports = Ports::new(part.spec.name.clone());
            for port in part.kind.signature.inputs {
                let edges = self.edges_into(&part.spec.name, port);
                let parts = edges.iter().map(|(edge, producer)| self.edge_parts(edge, producer)).collect();
                let Some((ends, receiver)) = self.make(part, port, parts) else { continue };
                ports.add_input(port, receiver, !edges.is_empty());
                senders.extend(edges.iter().map(|(edge, _)| edge.from.clone()).zip(ends));
            }
            all.push(ports);
        }
        for (part, ports) in self.parts.iter().zip(&mut all) {
            for port in part.kind.signature.outputs {
                let from = PortRef { stage: part.spec.name.clone(), port: port.name };
                match senders.remove(&from) {
                    Some(sender) => ports.add_output(port, sender, true),
                    None => {
                        if let Some(sender) = self.closed_output(part, port, &from) {
                            ports.add_output(port, sender, false);
                        }
                    }
                }
            }
        }
        all
    }

    /// Builds every part with its ports.
    fn stages(&mut self, ports: Vec<Ports>) -> Vec<UnspawnedStage> {
        let mut stages = Vec::with_capacity(self.parts.len());
        for (part, mut ports) in self.parts.iter().zip(ports) {
            let peers = self.lane(part);
            let build = Build { spec: part.spec, node: self.node, ports: &mut ports, topology: self.topology };
            match (part.kind.factory)(build) {
                Ok(stage) => {
                    let (name, states) = (part.spec.name.clone(), part.states.clone());
                    stages.push(UnspawnedStage { name, stage, states, peers });
                    self.errors.extend(ports.left());
                }
                Err(error) => self.errors.push(error),
            }
        }
        stages
    }

    /// The edges into a port that begin on this node, each with the account of the stage it comes from.
    fn edges_into(&self, stage: &StageName, port: &PortSpec) -> Vec<(&'a EdgeSpec, StageStates)> {
        let edges = self.topology.graph.edges.iter();
        let into = edges.filter(|edge| edge.to.stage == *stage && edge.to.port == port.name);
        into.filter_map(|edge| {
            let producer = self.parts.iter().find(|part| part.spec.name == edge.from.stage)?;
            Some((edge, producer.states.clone()))
        })
        .collect()
    }

    fn edge_parts(&self, edge: &EdgeSpec, producer: &StageStates) -> EdgeParts {
        let bounds = Bounds { items: edge.capacity_items, bytes: edge.capacity_bytes };
        let label = EdgeLabel::new(edge.from.to_string(), edge.to.to_string());
        EdgeParts {
            bounds,
            full: edge.full,
            meters: self.telemetry.open_edge(label, bounds),
            producer: producer.clone(),
        }
    }

    fn make(&mut self, part: &Part<'_>, port: &PortSpec, edges: Vec<EdgeParts>) -> Option<(Vec<AnyEnd>, AnyEnd)> {
        let Some(item) = self.registry.item_type(port.item) else {
            let (kind, port, item) = (part.kind.signature.kind, port.name, port.item);
            self.errors.push(BuildError::UnknownItem { kind, port, item });
            return None;
        };
        Some(item.port(edges, part.states.clone()))
    }

    /// A sender whose receiver is gone, for an output that leads nowhere on this node. It is not counted.
    fn closed_output(&mut self, part: &Part<'_>, port: &PortSpec, from: &PortRef) -> Option<AnyEnd> {
        let bounds = Bounds { items: 1, bytes: 0 };
        let meters = Arc::new(EdgeMeters::new(EdgeLabel::new(from.to_string(), "nowhere"), bounds.items, bounds.bytes));
        let edge = EdgeParts { bounds, full: WhenFull::Wait, meters, producer: part.states.clone() };
        let (senders, _receiver) = self.make(part, port, vec![edge])?;
        senders.into_iter().next()
    }

    /// The port of a networked stage to its counterparts.
    fn lane(&mut self, part: &Part<'_>) -> Option<PeerPort> {
        if !part.kind.signature.networked {
            return None;
        }
        let stage = part.spec.name.clone();
        let Some(mesh) = &self.mesh else {
            self.errors.push(BuildError::NoNetwork { stage });
            return None;
        };
        let config = &part.spec.config;
        let items = config.integer("peer_capacity").and_then(|items| usize::try_from(items).ok());
        let bytes = config.bytes("peer_capacity_bytes").and_then(|bytes| usize::try_from(bytes).ok());
        let bounds = Bounds { items: items.unwrap_or(PEER_ITEMS_DEFAULT), bytes: bytes.unwrap_or(PEER_BYTES_DEFAULT) };
        match mesh.port(stage.clone(), bounds) {
            Ok(port) => Some(port.accounted(part.states.clone())),
            Err(source) => {
                self.errors.push(BuildError::NoLane { stage, source: Box::new(source) });
                None
            }
        }
    }
}
