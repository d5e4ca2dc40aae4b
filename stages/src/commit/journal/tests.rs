use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

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
        origin: None,
        request: number.to_le_bytes().repeat(40),
    }
}

fn certified(number: u64) -> Settled {
    let outcome = Outcome::Certified {
        receipt: format!("{{\"n\":{number}}}").into_bytes(),
        answer: vec![7; 20],
        sampled: Vec::new(),
    };
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

/// A request may be computed while it is being written: its end is behind it in the log.
#[tokio::test]
async fn an_end_that_enters_behind_its_request_is_never_durable_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder);
    let mut accepting = Vec::new();
    for number in 1..=50 {
        let mut entered = journal.enter(accepted(number), None).await.unwrap();
        if number % 2 == 0 {
            entered.begun().await;
            entered.begun().await;
        }
        let ended = journal.enter_ends(vec![certified(number)], Vec::new()).await.unwrap();
        accepting.push((number, entered, ended));
    }
    for (number, entered, ended) in accepting {
        assert_eq!(ended.durable().await, Ok(vec![true]), "{number}");
        assert!(journal.record(&rd(number)).unwrap().unwrap().outcome.is_some());
        assert_eq!(entered.durable().await, Ok(vec![true]));
    }
    let again = journal.enter(accepted(1), None).await.unwrap();
    assert_eq!(again.durable().await, Ok(vec![false]), "it is known");
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

/// Runs [`killed_writer`] as a process of its own until it has written so many lines, or until it ends.
fn run_and_kill(path: &Path, first: u64, lines: Option<u64>, failpoint: Option<(&str, u32)>) -> String {
    run_and_kill_one("killed_writer", path, first, lines, failpoint)
}

fn run_and_kill_one(name: &str, path: &Path, first: u64, lines: Option<u64>, failpoint: Option<(&str, u32)>) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--ignored", "--nocapture", "--exact"])
        .arg(format!("{}::{name}", module_path!().split_once("::").unwrap().1))
        .env("BUTTERFLY_TEST_JOURNAL", path)
        .env("BUTTERFLY_TEST_FIRST", first.to_string())
        .stdout(Stdio::piped());
    if let Some((step, hits)) = failpoint {
        command.env("BUTTERFLY_TEST_FAILPOINT", step).env("BUTTERFLY_TEST_HITS", hits.to_string());
    }
    let mut child = command.spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    if let Some(lines) = lines {
        for _ in 0..lines {
            output.read_line(&mut text).unwrap();
        }
        child.kill().unwrap();
    }
    output.read_to_string(&mut text).unwrap();
    assert!(!child.wait().unwrap().success());
    text
}

/// What processes were promised before they were killed.
#[derive(Default)]
struct Promises {
    accepted: BTreeSet<u64>,
    settled: BTreeSet<u64>,
}

impl Promises {
    fn note(&mut self, text: &str) {
        // The last line may be cut in the middle of its number.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            match line.split_once(' ') {
                Some(("accepted", number)) => assert!(self.accepted.insert(number.parse().unwrap())),
                Some(("settled", number)) => assert!(self.settled.insert(number.parse().unwrap())),
                _ => {}
            }
        }
    }

    fn are_kept(&self, path: &Path) {
        let journal = Journal::open(path).unwrap();
        let open: BTreeMap<u64, Open> =
            journal.open_requests().unwrap().into_iter().map(|open| (open.accepted.accepted_ms, open)).collect();
        for number in &self.accepted {
            let record = journal.record(&rd(*number)).unwrap().expect("a promised request is in the log");
            assert_eq!(record.accepted, accepted(*number));
            assert_eq!(record.outcome.is_none(), open.contains_key(number), "request {number}");
            if self.settled.contains(number) {
                assert_eq!(record.outcome, Some(certified(*number).outcome));
            }
        }
    }
}

#[test]
fn a_killed_process_leaves_a_log_that_holds_all_it_promised() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("commit.redb");
    let mut promises = Promises::default();
    for round in 0..12_u64 {
        // Killed after another number of lines each time, among them at once.
        promises.note(&run_and_kill(&path, round * 1_000_000, Some(round * 37), None));
        promises.are_kept(&path);
    }
    let (accepted, settled) = (promises.accepted.len(), promises.settled.len());
    assert!(accepted > 200 && settled > 100, "{accepted} accepted, {settled} settled");
}

/// Between any two steps: while the file is begun, before a transaction is durable, and after it is, before anyone is told.
#[test]
fn a_process_that_dies_at_any_step_of_the_log_loses_nothing_it_promised() {
    let begins = [("created", 0), ("applied", 0), ("committed", 0), ("linked", 0), ("named", 0)];
    let writes = [("applied", 1), ("committed", 1), ("applied", 2), ("committed", 5), ("applied", 9)];
    for (step, hits) in begins.into_iter().chain(writes) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("commit.redb");
        let mut promises = Promises::default();
        promises.note(&run_and_kill(&path, 0, None, Some((step, hits))));
        promises.are_kept(&path);
        // The next process goes on where this one was.
        promises.note(&run_and_kill(&path, 1_000_000, Some(20), None));
        promises.are_kept(&path);
        assert!(promises.accepted.len() >= 8, "{step} {hits}");
    }
}

/// Storage that fails for good from some operation on.
#[derive(Debug)]
struct Failing {
    file: redb::backends::FileBackend,
    left: AtomicU32,
    how: std::io::ErrorKind,
}

impl Failing {
    fn spend(&self) -> std::io::Result<()> {
        let spent = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        spent.map(drop).map_err(|_| self.how.into())
    }
}

impl redb::StorageBackend for Failing {
    fn len(&self) -> std::io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.spend().and_then(|()| self.file.set_len(len))
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.spend().and_then(|()| self.file.sync_data())
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.spend().and_then(|()| self.file.write(offset, data))
    }
}

/// A disk that is full, read-only or broken, from every operation on: what was promised stays, nothing more is, and the
/// error says why.
#[tokio::test]
async fn storage_that_fails_at_any_operation_keeps_what_was_promised() {
    use std::io::ErrorKind::{Other, ReadOnlyFilesystem, StorageFull};

    let mut promised_most = 0;
    for (operations, how) in (0..60).zip([StorageFull, ReadOnlyFilesystem, Other].into_iter().cycle()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("commit.redb");
        let journal = Journal::open(&path).unwrap();
        journal.accept(accepted(0)).await.unwrap();
        drop(journal);
        let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let file = redb::backends::FileBackend::new(file).unwrap();
        let storage = Failing { file, left: AtomicU32::new(operations), how };
        let mut promised = vec![0];
        let error = match Log::over(&path, storage).and_then(|log| Journal::over(log, &path)) {
            Err(error) => error,
            Ok(journal) => {
                let mut number = 0;
                let error = loop {
                    number += 1;
                    match journal.accept(accepted(number)).await {
                        Ok(()) => promised.push(number),
                        Err(error) => break error,
                    }
                };
                assert_eq!(journal.failure().as_ref(), Some(&error));
                assert_eq!(journal.settle(vec![certified(0)]).await.as_ref(), Err(&error), "and nothing after it");
                error
            }
        };
        assert!(matches!(error, JournalError::Storage { .. }), "{error:?}");
        assert!(error.to_string().contains(&how.to_string()), "{error}");
        let journal = Journal::open(&path).unwrap();
        for number in &promised {
            assert_eq!(
                journal.record(&rd(*number)).unwrap(),
                Some(Record { accepted: accepted(*number), outcome: None })
            );
        }
        promised_most = promised_most.max(promised.len());
    }
    assert!(promised_most > 2, "every run failed at its first write");
}

#[test]
fn the_log_of_another_node_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder);
    journal.claim("demo/n0").unwrap();
    drop(journal);
    let journal = open(&folder);
    journal.claim("demo/n0").unwrap();
    let error = journal.claim("other/n0").unwrap_err();
    assert!(error.to_string().contains("belongs to demo/n0, and this node is other/n0"), "{error}");
}

/// The checkpoint over what is new, vouched for by the only node of the epoch.
async fn checkpoint(journal: &Journal, receipts_max: usize) -> Segment {
    let epoch = crate::ingest::fixture::epoch(4096);
    let key = k256::ecdsa::SigningKey::from_slice(&[1; 32]).unwrap();
    let signer = butterfly_verify::Signer::new(key, butterfly_verify::NodeIndex(0), &epoch).unwrap();
    let segment = journal.next_segment(&epoch, receipts_max).unwrap();
    let Segment { sequence, previous, entries, through } = &segment;
    let made = butterfly_verify::Checkpoint::over(&epoch, signer.index(), *sequence, *previous, entries).unwrap();
    let signatures = vec![(signer.index(), signer.sign_checkpoint(&epoch, &made).unwrap())];
    let certificate = CheckpointCertificate { checkpoint: made, signatures };
    certificate.check(&epoch).unwrap();
    let certificate = serde_json::to_vec(&certificate).unwrap();
    journal.checkpoint(Checkpointed { sequence: *sequence, through: *through, certificate }).await.unwrap();
    segment
}

/// A log with 13 receipts, the first 10 of them in two checkpoints.
async fn with_checkpoints(path: &Path) {
    let journal = Journal::open(path).unwrap();
    join_all((1..=14).map(|number| journal.accept(accepted(number)))).await;
    journal.settle((1..=13).map(certified).collect()).await.unwrap();
    journal.settle(vec![failed(14)]).await.unwrap();
    assert_eq!((journal.uncovered(), journal.covered()), (13, 0));
    let first = checkpoint(&journal, 6).await;
    assert_eq!((first.sequence, first.entries.len(), first.through, first.previous), (1, 6, 6, Digest::default()));
    assert_eq!(first.entries[0].rd, rd(1));
    let second = checkpoint(&journal, 4).await;
    assert_eq!((second.sequence, second.through), (2, 10));
    assert_ne!(second.previous, Digest::default());
    assert_eq!((journal.uncovered(), journal.covered()), (3, 10));
}

#[tokio::test]
async fn a_start_checks_the_last_checkpoint_and_what_came_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("commit.redb");
    with_checkpoints(&path).await;
    let epoch = crate::ingest::fixture::epoch(4096);
    let journal = open(&folder);
    assert_eq!(journal.restore(&epoch), Ok(3));
    assert_eq!((journal.uncovered(), journal.covered()), (3, 10));
    drop(journal);
    // Receipts 1 to 6 are of an older checkpoint: a start does not look at them.
    for (number, found) in [(12, Some("receipt 12")), (8, Some("checkpoint 2")), (2, None)] {
        let copy = folder.path().join("changed.redb");
        std::fs::copy(&path, &copy).unwrap();
        let database = redb::Database::open(&copy).unwrap();
        let transaction = database.begin_write().unwrap();
        let table = redb::TableDefinition::<u64, &[u8; 64]>::new("receipts");
        transaction.open_table(table).unwrap().insert(number, &[9; 64]).unwrap();
        transaction.commit().unwrap();
        drop(database);
        let restored = Journal::open(&copy).unwrap().restore(&epoch);
        match found {
            None => assert_eq!(restored, Ok(3)),
            Some(what) => {
                let error = restored.unwrap_err();
                assert!(matches!(error, JournalError::Damaged { .. }) && error.to_string().contains(what), "{error}");
            }
        }
    }
}

/// A log too large to be read as a whole opens without it, is written on, and survives a crash.
#[tokio::test]
async fn a_large_log_opens_without_being_read_as_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("commit.redb");
    with_checkpoints(&path).await;
    let epoch = crate::ingest::fixture::epoch(4096);
    for round in 0..3 {
        let journal = Journal::over(Log::open_whole_up_to(&path, 0).unwrap(), &path).unwrap();
        assert_eq!(journal.restore(&epoch), Ok(3 + round));
        journal.accept(accepted(100 + round)).await.unwrap();
        journal.settle(vec![certified(100 + round)]).await.unwrap();
        // As a crash leaves it: copied while it is open.
        let crashed = folder.path().join("crashed.redb");
        std::fs::copy(&path, &crashed).unwrap();
        let again = Journal::over(Log::open_whole_up_to(&crashed, 0).unwrap(), &crashed).unwrap();
        assert_eq!(again.restore(&epoch), Ok(4 + round));
        assert_eq!(again.record(&rd(100 + round)).unwrap().unwrap().outcome, Some(certified(100 + round).outcome));
    }
}

/// Everything that was accepted before this goes.
fn older_than(old_ms: u64) -> Window {
    Window { old_ms, records_max: u64::MAX, young_ms: 0 }
}

/// All beyond so many go, however young.
fn at_most(records_max: u64) -> Window {
    Window { old_ms: 0, records_max, young_ms: u64::MAX }
}

async fn prune_all(journal: &Journal, window: Window) {
    while journal.prune(window).await.unwrap() {}
}

#[tokio::test]
async fn what_is_too_old_or_too_much_goes_with_everything_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let journal = open(&folder);
    let key = |number: u64| RetryKey { key: [number as u8; 32], fingerprint: [0; 32] };
    for number in 1..=20 {
        // The key of the first is used again, and the task id of the second.
        let again = if number == 12 { 1 } else { number };
        let task_id = if number == 13 { accepted(2).task_id } else { accepted(number).task_id };
        let entered = journal.enter(Accepted { task_id, ..accepted(number) }, Some(key(again))).await.unwrap();
        entered.durable().await.unwrap();
        if number != 3 {
            journal.settle(vec![certified(number)]).await.unwrap();
        }
    }
    prune_all(&journal, older_than(9)).await;
    assert!(journal.record(&rd(1)).unwrap().is_some(), "no checkpoint has its receipt yet");
    checkpoint(&journal, 6).await;
    checkpoint(&journal, 8).await;
    prune_all(&journal, older_than(9)).await;
    let kept = |number: u64| journal.record(&rd(number)).unwrap().is_some();
    let left: Vec<u64> = (1..=20).filter(|number| kept(*number)).collect();
    assert_eq!(left, [3].into_iter().chain(9..=20).collect::<Vec<u64>>(), "what is open stays");
    assert_eq!(journal.task("client", "task-1").unwrap(), None);
    assert_eq!(journal.task("client", "task-2").unwrap().unwrap().accepted.rd, rd(13));
    assert_eq!(journal.keyed(&[1; 32]).unwrap().unwrap().1.accepted.rd, rd(12));
    assert_eq!(journal.keyed(&[2; 32]).unwrap(), None);
    let epoch = crate::ingest::fixture::epoch(4096);
    assert_eq!((journal.restore(&epoch), journal.covered()), (Ok(5), 14));
    // Those that could be sent again stay, however many they are.
    prune_all(&journal, Window { old_ms: 0, records_max: 2, young_ms: 11 }).await;
    assert_eq!((9..=20).filter(|number| kept(*number)).collect::<Vec<u64>>(), (11..=20).collect::<Vec<u64>>());
    checkpoint(&journal, 1024).await;
    prune_all(&journal, at_most(0)).await;
    assert_eq!((1..=20).filter(|number| kept(*number)).collect::<Vec<u64>>(), [3, 20], "the newest keeps its number");
    journal.accept(accepted(1)).await.unwrap();
    assert_eq!(journal.open_requests().unwrap().len(), 2);
    drop(journal);
    assert_eq!(open(&folder).restore(&epoch), Ok(0));
}

/// What one step of the property below does.
#[derive(Debug, Clone)]
enum Move {
    Accept,
    Settle(proptest::sample::Index),
    Checkpoint,
    Prune { old: u64, records_max: u64, young: u64 },
    Reopen,
}

fn moves() -> impl proptest::strategy::Strategy<Value = Vec<Move>> {
    use proptest::prelude::*;

    let prune = (0..30_u64, 0..12_u64, 0..30_u64);
    let prune = prune.prop_map(|(old, records_max, young)| Move::Prune { old, records_max, young });
    let one = prop_oneof![
        6 => Just(Move::Accept),
        6 => any::<prop::sample::Index>().prop_map(Move::Settle),
        2 => Just(Move::Checkpoint),
        3 => prune,
        1 => Just(Move::Reopen),
    ];
    prop::collection::vec(one, 1..60)
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 24, ..Default::default() })]

    /// Whatever happens in whatever order: what is open and what is within the window stays, what is outside goes unless a
    /// start or the next checkpoint needs it, and the log always holds what a start relies on.
    #[test]
    fn a_log_keeps_its_window_and_nothing_else(moves in moves()) {
        let folder = tempfile::tempdir().unwrap();
        let epoch = crate::ingest::fixture::epoch(4096);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut journal = open(&folder);
        let (mut now, mut unsettled, mut finished) = (0, Vec::new(), Vec::new());
        for one in moves {
            match one {
                Move::Accept => {
                    now += 1;
                    runtime.block_on(journal.accept(accepted(now))).unwrap();
                    unsettled.push(now);
                }
                Move::Settle(which) if !unsettled.is_empty() => {
                    let number = unsettled.swap_remove(which.index(unsettled.len()));
                    let end = if number % 3 == 0 { failed(number) } else { certified(number) };
                    runtime.block_on(journal.settle(vec![end])).unwrap();
                    finished.push(number);
                }
                Move::Settle(_) => {}
                Move::Checkpoint if journal.uncovered() > 0 => drop(runtime.block_on(checkpoint(&journal, 1024))),
                Move::Checkpoint => {}
                Move::Prune { old, records_max, young } => {
                    let window =
                        Window { old_ms: now.saturating_sub(old), records_max, young_ms: now.saturating_sub(young) };
                    runtime.block_on(prune_all(&journal, window));
                    let uncovered = journal.next_segment(&epoch, usize::MAX).unwrap().entries;
                    finished.sort_unstable();
                    let is_kept = |number: &u64| journal.record(&rd(*number)).unwrap().is_some();
                    let mut excess = finished.len().saturating_sub(usize::try_from(records_max).unwrap());
                    for number in &finished {
                        let is_needed = *number == now || uncovered.iter().any(|entry| entry.rd == rd(*number));
                        let is_outside = *number < window.old_ms || (excess > 0 && *number < window.young_ms);
                        proptest::prop_assert_eq!(is_kept(number), is_needed || !is_outside, "{}", number);
                        excess = excess.saturating_sub(usize::from(!is_kept(number)));
                    }
                    finished.retain(is_kept);
                }
                Move::Reopen => {
                    drop(journal);
                    journal = open(&folder);
                }
            }
            unsettled.sort_unstable();
            let left: Vec<u64> = journal.open_requests().unwrap().iter().map(|open| open.accepted.accepted_ms).collect();
            proptest::prop_assert_eq!(&left, &unsettled);
            proptest::prop_assert_eq!(journal.restore(&epoch), Ok(journal.uncovered()));
        }
    }
}

/// Not a test of its own: what [`a_process_that_dies_while_it_lets_go_loses_nothing_within_the_window`] runs and kills.
#[test]
#[ignore = "run by another test as a process of its own"]
fn killed_pruner() {
    let Ok(path) = std::env::var("BUTTERFLY_TEST_JOURNAL") else { return };
    let first: u64 = std::env::var("BUTTERFLY_TEST_FIRST").unwrap().parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let journal = Journal::open(Path::new(&path)).unwrap();
        for number in first.. {
            journal.accept(accepted(number)).await.unwrap();
            println!("accepted {number}");
            if number % 7 != 0 {
                journal.settle(vec![certified(number)]).await.unwrap();
                println!("settled {number}");
            }
            if number % 4 == 0 {
                checkpoint(&journal, 1024).await;
                prune_all(&journal, at_most(KEPT)).await;
            }
        }
    });
}

/// Finished requests that [`killed_pruner`] keeps.
const KEPT: u64 = 10;

#[test]
fn a_process_that_dies_while_it_lets_go_loses_nothing_within_the_window() {
    let epoch = crate::ingest::fixture::epoch(4096);
    // Long enough for every step of letting go to be among them.
    for (step, hits) in (60..72).map(|hits| (if hits % 2 == 0 { "applied" } else { "committed" }, hits)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("commit.redb");
        let mut promises = Promises::default();
        promises.note(&run_and_kill_one("killed_pruner", &path, 1, None, Some((step, hits))));
        promises.note(&run_and_kill_one("killed_pruner", &path, 1_000, Some(60), None));
        let journal = Journal::open(&path).unwrap();
        assert_eq!(journal.restore(&epoch), Ok(journal.uncovered()));
        for number in promises.accepted.iter().filter(|number| **number % 7 == 0) {
            assert!(journal.record(&rd(*number)).unwrap().is_some(), "{step} {hits}: open request {number}");
        }
        let newest: Vec<u64> = promises.settled.iter().rev().take(KEPT as usize).copied().collect();
        for number in &newest {
            let record = journal.record(&rd(*number)).unwrap().expect("within the window");
            assert_eq!(record.outcome, Some(certified(*number).outcome));
        }
        let kept = promises.settled.iter().filter(|number| journal.record(&rd(**number)).unwrap().is_some()).count();
        assert!(kept < promises.settled.len(), "{step} {hits}: {kept} are kept, and nothing has gone");
    }
}
