//! What became of each request, and the distributions of all of them.
//!
//! Invariants: every latency but the gaps between tokens counts from the *scheduled* send, so time that a request waited
//! for a busy server is in it wherever it waited. A request that failed is in the counts, never in the latencies.
//!
//! It refuses to know how requests are sent.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::workload::{Ask, Kind};

/// Latencies are kept up to this many microseconds: ten minutes.
const LATENCY_US_MAX: u64 = 600_000_000;
/// Rows that are kept; requests beyond are counted and measured, not listed.
pub(crate) const ROWS_MAX: usize = 1_000_000;
/// Receipts that are checked after the run.
const RECEIPTS_KEPT_MAX: usize = 16;
/// Codes of errors that are told apart; a server could invent many.
const CODES_MAX: usize = 32;

/// What a server answered to one request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answered {
    /// HTTP status; 0 if there was no response.
    pub(crate) status: u16,
    /// Why it is no success: the server's code, or what broke.
    pub(crate) fault: Option<Fault>,
    pub(crate) receipt: Option<String>,
    pub(crate) tokens_in: u64,
    pub(crate) tokens_out: u64,
    /// Pieces of a stream that had tokens, as they came.
    pub(crate) pieces: Vec<Piece>,
    /// Whether the server did not say how many tokens are in a piece, so that each counts as one.
    pub(crate) are_pieces_guessed: bool,
}

/// Why a request failed.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) code: String,
    pub(crate) message: String,
}

/// A part of a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) at: Duration,
    pub(crate) tokens: u32,
}

/// One request with its moments since the begin of the load.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) ask: Ask,
    pub(crate) scheduled: Duration,
    pub(crate) sent: Duration,
    pub(crate) done: Duration,
    pub(crate) answered: Answered,
}

/// What is written of one request: a line of `requests.jsonl`. Moments in milliseconds since the begin of the load.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) scheduled_ms: f64,
    pub(crate) sent_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) first_token_ms: Option<f64>,
    pub(crate) done_ms: f64,
    pub(crate) kind: Kind,
    /// As asked for; with `output_tokens`, what a replay needs.
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    /// As the server counted.
    pub(crate) tokens_in: u64,
    pub(crate) tokens_out: u64,
    pub(crate) status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) meets_slo: Option<bool>,
}

/// Objectives of one request: it meets them when it succeeds and none of these is longer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Slo {
    /// To the first token.
    pub(crate) ttft: Option<Duration>,
    /// Every single gap between tokens.
    pub(crate) itl: Option<Duration>,
    /// The mean gap.
    pub(crate) tpot: Option<Duration>,
    /// To the end.
    pub(crate) e2e: Option<Duration>,
}

/// The distributions of a load, in microseconds, in the order in which they are reported.
#[derive(Debug, Clone)]
pub(crate) struct Latencies {
    pub(crate) ttft: Histogram<u64>,
    pub(crate) itl: Histogram<u64>,
    pub(crate) tpot: Histogram<u64>,
    pub(crate) e2e: Histogram<u64>,
    /// From the last token to the end, which brings the receipt.
    pub(crate) proof_wait: Histogram<u64>,
    /// From the scheduled send to the actual one.
    pub(crate) send_delay: Histogram<u64>,
}

/// Everything that was measured.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) slo: Slo,
    pub(crate) sent: u64,
    pub(crate) ok: u64,
    pub(crate) errors: BTreeMap<String, u64>,
    pub(crate) first_error: Option<String>,
    pub(crate) tokens_in: u64,
    pub(crate) tokens_out: u64,
    pub(crate) met_slo: u64,
    pub(crate) first_sent: Duration,
    pub(crate) last_sent: Duration,
    pub(crate) first_done: Duration,
    pub(crate) last_done: Duration,
    pub(crate) latencies: Latencies,
    pub(crate) are_pieces_guessed: bool,
    pub(crate) receipts: Vec<String>,
    pub(crate) rows: Vec<Row>,
    /// Requests that are not among the rows.
    pub(crate) rows_left_out: u64,
}

impl Answered {
    /// A failure that has no response of its own.
    pub(crate) fn fails(&mut self, code: impl Into<String>, message: impl Into<String>) {
        self.fault = Some(Fault { code: code.into(), message: message.into() });
    }
}

impl Sample {
    fn is_ok(&self) -> bool {
        self.answered.fault.is_none()
    }

    /// From the scheduled send to the end.
    pub(crate) fn e2e(&self) -> Duration {
        self.done.saturating_sub(self.scheduled)
    }

    fn ttft(&self) -> Option<Duration> {
        Some(self.answered.pieces.first()?.at.saturating_sub(self.scheduled))
    }

    /// The gap before each token after the first piece, with how many tokens it is for. Tokens that came together share
    /// the time since the piece before.
    fn gaps(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        self.answered.pieces.windows(2).map(|pair| {
            let tokens = pair[1].tokens.max(1);
            (pair[1].at.saturating_sub(pair[0].at) / tokens, u64::from(tokens))
        })
    }

    /// Time for each token after the first piece.
    fn tpot(&self) -> Option<Duration> {
        let (first, last) = (self.answered.pieces.first()?, self.answered.pieces.last()?);
        let tokens: u32 = self.answered.pieces[1..].iter().map(|piece| piece.tokens).sum();
        (tokens > 0).then(|| last.at.saturating_sub(first.at) / tokens)
    }

    fn row(&self, slo: &Slo) -> Row {
        let ms = |moment: Duration| (moment.as_secs_f64() * 1e6).round() / 1e3;
        Row {
            scheduled_ms: ms(self.scheduled),
            sent_ms: ms(self.sent),
            first_token_ms: self.answered.pieces.first().map(|piece| ms(piece.at)),
            done_ms: ms(self.done),
            kind: self.ask.kind,
            prompt_tokens: self.ask.prompt,
            output_tokens: self.ask.output,
            tokens_in: self.answered.tokens_in,
            tokens_out: self.answered.tokens_out,
            status: self.answered.status,
            error: self.answered.fault.as_ref().map(|fault| fault.code.clone()),
            meets_slo: (!slo.is_empty()).then(|| slo.is_met(self)),
        }
    }
}

impl Slo {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn is_met(&self, sample: &Sample) -> bool {
        let within = |limit: Option<Duration>, found: Option<Duration>| {
            limit.is_none_or(|limit| found.is_none_or(|found| found <= limit))
        };
        sample.is_ok()
            && within(self.ttft, sample.ttft())
            && within(self.itl, sample.gaps().map(|(gap, _)| gap).max())
            && within(self.tpot, sample.tpot())
            && within(self.e2e, Some(sample.e2e()))
    }
}

impl FromStr for Slo {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut slo = Self::default();
        for part in text.split(',') {
            let (name, limit) = part.split_once('=').ok_or_else(|| format!("`{part}`: expected `ttft=200ms`"))?;
            let limit = duration(limit.trim()).ok_or_else(|| format!("`{limit}`: expected `200ms` or `1.5s`"))?;
            let place = match name.trim() {
                "ttft" => &mut slo.ttft,
                "itl" => &mut slo.itl,
                "tpot" => &mut slo.tpot,
                "e2e" => &mut slo.e2e,
                other => return Err(format!("`{other}` is no objective; there are ttft, itl, tpot and e2e")),
            };
            if place.replace(limit).is_some() {
                return Err(format!("`{name}` is given twice"));
            }
        }
        Ok(slo)
    }
}

impl std::fmt::Display for Slo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let limits = [("ttft", self.ttft), ("itl", self.itl), ("tpot", self.tpot), ("e2e", self.e2e)];
        let given =
            limits.iter().filter_map(|(name, limit)| Some(format!("{name}={}ms", (*limit)?.as_secs_f64() * 1e3)));
        f.write_str(&given.collect::<Vec<_>>().join(","))
    }
}

/// `250us`, `200ms`, `1.5s`.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let (number, unit) = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))?;
    let seconds = number.trim().parse::<f64>().ok()? * unit;
    Duration::try_from_secs_f64(seconds).ok().filter(|limit| !limit.is_zero())
}

impl Latencies {
    fn new() -> anyhow::Result<Self> {
        let empty = || Histogram::new_with_bounds(1, LATENCY_US_MAX, 3);
        Ok(Self {
            ttft: empty()?,
            itl: empty()?,
            tpot: empty()?,
            e2e: empty()?,
            proof_wait: empty()?,
            send_delay: empty()?,
        })
    }

    /// Each with the name it is reported under.
    pub(crate) fn named(&self) -> [(&'static str, &Histogram<u64>); 6] {
        [
            ("ttft", &self.ttft),
            ("itl", &self.itl),
            ("tpot", &self.tpot),
            ("e2e", &self.e2e),
            ("proof_wait", &self.proof_wait),
            ("send_delay", &self.send_delay),
        ]
    }

    fn record(&mut self, sample: &Sample) {
        let wait = sample.answered.pieces.last().map(|last| sample.done.saturating_sub(last.at));
        for (histogram, found) in [
            (&mut self.ttft, sample.ttft()),
            (&mut self.tpot, sample.tpot()),
            (&mut self.e2e, Some(sample.e2e())),
            (&mut self.proof_wait, wait),
        ] {
            found.into_iter().for_each(|found| histogram.saturating_record(micros(found)));
        }
        for (gap, tokens) in sample.gaps() {
            self.itl.saturating_record_n(micros(gap), tokens);
        }
    }

    fn add(&mut self, other: &Self) -> anyhow::Result<()> {
        self.ttft.add(&other.ttft)?;
        self.itl.add(&other.itl)?;
        self.tpot.add(&other.tpot)?;
        self.e2e.add(&other.e2e)?;
        self.proof_wait.add(&other.proof_wait)?;
        self.send_delay.add(&other.send_delay)?;
        Ok(())
    }
}

impl Record {
    pub(crate) fn new(slo: Slo) -> anyhow::Result<Self> {
        Ok(Self {
            slo,
            sent: 0,
            ok: 0,
            errors: BTreeMap::new(),
            first_error: None,
            tokens_in: 0,
            tokens_out: 0,
            met_slo: 0,
            first_sent: Duration::MAX,
            last_sent: Duration::ZERO,
            first_done: Duration::MAX,
            last_done: Duration::ZERO,
            latencies: Latencies::new()?,
            are_pieces_guessed: false,
            receipts: Vec::new(),
            rows: Vec::new(),
            rows_left_out: 0,
        })
    }

    /// Counts a request, and keeps a row of it if there is room for `rows_max`.
    pub(crate) fn count(&mut self, sample: Sample, rows_max: usize) {
        self.sent += 1;
        self.first_sent = self.first_sent.min(sample.sent);
        self.last_sent = self.last_sent.max(sample.sent);
        let delay = sample.sent.saturating_sub(sample.scheduled);
        self.latencies.send_delay.saturating_record(micros(delay));
        self.met_slo += u64::from(!self.slo.is_empty() && self.slo.is_met(&sample));
        if self.rows.len() < rows_max {
            self.rows.push(sample.row(&self.slo));
        } else {
            self.rows_left_out += 1;
        }
        match sample.answered.fault {
            None => {
                self.ok += 1;
                self.tokens_in += sample.answered.tokens_in;
                self.tokens_out += sample.answered.tokens_out;
                self.first_done = self.first_done.min(sample.done);
                self.last_done = self.last_done.max(sample.done);
                self.are_pieces_guessed |= sample.answered.are_pieces_guessed;
                self.latencies.record(&sample);
                if self.receipts.len() < RECEIPTS_KEPT_MAX {
                    self.receipts.extend(sample.answered.receipt);
                }
            }
            Some(fault) => {
                self.first_error.get_or_insert_with(|| format!("{}: {}", fault.code, fault.message));
                self.count_error(fault.code, 1);
            }
        }
    }

    fn count_error(&mut self, code: String, count: u64) {
        let is_known = self.errors.contains_key(&code) || self.errors.len() < CODES_MAX;
        *self.errors.entry(if is_known { code } else { "other".into() }).or_default() += count;
    }

    /// Adds what another worker of the same load measured.
    pub(crate) fn merge(&mut self, other: Self) -> anyhow::Result<()> {
        self.sent += other.sent;
        self.ok += other.ok;
        for (code, count) in other.errors {
            self.count_error(code, count);
        }
        self.first_error = self.first_error.take().or(other.first_error);
        self.tokens_in += other.tokens_in;
        self.tokens_out += other.tokens_out;
        self.met_slo += other.met_slo;
        self.first_sent = self.first_sent.min(other.first_sent);
        self.last_sent = self.last_sent.max(other.last_sent);
        self.first_done = self.first_done.min(other.first_done);
        self.last_done = self.last_done.max(other.last_done);
        self.latencies.add(&other.latencies)?;
        self.are_pieces_guessed |= other.are_pieces_guessed;
        let room = RECEIPTS_KEPT_MAX.saturating_sub(self.receipts.len());
        self.receipts.extend(other.receipts.into_iter().take(room));
        self.rows.extend(other.rows);
        self.rows_left_out += other.rows_left_out;
        Ok(())
    }

    /// Answers per second, from the first to the last: what the server gave, however long each took. Of fewer than two
    /// answers there is no rate, and the time since the first send stands in for it.
    pub(crate) fn done_rate(&self) -> f64 {
        let span = self.last_done.saturating_sub(self.first_done).as_secs_f64();
        if self.ok > 1 && span > 0.0 {
            (self.ok - 1) as f64 / span
        } else {
            let span = self.last_done.saturating_sub(self.first_sent).as_secs_f64();
            if self.ok > 0 && span > 0.0 { self.ok as f64 / span } else { 0.0 }
        }
    }

    /// Requests that left per second.
    pub(crate) fn sent_rate(&self) -> f64 {
        let span = self.last_sent.saturating_sub(self.first_sent).as_secs_f64();
        if self.sent > 1 && span > 0.0 { (self.sent - 1) as f64 / span } else { 0.0 }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests;
