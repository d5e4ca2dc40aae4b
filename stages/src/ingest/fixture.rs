//! What the tests of this folder stand on: a board over a journal of its own, on manual time.

use std::sync::Arc;

use butterfly_engine::clock::{Clock, ManualClock};
use butterfly_engine::telemetry::{TaskLabels, TaskStatus, Telemetry};
use butterfly_verify::{
    Answer, Digest, Epoch, EpochParts, Finish, Input, Limits, Member, Mode, NodeIndex, Params, PublicKey, Receipt,
    Request, RequestParts, SliceReplicas,
};
use k256::ecdsa::SigningKey;

use super::board::{Board, Completed, NewTask, Room, TaskResult};
use super::reply::{ReplyReceiver, reply};
use crate::commit::{Accepted, Journal, TaskKind};
use crate::error::SchedulingError;
use crate::items::Priority;

/// Tasks that the board admits, and those of them that may run.
pub(super) const ROOM: usize = 5;
pub(super) const RUNNING: usize = 2;

pub(super) struct Fixture {
    _folder: tempfile::TempDir,
    pub(super) journal: Arc<Journal>,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) clock: ManualClock,
    pub(super) board: Board,
}

pub(super) fn fixture() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let journal = Journal::open(&folder.path().join("commit.redb")).unwrap();
    let clock = ManualClock::new(1_000_000);
    let shared: Arc<dyn Clock> = Arc::new(clock.clone());
    let telemetry = Arc::new(Telemetry::with_clock("n0".parse().unwrap(), Arc::clone(&shared)));
    let room = Room { waiting_max: ROOM - RUNNING, tasks_max: ROOM, bytes_max: 1 << 20 };
    let board = Board::new(Arc::clone(&journal), Arc::clone(&telemetry), shared, room);
    Fixture { _folder: folder, journal, telemetry, clock, board }
}

pub(super) fn request(number: u8, client: &str) -> Request {
    let parts = RequestParts {
        client: client.to_owned(),
        nonce: [number; 32],
        model: "tiny".to_owned(),
        mode: Mode::Full,
        input: Input::Tokens { tokens: vec![1, 2] },
        params: Params { max_tokens: 8, ..Params::default() },
        now_ms: 1_000_000,
        expires_ms: 1_600_000,
    };
    Request::new(parts).unwrap()
}

pub(super) fn completed(request: &Request) -> TaskResult {
    let answer =
        Answer::Text { tokens: vec![5, 6], text: b"hi".to_vec(), finish: Finish::Stop, prompt_tokens: 2, choice: 0 };
    let receipt = Receipt {
        version: 1,
        epoch: Digest::default(),
        rd: request.digest(),
        mode: Mode::Full,
        answer_root: answer.root(),
        slices: Vec::new(),
    };
    let (task_id, request, sampled) = ("task".to_owned(), request.clone(), Vec::new());
    Ok(Arc::new(Completed { task_id, request, answer, receipt, sampled, cached: false }))
}

impl Fixture {
    pub(super) fn open(&self, task_id: &str, request: &Request) -> Result<ReplyReceiver, SchedulingError> {
        let (sink, receiver) = reply(8);
        let task = NewTask {
            task_id: task_id.to_owned(),
            kind: TaskKind::Completion,
            request: request.clone(),
            attempt: 1,
            sink: Some(sink),
        };
        self.board.admit(task).map(|()| receiver)
    }

    pub(super) async fn accept(&self, request: &Request) {
        let accepted = Accepted {
            rd: request.digest(),
            kind: TaskKind::Completion,
            priority: Priority::default(),
            accepted_ms: 0,
            client: request.client.clone(),
            task_id: request.digest().to_string(),
            origin: None,
            request: request.encode(),
        };
        self.journal.accept(accepted).await.unwrap();
    }

    pub(super) fn gauges(&self) -> (i64, i64) {
        let metrics = self.telemetry.metrics();
        (metrics.tasks_waiting.get(), metrics.tasks_running.get())
    }

    pub(super) fn ended(&self, status: TaskStatus) -> u64 {
        let labels = TaskLabels { model: "tiny".to_owned(), kind: TaskKind::Completion.label(), status };
        self.telemetry.metrics().tasks_total.of(&labels).get()
    }
}

pub(crate) fn epoch(positions_max: u32) -> Epoch {
    let key = SigningKey::from_slice(&[1; 32]).unwrap();
    let public: [u8; 33] = key.verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap();
    Epoch::new(EpochParts {
        cluster: "test".into(),
        number: 1,
        max_byzantine: 0,
        roster: vec![Member { id: "n0".into(), public_key: PublicKey(public), domain: None }],
        model: "tiny-rust".into(),
        manifest: Default::default(),
        profile: "cpu-1".into(),
        profile_digest: Default::default(),
        slices: vec![SliceReplicas { first_layer: 0, last_layer: 8, replicas: vec![NodeIndex(0)] }],
        limits: Limits { positions_max, ..Limits::default() },
    })
    .unwrap()
}
