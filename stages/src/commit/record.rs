//! What the log keeps of a request, and its bytes.
//!
//! Layout, little-endian. Accepted: rd (32), kind (1), priority (1), accepted_ms (8), client (length 2, bytes), task id (length 2,
//! bytes), origin, request (the rest). Origin: 0; or 1, trace id (16), parent id (8), flags (1), id of the HTTP request
//! (length 2, bytes). Outcome: 0, receipt (length 4, bytes), answer (the rest); 1, error (the rest); or 2, receipt,
//! answer (each length 4, bytes), tokens with their log-probabilities (the rest).
//!
//! It refuses to know what receipt, answer and error say.

use butterfly_engine::telemetry::TraceContext;

use crate::items::{Priority, RequestId};

/// Which route a task came by; a label of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// `POST /inference`.
    Inference,
    /// `POST /v1/completions`.
    Completion,
    /// `POST /v1/embeddings`.
    Embedding,
    /// `POST /v1/chat/completions`.
    Chat,
}

impl TaskKind {
    /// All of them, as labels.
    pub const LABELS: [&'static str; 4] =
        [Self::Inference.label(), Self::Completion.label(), Self::Embedding.label(), Self::Chat.label()];

    /// The label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Inference => "inference",
            Self::Completion => "completion",
            Self::Embedding => "embedding",
            Self::Chat => "chat",
        }
    }

    /// What precedes the request's digest in the id of a task whose client chose none.
    #[must_use]
    pub const fn id_prefix(self) -> &'static str {
        match self {
            Self::Inference | Self::Embedding => "",
            Self::Completion => "cmpl-",
            Self::Chat => "chatcmpl-",
        }
    }
}

/// A request that was promised an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The request's digest.
    pub rd: RequestId,
    /// The route it came by.
    pub kind: TaskKind,
    /// How urgent it is.
    pub priority: Priority,
    /// When it was accepted, in milliseconds since 1970.
    pub accepted_ms: u64,
    /// Who asked, as the gateway knows them; task ids of different clients do not meet.
    pub client: String,
    /// The client's name for it.
    pub task_id: String,
    /// The HTTP request and the trace that it came with. It is in no digest; a restart goes on with it.
    pub origin: Option<TraceContext>,
    /// Canonical bytes of the request.
    pub request: Vec<u8>,
}

impl Accepted {
    pub(super) fn size_bytes(&self) -> usize {
        let origin = self.origin.as_ref().map_or(0, |origin| size_of::<TraceContext>() + origin.request_id.len());
        self.client.len() + self.task_id.len() + origin + self.request.len()
    }
}

/// What a client may ask for a request again with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryKey {
    /// Digest of the client and of the key it chose.
    pub key: [u8; 32],
    /// Digest of what was asked, so that a key used for something else is found out.
    pub fingerprint: [u8; 32],
}

/// A request that was accepted and not settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// What was accepted.
    pub accepted: Accepted,
    /// Times it was started, the first included.
    pub starts: u32,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With an answer and its proof.
    Certified {
        /// The receipt, as JSON.
        receipt: Vec<u8>,
        /// Canonical bytes of the answer.
        answer: Vec<u8>,
        /// Tokens with their log-probabilities; empty unless the request asks for these.
        sampled: Vec<u8>,
    },
    /// Without.
    Failed {
        /// What the client is told, as JSON.
        error: Vec<u8>,
    },
}

impl Outcome {
    pub(super) fn size_bytes(&self) -> usize {
        match self {
            Self::Certified { receipt, answer, sampled } => receipt.len() + answer.len() + sampled.len(),
            Self::Failed { error } => error.len(),
        }
    }
}

/// The end of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// The request.
    pub rd: RequestId,
    /// How it ended.
    pub outcome: Outcome,
}

/// All that is known of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What was accepted.
    pub accepted: Accepted,
    /// How it ended; absent while it is open.
    pub outcome: Option<Outcome>,
}

/// Bytes that are no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a record's {0} is malformed")]
pub(super) struct Malformed(&'static str);

pub(super) fn write_accepted(accepted: &Accepted) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(46 + accepted.size_bytes());
    bytes.extend_from_slice(accepted.rd.as_bytes());
    bytes.push(match accepted.kind {
        TaskKind::Inference => 0,
        TaskKind::Completion => 1,
        TaskKind::Embedding => 2,
        TaskKind::Chat => 3,
    });
    bytes.push(accepted.priority.level());
    bytes.extend_from_slice(&accepted.accepted_ms.to_le_bytes());
    write_text(&mut bytes, &accepted.client);
    write_text(&mut bytes, &accepted.task_id);
    match &accepted.origin {
        None => bytes.push(0),
        Some(TraceContext { trace_id, parent_id, flags, request_id }) => {
            bytes.push(1);
            bytes.extend_from_slice(trace_id);
            bytes.extend_from_slice(parent_id);
            bytes.push(*flags);
            write_text(&mut bytes, request_id);
        }
    }
    bytes.extend_from_slice(&accepted.request);
    bytes
}

pub(super) fn read_accepted(bytes: &[u8]) -> Result<Accepted, Malformed> {
    let mut rest = bytes;
    let rd = RequestId::from(array::<32>(&mut rest, "request id")?);
    let kind = match array::<1>(&mut rest, "kind")? {
        [0] => TaskKind::Inference,
        [1] => TaskKind::Completion,
        [2] => TaskKind::Embedding,
        [3] => TaskKind::Chat,
        _ => return Err(Malformed("kind")),
    };
    let [level] = array::<1>(&mut rest, "priority")?;
    let priority = Priority::new(level).ok_or(Malformed("priority"))?;
    let accepted_ms = u64::from_le_bytes(array(&mut rest, "time")?);
    let client = text(&mut rest, "client")?;
    let task_id = text(&mut rest, "task id")?;
    let origin = match array::<1>(&mut rest, "origin")? {
        [0] => None,
        [1] => {
            let (trace_id, parent_id) = (array(&mut rest, "trace")?, array(&mut rest, "trace")?);
            let [flags] = array(&mut rest, "trace")?;
            let request_id = text(&mut rest, "id of the HTTP request")?.into();
            Some(TraceContext { trace_id, parent_id, flags, request_id })
        }
        _ => return Err(Malformed("origin")),
    };
    Ok(Accepted { rd, kind, priority, accepted_ms, client, task_id, origin, request: rest.to_vec() })
}

fn write_text(bytes: &mut Vec<u8>, text: &str) {
    // All are bounded far below; a longer one would be cut at a character, never written wrongly.
    let cut = text.floor_char_boundary(usize::from(u16::MAX));
    bytes.extend_from_slice(&(cut as u16).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes().get(..cut).unwrap_or_default());
}

pub(super) fn write_outcome(outcome: &Outcome) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(5 + outcome.size_bytes());
    match outcome {
        Outcome::Certified { receipt, answer, sampled } => {
            bytes.push(if sampled.is_empty() { 0 } else { 2 });
            write_part(&mut bytes, receipt);
            if sampled.is_empty() {
                bytes.extend_from_slice(answer);
            } else {
                write_part(&mut bytes, answer);
                bytes.extend_from_slice(sampled);
            }
        }
        Outcome::Failed { error } => {
            bytes.push(1);
            bytes.extend_from_slice(error);
        }
    }
    bytes
}

pub(super) fn read_outcome(bytes: &[u8]) -> Result<Outcome, Malformed> {
    let mut rest = bytes;
    match array::<1>(&mut rest, "outcome")? {
        [0] => {
            let receipt = read_part(&mut rest, "receipt")?;
            Ok(Outcome::Certified { receipt, answer: rest.to_vec(), sampled: Vec::new() })
        }
        [1] => Ok(Outcome::Failed { error: rest.to_vec() }),
        [2] => {
            let (receipt, answer) = (read_part(&mut rest, "receipt")?, read_part(&mut rest, "answer")?);
            Ok(Outcome::Certified { receipt, answer, sampled: rest.to_vec() })
        }
        _ => Err(Malformed("outcome")),
    }
}

fn write_part(bytes: &mut Vec<u8>, part: &[u8]) {
    // Each part is bounded far below.
    bytes.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(part);
}

fn read_part(rest: &mut &[u8], what: &'static str) -> Result<Vec<u8>, Malformed> {
    let length = usize::try_from(u32::from_le_bytes(array(rest, what)?)).map_err(|_| Malformed(what))?;
    let (part, after) = rest.split_at_checked(length).ok_or(Malformed(what))?;
    *rest = after;
    Ok(part.to_vec())
}

fn array<const N: usize>(rest: &mut &[u8], what: &'static str) -> Result<[u8; N], Malformed> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(Malformed(what))?;
    *rest = tail;
    Ok(*head)
}

fn text(rest: &mut &[u8], what: &'static str) -> Result<String, Malformed> {
    let length = usize::from(u16::from_le_bytes(array(rest, what)?));
    let (head, tail) = rest.split_at_checked(length).ok_or(Malformed(what))?;
    *rest = tail;
    String::from_utf8(head.to_vec()).map_err(|_| Malformed(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted() -> Accepted {
        Accepted {
            rd: RequestId::from([7; 32]),
            kind: TaskKind::Completion,
            priority: Priority::default(),
            accepted_ms: 1_700_000_000_000,
            client: "lab".to_owned(),
            task_id: "übung-1".to_owned(),
            origin: Some(TraceContext { trace_id: [1; 16], parent_id: [2; 8], flags: 1, request_id: "req-1".into() }),
            request: vec![1, 2, 3],
        }
    }

    #[test]
    fn records_read_back_and_every_cut_is_refused_or_shortens_only_the_tail() {
        let own = Accepted { origin: None, ..accepted() };
        assert_eq!(read_accepted(&write_accepted(&own)), Ok(own));
        let bytes = write_accepted(&accepted());
        assert_eq!(read_accepted(&bytes), Ok(accepted()));
        let head = bytes.len() - accepted().request.len();
        for cut in 0..head {
            assert!(read_accepted(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        for outcome in [
            Outcome::Certified { receipt: b"{}".to_vec(), answer: vec![9; 5], sampled: Vec::new() },
            Outcome::Certified { receipt: b"{}".to_vec(), answer: vec![9; 5], sampled: vec![8; 3] },
            Outcome::Failed { error: b"{\"code\":\"x\"}".to_vec() },
        ] {
            assert_eq!(read_outcome(&write_outcome(&outcome)), Ok(outcome));
        }
        assert!(read_outcome(&[]).is_err());
        assert!(read_outcome(&[2]).is_err());
        assert!(read_outcome(&[0, 255, 255, 255, 255, 1]).is_err());
    }
}
