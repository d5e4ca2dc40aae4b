//! A stage that does nothing but take its time, between partition and assign, and a cluster that has it on its gateway.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use butterfly::items::Planned;
use butterfly::loopback::Loopback;
use butterfly::node::Extension;
use butterfly_topology::catalogue::{KindSignature, PortSpec, WhenFull};

/// Kind and name of the stage.
pub(super) const NAME: &str = "molasses";

/// Timers are late by up to this much, so the rest of a wait is spent looking at the clock.
const TIMER_SLACK: Duration = Duration::from_millis(2);

const SIGNATURE: KindSignature = KindSignature {
    kind: NAME,
    doc: "hands on what it gets, later",
    inputs: &[PortSpec { name: "early", item: "Planned", required: true }],
    outputs: &[PortSpec { name: "late", item: "Planned", required: true }],
    keys: &[],
    networked: false,
    full: &[WhenFull::Wait],
};

const STAGES: &str = r#"
[[stage]]
kind = "ingest"
on = ["n0"]
bind_address = "127.0.0.1:0"
capacity = 256

[[stage]]
kind = "partition"
input = "ingest"
capacity = 2

[[stage]]
kind = "molasses"
input = "partition"
capacity = 2

[[stage]]
kind = "assign"
input = "molasses"
max_in_flight = 256

[[stage]]
kind = "transfer"
input = ["assign", { from = "compute.boundary", feedback = true }]

[[stage]]
kind = "compute"
input = "transfer"
micro_batch = 64

[[stage]]
kind = "consensus"
input = "compute.outcome"

[[stage]]
kind = "commit"
input = "consensus"
"#;

/// What the stage really took.
#[derive(Debug, Default)]
pub(super) struct Truth {
    items: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Truth {
    /// Mean time of an item; `None` before the first.
    pub(super) fn mean_ms(&self) -> Option<f64> {
        let items = self.items.load(Ordering::Relaxed);
        (items > 0).then(|| self.nanoseconds.load(Ordering::Relaxed) as f64 / items as f64 / 1e6)
    }

    fn took(&self, time: Duration) {
        self.items.fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Three nodes for vectors, whose gateway takes this much longer for each request.
pub(super) fn cluster(delay: Duration) -> (Loopback, Arc<Truth>) {
    let truth = Arc::new(Truth::default());
    let loopback = Loopback {
        model: "builtin:mlp".into(),
        stages: Some(STAGES.into()),
        extension: Some((vec![SIGNATURE], extension(delay, Arc::clone(&truth)))),
        ..Loopback::default()
    };
    (loopback, truth)
}

fn extension(delay: Duration, truth: Arc<Truth>) -> Extension {
    Arc::new(move |registry, services| {
        let clock = Arc::clone(&services.clock);
        let truth = Arc::clone(&truth);
        registry.map(SIGNATURE, move |_| {
            let (clock, truth) = (Arc::clone(&clock), Arc::clone(&truth));
            Ok(move |planned: Planned| {
                let (clock, truth) = (Arc::clone(&clock), Arc::clone(&truth));
                async move {
                    let begin = clock.now();
                    clock.sleep(delay.saturating_sub(TIMER_SLACK)).await;
                    while clock.now().saturating_sub(begin) < delay {
                        tokio::task::yield_now().await;
                    }
                    truth.took(clock.now().saturating_sub(begin));
                    Some(planned)
                }
            })
        })
    })
}
