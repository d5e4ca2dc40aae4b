//! The durable log of a node: accepted requests, their ends, and evidence, on a thread of its own.
//!
//! Group commit: whatever waits when a transaction begins goes into it together, so the price of making things durable is
//! shared by as many as are waiting. A method that changes the log returns when its change is on disk; [`Journal::enter`]
//! and its like return when its place in the order is fixed, and give what resolves when it is on disk.
//!
//! Invariants: changes are applied in the order in which the calls entered the queue; the queue is bounded in entries and
//! bytes; after a failed transaction the log takes nothing more, so that nothing later is durable while something earlier is
//! not.
//!
//! It refuses to know who waits for an answer, and when a checkpoint is due.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use butterfly_verify::checkpoint::CHECKPOINT_RECEIPTS_MAX;
use butterfly_verify::{Answer, CheckpointCertificate, Digest, Entry, Epoch};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::log::{Change, Log};
pub use super::log::{Checkpointed, JournalError, TASK_ID_BYTES_MAX, Window};
pub use super::record::{Accepted, Open, Outcome, Record, RetryKey, Settled, TaskKind};
use crate::items::RequestId;

/// Calls that wait for the log at most; further ones wait to enter the queue.
pub const CALLS_WAITING_MAX: usize = 4096;
/// Calls that share a transaction at most.
const CALLS_AT_ONCE_MAX: usize = 1024;
/// Bytes that wait for the log at most.
const BYTES_WAITING_MAX: u32 = 64 << 20;

/// The durable log.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    log: Arc<Log>,
    room: Arc<Semaphore>,
    calls: Option<mpsc::Sender<Call>>,
    failure: watch::Receiver<Option<JournalError>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Receipts that the next checkpoint covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The number of the checkpoint.
    pub sequence: u64,
    /// The digest of the one before; zeros before the first.
    pub previous: Digest,
    /// The receipts; none when there are no new ones.
    pub entries: Vec<Entry>,
    /// The number of the last of them.
    pub through: u64,
}

/// Changes that have their place in the log: whatever enters later is durable later, or with them.
#[derive(Debug)]
#[must_use = "nothing may be promised before the changes are on disk"]
pub struct Entered {
    begun: oneshot::Receiver<()>,
    outcome: oneshot::Receiver<Result<Vec<bool>, JournalError>>,
    failure: watch::Receiver<Option<JournalError>>,
}

impl Entered {
    /// Waits until they are being written, together with all that entered before it began. Safe to cancel.
    pub async fn begun(&mut self) {
        if !self.begun.is_terminated() {
            // Where the log takes nothing more there is nothing to wait for; that is said in the end.
            let _ = (&mut self.begun).await;
        }
    }

    /// Waits until the changes are on disk. For each it says whether it had an effect. Dropping the future changes nothing
    /// about the log.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub async fn durable(self) -> Result<Vec<bool>, JournalError> {
        let closed = || self.failure.borrow().clone().unwrap_or(JournalError::Closed);
        self.outcome.await.unwrap_or_else(|_| Err(closed()))
    }
}

/// Changes that one caller wants made, in one transaction.
#[derive(Debug)]
struct Call {
    changes: Vec<Change>,
    begun: Option<oneshot::Sender<()>>,
    done: oneshot::Sender<Result<Vec<bool>, JournalError>>,
    _room: OwnedSemaphorePermit,
}

impl Journal {
    /// Opens the log at `path`, or begins one where there is none.
    ///
    /// # Errors
    /// When another process has it open, when it was written in another layout, when it is damaged or something else
    /// than a log, and when the file system refuses.
    pub fn open(path: &Path) -> Result<Arc<Self>, JournalError> {
        Self::over(Log::open(path)?, path)
    }

    fn over(log: Log, path: &Path) -> Result<Arc<Self>, JournalError> {
        let log = Arc::new(log);
        let (calls, queue) = mpsc::channel(CALLS_WAITING_MAX);
        let (failed, failure) = watch::channel(None);
        let thread = std::thread::Builder::new().name("butterfly-journal".to_owned());
        let thread = thread.spawn({
            let log = Arc::clone(&log);
            move || write_until_closed(&log, queue, &failed)
        });
        let thread =
            thread.map_err(|error| JournalError::Storage { path: path.to_owned(), reason: error.to_string() })?;
        Ok(Arc::new(Self {
            path: path.to_owned(),
            log,
            room: Arc::new(Semaphore::new(BYTES_WAITING_MAX as usize)),
            calls: Some(calls),
            failure,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// Makes the log that of a node; `node` names it and its cluster. It writes the file: a short blocking call.
    ///
    /// # Errors
    /// When it is another's, and when the log cannot be written.
    pub fn claim(&self, node: &str) -> Result<(), JournalError> {
        self.log.claim(node)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Records that a request was accepted.
    ///
    /// A cancelled call may or may not have been recorded.
    ///
    /// # Errors
    /// When the request is known already, and when the log cannot be written.
    pub async fn accept(&self, accepted: Accepted) -> Result<(), JournalError> {
        let rd = accepted.rd;
        let recorded = self.enter(accepted, None).await?.durable().await?;
        if recorded.first() == Some(&true) { Ok(()) } else { Err(JournalError::Known(rd)) }
    }

    /// Gives an accepted request its place in the log, with the key under which it can be found again, in one transaction. A
    /// request that had this key before can be found under its other names only. The first effect is false when the request
    /// is known already.
    ///
    /// A cancelled call has entered nothing.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub async fn enter(&self, accepted: Accepted, key: Option<RetryKey>) -> Result<Entered, JournalError> {
        let rd = accepted.rd;
        let mut changes = vec![Change::Accept(accepted)];
        changes.extend(key.map(|key| Change::Key(rd, key)));
        self.enter_changes(changes).await
    }

    /// Records how requests ended, all in one transaction. For each it says whether this is its end: false when it was
    /// settled before, whose outcome stays, and when it was never accepted here.
    ///
    /// A cancelled call may or may not have been recorded.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub async fn settle(&self, settled: Vec<Settled>) -> Result<Vec<bool>, JournalError> {
        self.change(settled.into_iter().map(Change::Settle).collect()).await
    }

    /// Gives ends of requests and evidence (as JSON) their place in the log, in one transaction. The effects are first those of
    /// the ends, as of [`settle`](Self::settle).
    ///
    /// A cancelled call has entered nothing.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub async fn enter_ends(&self, settled: Vec<Settled>, evidence: Vec<Vec<u8>>) -> Result<Entered, JournalError> {
        let changes = settled.into_iter().map(Change::Settle).chain(evidence.into_iter().map(Change::Evidence));
        self.enter_changes(changes.collect()).await
    }

    /// Records evidence, as JSON. The same piece is kept once.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub async fn evidence(&self, evidence: Vec<Vec<u8>>) -> Result<(), JournalError> {
        self.change(evidence.into_iter().map(Change::Evidence).collect()).await.map(drop)
    }

    /// Records that an open request is started once more, as after a restart.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub async fn restart(&self, requests: Vec<RequestId>) -> Result<(), JournalError> {
        self.change(requests.into_iter().map(Change::Restart).collect()).await.map(drop)
    }

    /// The latest request of a client under a task id. It reads the file: a short blocking call.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn task(&self, client: &str, task_id: &str) -> Result<Option<Record>, JournalError> {
        self.log.task(client, task_id)
    }

    /// The latest request under a key, with the fingerprint that came with it. It reads the file: a short blocking call.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn keyed(&self, key: &[u8; 32]) -> Result<Option<([u8; 32], Record)>, JournalError> {
        self.log.keyed(key)
    }

    /// The record of a request. It reads the file: a short blocking call.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn record(&self, rd: &RequestId) -> Result<Option<Record>, JournalError> {
        self.log.record(rd)
    }

    /// Every request that was accepted and not settled, in the order of acceptance: what a restart finishes or fails.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn open_requests(&self) -> Result<Vec<Open>, JournalError> {
        self.log.open_requests()
    }

    /// Pieces of evidence, as JSON, each once, at most so many. It reads the file: a short blocking call.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn kept_evidence(&self, max: usize) -> Result<Vec<Vec<u8>>, JournalError> {
        self.log.evidence(max)
    }

    /// The newest requests that have a receipt, with the receipt as JSON, at most so many. It reads the file: a short blocking
    /// call.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn newest_receipts(&self, max: usize) -> Result<Vec<(Accepted, Vec<u8>)>, JournalError> {
        self.log.newest_receipts(max)
    }

    /// Records that receipts up to a number are in a checkpoint.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub async fn checkpoint(&self, checkpointed: Checkpointed) -> Result<(), JournalError> {
        self.change(vec![Change::Checkpoint(checkpointed)]).await.map(drop)
    }

    /// Lets go of finished requests outside a window, of a bounded number at a time. Says whether there may be more.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub async fn prune(&self, window: Window) -> Result<bool, JournalError> {
        Ok(self.change(vec![Change::Prune(window)]).await? == [true])
    }

    /// Receipts that are in no checkpoint yet.
    #[must_use]
    pub fn uncovered(&self) -> u64 {
        let (receipts, covered) = self.log.receipts();
        receipts - covered
    }

    /// Receipts that are in checkpoints, those among them that are no longer kept.
    #[must_use]
    pub fn covered(&self) -> u64 {
        self.log.receipts().1
    }

    /// What the next checkpoint covers, at most so many receipts. It reads the file: a short blocking call.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn next_segment(&self, epoch: &Epoch, receipts_max: usize) -> Result<Segment, JournalError> {
        let last = self.log.last_checkpoint()?;
        let (sequence, covered) = last.as_ref().map_or((0, 0), |last| (last.sequence, last.through));
        let previous = match &last {
            Some(last) => self.certificate(last)?.checkpoint.digest(epoch),
            None => Digest::default(),
        };
        let entries = self.entries_after(covered, receipts_max)?;
        let through = covered.saturating_add(entries.len() as u64);
        Ok(Segment { sequence: sequence.saturating_add(1), previous, entries, through })
    }

    /// Checks the last checkpoint and everything after it, which is all that a start relies on: the certificate's signatures
    /// and its receipts, then each later receipt against the record it is of. Returns how many later ones there are. What is
    /// older is checked when it is read. It reads the file.
    ///
    /// # Errors
    /// When something does not hold: the log is damaged.
    pub fn restore(&self, epoch: &Epoch) -> Result<u64, JournalError> {
        let last = self.log.last_checkpoint()?;
        let covered = last.as_ref().map_or(0, |last| last.through);
        if let Some(last) = &last {
            let certificate = self.certificate(last)?;
            let from = self.log.checkpoint_before(last.sequence)?.map_or(0, |before| before.through);
            let count = usize::try_from(last.through.saturating_sub(from)).unwrap_or(usize::MAX);
            let entries = self.entries_after(from, count.min(CHECKPOINT_RECEIPTS_MAX))?;
            // Checkpoints of other epochs, and those for which too few vouched, say nothing here.
            if certificate.check(epoch).is_ok() && !certificate.checkpoint.covers(epoch, &entries) {
                return Err(self.damaged(format!("the receipts of checkpoint {} are not its own", last.sequence)));
            }
        }
        let mut number = covered;
        loop {
            let entries = self.entries_after(number, CHECKPOINT_RECEIPTS_MAX)?;
            if entries.is_empty() {
                return Ok(number - covered);
            }
            for entry in &entries {
                number = number.saturating_add(1);
                let record = self.record(&entry.rd)?;
                let answer = match record.as_ref().and_then(|record| record.outcome.as_ref()) {
                    Some(Outcome::Certified { answer, .. }) => Some(Answer::root_of(answer)),
                    _ => None,
                };
                if answer != Some(entry.answer_root) {
                    return Err(self.damaged(format!("receipt {number} is not that of its request")));
                }
            }
        }
    }

    fn certificate(&self, checkpointed: &Checkpointed) -> Result<CheckpointCertificate, JournalError> {
        serde_json::from_slice(&checkpointed.certificate)
            .map_err(|error| self.damaged(format!("checkpoint {}: {error}", checkpointed.sequence)))
    }

    fn entries_after(&self, number: u64, max: usize) -> Result<Vec<Entry>, JournalError> {
        let entry = |bytes: [u8; 64]| {
            let (rd, answer_root) = bytes.split_at(32);
            let digest = |half: &[u8]| Digest(std::array::from_fn(|at| half.get(at).copied().unwrap_or(0)));
            Entry { rd: digest(rd), answer_root: digest(answer_root) }
        };
        Ok(self.log.receipts_after(number, max)?.into_iter().map(entry).collect())
    }

    fn damaged(&self, reason: String) -> JournalError {
        JournalError::Damaged { path: self.path.clone(), reason }
    }

    /// The error after which nothing more is recorded, if there was one.
    #[must_use]
    pub fn failure(&self) -> Option<JournalError> {
        self.failure.borrow().clone()
    }

    /// Resolves with that error when there is one. Safe to cancel.
    pub async fn failed(&self) -> JournalError {
        // The other end is gone only when the thread has panicked.
        let mut failure = self.failure.clone();
        match failure.wait_for(Option::is_some).await {
            Ok(failure) => failure.clone().unwrap_or(JournalError::Closed),
            Err(_) => JournalError::Closed,
        }
    }

    async fn change(&self, changes: Vec<Change>) -> Result<Vec<bool>, JournalError> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        self.enter_changes(changes).await?.durable().await
    }

    async fn enter_changes(&self, changes: Vec<Change>) -> Result<Entered, JournalError> {
        let bytes = changes.iter().map(Change::size_bytes).fold(0, usize::saturating_add);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(BYTES_WAITING_MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(bytes).await.map_err(|_| JournalError::Closed)?;
        let ((begin, begun), (done, outcome)) = (oneshot::channel(), oneshot::channel());
        let calls = self.calls.as_ref().ok_or(JournalError::Closed)?;
        let entered = calls.send(Call { changes, begun: Some(begin), done, _room: room }).await;
        entered.map_err(|_| self.failure().unwrap_or(JournalError::Closed))?;
        Ok(Entered { begun, outcome, failure: self.failure.clone() })
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.calls = None;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // The thread ends as soon as the queue is empty. One that panicked has nothing left to write.
            let _ = thread.join();
        }
    }
}

/// The journal's thread: one transaction after another, each with all that waits.
fn write_until_closed(log: &Log, mut queue: mpsc::Receiver<Call>, failed: &watch::Sender<Option<JournalError>>) {
    let mut calls = Vec::new();
    while queue.blocking_recv_many(&mut calls, CALLS_AT_ONCE_MAX) > 0 {
        for begun in calls.iter_mut().filter_map(|call| call.begun.take()) {
            // Hardly anyone wants to know.
            let _ = begun.send(());
        }
        match log.apply(calls.iter().flat_map(|call| &call.changes)) {
            Ok(effects) => {
                let mut effects = effects.into_iter();
                for call in calls.drain(..) {
                    let own = effects.by_ref().take(call.changes.len()).collect();
                    // A caller that has gone away does not need its answer.
                    let _ = call.done.send(Ok(own));
                }
            }
            Err(error) => {
                tracing::error!(%error, "the log takes nothing more");
                failed.send_replace(Some(error.clone()));
                queue.close();
                while let Ok(call) = queue.try_recv() {
                    calls.push(call);
                }
                for call in calls.drain(..) {
                    let _ = call.done.send(Err(error.clone()));
                }
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
