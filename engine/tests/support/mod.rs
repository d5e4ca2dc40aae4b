//! Small stages of numbers, and topologies to put them in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, dead_code, unreachable_pub)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use butterfly_engine::channel::{Item, Receiver, Sender};
use butterfly_engine::clock::{Clock, RealClock};
use butterfly_engine::registry::Registry;
use butterfly_engine::running::Running;
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_engine::telemetry::{StageState, Telemetry};
use butterfly_engine::wiring::{Unspawned, Wiring};
use butterfly_topology::{KeySpec, KindSignature, NodeId, PortSpec, Topology, ValueSpec, WhenFull};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::Semaphore;

/// An item that counts eight bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Number(pub u64);

impl Item for Number {
    fn size_bytes(&self) -> usize {
        8
    }
}

/// An item of another type.
#[derive(Debug)]
pub struct Word;

impl Item for Word {
    fn size_bytes(&self) -> usize {
        1
    }
}

pub const fn signature(kind: &'static str, inputs: &'static [PortSpec], outputs: &'static [PortSpec]) -> KindSignature {
    KindSignature { kind, doc: "A stage of a test.", inputs, outputs, keys: &[], networked: false, full: &[] }
}

const COUNT: ValueSpec = ValueSpec::Integer { min: 0, max: 1_000_000 };

/// Sends `count` numbers from `first` on, then ends.
pub const SOURCE: KindSignature = KindSignature {
    keys: &[
        KeySpec { name: "count", doc: "How many.", value: COUNT, default: Some("0"), required: false },
        KeySpec { name: "first", doc: "From where.", value: COUNT, default: Some("0"), required: false },
    ],
    full: &[WhenFull::Wait, WhenFull::Reject],
    ..signature("source", &[], &[PortSpec { name: "out", item: "Number", required: true }])
};

/// Takes numbers into a [`Collector`].
pub const SINK: KindSignature = signature("sink", &[PortSpec { name: "in", item: "Number", required: true }], &[]);

/// What the sinks of a graph took, and what its sources sent.
#[derive(Debug, Clone)]
pub struct Collector {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    taken: Mutex<Vec<u64>>,
    produced: AtomicU64,
    gate: Semaphore,
    waiting: AtomicBool,
}

impl Default for Collector {
    fn default() -> Self {
        let collector = Self::gated();
        collector.open();
        collector
    }
}

impl Collector {
    /// A collector whose sinks hold their first item until [`open`](Self::open).
    pub fn gated() -> Self {
        let inner = Inner {
            taken: Mutex::default(),
            produced: AtomicU64::new(0),
            gate: Semaphore::new(0),
            waiting: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner) }
    }

    pub fn open(&self) {
        self.inner.gate.close();
    }

    /// Whether a sink holds an item before the gate.
    pub fn waiting(&self) -> bool {
        self.inner.waiting.load(Ordering::SeqCst)
    }

    pub fn produced(&self) -> u64 {
        self.inner.produced.load(Ordering::SeqCst)
    }

    pub fn taken(&self) -> Vec<u64> {
        self.inner.taken.lock().unwrap().clone()
    }
}

struct Source {
    numbers: std::ops::Range<u64>,
    output: Sender<Number>,
    collector: Collector,
}

impl Stage for Source {
    fn run(self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            context.ready();
            for number in self.numbers {
                if self.output.send(Number(number)).await.is_err() {
                    break;
                }
                self.collector.inner.produced.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        }
        .boxed()
    }
}

struct Sink {
    input: Receiver<Number>,
    collector: Collector,
}

impl Stage for Sink {
    fn run(mut self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            context.ready();
            while let Some(Number(number)) = self.input.recv().await {
                self.collector.inner.waiting.store(true, Ordering::SeqCst);
                // Only ever closed, never acquired.
                let _ = self.collector.inner.gate.acquire().await;
                self.collector.inner.taken.lock().unwrap().push(number);
            }
            Ok(())
        }
        .boxed()
    }
}

/// A stage made of a closure over its context.
pub struct Scripted<F>(pub F);

impl<F, R> Stage for Scripted<F>
where
    F: FnOnce(StageContext) -> R + Send + 'static,
    R: Future<Output = Result<(), StageError>> + Send + 'static,
{
    fn run(self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        (self.0)(context).boxed()
    }
}

/// A stage that is ready and does nothing until the shutdown completes.
pub fn idle() -> Box<dyn Stage> {
    Box::new(Scripted(|context: StageContext| async move {
        context.ready();
        context.shutdown.completing().await;
        Ok(())
    }))
}

/// Sources and sinks.
pub fn registry(collector: &Collector) -> Registry {
    let (for_source, for_sink) = (collector.clone(), collector.clone());
    Registry::new()
        .item::<Number>("Number")
        .item::<Word>("Word")
        .with(SOURCE, move |build| {
            let key = |name| build.spec.config.integer(name).and_then(|value| u64::try_from(value).ok()).unwrap();
            let numbers = key("first")..key("first") + key("count");
            let output = build.ports.output("out")?;
            Ok(Box::new(Source { numbers, output, collector: for_source.clone() }))
        })
        .with(SINK, move |build| Ok(Box::new(Sink { input: build.ports.input("in")?, collector: for_sink.clone() })))
}

/// A catalogue with a source and something that takes numbers.
pub fn drain_only() -> Registry {
    registry(&Collector::default()).with(signature("drain", SINK.inputs, &[]), |_build| Ok(idle()))
}

pub fn ports_of(registry: &Registry, kind: &str) -> Vec<&'static str> {
    registry.catalogue().kind(kind).unwrap().outputs.iter().map(|port| port.name).collect()
}

pub fn node(id: &str) -> NodeId {
    NodeId::parse(id).unwrap()
}

/// Parses the stages with two nodes, `n0` and `n1`.
pub fn topology(stages: &str, registry: &Registry) -> Topology {
    let text = format!("{CLUSTER}\n{stages}");
    match butterfly_topology::parse(&text, "test.toml", &registry.catalogue()) {
        Ok(topology) => topology,
        Err(diagnostics) => panic!("{}", diagnostics.render(false)),
    }
}

const CLUSTER: &str = r#"
[cluster]
name = "test"
model = "builtin:mlp"
max_byzantine = 0

[[node]]
id = "n0"
listen_address = "127.0.0.1:9000"
public_key = "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"

[[node]]
id = "n1"
listen_address = "127.0.0.1:9001"
public_key = "02c6047f9441ed7d6d3045406e95c07cd85c778e4b8cef3ca7abac09b95c709ee5"
"#;

/// A topology with what it needs to run on `n0`.
pub struct Graph {
    pub topology: Topology,
    pub registry: Registry,
    pub telemetry: Arc<Telemetry>,
    pub clock: Arc<dyn Clock>,
}

impl Graph {
    pub fn new(stages: &str, registry: Registry) -> Self {
        Self::on_clock(stages, registry, RealClock::shared())
    }

    pub fn on_clock(stages: &str, registry: Registry, clock: Arc<dyn Clock>) -> Self {
        let topology = topology(stages, &registry);
        let telemetry = Arc::new(Telemetry::with_clock(node("n0"), Arc::clone(&clock)));
        Self { topology, registry, telemetry, clock }
    }

    pub fn compile(&self) -> Unspawned {
        let (telemetry, clock) = (Arc::clone(&self.telemetry), Arc::clone(&self.clock));
        let compiled = Wiring::compile(&self.topology, &node("n0"), &self.registry, telemetry, None, clock);
        compiled.unwrap_or_else(|errors| panic!("{errors:?}"))
    }

    pub fn start(&self) -> Running {
        self.compile().start()
    }
}

/// Yields until the condition holds.
pub async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
    }
}

/// What a stage does now.
pub fn state(telemetry: &Telemetry, stage: &str) -> Option<StageState> {
    telemetry.stage_states(stage).map(|states| states.state())
}
