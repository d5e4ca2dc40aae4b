//! The seven kinds: their signatures as data for the topology check, and their factories for the engine.
//!
//! The list is closed and explicit. A program that adds its own kind calls [`registry`] and then
//! `Registry::with`; one test proves that catalogue and registry name the same kinds.

use std::sync::Arc;

use butterfly_engine::registry::{Build, BuildError, Registry};
use butterfly_engine::stage::Stage;
use butterfly_topology::StageConfig;
use butterfly_topology::catalogue::{Catalogue, KeySpec, KindSignature, PortSpec, ValueSpec, WhenFull};

use crate::assign::{AssignStage, Policy};
use crate::commit::CommitStage;
use crate::compute::ComputeStage;
use crate::consensus::ConsensusStage;
use crate::ingest::IngestStage;
use crate::items::{Assigned, Boundary, Decided, Outcome, Planned, Request, Step};
use crate::partition::{PartitionStage, Planner, Question};
use crate::services::Services;
use crate::transfer::TransferStage;

const fn port(name: &'static str, item: &'static str) -> PortSpec {
    PortSpec { name, item, required: true }
}

const fn key(name: &'static str, doc: &'static str, value: ValueSpec, default: Option<&'static str>) -> KeySpec {
    KeySpec { name, doc, value, default, required: false }
}

const PEER_CAPACITY: KeySpec = key(
    "peer_capacity",
    "frames that may wait here from each peer",
    ValueSpec::Integer { min: 1, max: 65_536 },
    Some("1024"),
);
const PEER_CAPACITY_BYTES: KeySpec = key(
    "peer_capacity_bytes",
    "bytes of frames that may wait here from each peer",
    ValueSpec::Bytes { min: 1 << 20, max: 1 << 40 },
    Some("64 MiB"),
);

/// Signature of the ingest stage.
pub const INGEST: KindSignature = KindSignature {
    kind: "ingest",
    doc: "takes requests over HTTP",
    inputs: &[],
    outputs: &[port("requests", "Request")],
    keys: &[
        KeySpec {
            name: "bind_address",
            doc: "where the public HTTP listener binds",
            value: ValueSpec::SocketAddress,
            default: None,
            required: true,
        },
        key(
            "max_request_size_mb",
            "largest request body, in MiB",
            ValueSpec::Integer { min: 1, max: 1024 },
            Some("100"),
        ),
        key(
            "request_timeout_secs",
            "seconds without progress after which a request fails",
            ValueSpec::Integer { min: 1, max: 3600 },
            Some("30"),
        ),
        key(
            "rate_limit_per_second",
            "requests per second and client; no limit when absent",
            ValueSpec::Integer { min: 1, max: 1_000_000 },
            None,
        ),
        key("max_connections", "open client connections", ValueSpec::Integer { min: 1, max: 1_000_000 }, Some("1024")),
        key("tokens_file", "hashed API keys, one a line; may be absent only on a loopback bind", ValueSpec::Path, None),
        key(
            "result_cache",
            "memory for answers to requests that can have one answer only; 0 keeps none",
            ValueSpec::Bytes { min: 0, max: 1 << 40 },
            Some("0 B"),
        ),
        key(
            "cors_origins",
            "origins of pages that may ask, with spaces between them, or * for all; none when absent",
            ValueSpec::Text,
            None,
        ),
    ],
    networked: false,
    full: &[WhenFull::Wait, WhenFull::Reject],
};

/// Signature of the partition stage.
pub const PARTITION: KindSignature = KindSignature {
    kind: "partition",
    doc: "finds the plan for a request",
    inputs: &[port("requests", "Request")],
    outputs: &[port("planned", "Planned")],
    keys: &[
        key(
            "default_strategy",
            "the planner tried first",
            ValueSpec::Choice(&["topology_aware", "load_balanced", "uniform"]),
            Some("topology_aware"),
        ),
        key("cache_size", "plans kept", ValueSpec::Integer { min: 1, max: 100_000 }, Some("100")),
    ],
    networked: false,
    full: &[WhenFull::Wait],
};

/// Signature of the assign stage.
pub const ASSIGN: KindSignature = KindSignature {
    kind: "assign",
    doc: "queues requests and lets them run as permits allow",
    inputs: &[port("planned", "Planned")],
    outputs: &[port("assigned", "Assigned")],
    keys: &[
        key(
            "scheduler_type",
            "who goes next: the first, the most urgent (priority 0 to 9; waiting raises it), or clients in turn",
            ValueSpec::Choice(&Policy::NAMES),
            Some("fifo"),
        ),
        key("max_queue_size", "requests that may wait", ValueSpec::Integer { min: 1, max: 1_000_000 }, Some("1000")),
        key(
            "max_queue_bytes",
            "bytes of requests that may wait and run",
            ValueSpec::Bytes { min: 1 << 20, max: 1 << 40 },
            Some("256 MiB"),
        ),
        key("max_in_flight", "requests that run at once", ValueSpec::Integer { min: 1, max: 65_536 }, Some("64")),
    ],
    networked: false,
    full: &[WhenFull::Wait],
};

/// Signature of the transfer stage.
pub const TRANSFER: KindSignature = KindSignature {
    kind: "transfer",
    doc: "carries requests and boundary rows between nodes",
    inputs: &[port("assigned", "Assigned"), port("boundary", "Boundary")],
    outputs: &[port("steps", "Step")],
    keys: &[
        key("backend_type", "how nodes are joined", ValueSpec::Choice(&["quic", "local"]), Some("quic")),
        key("compression", "compression of tensors", ValueSpec::Choice(&["none"]), Some("none")),
        PEER_CAPACITY,
        PEER_CAPACITY_BYTES,
    ],
    networked: true,
    full: &[WhenFull::Wait],
};

/// Signature of the compute stage.
pub const COMPUTE: KindSignature = KindSignature {
    kind: "compute",
    doc: "runs the forward pass of the slices this node holds",
    inputs: &[port("steps", "Step")],
    outputs: &[port("boundary", "Boundary"), port("outcome", "Outcome")],
    keys: &[
        key("threads", "threads of a forward pass", ValueSpec::Integer { min: 1, max: 1024 }, Some("2")),
        key("micro_batch", "requests that share a forward pass", ValueSpec::Integer { min: 1, max: 1024 }, Some("16")),
        key(
            "kv_budget",
            "memory for keys, values and rows of open requests",
            ValueSpec::Bytes { min: 1 << 20, max: 1 << 50 },
            Some("1 GiB"),
        ),
    ],
    networked: false,
    full: &[WhenFull::Wait],
};

/// Signature of the consensus stage.
pub const CONSENSUS: KindSignature = KindSignature {
    kind: "consensus",
    doc: "turns outcomes into votes, and votes into decisions",
    inputs: &[port("outcome", "Outcome")],
    outputs: &[port("decided", "Decided")],
    keys: &[
        key(
            "verify",
            "none: one replica's word (only with max_byzantine = 0); full: all replicas compute, f+1 equal votes decide",
            ValueSpec::Choice(&["none", "full"]),
            None,
        ),
        PEER_CAPACITY,
        PEER_CAPACITY_BYTES,
    ],
    networked: true,
    full: &[WhenFull::Wait],
};

/// Signature of the commit stage.
pub const COMMIT: KindSignature = KindSignature {
    kind: "commit",
    doc: "journals receipts and answers clients",
    inputs: &[port("decided", "Decided")],
    outputs: &[],
    keys: &[
        key("log", "the durable log, under the node's data directory", ValueSpec::Path, Some("commit.redb")),
        key(
            "checkpoint_every",
            "receipts that a checkpoint covers at most; fewer are covered after 10 s",
            ValueSpec::Integer { min: 1, max: 1024 },
            Some("1024"),
        ),
        key(
            "keep_days",
            "days for which finished tasks and their receipts are kept",
            ValueSpec::Integer { min: 1, max: 36_500 },
            Some("30"),
        ),
        key(
            "keep_tasks",
            "finished tasks that are kept at most; the oldest go first, but none of the last eleven minutes",
            ValueSpec::Integer { min: 1, max: 1_000_000_000 },
            Some("1000000"),
        ),
    ],
    networked: false,
    full: &[WhenFull::Wait],
};

/// The signatures of the seven kinds.
pub const SIGNATURES: [KindSignature; 7] = [INGEST, PARTITION, ASSIGN, TRANSFER, COMPUTE, CONSENSUS, COMMIT];

/// The catalogue against which a topology file is checked.
#[must_use]
pub fn catalogue() -> Catalogue {
    Catalogue::new(SIGNATURES.to_vec())
}

/// The seven kinds with their factories, over the shared things of one node.
#[must_use]
pub fn registry(services: &Services, question: &Arc<Question>, planner: &Arc<Planner>) -> Registry {
    let (question, planner) = (Arc::clone(question), Arc::clone(planner));
    Registry::new()
        .item::<Request>("Request")
        .item::<Planned>("Planned")
        .item::<Assigned>("Assigned")
        .item::<Boundary>("Boundary")
        .item::<Step>("Step")
        .item::<Outcome>("Outcome")
        .item::<Decided>("Decided")
        .with(
            INGEST,
            stage(services, |build, services| {
                let output = build.ports.output("requests")?;
                Ok(IngestStage::new(&build.spec.config, output, services))
            }),
        )
        .with(
            PARTITION,
            stage(services, move |build, services| {
                Ok(PartitionStage {
                    input: build.ports.input("requests")?,
                    output: build.ports.output("planned")?,
                    planner: Arc::clone(&planner),
                    question: Arc::clone(&question),
                    services,
                })
            }),
        )
        .with(
            ASSIGN,
            stage(services, |build, services| {
                Ok(AssignStage {
                    input: build.ports.input("planned")?,
                    output: build.ports.output("assigned")?,
                    policy: Policy::named(build.spec.config.text("scheduler_type")),
                    admitted_max: services.board.room().tasks_max,
                    in_flight_max: count(&build.spec.config, "max_in_flight"),
                    services,
                })
            }),
        )
        .with(
            TRANSFER,
            stage(services, |build, services| {
                Ok(TransferStage::new(
                    build.ports.input("assigned")?,
                    build.ports.input("boundary")?,
                    build.ports.output("steps")?,
                    services,
                ))
            }),
        )
        .with(
            COMPUTE,
            stage(services, |build, services| {
                Ok(ComputeStage {
                    steps: build.ports.input("steps")?,
                    boundary: build.ports.output("boundary")?,
                    outcome: build.ports.output("outcome")?,
                    threads: count(&build.spec.config, "threads"),
                    micro_batch: count(&build.spec.config, "micro_batch"),
                    memory_max: build.spec.config.bytes("kv_budget").unwrap_or(u64::MAX),
                    services,
                })
            }),
        )
        .with(
            CONSENSUS,
            stage(services, |build, services| {
                Ok(ConsensusStage {
                    outcome: build.ports.input("outcome")?,
                    decided: build.ports.output("decided")?,
                    services,
                })
            }),
        )
        .with(COMMIT, stage(services, |build, services| Ok(CommitStage::new(build.ports.input("decided")?, services))))
}

/// A factory that gives each stage it makes the shared things of the node.
fn stage<S, F>(services: &Services, make: F) -> impl Fn(Build<'_>) -> Result<Box<dyn Stage>, BuildError> + use<S, F>
where
    S: Stage,
    F: Fn(Build<'_>, Services) -> Result<S, BuildError>,
{
    let services = services.clone();
    move |build| Ok(Box::new(make(build, services.clone())?))
}

/// A count that the catalogue has bounded and given a default.
fn count(config: &StageConfig, key: &str) -> usize {
    config.integer(key).and_then(|value| usize::try_from(value).ok()).unwrap_or(1)
}
