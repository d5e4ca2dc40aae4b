//! The commit stage: what was decided is made durable, then told.
//!
//! Decisions are taken from the edge together, written in one transaction, and only then given to whoever waits. Meanwhile the
//! next ones are taken, so that they are in the log's next transaction. Tokens of a stream are passed on at once: they are part
//! of no promise, the certificate at the end is.
//!
//! Invariants: a client hears of an end only when that end is in the log; of several ends of one request the log takes the
//! first, and only that one is told. An end that cannot be written stops the node.
//!
//! Finished tasks are kept for a time and up to a number, which the topology sets.
//!
//! It refuses to know votes and HTTP.

pub mod journal;
mod log;
mod record;
mod retention;

use std::sync::Arc;
use std::time::Duration;

use butterfly_engine::channel::Receiver;
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_engine::telemetry::{Event, Mark};
use butterfly_verify::{Answer, CheckpointCertificate, Receipt};
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use futures::{FutureExt, StreamExt};

pub use journal::{
    Accepted, Checkpointed, Entered, Journal, JournalError, Open, Outcome, Record, RetryKey, Segment, Settled,
    TASK_ID_BYTES_MAX, TaskKind, Window,
};

use crate::error::TaskError;
use crate::ingest::{Completed, Failure, TaskResult};
use crate::items::{Decided, RequestId};
use crate::services::Services;

/// Decisions that share a transaction at most.
const DECISIONS_AT_ONCE_MAX: usize = 1024;
/// Batches of decisions that wait for the disk at most.
const BATCHES_WRITTEN_MAX: usize = 64;

/// The stage.
pub struct CommitStage {
    input: Receiver<Decided>,
    services: Services,
}

impl CommitStage {
    /// The stage, writing to the node's journal and answering through its board.
    #[must_use]
    pub fn new(input: Receiver<Decided>, services: Services) -> Self {
        Self { input, services }
    }
}

impl Stage for CommitStage {
    fn run(mut self: Box<Self>, context: StageContext) -> BoxFuture<'static, Result<(), StageError>> {
        async move {
            let services = self.services.clone();
            tokio::select! {
                committed = self.commit_all(&context) => committed,
                failed = retention::keep_within(&services, &context) => Err(failed),
            }
        }
        .boxed()
    }
}

fn unwritten(error: JournalError) -> StageError {
    StageError::environment("write the log", error)
}

impl CommitStage {
    async fn commit_all(&mut self, context: &StageContext) -> Result<(), StageError> {
        let mut writing = FuturesOrdered::new();
        let mut input_open = true;
        context.ready();
        while input_open || !writing.is_empty() {
            // As long as it can take more, waiting for the disk is no work.
            let has_room = writing.len() < BATCHES_WRITTEN_MAX;
            tokio::select! {
                biased;
                Some(told) = writing.next() => told?,
                batch = self.input.recv_many(DECISIONS_AT_ONCE_MAX), if input_open && has_room => {
                    input_open = !batch.is_empty();
                    let mut batch = self.sort(batch);
                    self.keep(std::mem::take(&mut batch.checkpoints), context).await?;
                    if !batch.settled.is_empty() || !batch.evidence.is_empty() {
                        let began = context.clock.now();
                        let Batch { settled, evidence, ends, .. } = batch;
                        let entered = self.services.journal.enter_ends(settled, evidence).await.map_err(unwritten)?;
                        writing.push_back(self.tell(entered, ends, began, context));
                    }
                }
                () = context.shutdown.completing(), if input_open => input_open = false,
            }
        }
        Ok(())
    }

    /// Tells ends once they are in the log.
    fn tell(
        &self,
        entered: Entered,
        ends: Vec<(RequestId, TaskResult)>,
        began: Duration,
        context: &StageContext,
    ) -> impl Future<Output = Result<(), StageError>> + use<> {
        let (board, clock) = (Arc::clone(&self.services.board), Arc::clone(&context.clock));
        let (telemetry, stage) = (Arc::clone(&self.services.telemetry), context.stage.clone());
        async move {
            let first = entered.durable().await.map_err(unwritten)?;
            let took = clock.now().saturating_sub(began);
            telemetry.metrics().commit_seconds.record(took);
            for ((rd, result), first) in ends.into_iter().zip(first) {
                if !first {
                    continue;
                }
                telemetry.traces().mark_last(&rd.0, Mark::new("commit", "written").took(took));
                if result.is_ok() {
                    telemetry.metrics().receipts_total.inc();
                    telemetry.events().emit_with(|| Event::new("certified").stage(&stage).request(rd));
                }
                board.settle(&rd, result);
            }
            Ok(())
        }
    }

    /// Records checkpoints, which nobody waits for.
    async fn keep(
        &self,
        checkpoints: Vec<(CheckpointCertificate, u64, bool)>,
        context: &StageContext,
    ) -> Result<(), StageError> {
        for (certificate, through, is_certified) in checkpoints {
            let sequence = certificate.checkpoint.sequence;
            let failed = |error: String| StageError::environment("write a checkpoint to the log", error);
            let certificate = serde_json::to_vec(&certificate).map_err(|error| failed(error.to_string()))?;
            let written = self.services.journal.checkpoint(Checkpointed { sequence, through, certificate }).await;
            written.map_err(|error| failed(error.to_string()))?;
            if is_certified {
                context.telemetry.metrics().checkpoints_total.inc();
            }
            context.telemetry.events().emit_with(|| {
                Event::new("checkpoint")
                    .stage(&context.stage)
                    .with("sequence", sequence)
                    .with("certified", is_certified)
            });
        }
        Ok(())
    }

    /// Passes tokens on, and sorts the rest into what is written and what is told afterwards.
    fn sort(&self, decisions: Vec<Decided>) -> Batch {
        let mut batch = Batch::default();
        for decided in decisions {
            match decided {
                Decided::Progress { rd, index, tokens } => self.services.board.progress(&rd, index, &tokens),
                Decided::Certified { rd, receipt, answer } => self.certified(&mut batch, rd, *receipt, *answer),
                Decided::Failed { rd, error } => {
                    if self.services.board.is_living(&rd) {
                        batch.end(rd, Outcome::Failed { error: Failure::from(&error).to_json() }, Err(error));
                    }
                }
                Decided::Checkpoint { certificate, through, is_certified } => {
                    batch.checkpoints.push((*certificate, through, is_certified));
                }
                Decided::Accused { evidence } => match serde_json::to_vec(&evidence) {
                    Ok(bytes) => batch.evidence.push(bytes),
                    Err(error) => tracing::error!(%error, "evidence could not be written as JSON"),
                },
            }
        }
        batch
    }

    fn certified(&self, batch: &mut Batch, rd: RequestId, receipt: Receipt, answer: Answer) {
        // A request that nobody waits for any more has its end in the log already, or will soon.
        let Some((task_id, request)) = self.services.board.task(&rd) else { return };
        match serde_json::to_vec(&receipt) {
            Ok(bytes) => {
                let tokens = self.services.board.sampled(&rd);
                let mut sampled = Vec::new();
                tokens.iter().for_each(|token| token.write(&mut sampled));
                let outcome = Outcome::Certified { receipt: bytes, answer: answer.encode(), sampled };
                let completed = Completed { task_id, request, answer, receipt, sampled: tokens, cached: false };
                batch.end(rd, outcome, Ok(Arc::new(completed)));
            }
            Err(error) => {
                let error = TaskError::Internal(format!("the receipt could not be written as JSON: {error}"));
                batch.end(rd, Outcome::Failed { error: Failure::from(&error).to_json() }, Err(error));
            }
        }
    }
}

/// Decisions, sorted.
#[derive(Default)]
struct Batch {
    settled: Vec<Settled>,
    /// In the order of `settled`.
    ends: Vec<(RequestId, TaskResult)>,
    evidence: Vec<Vec<u8>>,
    /// Each with the number of its last receipt, and whether it is certified.
    checkpoints: Vec<(CheckpointCertificate, u64, bool)>,
}

impl Batch {
    fn end(&mut self, rd: RequestId, outcome: Outcome, result: TaskResult) {
        self.settled.push(Settled { rd, outcome });
        self.ends.push((rd, result));
    }
}
