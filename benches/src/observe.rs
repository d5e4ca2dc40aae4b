//! Where the time and the bytes of a cluster went during a load: what its accounts say after it, less what they said before.
//!
//! Of a cluster in this process everything is known. Of one elsewhere its `/metrics` tell the states, the items and how full
//! edges are; the distributions stay unknown and are left out.
//!
//! It refuses to judge: see [`bottleneck`](crate::bottleneck).

mod metrics;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::clock::Clock;
use butterfly_engine::telemetry::{StageState, Telemetry, TextFormat};
use bytes::Bytes;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::client::Gateway;
use crate::report::Quantiles;

/// How often an own cluster's edges are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often another's metrics are asked for.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Nanoseconds in one millisecond, the unit of reports.
const NS_PER_MS: f64 = 1e6;

/// Who can be asked.
#[derive(Clone)]
pub(crate) enum Source {
    /// Nodes of this process.
    Own(Vec<Arc<Telemetry>>),
    /// `/metrics` of a gateway.
    Metrics(Gateway),
}

/// One node during a load.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Node {
    pub(crate) name: String,
    /// In the order of the graph.
    pub(crate) stages: Vec<Stage>,
    pub(crate) edges: Vec<Edge>,
    /// Plans that the partition stage found in its cache, since the node started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) partition_cache_hit_ratio: Option<f64>,
}

/// One stage during a load. Seconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Stage {
    pub(crate) name: String,
    pub(crate) busy_s: f64,
    pub(crate) starved_s: f64,
    pub(crate) blocked_s: f64,
    pub(crate) verifying_s: f64,
    pub(crate) items: u64,
    pub(crate) service_ms: Option<Quantiles>,
}

/// One edge during a load. Its ends are `stage.port`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Edge {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) items: Option<u64>,
    pub(crate) bytes: u64,
    pub(crate) capacity_items: u64,
    /// Share of its room in items that was taken: the mean of all looks, and the most.
    pub(crate) fill_mean: f64,
    pub(crate) fill_max: f64,
    pub(crate) queue_ms: Option<Quantiles>,
    pub(crate) send_ms: Option<Quantiles>,
}

/// The accounts of a node at one moment.
#[derive(Debug, Clone, Default)]
struct Account {
    name: String,
    stages: Vec<StageAccount>,
    edges: Vec<EdgeAccount>,
    hit_ratio: Option<f64>,
}

#[derive(Debug, Clone, Default)]
struct StageAccount {
    name: String,
    /// In the order of [`StageState::ALL`].
    seconds: [f64; 4],
    items: u64,
    service: Option<Histogram<u64>>,
}

#[derive(Debug, Clone, Default)]
struct EdgeAccount {
    from: String,
    to: String,
    items: Option<u64>,
    bytes: u64,
    queued: u64,
    capacity: u64,
    queue: Option<Histogram<u64>>,
    send: Option<Histogram<u64>>,
}

/// Watches a cluster while it is loaded.
pub(crate) struct Watch {
    source: Source,
    before: Vec<Account>,
    stop: CancellationToken,
    looks: tokio::task::JoinHandle<Fills>,
}

/// For each node and edge: the sum of all fills, their number, and the most.
type Fills = BTreeMap<(String, String, String), (f64, u64, f64)>;

impl Watch {
    /// Begins to watch. `None` when the source says nothing.
    pub(crate) async fn begin(source: Source, clock: Arc<dyn Clock>) -> Option<Self> {
        let before = source.accounts().await.ok().filter(|accounts| !accounts.is_empty())?;
        let stop = CancellationToken::new();
        let looks = tokio::spawn(look(source.clone(), clock, stop.clone()));
        Some(Self { source, before, stop, looks })
    }

    /// Ends the watch: what happened since its begin.
    pub(crate) async fn end(self) -> anyhow::Result<Vec<Node>> {
        let after = self.source.accounts().await?;
        self.stop.cancel();
        let fills = self.looks.await?;
        let before: BTreeMap<&str, &Account> = self.before.iter().map(|of| (of.name.as_str(), of)).collect();
        Ok(after.iter().map(|after| after.since(before.get(after.name.as_str()).copied(), &fills)).collect())
    }
}

async fn look(source: Source, clock: Arc<dyn Clock>, stop: CancellationToken) -> Fills {
    let every = if matches!(source, Source::Own(_)) { LOOK_EVERY } else { ASK_EVERY };
    let mut fills = Fills::new();
    loop {
        // A gateway that does not answer is looked at again; its load tells that it is stuck.
        for (place, fill) in source.fills().await.unwrap_or_default() {
            let (sum, count, most) = fills.entry(place).or_default();
            (*sum, *count, *most) = (*sum + fill, *count + 1, most.max(fill));
        }
        tokio::select! {
            () = clock.sleep(every) => {}
            () = stop.cancelled() => return fills,
        }
    }
}

impl Source {
    async fn accounts(&self) -> anyhow::Result<Vec<Account>> {
        match self {
            Self::Own(nodes) => Ok(nodes.iter().map(|node| Account::of(node)).collect()),
            Self::Metrics(gateway) => Ok(metrics::accounts(&scrape(gateway).await?)),
        }
    }

    async fn fills(&self) -> anyhow::Result<Vec<((String, String, String), f64)>> {
        let share = |queued: u64, capacity: u64| queued as f64 / capacity.max(1) as f64;
        match self {
            Self::Own(nodes) => {
                let edges =
                    nodes.iter().flat_map(|node| node.edges().into_iter().map(|edge| (node.node().to_string(), edge)));
                let fill = |(node, edge): (String, Arc<butterfly_engine::telemetry::EdgeMeters>)| {
                    let label = edge.label();
                    ((node, label.from.clone(), label.to.clone()), share(edge.queued_items(), edge.capacity_items()))
                };
                Ok(edges.map(fill).collect())
            }
            Self::Metrics(_) => {
                let accounts = self.accounts().await?;
                let edges = accounts.iter().flat_map(|account| account.edges.iter().map(|edge| (&account.name, edge)));
                let fill = |(node, edge): (&String, &EdgeAccount)| {
                    ((node.clone(), edge.from.clone(), edge.to.clone()), share(edge.queued, edge.capacity))
                };
                Ok(edges.map(fill).collect())
            }
        }
    }
}

async fn scrape(gateway: &Gateway) -> anyhow::Result<String> {
    let (status, body) = gateway.client().call("GET", "/metrics", Bytes::new()).await?;
    anyhow::ensure!(status == 200, "/metrics answers {status}");
    Ok(String::from_utf8(body.to_vec())?)
}

impl Account {
    fn of(telemetry: &Telemetry) -> Self {
        let stages = telemetry.stages().into_iter().map(|(name, states)| {
            let times = states.times();
            StageAccount {
                name: name.to_string(),
                seconds: StageState::ALL.map(|state| times.of(state).as_secs_f64()),
                items: states.items(),
                service: states.service().histogram(),
            }
        });
        let edges = telemetry.edges().into_iter().map(|meters| EdgeAccount {
            from: meters.label().from.clone(),
            to: meters.label().to.clone(),
            items: Some(meters.items()),
            bytes: meters.bytes(),
            queued: meters.queued_items(),
            capacity: meters.capacity_items(),
            queue: meters.queue().histogram(),
            send: meters.send().histogram(),
        });
        Self {
            name: telemetry.node().to_string(),
            stages: stages.collect(),
            edges: edges.collect(),
            hit_ratio: metrics::accounts(&telemetry.render(TextFormat::Classic))
                .into_iter()
                .find_map(|account| account.hit_ratio),
        }
    }

    fn since(&self, before: Option<&Self>, fills: &Fills) -> Node {
        let stages = self.stages.iter().map(|stage| {
            let earlier = before.and_then(|before| before.stages.iter().find(|earlier| earlier.name == stage.name));
            let none = StageAccount::default();
            let earlier = earlier.unwrap_or(&none);
            let [busy, starved, blocked, verifying] =
                std::array::from_fn(|state| (stage.seconds[state] - earlier.seconds[state]).max(0.0));
            Stage {
                name: stage.name.clone(),
                busy_s: busy,
                starved_s: starved,
                blocked_s: blocked,
                verifying_s: verifying,
                items: stage.items.saturating_sub(earlier.items),
                service_ms: since(stage.service.as_ref(), earlier.service.as_ref()),
            }
        });
        let edges = self.edges.iter().map(|edge| {
            let is_it = |earlier: &&EdgeAccount| earlier.from == edge.from && earlier.to == edge.to;
            let none = EdgeAccount::default();
            let earlier = before.and_then(|before| before.edges.iter().find(is_it)).unwrap_or(&none);
            let place = (self.name.clone(), edge.from.clone(), edge.to.clone());
            let (sum, count, most) = fills.get(&place).copied().unwrap_or_default();
            Edge {
                from: edge.from.clone(),
                to: edge.to.clone(),
                items: edge.items.map(|items| items.saturating_sub(earlier.items.unwrap_or(0))),
                bytes: edge.bytes.saturating_sub(earlier.bytes),
                capacity_items: edge.capacity,
                fill_mean: if count > 0 { sum / count as f64 } else { 0.0 },
                fill_max: most,
                queue_ms: since(edge.queue.as_ref(), earlier.queue.as_ref()),
                send_ms: since(edge.send.as_ref(), earlier.send.as_ref()),
            }
        });
        Node {
            name: self.name.clone(),
            stages: stages.collect(),
            edges: edges.collect(),
            partition_cache_hit_ratio: self.hit_ratio,
        }
    }
}

/// The quantiles of what was recorded between two moments.
fn since(after: Option<&Histogram<u64>>, before: Option<&Histogram<u64>>) -> Option<Quantiles> {
    let mut histogram = after?.clone();
    if let Some(before) = before {
        histogram.subtract(before).ok()?;
    }
    Quantiles::of(&histogram, NS_PER_MS)
}

impl Stage {
    /// Shares of its time: busy, starved, blocked, verifying. All zero if it did not run.
    pub(crate) fn shares(&self) -> [f64; 4] {
        let all = [self.busy_s, self.starved_s, self.blocked_s, self.verifying_s];
        let sum: f64 = all.iter().sum();
        all.map(|seconds| if sum > 0.0 { seconds / sum } else { 0.0 })
    }

    /// Share of its time in which it worked, its own work or on that of others.
    pub(crate) fn working(&self) -> f64 {
        let [busy, _, _, verifying] = self.shares();
        busy + verifying
    }
}

impl Node {
    /// Whether a stage's account says what it does: one that no edge of the graph leads to does not show when it waits.
    pub(crate) fn accounts_for(&self, stage: &Stage) -> bool {
        self.edges.iter().any(|edge| edge.end_stage() == stage.name)
    }

    /// Whether it is known from metrics only, which have no distributions.
    pub(crate) fn is_from_afar(&self) -> bool {
        self.edges.iter().all(|edge| edge.items.is_none())
    }
}

impl Edge {
    /// The stage at its start.
    pub(crate) fn start_stage(&self) -> &str {
        stage_of(&self.from)
    }

    /// The stage at its end.
    pub(crate) fn end_stage(&self) -> &str {
        stage_of(&self.to)
    }
}

fn stage_of(end: &str) -> &str {
    end.split_once('.').map_or(end, |(stage, _)| stage)
}

/// Share of all work that went into checking others, over all nodes. `None` if nothing is known of any work.
pub(crate) fn verifying_share(nodes: &[Node]) -> Option<f64> {
    let stages = || nodes.iter().flat_map(|node| &node.stages);
    let verifying: f64 = stages().map(|stage| stage.verifying_s).sum();
    let work: f64 = stages().map(|stage| stage.verifying_s + stage.busy_s).sum();
    (work > 0.0).then(|| verifying / work)
}
