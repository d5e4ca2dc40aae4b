//! A catalogue like the real one, for tests of the check: the same ports and the keys that matter to it, plus kinds that
//! only a user would write.

use butterfly_topology::{Catalogue, KeySpec, KindSignature, PortSpec, ValueSpec, WhenFull};

const fn input(name: &'static str, item: &'static str) -> PortSpec {
    PortSpec { name, item, required: true }
}

const fn optional(name: &'static str, item: &'static str) -> PortSpec {
    PortSpec { name, item, required: false }
}

const fn key(name: &'static str, value: ValueSpec, default: Option<&'static str>) -> KeySpec {
    KeySpec { name, doc: "a key", value, default, required: false }
}

const NONE: KindSignature = KindSignature {
    kind: "",
    doc: "",
    inputs: &[],
    outputs: &[],
    keys: &[],
    networked: false,
    full: &[WhenFull::Wait],
};

pub(crate) fn catalogue() -> Catalogue {
    Catalogue::new(KINDS.to_vec())
}

const KINDS: &[KindSignature] = &[
    KindSignature {
        kind: "ingest",
        outputs: &[input("requests", "Request")],
        keys: &[
            KeySpec {
                name: "bind_address",
                doc: "where HTTP is served",
                value: ValueSpec::SocketAddress,
                default: None,
                required: true,
            },
            key("max_request_size_mb", ValueSpec::Integer { min: 1, max: 1024 }, Some("100")),
            key("request_timeout_secs", ValueSpec::Integer { min: 1, max: 86_400 }, Some("30")),
            key("rate_limit_per_second", ValueSpec::Number { min: 0.1, max: 1e6 }, Some("200")),
            key("tokens_file", ValueSpec::Path, None),
        ],
        full: &[WhenFull::Reject, WhenFull::Wait],
        ..NONE
    },
    KindSignature {
        kind: "partition",
        inputs: &[input("requests", "Request")],
        outputs: &[input("planned", "Planned")],
        keys: &[
            key(
                "default_strategy",
                ValueSpec::Choice(&["topology_aware", "load_balanced", "uniform"]),
                Some("topology_aware"),
            ),
            key("cache_size", ValueSpec::Integer { min: 1, max: 100_000 }, Some("100")),
        ],
        ..NONE
    },
    KindSignature {
        kind: "assign",
        inputs: &[input("planned", "Planned")],
        outputs: &[input("assigned", "Assigned")],
        keys: &[
            key("scheduler_type", ValueSpec::Choice(&["fifo", "priority", "fair"]), Some("fifo")),
            key("max_queue_size", ValueSpec::Integer { min: 1, max: 1_000_000 }, Some("1000")),
            key("max_in_flight", ValueSpec::Integer { min: 1, max: 1_000_000 }, Some("64")),
        ],
        ..NONE
    },
    KindSignature {
        kind: "transfer",
        inputs: &[input("assigned", "Assigned"), optional("boundary", "Boundary")],
        outputs: &[input("steps", "Step")],
        keys: &[
            key("backend_type", ValueSpec::Choice(&["local", "quic"]), Some("quic")),
            key("compression", ValueSpec::Choice(&["none", "lz4"]), Some("none")),
        ],
        networked: true,
        ..NONE
    },
    KindSignature {
        kind: "compute",
        inputs: &[input("steps", "Step")],
        outputs: &[optional("boundary", "Boundary"), input("outcome", "Outcome")],
        keys: &[
            key("threads", ValueSpec::Integer { min: 1, max: 1024 }, None),
            key("micro_batch", ValueSpec::Integer { min: 1, max: 4096 }, Some("8")),
            key("frame_bytes_max", ValueSpec::Bytes { min: 1, max: 1 << 30 }, None),
            key("pin", ValueSpec::Flag, Some("false")),
        ],
        ..NONE
    },
    KindSignature {
        kind: "consensus",
        inputs: &[input("outcome", "Outcome")],
        outputs: &[input("decided", "Decided")],
        keys: &[key("verify", ValueSpec::Choice(&["none", "quorum", "full"]), Some("full"))],
        networked: true,
        ..NONE
    },
    KindSignature {
        kind: "commit",
        inputs: &[input("decided", "Decided")],
        keys: &[
            key("log", ValueSpec::Path, Some("commit.redb")),
            key("checkpoint_every", ValueSpec::Integer { min: 1, max: 1_000_000 }, Some("1024")),
        ],
        networked: true,
        ..NONE
    },
    // Kinds that a user could write.
    KindSignature {
        kind: "rewrite",
        inputs: &[optional("requests", "Request")],
        outputs: &[optional("rewritten", "Request")],
        ..NONE
    },
    KindSignature {
        kind: "merge",
        inputs: &[input("left", "Request"), input("right", "Request")],
        outputs: &[input("merged", "Request")],
        ..NONE
    },
];
