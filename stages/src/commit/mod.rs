//! The commit stage: what was decided is made durable, then told.
//!
//! Decisions are taken from the edge together, written in one transaction, and only then given to whoever waits. Tokens of a
//! stream are passed on at once: they are part of no promise, the certificate at the end is.
//!
//! Invariants: a client hears of an end only when that end is in the log; of several ends of one request the log takes the
//! first, and only that one is told. An end that cannot be written stops the node.
//!
//! It refuses to know votes and HTTP.

pub mod journal;
mod log;
mod record;

use std::sync::Arc;

use butterfly_engine::channel::Receiver;
use butterfly_engine::stage::{Stage, StageContext, StageError};
use butterfly_engine::telemetry::{Event, Mark};
use butterfly_verify::{Answer, CheckpointCertificate, Receipt};
use futures::FutureExt;
use futures::future::BoxFuture;

pub use journal::{
    Accepted, Checkpointed, Journal, JournalError, Open, Outcome, Record, RetryKey, Segment, Settled,
    TASK_ID_BYTES_MAX, TaskKind,
};

use crate::error::TaskError;
use crate::ingest::{Completed, Failure, TaskResult};
use crate::items::{Decided, RequestId};
use crate::services::Services;

/// Decisions that share a transaction at most.
const DECISIONS_AT_ONCE_MAX: usize = 1024;

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
            context.ready();
            loop {
                let batch = tokio::select! {
                    biased;
                    batch = self.input.recv_many(DECISIONS_AT_ONCE_MAX) => batch,
                    () = context.shutdown.completing() => Vec::new(),
                };
                if batch.is_empty() {
                    return Ok(());
                }
                self.commit(batch, &context).await?;
            }
        }
        .boxed()
    }
}

impl CommitStage {
    async fn commit(&self, batch: Vec<Decided>, context: &StageContext) -> Result<(), StageError> {
        let mut batch = self.sort(batch);
        self.keep(std::mem::take(&mut batch.checkpoints), context).await?;
        if batch.settled.is_empty() && batch.evidence.is_empty() {
            return Ok(());
        }
        let began = context.clock.now();
        let settled = std::mem::take(&mut batch.settled);
        let written = self.services.journal.settle_with_evidence(settled, batch.evidence).await;
        let first = written.map_err(|error| StageError::environment("write the log", error))?;
        let metrics = context.telemetry.metrics();
        let took = context.clock.now().saturating_sub(began);
        metrics.commit_seconds.record(took);
        for ((rd, result), first) in batch.ends.into_iter().zip(first) {
            if !first {
                continue;
            }
            context.telemetry.traces().mark_last(&rd.0, Mark::new("commit", "written").took(took));
            if result.is_ok() {
                metrics.receipts_total.inc();
                context.telemetry.events().emit_with(|| Event::new("certified").stage(&context.stage).request(rd));
            }
            self.services.board.settle(&rd, result);
        }
        Ok(())
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
