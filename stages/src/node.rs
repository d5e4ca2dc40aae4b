//! Assembles a node from a checked topology: model, plan, epoch, links, journal, and the stages wired over them.
//!
//! Everything that could be wrong is found here, before the first request: a key that is not the topology's, a model that
//! does not load, a plan that does not exist, a log that is locked. What runs afterwards is the engine's `Running`.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use butterfly_engine::clock::{Clock, RealClock};
use butterfly_engine::registry::{BuildError, Registry};
use butterfly_engine::running::{RunError, Running};
use butterfly_engine::telemetry::{ReportForm, Telemetry};
use butterfly_engine::transport::{
    LinkIdentity, LocalHub, Mesh, NetworkError, PeerState, QuicConfig, Roster, RosterMember,
};
use butterfly_engine::wiring::Wiring;
use butterfly_topology::plan::{LayerCost, Plan, Strategy};
use butterfly_topology::{CollectorType, NodeId, NodeSpec, Topology, planner};
use butterfly_verify::{Digest, Epoch, EpochError, EpochParts, Limits, Member, NodeIndex, PublicKey, SliceReplicas};
use k256::ecdsa::SigningKey;
use tokio_util::task::AbortOnDropHandle;

use crate::admin::{Admin, AdminError, Serving};
use crate::commit::{Journal, JournalError, TaskKind};
use crate::error::PartitionError;
use crate::ingest::{Board, Room};
use crate::model::{Model, ModelError, PackedWeights};
use crate::partition::{PlanKey, Planner, Question, nodes_digest};
use crate::registry::registry;
use crate::services::Services;
use crate::standing::{SET_ASIDE_FILE, SetAside, SetAsideError, Standing};

#[cfg(feature = "adversary")]
use crate::adversary::Behaviour;

/// Pieces of evidence of the log that are taken up at a start, at most.
const EVIDENCE_READ_MAX: usize = 65_536;

/// What a node is started with.
pub struct NodeOptions {
    /// The checked topology.
    pub topology: Arc<Topology>,
    /// Which of its nodes this is.
    pub node: NodeId,
    /// The node's secret identity.
    pub identity: SigningKey,
    /// Where the node keeps its log.
    pub data_dir: PathBuf,
    /// Where relative paths of the topology file begin.
    pub base_dir: PathBuf,
    /// A socket bound already; else the node binds its `listen_address`.
    pub socket: Option<UdpSocket>,
    /// Where nodes of this process meet if the topology says `backend_type = "local"`.
    pub hub: Option<LocalHub>,
    /// Kinds beside the seven, for topologies that name them.
    pub extension: Option<Extension>,
}

/// Adds kinds of stages to a node's registry. The topology must have been checked against a catalogue that has them too.
pub type Extension = Arc<dyn Fn(Registry, &Services) -> Registry + Send + Sync>;

/// A running node.
pub struct Node {
    running: Running,
    services: Services,
    mesh: Mesh,
    admin: Option<Serving>,
    /// Writes reports where nobody scrapes; ends with the node.
    _reports: AbortOnDropHandle<()>,
}

/// Why a node cannot start, or did not stop well.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The topology does not pass the check.
    #[error("{0}")]
    Topology(String),
    /// The topology has no such node.
    #[error("the topology has no node '{node}'; it has {known}")]
    UnknownNode {
        /// The node asked for.
        node: NodeId,
        /// Those there are.
        known: String,
    },
    /// The key is not the one the topology names.
    #[error(
        "the key of '{node}' is {found}, but the topology says {expected}; correct `public_key`, or use the right key file"
    )]
    WrongKey {
        /// The node.
        node: NodeId,
        /// Public key of the secret given.
        found: String,
        /// Public key in the topology.
        expected: String,
    },
    /// The consensus stage is told something that cannot be kept.
    #[error(
        "stage consensus: verify = \"none\" takes one node's word, but max_byzantine is {0}; use \"full\", or set max_byzantine = 0"
    )]
    Unverified(usize),
    /// Links within a process, and only one node in it.
    #[error(
        "stage transfer: backend_type = \"local\" joins nodes of one process; serve all nodes together, without --node, or use \"quic\""
    )]
    LocalAlone,
    /// A liar in a build without liars.
    #[error(
        "node '{0}' has `adversary` set, and this build has no adversary in it; remove the key, or build with --features adversary"
    )]
    NoAdversary(NodeId),
    /// A socket could not be bound.
    #[error("no port could be bound: {0}")]
    Bind(std::io::Error),
    /// The data directory cannot be used.
    #[error("the data directory {path} cannot be used: {source}")]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The model cannot be opened or loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// There is no plan.
    #[error(transparent)]
    Plan(#[from] PartitionError),
    /// The cluster is no epoch.
    #[error("the cluster makes no epoch: {0}")]
    Epoch(#[from] EpochError),
    /// The log cannot be opened.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// What the operator has set aside cannot be read.
    #[error(transparent)]
    SetAside(#[from] SetAsideError),
    /// The links cannot be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The stages cannot be built.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Build(Vec<BuildError>),
    /// The signing key does not fit the epoch.
    #[error("the identity key does not sign for this epoch: {0}")]
    Signer(#[from] butterfly_verify::SignError),
    /// There is no admin listener although there should be one.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// A stage failed, or did not stop.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// What follows from a topology and its model alone, the same on every node.
pub struct Foundation {
    /// The model, opened.
    pub model: Arc<Model>,
    /// What the planners are asked.
    pub question: Arc<Question>,
    /// The planners, with this plan cached.
    pub planner: Arc<Planner>,
    /// The plan.
    pub plan: Arc<Plan>,
    /// The epoch.
    pub epoch: Arc<Epoch>,
}

impl Foundation {
    /// Opens the model, plans it over the roster and fixes the epoch. Reads files; does not pack weights.
    ///
    /// # Errors
    /// When the model cannot be opened or no plan exists.
    pub fn new(topology: &Topology, base_dir: &Path) -> Result<Self, NodeError> {
        let model = Model::open(&topology.cluster.model, base_dir)?;
        let partition = topology.graph.of_kind("partition").next();
        let strategy = partition
            .and_then(|stage| stage.config.text("default_strategy"))
            .and_then(Strategy::parse)
            .unwrap_or(Strategy::TopologyAware);
        let cache_size = partition.and_then(|stage| stage.config.integer("cache_size")).unwrap_or(100);
        let question = Arc::new(question(topology, &model, strategy));
        let planner = Arc::new(Planner::new(usize::try_from(cache_size).unwrap_or(1)));
        let plan = planner.plan(&question.key, || question.input())?;
        let epoch = Arc::new(epoch(topology, &model, &plan)?);
        Ok(Self { model, question, planner, plan, epoch })
    }
}

fn question(topology: &Topology, model: &Model, strategy: Strategy) -> Question {
    let manifest = model.manifest();
    let layers = manifest
        .layer_costs
        .iter()
        .map(|cost| LayerCost {
            weight_bytes: cost.weight_bytes,
            kv_bytes_per_position: cost.kv_bytes_per_position,
            work: cost.work,
            boundary_bytes: cost.boundary_bytes,
        })
        .collect();
    let nodes = topology.cluster.nodes.clone();
    let key = PlanKey { model: manifest.root, strategy, nodes: nodes_digest(&nodes) };
    Question {
        layers,
        nodes,
        max_byzantine: topology.cluster.max_byzantine,
        slices: topology.cluster.slices,
        positions_max: manifest.context_length as u64,
        key,
    }
}

fn epoch(topology: &Topology, model: &Model, plan: &Plan) -> Result<Epoch, EpochError> {
    let manifest = model.manifest();
    let cluster = &topology.cluster;
    let index: BTreeMap<&NodeId, NodeIndex> =
        cluster.nodes.iter().zip(0..).map(|(node, index)| (&node.id, NodeIndex(index))).collect();
    Epoch::new(EpochParts {
        cluster: cluster.name.clone(),
        number: 1,
        max_byzantine: cluster.max_byzantine as u16,
        roster: cluster
            .nodes
            .iter()
            .map(|node| Member {
                id: node.id.to_string(),
                public_key: PublicKey(node.public_key),
                domain: node.domain.clone(),
            })
            .collect(),
        model: manifest.name.clone(),
        manifest: Digest(manifest.root),
        profile: butterfly_kernels::PROFILE.into(),
        profile_digest: Digest(butterfly_kernels::profile_digest()),
        slices: plan
            .slices
            .iter()
            .map(|slice| SliceReplicas {
                first_layer: slice.layers.start as u32,
                last_layer: slice.layers.end as u32,
                replicas: slice.replicas.iter().filter_map(|node| index.get(node).copied()).collect(),
            })
            .collect(),
        limits: Limits::default(),
    })
}

impl Node {
    /// Starts a node; it is ready when [`Node::ready`] says so.
    ///
    /// # Errors
    /// Everything that can be known to be wrong before the first request.
    pub async fn start(options: NodeOptions) -> Result<Self, NodeError> {
        let NodeOptions { topology, node, identity, data_dir, base_dir, socket, hub, extension } = options;
        check(&topology, &node, &identity)?;
        let foundation = {
            let (topology, base_dir) = (Arc::clone(&topology), base_dir.clone());
            tokio::task::spawn_blocking(move || Foundation::new(&topology, &base_dir))
                .await
                .map_err(|error| NodeError::Topology(format!("opening the model failed: {error}")))??
        };
        let clock: Arc<dyn Clock> = Arc::new(RealClock::new());
        let telemetry = Arc::new(Telemetry::with_clock(node.clone(), Arc::clone(&clock)));
        declare(&telemetry, &topology, &foundation);
        let admin = match topology.cluster.node(&node).and_then(|spec| spec.admin_address) {
            Some(address) => Some(Admin::bind(address, base_dir.join(&topology.telemetry.admin_token_file)).await?),
            None => None,
        };
        std::fs::create_dir_all(&data_dir).map_err(|source| NodeError::DataDir { path: data_dir.clone(), source })?;
        foundation.model.keep_packed(PackedWeights::new(data_dir.join("packed")));
        let journal = Journal::open(&data_dir.join(log_name(&topology)))?;
        journal.claim(&format!("{}/{node}", topology.cluster.name))?;
        let board =
            Arc::new(Board::new(Arc::clone(&journal), Arc::clone(&telemetry), Arc::clone(&clock), Room::of(&topology)));
        let epoch = Arc::clone(&foundation.epoch);
        let since = journal.restore(&epoch)?;
        tracing::info!(%node, receipts = journal.covered() + since, since_checkpoint = since, "the log is restored");
        let set_aside = SetAside::read(&data_dir.join(SET_ASIDE_FILE))?;
        let standing = Arc::new(Standing::new(&journal.kept_evidence(EVIDENCE_READ_MAX)?, &epoch, &set_aside));
        let index = epoch.index_of(node.as_ref()).ok_or_else(|| unknown(&topology, &node))?;
        let signer = Arc::new(butterfly_verify::Signer::new(identity.clone(), index, &epoch)?);
        let roster = roster(&topology, &epoch);
        let link_identity = LinkIdentity::new(node.clone(), identity);
        let mesh = if is_local(&topology) {
            let hub = hub.ok_or(NodeError::LocalAlone)?;
            Mesh::local(&hub, link_identity, roster, Arc::clone(&telemetry), Arc::clone(&clock))?
        } else {
            let config = QuicConfig { socket, ..QuicConfig::new(link_identity, roster) };
            Mesh::quic(config, Arc::clone(&telemetry), Arc::clone(&clock))?
        };
        let services = Services {
            node: node.clone(),
            index,
            topology: Arc::clone(&topology),
            epoch,
            plan: Arc::clone(&foundation.plan),
            model: Arc::clone(&foundation.model),
            signer,
            board,
            journal,
            telemetry: Arc::clone(&telemetry),
            clock: Arc::clone(&clock),
            peers: mesh.peers(),
            standing,
            base_dir,
            #[cfg(feature = "adversary")]
            behaviour: behaviour(&topology, &node)?,
        };
        let registry = registry(&services, &foundation.question, &foundation.planner);
        let registry = match extension {
            Some(extend) => extend(registry, &services),
            None => registry,
        };
        let unspawned = Wiring::compile(&topology, &node, &registry, telemetry, Some(mesh.clone()), clock)
            .map_err(NodeError::Build)?;
        let running = unspawned.start();
        let shutdown = running.controller().shutdown();
        let admin = admin.map(|admin| admin.serve(services.clone(), running.readiness().clone(), shutdown));
        let _reports = AbortOnDropHandle::new(tokio::spawn(report(services.clone())));
        Ok(Self { running, services, mesh, admin, _reports })
    }

    /// Resolves when every stage is ready.
    ///
    /// # Errors
    /// When a stage failed before.
    pub async fn ready(&self) -> Result<(), NodeError> {
        Ok(self.running.ready().await?)
    }

    /// Resolves when every other node of the cluster is up.
    pub async fn meshed(&self) {
        let mut peers = self.services.peers.clone();
        let others = self.services.topology.cluster.nodes.len() - 1;
        let _ = peers
            .wait_for(|peers| peers.values().filter(|peer| matches!(peer, PeerState::Up { .. })).count() >= others)
            .await;
    }

    /// The node's shared things.
    #[must_use]
    pub fn services(&self) -> &Services {
        &self.services
    }

    /// Where the node takes requests, if it is a gateway and its listener is bound.
    #[must_use]
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.services.board.http_address()
    }

    /// Where the node's operator watches it, if the topology gives it an admin listener.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.as_ref().map(Serving::address)
    }

    /// Resolves when a stage has failed and the node drains by itself.
    pub async fn failed(&self) -> RunError {
        self.running.failed().await
    }

    /// Drains, completes, and then forces, within 30 s in all.
    ///
    /// # Errors
    /// What failed before or during it.
    pub async fn shutdown(self) -> Result<(), NodeError> {
        let stopped = self.running.shutdown().await;
        self.mesh.shutdown().await;
        Ok(stopped?)
    }
}

/// Starts at zero whatever can be counted of this cluster, on every node.
fn declare(telemetry: &Telemetry, topology: &Topology, foundation: &Foundation) {
    let metrics = telemetry.metrics();
    metrics.declare_model(&foundation.model.manifest().name, &TaskKind::LABELS);
    topology.cluster.nodes.iter().for_each(|node| metrics.declare_member(&node.id));
    let forecast =
        planner::forecast(&foundation.plan, &foundation.question.input(), planner::REFERENCE_WORK_PER_SECOND);
    metrics.partition_quality_ratio.set(forecast.quality);
}

/// Writes what there is to tell to standard output, as often as the topology says, where it wants that; for ever.
async fn report(services: Services) {
    let spec = &services.topology.telemetry;
    let form = match spec.collector_type {
        CollectorType::Prometheus => return,
        CollectorType::Console => ReportForm::Console,
        CollectorType::Json => ReportForm::Json,
    };
    loop {
        services.clock.sleep(spec.export_interval).await;
        let text = services.telemetry.report(form);
        // Whoever reads may be slow; that holds up a thread for such things, and the next report.
        let write = move || std::io::Write::write_all(&mut std::io::stdout().lock(), text.as_bytes());
        if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
            tracing::warn!(node = %services.node, %error, "no reports any more: standard output cannot be written");
            return;
        }
    }
}

fn check(topology: &Topology, node: &NodeId, identity: &SigningKey) -> Result<(), NodeError> {
    let spec = topology.cluster.node(node).ok_or_else(|| unknown(topology, node))?;
    let public = identity.verifying_key().to_sec1_point(true);
    if public.as_bytes() != spec.public_key {
        return Err(NodeError::WrongKey {
            node: node.clone(),
            found: hex::encode(public.as_bytes()),
            expected: hex::encode(spec.public_key),
        });
    }
    if !cfg!(feature = "adversary") && spec.adversary.is_some() {
        return Err(NodeError::NoAdversary(node.clone()));
    }
    let max_byzantine = topology.cluster.max_byzantine;
    let takes_one_word = |stage: &butterfly_topology::StageSpec| stage.config.text("verify") == Some("none");
    if max_byzantine > 0 && topology.graph.of_kind("consensus").any(takes_one_word) {
        return Err(NodeError::Unverified(max_byzantine));
    }
    Ok(())
}

fn unknown(topology: &Topology, node: &NodeId) -> NodeError {
    let known: Vec<&str> = topology.cluster.nodes.iter().map(|node| node.id.as_ref()).collect();
    NodeError::UnknownNode { node: node.clone(), known: known.join(", ") }
}

#[cfg(feature = "adversary")]
fn behaviour(topology: &Topology, node: &NodeId) -> Result<Option<Behaviour>, NodeError> {
    let named = topology.cluster.node(node).and_then(|spec| spec.adversary.as_deref());
    named
        .map(str::parse)
        .transpose()
        .map_err(|error: crate::adversary::UnknownBehaviour| NodeError::Topology(error.to_string()))
}

fn log_name(topology: &Topology) -> String {
    let commit = topology.graph.of_kind("commit").next();
    commit.and_then(|stage| stage.config.text("log")).unwrap_or("commit.redb").to_owned()
}

fn is_local(topology: &Topology) -> bool {
    topology.graph.of_kind("transfer").any(|stage| stage.config.text("backend_type") == Some("local"))
}

fn roster(topology: &Topology, epoch: &Epoch) -> Roster {
    let nodes = topology.cluster.nodes.iter();
    let member = |node: &NodeSpec| RosterMember { public_key: node.public_key, address: node.listen_address };
    Roster { epoch_digest: epoch.digest().0, members: nodes.map(|node| (node.id.clone(), member(node))).collect() }
}
