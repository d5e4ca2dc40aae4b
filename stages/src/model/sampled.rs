//! A token with how likely it was, and its bytes: what replicas tell gateways, and what the log keeps.
//!
//! Layout, little-endian: the token (4), then 0; or the number of the likeliest tokens and one (1), the token's own
//! log-probability (4), and for each of the likeliest its id (4) and its log-probability (4).
//!
//! Invariants: what is read is bounded by its bytes, names at most [`LOGPROBS_MAX`] others, and is finite.
//!
//! It refuses to know who sampled it.

use butterfly_kernels::LogProbs;
use butterfly_verify::limits::LOGPROBS_MAX;

/// A token that was sampled; or one of the prompt, where the request wants to know how likely that was.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// How likely it and others were before bias, penalties and temperature; only if the request asks for it. The first token
    /// of a prompt has none.
    pub logprobs: Option<Box<LogProbs>>,
}

/// Bytes that are no sampled token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed token or log-probability")]
pub(crate) struct MalformedSampled;

impl Sampled {
    /// What it pins in memory.
    pub(crate) fn size_bytes(&self) -> usize {
        let boxed = |logprobs: &LogProbs| size_of::<LogProbs>() + size_of_val(logprobs.top.as_slice());
        size_of::<Self>() + self.logprobs.as_deref().map_or(0, boxed)
    }

    /// Appends its bytes.
    pub(crate) fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.token.to_le_bytes());
        let Some(LogProbs { chosen, top }) = self.logprobs.as_deref() else { return bytes.push(0) };
        let top = top.get(..usize::from(LOGPROBS_MAX)).unwrap_or(top);
        bytes.push(top.len() as u8 + 1);
        bytes.extend_from_slice(&chosen.to_le_bytes());
        for (id, log_prob) in top {
            bytes.extend_from_slice(&id.to_le_bytes());
            bytes.extend_from_slice(&log_prob.to_le_bytes());
        }
    }

    /// Reads one and leaves what follows.
    ///
    /// # Errors
    /// When the bytes begin with none.
    pub(crate) fn read(rest: &mut &[u8]) -> Result<Self, MalformedSampled> {
        let token = u32::from_le_bytes(*take(rest)?);
        let [entries] = *take(rest)?;
        let Some(top) = entries.checked_sub(1) else { return Ok(token.into()) };
        if top > LOGPROBS_MAX {
            return Err(MalformedSampled);
        }
        let chosen = read_log_prob(rest)?;
        let top =
            (0..top).map(|_| Ok((u32::from_le_bytes(*take(rest)?), read_log_prob(rest)?))).collect::<Result<_, _>>()?;
        Ok(Self { token, logprobs: Some(Box::new(LogProbs { chosen, top })) })
    }
}

impl From<u32> for Sampled {
    fn from(token: u32) -> Self {
        Self { token, logprobs: None }
    }
}

fn read_log_prob(rest: &mut &[u8]) -> Result<f32, MalformedSampled> {
    let value = f32::from_le_bytes(*take(rest)?);
    if value.is_finite() { Ok(value) } else { Err(MalformedSampled) }
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Result<&'a [u8; N], MalformedSampled> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(MalformedSampled)?;
    *rest = tail;
    Ok(head)
}
