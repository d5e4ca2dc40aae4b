use std::sync::atomic::{AtomicUsize, Ordering};

use futures::FutureExt;
use proptest::prelude::*;

use super::super::fixture::{ROOM, RUNNING, completed, fixture, request};
use super::super::reply::{Reply, reply};
use super::*;

/// A permit that counts how often it was given back.
struct Permit(Arc<AtomicUsize>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn permit() -> (Box<Permit>, Arc<AtomicUsize>) {
    let returned = Arc::new(AtomicUsize::new(0));
    (Box::new(Permit(Arc::clone(&returned))), returned)
}

#[test]
fn a_task_ends_once_and_gives_its_permit_back() {
    let fixture = fixture();
    let request = request(1, "");
    let rd = request.digest();
    let mut waiting = fixture.open("task", &request).unwrap();
    assert_eq!(fixture.gauges(), (1, 0));
    let (permit, returned) = permit();
    fixture.board.running(&rd, permit);
    assert_eq!(fixture.gauges(), (0, 1));
    fixture.board.progress(&rd, 0, &[5.into()]);
    fixture.board.settle(&rd, completed(&request));
    fixture.board.settle(&rd, Err(TaskError::Numeric));
    assert_eq!(returned.load(Ordering::Relaxed), 1);
    assert_eq!(fixture.gauges(), (0, 0));
    assert_eq!((fixture.ended(TaskStatus::Completed), fixture.ended(TaskStatus::Failed)), (1, 0));
    assert!(matches!(waiting.next().now_or_never(), Some(Reply::Tokens(tokens)) if tokens == [5.into()]));
    assert!(waiting.end().now_or_never().unwrap().is_ok());
    assert!(!fixture.board.is_living(&rd));
    assert!(fixture.board.drained().now_or_never().is_some());
}

#[test]
fn a_permit_for_a_task_that_is_over_comes_straight_back() {
    let fixture = fixture();
    let request = request(1, "");
    let (permit, returned) = permit();
    fixture.board.running(&request.digest(), permit);
    assert_eq!(returned.load(Ordering::Relaxed), 1);
    assert_eq!(fixture.gauges(), (0, 0));
}

#[test]
fn ids_of_living_tasks_are_taken_for_their_client_alone() {
    let fixture = fixture();
    let (one, two, three) = (request(1, "a"), request(2, "a"), request(3, "b"));
    let _waiting = fixture.open("task", &one).unwrap();
    assert_eq!(fixture.open("task", &two).unwrap_err(), SchedulingError::TaskAlreadyExists("task".into()));
    assert_eq!(fixture.open("other", &one).unwrap_err(), SchedulingError::TaskAlreadyExists("other".into()));
    let _elsewhere = fixture.open("task", &three).unwrap();
    assert_eq!(fixture.board.status("a", "task").unwrap().rd, one.digest());
    assert_eq!(fixture.board.status("b", "task").unwrap().rd, three.digest());
    assert_eq!(fixture.board.status("b", &one.digest().to_string()), None, "not of this client");
    fixture.board.settle(&one.digest(), completed(&one));
    assert!(fixture.open("task", &two).is_ok(), "the id is free again");
}

#[tokio::test]
async fn a_failure_is_in_the_journal_before_it_is_told_and_stops_the_work() {
    let fixture = fixture();
    let request = request(1, "");
    let rd = request.digest();
    let mut waiting = fixture.open("task", &request).unwrap();
    fixture.accept(&request).await;
    fixture.board.fail(&rd, TaskError::Numeric).await;
    assert_eq!(waiting.end().await.unwrap_err(), TaskError::Numeric);
    let Some(Outcome::Failed { error }) = fixture.journal.record(&rd).unwrap().unwrap().outcome else { panic!() };
    assert!(String::from_utf8(error).unwrap().contains("numeric_failure"));
    let mut cancellations = fixture.board.take_cancellations().unwrap();
    assert_eq!(cancellations.recv().await, Some(rd));
    assert!(fixture.board.take_cancellations().is_none());
}

#[tokio::test]
async fn of_two_ends_the_one_in_the_journal_is_told() {
    let fixture = fixture();
    let request = request(1, "");
    let rd = request.digest();
    let mut waiting = fixture.open("task", &request).unwrap();
    fixture.accept(&request).await;
    let outcome = Outcome::Certified { receipt: b"{}".to_vec(), answer: Vec::new(), sampled: Vec::new() };
    fixture.journal.settle(vec![Settled { rd, outcome }]).await.unwrap();
    fixture.board.fail(&rd, TaskError::Numeric).await;
    assert!(waiting.next().now_or_never().is_none(), "the failure came second");
    fixture.board.settle(&rd, completed(&request));
    assert!(waiting.end().await.is_ok());
}

#[tokio::test]
async fn a_task_whose_client_has_gone_is_dead_at_once_and_buried_in_the_journal() {
    let fixture = fixture();
    let request = request(1, "");
    let rd = request.digest();
    let mut waiting = fixture.open("task", &request).unwrap();
    fixture.accept(&request).await;
    let (permit, returned) = permit();
    fixture.board.running(&rd, permit);
    fixture.board.cancel(&rd);
    fixture.board.cancel(&rd);
    assert_eq!(returned.load(Ordering::Relaxed), 1);
    assert!(!fixture.board.is_living(&rd));
    assert_eq!(fixture.board.request(&rd), None);
    assert_eq!(fixture.gauges(), (0, 0));
    assert_eq!(waiting.end().await.unwrap_err(), TaskError::Cancelled);
    fixture.board.settle(&rd, completed(&request));
    assert_eq!(fixture.board.living(), 1, "its end is not in the journal yet");
    assert!(fixture.board.drained().now_or_never().is_none());
    fixture.board.bury().await;
    assert_eq!(fixture.board.living(), 0);
    assert_eq!((fixture.ended(TaskStatus::Cancelled), fixture.ended(TaskStatus::Completed)), (1, 0));
    assert!(matches!(fixture.journal.record(&rd).unwrap().unwrap().outcome, Some(Outcome::Failed { .. })));
    assert_eq!(fixture.board.take_cancellations().unwrap().recv().now_or_never(), Some(Some(rd)));
    assert!(fixture.board.bury().now_or_never().is_none(), "nothing is left to bury");
}

#[test]
fn tasks_that_stand_still_are_found_and_those_that_move_are_not() {
    let fixture = fixture();
    let timeout = Duration::from_secs(30);
    let (running, waiting) = (request(1, ""), request(2, ""));
    let _first = fixture.open("running", &running).unwrap();
    let _second = fixture.open("waiting", &waiting).unwrap();
    fixture.board.running(&running.digest(), Box::new(()));
    let stalled = || fixture.board.stalled(timeout).into_iter().map(|(rd, _)| rd).collect::<Vec<_>>();
    fixture.clock.advance(Duration::from_secs(20));
    fixture.board.progress(&running.digest(), 0, &[1.into()]);
    fixture.clock.advance(Duration::from_secs(20));
    assert_eq!(stalled(), vec![], "what waits stands still only if the whole board does");
    assert_eq!(fixture.board.still_for(), Duration::from_secs(20));
    fixture.clock.advance(Duration::from_secs(10));
    assert_eq!(stalled().len(), 2);
    fixture.board.progress(&running.digest(), 1, &[1.into()]);
    assert_eq!(stalled(), vec![]);
    for index in 2..30 {
        fixture.clock.advance(Duration::from_secs(20));
        fixture.board.progress(&running.digest(), index, &[1.into()]);
    }
    assert_eq!(stalled().len(), 2, "both have expired, however much they move");
}

#[test]
fn tokens_count_for_latency_once_each() {
    let fixture = fixture();
    let request = request(1, "");
    let rd = request.digest();
    let _waiting = fixture.open("task", &request).unwrap();
    fixture.clock.advance(Duration::from_millis(100));
    fixture.board.progress(&rd, 0, &[1.into(), 2.into()]);
    fixture.board.progress(&rd, 0, &[1.into(), 2.into()]);
    fixture.board.progress(&rd, 5, &[6.into()]);
    fixture.clock.advance(Duration::from_millis(40));
    fixture.board.progress(&rd, 1, &[2.into(), 3.into(), 4.into()]);
    let label = ModelLabel { model: "tiny".to_owned() };
    let metrics = fixture.telemetry.metrics();
    assert_eq!(metrics.time_to_first_token_seconds.of(&label).quantiles().count, 1);
    let between = metrics.inter_token_latency_seconds.of(&label).quantiles();
    assert_eq!(between.count, 3);
    assert!((between.max - 0.020).abs() < 0.001, "{between:?}");
}

/// Tokens of a prompt are told before the answer; they are not the first of it, and a client that joins later hears them too.
#[test]
fn tokens_of_a_prompt_are_told_and_not_counted_as_generated() {
    let fixture = fixture();
    let mut parts = request(1, "").parts().clone();
    (parts.params.logprobs, parts.params.prompt_logprobs) = (Some(0), true);
    let request = Request::new(parts).unwrap();
    let rd = request.digest();
    let _waiting = fixture.open("task", &request).unwrap();
    let label = ModelLabel { model: "tiny".to_owned() };
    let first = || fixture.telemetry.metrics().time_to_first_token_seconds.of(&label).quantiles().count;
    let tokens = || fixture.board.status("", "task").unwrap().tokens;
    fixture.board.progress(&rd, 0, &[1.into(), 2.into()]);
    assert_eq!((first(), tokens()), (0, 0));
    fixture.board.progress(&rd, 1, &[2.into(), 5.into()]);
    assert_eq!((first(), tokens()), (1, 1));
    let told = [1.into(), 2.into(), 5.into()];
    assert_eq!(fixture.board.sampled(&rd), told);
    let (sink, mut late) = reply(10);
    assert!(fixture.board.join(&rd, sink).unwrap());
    assert!(matches!(late.next().now_or_never(), Some(Reply::Tokens(tokens)) if tokens == told));
}

/// Whoever finds no room is told when those who wait will have been served, at the rate at which tasks last ended.
#[test]
fn the_wait_for_room_follows_from_the_queue_and_from_how_fast_tasks_end() {
    let fixture = fixture();
    let wait = || match fixture.board.queue_full() {
        SchedulingError::QueueFull { retry_after, .. } => retry_after.as_secs(),
        other => panic!("{other}"),
    };
    assert_eq!(wait(), 1, "nothing is known yet");
    let requests: Vec<Request> = (0..ROOM as u8).map(|number| request(number, "")).collect();
    let _waiting: Vec<_> =
        requests.iter().enumerate().map(|(at, one)| fixture.open(&format!("task-{at}"), one).unwrap()).collect();
    for request in &requests[..2] {
        fixture.board.running(&request.digest(), Box::new(()));
        fixture.board.settle(&request.digest(), completed(request));
        fixture.clock.advance(Duration::from_secs(3));
    }
    // Two ended in six seconds.
    assert_eq!(wait(), 3 * (ROOM as u64 - 2));
    fixture.clock.advance(Duration::from_secs(10_000));
    assert_eq!(wait(), 120, "nothing has ended for hours");
}

#[test]
fn a_task_whose_client_may_come_back_is_deserted_only_after_a_while() {
    let fixture = fixture();
    let (one, other) = (request(1, "lab"), request(2, "lab"));
    let rd = one.digest();
    let patience = Duration::from_secs(60);
    let first = fixture.open("task", &one).unwrap();
    let (sink, second) = reply(8);
    assert!(fixture.board.join(&rd, sink).unwrap());
    drop(first);
    fixture.board.part(&rd);
    fixture.clock.advance(patience);
    assert!(fixture.board.deserted(patience).is_empty(), "somebody still waits");
    drop(second);
    fixture.board.part(&rd);
    fixture.clock.advance(patience - Duration::from_millis(1));
    assert!(fixture.board.deserted(patience).is_empty());
    let (sink, mut third) = reply(8);
    assert!(fixture.board.join(&rd, sink).unwrap());
    fixture.clock.advance(patience);
    assert!(fixture.board.deserted(patience).is_empty(), "it came back");
    fixture.board.settle(&rd, completed(&one));
    assert!(third.end().now_or_never().unwrap().is_ok());
    assert!(!fixture.board.join(&rd, reply(8).0).unwrap(), "it has ended");
    drop(fixture.open("other", &other).unwrap());
    fixture.board.part(&other.digest());
    fixture.clock.advance(patience);
    assert_eq!(fixture.board.deserted(patience), [other.digest()]);
}

proptest! {
    /// Whatever happens to tasks, as many wait and run as there is room for, and not one more or less.
    #[test]
    fn exactly_as_many_are_admitted_as_there_is_room_for(moves in prop::collection::vec((0u8..6, any::<prop::sample::Index>()), 0..60)) {
        let fixture = fixture();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (mut living, mut running) = (Vec::new(), Vec::new());
        for (number, (what, which)) in (0u8..).zip(moves) {
            if what < 3 || living.is_empty() {
                let request = request(number, "");
                match fixture.open(&number.to_string(), &request) {
                    Ok(waiting) => living.push((request.digest(), waiting)),
                    Err(error) => {
                        let full = SchedulingError::QueueFull { limit: ROOM - RUNNING, retry_after: RETRY_SOON };
                        prop_assert_eq!((error, living.len()), (full, ROOM));
                    }
                }
            } else if what == 3 {
                let (rd, _) = living[which.index(living.len())];
                if !running.contains(&rd) {
                    fixture.board.running(&rd, Box::new(()));
                    running.push(rd);
                }
            } else {
                let (rd, _) = living.swap_remove(which.index(living.len()));
                running.retain(|running| *running != rd);
                if what == 4 {
                    fixture.board.settle(&rd, Err(TaskError::Numeric));
                } else {
                    fixture.board.cancel(&rd);
                    runtime.block_on(fixture.board.bury());
                }
            }
            prop_assert!(living.len() <= ROOM);
            prop_assert_eq!(fixture.board.check_room(0).is_ok(), living.len() < ROOM);
            prop_assert_eq!(fixture.gauges(), ((living.len() - running.len()) as i64, running.len() as i64));
        }
    }
}

#[test]
fn what_was_promised_before_is_taken_up_again_even_without_room_and_bytes_bound_what_is_new() {
    let fixture = fixture();
    let again = |number: u8| {
        let task = NewTask {
            task_id: number.to_string(),
            kind: TaskKind::Inference,
            request: request(number, ""),
            attempt: 2,
            sink: None,
        };
        fixture.board.open(task)
    };
    assert!((0..10).all(|number| again(number).is_ok()));
    assert!(matches!(fixture.open("new", &request(20, "")), Err(SchedulingError::QueueFull { .. })));
    for number in 0..10 {
        fixture.board.settle(&request(number, "").digest(), Err(TaskError::Numeric));
    }
    assert!(fixture.board.check_room(1 << 20).is_ok());
    let _waiting = fixture.open("new", &request(20, "")).unwrap();
    assert!(fixture.board.check_room(1 << 20).is_err(), "the room for bytes is not all free");
}

#[test]
fn a_clock_that_jumps_ends_what_expired_and_nothing_else() {
    let fixture = fixture();
    let timeout = Duration::from_secs(30);
    let request = request(1, "");
    let _waiting = fixture.open("task", &request).unwrap();
    fixture.board.running(&request.digest(), Box::new(()));
    fixture.clock.advance(Duration::from_secs(10));
    fixture.clock.correct(request.now_ms / 2);
    assert_eq!(fixture.board.stalled(timeout), vec![], "back by minutes, and nothing has moved for 10 s");
    fixture.clock.advance(Duration::from_secs(20));
    let stood_still = TaskError::NoProgress(timeout);
    assert_eq!(fixture.board.stalled(timeout), vec![(request.digest(), stood_still)], "stillness knows no calendar");
    fixture.board.progress(&request.digest(), 0, &[1.into()]);
    assert_eq!(fixture.board.stalled(timeout), vec![]);
    fixture.clock.correct(request.now_ms + 3_600_000);
    let expired = TaskError::DeadlineExceeded(Duration::from_secs(600));
    assert_eq!(
        fixture.board.stalled(timeout),
        vec![(request.digest(), expired)],
        "replicas with this clock refuse it too"
    );
}
