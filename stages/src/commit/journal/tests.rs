use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use futures::future::join_all;

use super::*;
use crate::items::Priority;

fn rd(number: u64) -> RequestId {
    let mut bytes = [0; 32];
    // The low bytes first, so that the index sees keys out of order.
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    RequestId::from(bytes)
}

fn accepted(number: u64) -> Accepted {
    Accepted {
        rd: rd(number),
        kind: TaskKind::Inference,
        priority: Priority::default(),
        accepted_ms: number,
        client: "client".to_owned(),
        task_id: format!("task-{number}"),
        request: number.to_le_bytes().repeat(40),
    }
}

fn certified(number: u64) -> Settled {
    let outcome = Outcome::Certified { receipt: format!("{{\"n\":{number}}}").into_bytes(), answer: vec![7; 20] };
    Settled { rd: rd(number), outcome }
}

fn failed(number: u64) -> Settled {
    Settled { rd: rd(number), outcome: Outcome::Failed { error: b"{}".to_vec() } }
}

fn open(folder: &tempfile::TempDir) -> Arc<Journal> {
    Journal::open(&folder.path().join("commit.redb")).unwrap()
}

#[tokio::test]
async fn what_was_recorded_is_read_back_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder);
    for number in 1..=3 {
        journal.accept(accepted(number)).await.unwrap();
    }
    assert_eq!(journal.settle(vec![certified(1), failed(2)]).await, Ok(vec![true, true]));
    journal.restart(vec![rd(3)]).await.unwrap();
    journal.evidence(vec![b"a".to_vec(), b"b".to_vec(), b"a".to_vec()]).await.unwrap();
    drop(journal);

    let journal = open(&folder);
    let first = journal.task("client", "task-1").unwrap().unwrap();
    assert_eq!(first, Record { accepted: accepted(1), outcome: Some(certified(1).outcome) });
    assert_eq!(journal.record(&rd(2)).unwrap().unwrap().outcome, Some(failed(2).outcome));
    assert_eq!(journal.open_requests().unwrap(), vec![Open { accepted: accepted(3), starts: 2 }]);
    assert_eq!(journal.task("another client", "task-1").unwrap(), None);
    assert_eq!(journal.record(&rd(4)).unwrap(), None);
    assert_eq!(journal.kept_evidence(9).unwrap().len(), 2);
}

#[tokio::test]
async fn the_first_end_of_a_request_stays() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder);
    journal.accept(accepted(1)).await.unwrap();
    assert_eq!(journal.accept(accepted(1)).await, Err(JournalError::Known(rd(1))));
    let effects = journal.settle(vec![failed(1), certified(1), certified(9)]).await;
    assert_eq!(effects, Ok(vec![true, false, false]));
    assert_eq!(journal.record(&rd(1)).unwrap().unwrap().outcome, Some(failed(1).outcome));
}

#[tokio::test]
async fn a_task_id_used_again_names_the_latest_request_and_the_earlier_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder);
    let again = Accepted { task_id: accepted(1).task_id, ..accepted(2) };
    journal.accept(accepted(1)).await.unwrap();
    journal.settle(vec![certified(1)]).await.unwrap();
    journal.accept(again.clone()).await.unwrap();
    assert_eq!(journal.task("client", "task-1").unwrap().unwrap().accepted, again);
    assert_eq!(journal.record(&rd(1)).unwrap().unwrap().outcome, Some(certified(1).outcome));
}

#[tokio::test]
async fn calls_that_wait_together_share_a_transaction_in_the_order_of_arrival() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder);
    let calls = (1..=300).map(|number| {
        let journal = &journal;
        async move {
            journal.accept(accepted(number)).await.unwrap();
            journal.settle(vec![certified(number)]).await.unwrap()
        }
    });
    let effects = join_all(calls).await;
    assert!(effects.iter().all(|effect| effect == &[true]));
    assert_eq!(journal.open_requests().unwrap(), vec![]);
}

#[test]
fn a_log_that_is_open_elsewhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let _journal = open(&folder);
    let error = Journal::open(&folder.path().join("commit.redb")).unwrap_err();
    assert!(matches!(error, JournalError::Locked { .. }), "{error}");
}

#[test]
fn another_version_another_database_and_another_file_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let newer = folder.path().join("newer.redb");
    drop(Journal::open(&newer).unwrap());
    let foreign = folder.path().join("foreign.redb");
    for (path, table, key) in [(&newer, "butterfly", "version"), (&foreign, "other", "version")] {
        let database = redb::Database::create(path).unwrap();
        let transaction = database.begin_write().unwrap();
        let table = redb::TableDefinition::<&str, u64>::new(table);
        transaction.open_table(table).unwrap().insert(key, 99).unwrap();
        transaction.commit().unwrap();
    }
    let error = Journal::open(&newer).unwrap_err();
    assert!(matches!(error, JournalError::Version { found: 99, .. }), "{error}");
    assert!(matches!(Journal::open(&foreign).unwrap_err(), JournalError::Foreign { .. }));
    let text = folder.path().join("text.redb");
    std::fs::write(&text, "not a log".repeat(1000)).unwrap();
    let error = Journal::open(&text).unwrap_err();
    assert!(matches!(error, JournalError::Foreign { .. }), "{error}");
    assert!(error.to_string().contains("text.redb"));
    let absent = folder.path().join("absent/commit.redb");
    let error = Journal::open(&absent).unwrap_err();
    assert!(matches!(error, JournalError::Storage { .. }), "{error}");
}

#[tokio::test]
async fn a_log_that_was_cut_or_overwritten_is_an_error_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder);
    join_all((1..=200).map(|number| journal.accept(accepted(number)))).await;
    journal.settle((1..=100).map(certified).collect()).await.unwrap();
    drop(journal);
    let whole = std::fs::read(folder.path().join("commit.redb")).unwrap();
    let damaged = folder.path().join("damaged.redb");
    let refused = |bytes: &[u8]| {
        std::fs::write(&damaged, bytes).unwrap();
        match Journal::open(&damaged) {
            Err(error) => {
                assert!(matches!(error, JournalError::Damaged { .. } | JournalError::Foreign { .. }), "{error:?}");
                true
            }
            // Pages that no table uses may be overwritten unnoticed.
            Ok(journal) => {
                assert_eq!(journal.open_requests().unwrap().len(), 100);
                false
            }
        }
    };
    for cut in [0, 1, 100, 319, 4096, whole.len() / 2, whole.len() - 1] {
        assert!(refused(&whole[..cut]), "cut at {cut}");
    }
    let mut overwritten = 0;
    for at in (0..whole.len()).step_by(4096) {
        let mut bytes = whole.clone();
        bytes[at..].iter_mut().take(512).for_each(|byte| *byte ^= 0x5a);
        overwritten += usize::from(refused(&bytes));
    }
    assert!(overwritten > 0);
}

/// Not a test of its own: what [`a_killed_process_leaves_a_log_that_holds_all_it_promised`] runs and kills.
#[test]
#[ignore = "run by another test as a process of its own"]
fn killed_writer() {
    let Ok(path) = std::env::var("BUTTERFLY_TEST_JOURNAL") else { return };
    let first: u64 = std::env::var("BUTTERFLY_TEST_FIRST").unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let journal = Journal::open(Path::new(&path)).unwrap();
        let writers = (0..8).map(|writer| {
            let journal = &journal;
            async move {
                for number in (first + writer..).step_by(8) {
                    journal.accept(accepted(number)).await.unwrap();
                    println!("accepted {number}");
                    if number % 3 != 0 {
                        journal.settle(vec![certified(number)]).await.unwrap();
                        println!("settled {number}");
                    }
                }
            }
        });
        join_all(writers).await;
    });
}

#[test]
fn a_killed_process_leaves_a_log_that_holds_all_it_promised() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("commit.redb");
    let (mut promised, mut ended) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..12_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--nocapture", "--exact"])
            .arg(format!("{}::killed_writer", module_path!().split_once("::").unwrap().1))
            .env("BUTTERFLY_TEST_JOURNAL", &path)
            .env("BUTTERFLY_TEST_FIRST", (round * 1_000_000).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        // Killed after another number of lines each time, among them at once.
        for _ in 0..round * 37 {
            output.read_line(&mut text).unwrap();
        }
        child.kill().unwrap();
        output.read_to_string(&mut text).unwrap();
        child.wait().unwrap();
        // The last line may be cut in the middle of its number.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            match line.split_once(' ') {
                Some(("accepted", number)) => assert!(promised.insert(number.parse::<u64>().unwrap())),
                Some(("settled", number)) => assert!(ended.insert(number.parse::<u64>().unwrap())),
                _ => {}
            }
        }
        let journal = Journal::open(&path).unwrap();
        let open: BTreeMap<u64, Open> =
            journal.open_requests().unwrap().into_iter().map(|open| (open.accepted.accepted_ms, open)).collect();
        for number in &promised {
            let record = journal.record(&rd(*number)).unwrap().expect("a promised request is in the log");
            assert_eq!(record.accepted, accepted(*number));
            assert_eq!(record.outcome.is_none(), open.contains_key(number), "request {number}");
            if ended.contains(number) {
                assert_eq!(record.outcome, Some(certified(*number).outcome));
            }
        }
    }
    assert!(promised.len() > 200 && ended.len() > 100, "{} promised, {} ended", promised.len(), ended.len());
}
