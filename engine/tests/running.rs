//! Supervision and shutdown: who fails is named, and everything ends in order and in time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::sync::{Arc, Mutex};

use butterfly_engine::clock::ManualClock;
use butterfly_engine::registry::Registry;
use butterfly_engine::running::{COMPLETE_MAX, DRAIN_MAX, FORCE_MAX, RunError};
use butterfly_engine::shutdown::Phase;
use butterfly_engine::stage::{Accountable, Fault, StageContext, StageError};
use butterfly_engine::telemetry::Event;
use butterfly_topology::StageName;
use futures::FutureExt;
use futures::future::BoxFuture;
use support::{Graph, SINK, SOURCE, Scripted};

const TEXT: &str = r#"
    [[stage]]
    kind = "source"
    [[stage]]
    kind = "sink"
    input = "source"
"#;

type Script = fn(StageContext, Log) -> BoxFuture<'static, Result<(), StageError>>;
type Log = Arc<Mutex<Vec<String>>>;

/// Two stages, the first upstream of the second, that follow scripts and write a log.
fn scripted(source: Script, sink: Script) -> (Registry, Log) {
    let log = Log::default();
    let (for_source, for_sink) = (Arc::clone(&log), Arc::clone(&log));
    let registry = Registry::new()
        .item::<support::Number>("Number")
        .with(SOURCE, move |build| {
            let output = build.ports.output::<support::Number>("out")?;
            let log = Arc::clone(&for_source);
            Ok(Box::new(Scripted(move |context| async move {
                let _output = output;
                source(context, log).await
            })))
        })
        .with(SINK, move |build| {
            let input = build.ports.input::<support::Number>("in")?;
            let log = Arc::clone(&for_sink);
            Ok(Box::new(Scripted(move |context| async move {
                let _input = input;
                sink(context, log).await
            })))
        });
    (registry, log)
}

fn say(log: &Log, word: impl ToString) {
    log.lock().unwrap().push(word.to_string());
}

fn polite(context: StageContext, log: Log) -> BoxFuture<'static, Result<(), StageError>> {
    async move {
        say(&log, format!("{} starts", context.stage));
        context.ready();
        context.shutdown.draining().await;
        say(&log, format!("{} drains", context.stage));
        context.shutdown.completing().await;
        say(&log, format!("{} ends", context.stage));
        Ok(())
    }
    .boxed()
}

#[tokio::test]
async fn stages_start_bottom_up_and_end_after_draining() {
    let (registry, log) = scripted(polite, polite);
    let running = Graph::new(TEXT, registry).start();
    running.ready().await.unwrap();
    assert_eq!(*log.lock().unwrap(), ["sink starts", "source starts"]);
    running.shutdown().await.unwrap();
    let mut told = log.lock().unwrap().split_off(2);
    let place = |what: &str| told.iter().position(|line| *line == what).unwrap();
    // Nothing holds the drain here, so one stage may end before the other has looked.
    assert!(place("sink drains") < place("sink ends") && place("source drains") < place("source ends"));
    told.sort();
    assert_eq!(told, ["sink drains", "sink ends", "source drains", "source ends"]);
}

#[tokio::test]
async fn ready_waits_for_every_stage() {
    fn late(context: StageContext, _log: Log) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            context.shutdown.completing().await;
            Ok(())
        }
        .boxed()
    }
    let (registry, log) = scripted(late, polite);
    let running = Graph::new(TEXT, registry).start();
    support::until(|| log.lock().unwrap().len() == 1).await;
    assert!(running.ready().now_or_never().is_none());
    assert_eq!(running.readiness().pending(), [StageName::parse("source").unwrap()].into());
    running.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_failing_stage_is_named_and_drains_the_node() {
    fn fails(context: StageContext, _log: Log) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            context.ready();
            Err(StageError::environment("open the log", std::io::Error::other("the disk is gone")))
        }
        .boxed()
    }
    let (registry, log) = scripted(polite, fails);
    let graph = Graph::new(TEXT, registry);
    let mut events = graph.telemetry.events().subscribe().unwrap();
    let running = graph.start();
    let error = running.failed().await;
    assert_eq!(error.stage().unwrap().as_str(), "sink");
    assert_eq!(error.fault(), Fault::Environment);
    assert_eq!(
        butterfly_engine::stage::explain(&error),
        "stage `sink` failed: could not open the log: the disk is gone"
    );
    assert!(running.ready().await.is_err(), "a node with a failed stage is not ready");
    assert!(running.controller().phase() >= Phase::Draining);
    let ended = running.ended().await.unwrap_err();
    assert_eq!(ended.stage().unwrap().as_str(), "sink");
    assert!(log.lock().unwrap().contains(&"source ends".to_owned()), "the others end in order");
    let heard: Vec<&str> = std::iter::from_fn(|| events.try_recv()).map(|event: Arc<Event>| event.name).collect();
    assert_eq!(heard, ["stage_failed", "draining", "completing", "stage_ended"]);
}

#[tokio::test]
async fn a_panicking_stage_is_named_with_what_it_said() {
    fn panics(context: StageContext, _log: Log) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            context.ready();
            context.shutdown.is_running().then(|| panic!("index {} is out of range", 7));
            Ok(())
        }
        .boxed()
    }
    let (registry, _log) = scripted(panics, polite);
    let running = Graph::new(TEXT, registry).start();
    let error = running.ended().await.unwrap_err();
    assert_eq!(error.to_string(), "stage `source` panicked: index 7 is out of range");
    assert_eq!(error.fault(), Fault::Program);
}

#[tokio::test]
async fn a_stage_that_panics_before_it_has_a_future_is_supervised_too() {
    fn panics(_context: StageContext, _log: Log) -> BoxFuture<'static, Result<(), StageError>> {
        panic!("at once")
    }
    let (registry, _log) = scripted(polite, panics);
    let error = Graph::new(TEXT, registry).start().ended().await.unwrap_err();
    assert!(matches!(error, RunError::Panicked { .. }));
}

#[tokio::test]
async fn completing_waits_for_holds() {
    fn holds(context: StageContext, log: Log) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            let hold = context.shutdown.hold("request in flight");
            context.ready();
            context.shutdown.draining().await;
            for _ in 0..50 {
                tokio::task::yield_now().await;
            }
            say(&log, format!("released in {:?}", context.shutdown.phase()));
            drop(hold);
            context.shutdown.completing().await;
            Ok(())
        }
        .boxed()
    }
    let (registry, log) = scripted(holds, polite);
    let running = Graph::new(TEXT, registry).start();
    running.ready().await.unwrap();
    running.shutdown().await.unwrap();
    let log = log.lock().unwrap();
    let place = |word: &str| log.iter().position(|said| said == word).unwrap();
    assert!(place("released in Draining") < place("sink ends"), "{log:?}");
}

#[tokio::test]
async fn each_phase_has_its_deadline_and_who_does_not_end_is_named() {
    fn deaf(context: StageContext, _log: Log) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            let _hold = context.shutdown.hold("never done");
            context.ready();
            std::future::pending().await
        }
        .boxed()
    }
    let (registry, _log) = scripted(deaf, polite);
    let clock = ManualClock::new(0);
    let running = Graph::on_clock(TEXT, registry, Arc::new(clock.clone())).start();
    running.ready().await.unwrap();
    let controller = running.controller().clone();
    let shutdown = tokio::spawn(running.shutdown());
    for (limit, phase) in [(DRAIN_MAX, Phase::Completing), (COMPLETE_MAX, Phase::Forced)] {
        clock.sleepers(1).await;
        assert!(controller.phase() < phase);
        assert_eq!(clock.until_next(), Some(limit));
        clock.advance(limit);
        controller.reached(phase).await;
    }
    let error = shutdown.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "aborted, since they did not end in time: source");
    assert_eq!((DRAIN_MAX + COMPLETE_MAX + FORCE_MAX).as_secs(), 30);
}

#[tokio::test]
async fn a_second_signal_forces() {
    fn deaf(context: StageContext, _log: Log) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            let _hold = context.shutdown.hold("never done");
            context.ready();
            std::future::pending().await
        }
        .boxed()
    }
    let (registry, _log) = scripted(deaf, deaf);
    let running = Graph::on_clock(TEXT, registry, Arc::new(ManualClock::new(0))).start();
    running.ready().await.unwrap();
    let controller = running.controller().clone();
    let shutdown = tokio::spawn(running.shutdown());
    controller.reached(Phase::Draining).await;
    controller.force();
    assert!(matches!(shutdown.await.unwrap(), Err(RunError::Aborted { stages }) if stages.len() == 2));
}

#[tokio::test]
async fn dropping_the_running_stages_aborts_them() {
    fn deaf(context: StageContext, log: Log) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            let _log = log;
            context.ready();
            std::future::pending().await
        }
        .boxed()
    }
    let (registry, log) = scripted(deaf, deaf);
    let graph = Graph::new(TEXT, registry);
    let running = graph.start();
    running.ready().await.unwrap();
    drop((running, graph));
    support::until(|| Arc::strong_count(&log) == 1).await;
}
