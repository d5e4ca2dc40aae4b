use butterfly_engine::clock::ManualClock;
use tokio::sync::watch;

use super::*;
use crate::arrivals::Arrivals;
use crate::workload::Workload;
use crate::workload::tests::recipe;

/// Answers at once while it is open, and not at all while it is closed.
#[derive(Clone)]
struct Gate {
    open: watch::Receiver<bool>,
    arrived: Arc<watch::Sender<u64>>,
}

impl Server for Gate {
    async fn answer(&mut self, _: &Ask) -> Answered {
        self.arrived.send_modify(|arrived| *arrived += 1);
        self.open.wait_for(|open| *open).await.unwrap();
        Answered { status: 200, ..Answered::default() }
    }
}

struct Stage {
    clock: ManualClock,
    open: watch::Sender<bool>,
    arrived: watch::Receiver<u64>,
    load: tokio::task::JoinHandle<anyhow::Result<Record>>,
}

fn start(pace: Pace, connections: usize, patience: Duration) -> Stage {
    let clock = ManualClock::new(0);
    let (open, is_open) = watch::channel(true);
    let (arrived, counted) = watch::channel(0);
    let gate = Gate { open: is_open, arrived: Arc::new(arrived) };
    let asks = Asks::Drawn(recipe(Workload::Mlp), 0);
    let load = Load { pace, asks, connections, patience, slo: "e2e=50ms".parse().unwrap() };
    let shared: Arc<dyn Clock> = Arc::new(clock.clone());
    let load = tokio::spawn(async move { load.run(&shared, || gate.clone()).await });
    Stage { clock, open, arrived: counted, load }
}

impl Stage {
    /// Moves time from one request to the next until this many have arrived at the server.
    async fn until_arrived(&mut self, count: u64) {
        while *self.arrived.borrow() < count {
            // What is due later than any request of the load is somebody's patience, which must not end.
            if let Some(wait) = self.clock.until_next().filter(|wait| *wait < Duration::from_secs(10)) {
                self.clock.advance(wait);
            }
            tokio::task::yield_now().await;
        }
    }
}

const PATIENCE: Duration = Duration::from_secs(1_000);

/// Requests every ten milliseconds for two seconds; the server stalls from 0.5 s to at least 1.5 s. What was measured, and
/// when the stall ended.
async fn stalled(connections: usize) -> (Record, Duration) {
    let moments = Arrivals::Constant.schedule(100.0, Duration::from_secs(2), 0).unwrap();
    let mut stage = start(Pace::Open(moments), connections, PATIENCE);
    stage.until_arrived(50).await;
    stage.open.send_replace(false);
    // What the connections let through arrives and waits; time goes on for the others as well.
    stage.until_arrived(50 + connections.min(100) as u64).await;
    let passed = stage.clock.now();
    stage.clock.advance(Duration::from_millis(1_500).saturating_sub(passed));
    let end = stage.clock.now();
    stage.open.send_replace(true);
    stage.until_arrived(200).await;
    (stage.load.await.unwrap().unwrap(), end)
}

/// Checks that of the requests that were scheduled in the stall each took what was left of it.
fn check((record, end): &(Record, Duration)) {
    assert_eq!((record.sent, record.ok), (200, 200));
    for limit in [900, 500, 100, 50].map(Duration::from_millis) {
        let scheduled = (50..150).map(|slot| Duration::from_millis(slot * 10));
        let expected = scheduled.filter(|scheduled| end.saturating_sub(*scheduled) > limit).count();
        assert!(expected > 8, "the stall was not long enough to tell");
        let limit_ms = limit.as_secs_f64() * 1000.0;
        let found = record.rows.iter().filter(|row| row.done_ms - row.scheduled_ms > limit_ms).count();
        assert!(found.abs_diff(expected) <= 2, "{found} requests took longer than {limit_ms} ms, expected {expected}");
        let slower =
            record.latencies.e2e.iter_recorded().filter(|step| step.value_iterated_to() > limit.as_micros() as u64);
        let counted: u64 = slower.map(|step| step.count_at_value()).sum();
        assert!(counted.abs_diff(expected as u64) <= 3, "the distribution has {counted} beyond {limit_ms} ms");
    }
    let good = record.rows.iter().filter(|row| row.done_ms - row.scheduled_ms <= 50.0).count();
    assert_eq!(record.met_slo, good as u64);
}

#[tokio::test]
async fn a_stall_shows_in_every_request_that_was_scheduled_in_it() {
    check(&stalled(200).await);
}

/// The mistake this guards against: with few connections a stalled server holds the load back, and if latency counted
/// from the actual send only four requests would look slow.
#[tokio::test]
async fn a_stall_shows_as_well_when_no_connection_is_left_to_send_on() {
    let stalled = stalled(4).await;
    check(&stalled);
    let late = stalled.0.rows.iter().filter(|row| row.sent_ms - row.scheduled_ms > 100.0).count();
    assert!(late > 80, "and that they left late is told too: {late}");
}

#[tokio::test]
async fn a_request_that_gets_no_answer_ends_as_a_timeout() {
    let moments = vec![Duration::ZERO];
    let mut stage = start(Pace::Open(moments), 1, Duration::from_secs(5));
    stage.open.send_replace(false);
    stage.until_arrived(1).await;
    stage.clock.sleepers(1).await;
    stage.clock.advance(Duration::from_secs(5));
    let record = stage.load.await.unwrap().unwrap();
    assert_eq!(record.errors.get("timeout"), Some(&1));
    assert!(record.latencies.e2e.is_empty());
}

#[tokio::test]
async fn a_closed_loop_sends_when_it_is_answered_and_ends_with_its_time() {
    let mut stage = start(Pace::Closed(Duration::from_secs(1)), 3, PATIENCE);
    stage.open.send_replace(false);
    stage.until_arrived(3).await;
    stage.clock.advance(Duration::from_millis(400));
    tokio::task::yield_now().await;
    assert_eq!(*stage.arrived.borrow(), 3, "no fourth request while three wait");
    stage.clock.advance(Duration::from_millis(700));
    stage.open.send_replace(true);
    let record = stage.load.await.unwrap().unwrap();
    assert_eq!((record.sent, record.latencies.send_delay.max()), (3, 1));
}

#[tokio::test]
async fn a_list_is_sent_as_it_is() {
    let recipe = recipe(Workload::Mlp);
    let asks: Vec<Ask> = [4, 9, 2].map(|number| recipe.ask(number)).into();
    let load = Load {
        pace: Pace::Open(vec![Duration::ZERO; 3]),
        asks: Asks::Listed(asks),
        connections: 1,
        patience: PATIENCE,
        slo: Slo::default(),
    };
    assert_eq!([0, 1, 2, 3].map(|slot| load.ask(slot).map(|ask| ask.number)), [Some(4), Some(9), Some(2), None]);
}
