//! Open-loop load: requests leave on schedule, whatever became of those before.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use http_body_util::BodyExt;
use tokio::task::JoinSet;

use crate::client::Client;
use crate::workload::Workload;

/// Receipts that are checked after the run.
const RECEIPTS_KEPT_MAX: usize = 16;
/// Latencies are kept up to this many microseconds: two minutes.
const LATENCY_US_MAX: u64 = 120_000_000;

/// Numbers every request of this process, so that no two runs ask the same.
static NEXT_INDEX: AtomicU64 = AtomicU64::new(0);

/// A load.
pub(crate) struct Load {
    pub(crate) rate: f64,
    pub(crate) connections: usize,
    pub(crate) workload: Workload,
    pub(crate) max_tokens: u32,
}

/// What was measured. Times in microseconds.
pub(crate) struct Measured {
    pub(crate) elapsed: Duration,
    pub(crate) sent: u64,
    pub(crate) ok: u64,
    pub(crate) refused: u64,
    pub(crate) errors: u64,
    pub(crate) first_error: Option<String>,
    pub(crate) tokens: u64,
    /// From the scheduled send to the last byte.
    pub(crate) latency: Histogram<u64>,
    /// From the scheduled send to the first token.
    pub(crate) first_token: Histogram<u64>,
    /// Between tokens that followed each other.
    pub(crate) inter_token: Histogram<u64>,
    /// From the scheduled send to the actual one.
    pub(crate) send_delay: Histogram<u64>,
    pub(crate) receipts: Vec<String>,
}

/// What came of one request.
struct Done {
    status: u16,
    receipt: Option<String>,
    tokens: u64,
    first_token: Option<Instant>,
    gaps: Vec<Duration>,
    error: Option<String>,
}

impl Measured {
    fn new() -> anyhow::Result<Self> {
        let histogram = || Histogram::new_with_bounds(1, LATENCY_US_MAX, 3);
        Ok(Self {
            elapsed: Duration::ZERO,
            sent: 0,
            ok: 0,
            refused: 0,
            errors: 0,
            first_error: None,
            tokens: 0,
            latency: histogram()?,
            first_token: histogram()?,
            inter_token: histogram()?,
            send_delay: histogram()?,
            receipts: Vec::new(),
        })
    }

    fn record(&mut self, scheduled: Instant, sent: Instant, done: Done) {
        let finished = Instant::now();
        self.sent += 1;
        self.send_delay.saturating_record(micros(sent - scheduled));
        match (&done.error, done.status) {
            (None, 200) if done.receipt.is_some() => {
                self.ok += 1;
                self.tokens += done.tokens;
                self.latency.saturating_record(micros(finished - scheduled));
                if let Some(first) = done.first_token {
                    self.first_token.saturating_record(micros(first - scheduled));
                }
                done.gaps.iter().for_each(|gap| self.inter_token.saturating_record(micros(*gap)));
                if self.receipts.len() < RECEIPTS_KEPT_MAX {
                    self.receipts.extend(done.receipt);
                }
            }
            (None, 429) => self.refused += 1,
            (error, status) => {
                self.errors += 1;
                let text = error.clone().unwrap_or_else(|| format!("status {status}, or an answer without a receipt"));
                self.first_error.get_or_insert(text);
            }
        }
    }

    fn merge(&mut self, other: Self) -> anyhow::Result<()> {
        self.sent += other.sent;
        self.ok += other.ok;
        self.refused += other.refused;
        self.errors += other.errors;
        self.tokens += other.tokens;
        if self.first_error.is_none() {
            self.first_error = other.first_error;
        }
        self.latency.add(&other.latency)?;
        self.first_token.add(&other.first_token)?;
        self.inter_token.add(&other.inter_token)?;
        self.send_delay.add(&other.send_delay)?;
        let room = RECEIPTS_KEPT_MAX.saturating_sub(self.receipts.len());
        self.receipts.extend(other.receipts.into_iter().take(room));
        Ok(())
    }
}

impl Load {
    /// Sends requests for `duration` and waits for all answers.
    pub(crate) async fn run(&self, address: SocketAddr, duration: Duration) -> anyhow::Result<Measured> {
        let total = (self.rate * duration.as_secs_f64()).ceil() as u64;
        let next = Arc::new(AtomicU64::new(0));
        let begin = Instant::now();
        let mut workers = JoinSet::new();
        for _ in 0..self.connections {
            let (next, rate, workload, max_tokens) = (Arc::clone(&next), self.rate, self.workload, self.max_tokens);
            workers.spawn(async move {
                let mut client = Client::new(address);
                let mut measured = Measured::new()?;
                loop {
                    let slot = next.fetch_add(1, Ordering::Relaxed);
                    if slot >= total {
                        return anyhow::Ok(measured);
                    }
                    let scheduled = begin + Duration::from_secs_f64(slot as f64 / rate);
                    tokio::time::sleep_until(scheduled.into()).await;
                    let sent = Instant::now();
                    let index = NEXT_INDEX.fetch_add(1, Ordering::Relaxed);
                    let done = ask(&mut client, workload, index, max_tokens).await;
                    measured.record(scheduled, sent, done);
                }
            });
        }
        let mut measured = Measured::new()?;
        while let Some(worker) = workers.join_next().await {
            measured.merge(worker??)?;
        }
        measured.elapsed = begin.elapsed();
        Ok(measured)
    }
}

async fn ask(client: &mut Client, workload: Workload, index: u64, max_tokens: u32) -> Done {
    let mut done = Done { status: 0, receipt: None, tokens: 0, first_token: None, gaps: Vec::new(), error: None };
    let result = if workload.is_stream() {
        stream(client, workload, index, max_tokens, &mut done).await
    } else {
        answer(client, workload, index, max_tokens, &mut done).await
    };
    if let Err(error) = result {
        done.error = Some(format!("{error:#}"));
    }
    done
}

async fn answer(
    client: &mut Client,
    workload: Workload,
    index: u64,
    max_tokens: u32,
    done: &mut Done,
) -> anyhow::Result<()> {
    let (status, body) = client.call("POST", workload.path(), workload.body(index, max_tokens)).await?;
    done.status = status;
    if status == 200 {
        let body: serde_json::Value = serde_json::from_slice(&body)?;
        done.receipt = receipt(&body);
    }
    Ok(())
}

/// Reads a stream of server-sent events. A stream that ends without `[DONE]` is an error, however cleanly it closes.
async fn stream(
    client: &mut Client,
    workload: Workload,
    index: u64,
    max_tokens: u32,
    done: &mut Done,
) -> anyhow::Result<()> {
    let response = client.send("POST", workload.path(), workload.body(index, max_tokens)).await?;
    done.status = response.status().as_u16();
    let mut body = response.into_body();
    let mut text = Vec::new();
    let mut last: Option<Instant> = None;
    let mut complete = false;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        text.extend_from_slice(&data);
        while let Some(end) = text.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = text.drain(..end + 2).collect();
            let Some(data) = event.strip_prefix(b"data: ") else { continue };
            let data = data.trim_ascii_end();
            if data == b"[DONE]" {
                complete = true;
                continue;
            }
            let chunk: serde_json::Value = serde_json::from_slice(data)?;
            anyhow::ensure!(chunk.get("error").is_none(), "the stream failed: {}", chunk["error"]);
            done.receipt = receipt(&chunk).or(done.receipt.take());
            if chunk["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()) {
                let now = Instant::now();
                done.tokens += 1;
                done.first_token.get_or_insert(now);
                done.gaps.extend(last.map(|last| now - last));
                last = Some(now);
            }
        }
    }
    anyhow::ensure!(complete || done.status != 200, "the stream ended without [DONE]");
    Ok(())
}

fn receipt(body: &serde_json::Value) -> Option<String> {
    body["butterfly"]["receipt_id"].as_str().map(str::to_owned)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX).max(1)
}
