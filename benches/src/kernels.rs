//! How fast a model computes on this machine, and how near that is to what its memory could give.
//!
//! Figures are medians of several rounds. The machine's read bandwidth is measured by the same threads in the same run,
//! as plain sums over memory that no cache holds.

use std::fmt::{self, Display, Formatter};
use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use butterfly::model::{Model, PackedWeights, Sequence, SequenceStep, SliceModel, StepInput, StepOutput};
use butterfly_kernels::{Path, Pool};
use clap::Args;
use serde::Serialize;

use crate::synth::absolute;

#[derive(Args)]
pub(crate) struct KernelsArgs {
    /// A GGUF file or a folder with a model.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    pub(crate) shape: Shape,
    /// Leave packed weights on disk alone.
    #[arg(long)]
    no_cache: bool,
}

/// What is measured.
#[derive(Args, Clone, Serialize)]
pub(crate) struct Shape {
    /// Threads of a forward pass.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    pub(crate) threads: Vec<usize>,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    pub(crate) prompt: usize,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 32)]
    pub(crate) tokens: usize,
    /// Sequences that are answered together.
    #[arg(long, default_value_t = 8)]
    pub(crate) sequences: usize,
    /// Times that each is measured.
    #[arg(long, default_value_t = 3)]
    pub(crate) rounds: usize,
}

/// Tokens before an answer that is measured.
pub(crate) const BEFORE: usize = 16;

/// What one number of threads reached.
#[derive(Serialize)]
pub(crate) struct Reached {
    threads: usize,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    batched_tokens_per_s: f64,
    decode_gb_per_s: f64,
    machine_gb_per_s: f64,
}

/// All of it.
#[derive(Serialize)]
pub(crate) struct Figures {
    model: String,
    path: String,
    load_s: f64,
    weight_mb: f64,
    resident_mb: Option<f64>,
    reached: Vec<Reached>,
}

/// A model that is loaded whole.
pub(crate) struct Loaded {
    pub(crate) model: Arc<Model>,
    pub(crate) slice: Arc<SliceModel>,
    pub(crate) path: Path,
    seconds: f64,
}

impl Loaded {
    pub(crate) fn open(model: &std::path::Path, cached: bool) -> anyhow::Result<Self> {
        let path = Path::detect().context("this processor cannot keep the profile")?;
        let start = Instant::now();
        let model = Model::open(&absolute(model)?, std::path::Path::new(""))?;
        if let Some(packed) = PackedWeights::of_user().filter(|_| cached) {
            model.keep_packed(packed);
        }
        let slice = model.load(0..model.manifest().layers)?;
        anyhow::ensure!(model.manifest().vocabulary > 0, "a model that takes tokens is needed");
        Ok(Self { model, slice, path, seconds: start.elapsed().as_secs_f64() })
    }

    /// Bytes of weights that one token reads: an embedding that is not the head as well is read one row at a time.
    fn read_bytes(&self) -> usize {
        let costs = &self.model.manifest().layer_costs;
        let [first, second, ..] = costs.as_slice() else { return self.slice.weight_bytes() };
        let embedding = first.weight_bytes.saturating_sub(second.weight_bytes);
        let all: u64 = costs.iter().map(|cost| cost.weight_bytes).sum();
        let is_tied = (self.slice.weight_bytes() as u64) < all.saturating_sub(embedding / 2);
        self.slice.weight_bytes() - if is_tied { 0 } else { embedding as usize }
    }

    fn token(&self, index: usize) -> u32 {
        (index * 7919 % self.model.manifest().vocabulary) as u32
    }

    /// One pass of one step for each sequence.
    pub(crate) fn pass(
        &self,
        pool: &Pool,
        sequences: &mut [Sequence],
        tokens: &[u32],
    ) -> anyhow::Result<Vec<StepOutput>> {
        let each = tokens.len() / sequences.len();
        let steps = sequences.iter_mut().zip(tokens.chunks(each));
        let mut steps: Vec<SequenceStep<'_>> =
            steps.map(|(sequence, tokens)| SequenceStep::new(sequence, StepInput::Tokens(tokens))).collect();
        self.slice.forward(pool, &mut steps)?;
        Ok(steps.into_iter().map(|step| step.output).collect())
    }

    /// Tokens per second of reading a prompt.
    pub(crate) fn prefill(&self, pool: &Pool, tokens: usize) -> anyhow::Result<f64> {
        let tokens: Vec<u32> = (0..tokens).map(|index| self.token(index)).collect();
        let mut sequence = [self.slice.new_sequence()];
        let start = Instant::now();
        black_box(self.pass(pool, &mut sequence, &tokens)?);
        Ok(tokens.len() as f64 / start.elapsed().as_secs_f64())
    }

    /// Tokens per second, of all sequences, of answering.
    pub(crate) fn decode(&self, pool: &Pool, sequences: usize, tokens: usize) -> anyhow::Result<f64> {
        let mut states: Vec<Sequence> = (0..sequences).map(|_| self.slice.new_sequence()).collect();
        let before: Vec<u32> = (0..sequences * BEFORE).map(|index| self.token(index)).collect();
        self.pass(pool, &mut states, &before)?;
        let start = Instant::now();
        for position in 0..tokens {
            let next: Vec<u32> = (0..sequences).map(|index| self.token(position + index)).collect();
            black_box(self.pass(pool, &mut states, &next)?);
        }
        Ok((tokens * sequences) as f64 / start.elapsed().as_secs_f64())
    }

    fn reached(&self, shape: &Shape, threads: usize) -> anyhow::Result<Reached> {
        let pool = Pool::new(threads, self.path);
        let rounds = |measure: &dyn Fn() -> anyhow::Result<f64>| -> anyhow::Result<f64> {
            Ok(median((0..shape.rounds.max(1)).map(|_| measure()).collect::<anyhow::Result<_>>()?))
        };
        let decode = rounds(&|| self.decode(&pool, 1, shape.tokens))?;
        Ok(Reached {
            threads,
            prefill_tokens_per_s: rounds(&|| self.prefill(&pool, shape.prompt))?,
            decode_tokens_per_s: decode,
            batched_tokens_per_s: rounds(&|| self.decode(&pool, shape.sequences, shape.tokens))?,
            decode_gb_per_s: decode * self.read_bytes() as f64 / 1e9,
            machine_gb_per_s: read_bandwidth(threads, shape.rounds.max(1)),
        })
    }
}

/// Measures.
pub(crate) fn run(args: &KernelsArgs) -> anyhow::Result<Figures> {
    let loaded = Loaded::open(&args.model, !args.no_cache)?;
    let reached = args.shape.threads.iter().map(|threads| loaded.reached(&args.shape, *threads));
    Ok(Figures {
        model: loaded.model.manifest().name.clone(),
        path: loaded.path.name().to_owned(),
        load_s: loaded.seconds,
        weight_mb: loaded.slice.weight_bytes() as f64 / 1e6,
        reached: reached.collect::<anyhow::Result<_>>()?,
        resident_mb: resident_mb(),
    })
}

/// The middle one; of an even number, the mean of the middle two, which favours nobody. 0 of none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or_default();
    f64::midpoint(at(values.len().saturating_sub(1) / 2), at(values.len() / 2))
}

/// Billions of bytes per second that so many threads read, each through a share of its own, in four streams: one stream
/// alone gets less of the memory.
fn read_bandwidth(threads: usize, rounds: usize) -> f64 {
    const NUMBERS: usize = 64 << 20;
    let memory: Vec<u64> = (0..NUMBERS as u64).collect();
    let read = |share: &[u64]| {
        let quarter = share.len() / 4;
        let streams: [&[[u64; 8]]; 4] = std::array::from_fn(|i| share[i * quarter..][..quarter].as_chunks().0);
        let mut sums = [[0_u64; 8]; 4];
        for line in 0..quarter / 8 {
            for (sums, stream) in sums.iter_mut().zip(streams) {
                for (sum, number) in sums.iter_mut().zip(&stream[line]) {
                    *sum = sum.wrapping_add(*number);
                }
            }
        }
        sums
    };
    let pass = || -> Duration {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for share in memory.chunks(NUMBERS.div_ceil(threads.max(1))) {
                scope.spawn(move || black_box(read(share)));
            }
        });
        start.elapsed()
    };
    let best = (0..rounds + 2).map(|_| pass()).min().unwrap_or(Duration::MAX);
    size_of_val(memory.as_slice()) as f64 / 1e9 / best.as_secs_f64()
}

/// Memory of this process that is not on disk or swapped out, where the system says so.
fn resident_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0 / 1e6)
}

impl Display for Figures {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {:.0} MB of weights, loaded in {:.2} s, path {}",
            self.model, self.weight_mb, self.load_s, self.path
        )?;
        match self.resident_mb {
            Some(resident) => writeln!(f, ", resident {resident:.0} MB")?,
            None => writeln!(f)?,
        }
        writeln!(f, "threads  prefill tok/s  decode tok/s  batched tok/s  decode GB/s  machine GB/s  share")?;
        for reached in &self.reached {
            writeln!(
                f,
                "{:>7}  {:>13.1}  {:>12.2}  {:>13.2}  {:>11.2}  {:>12.2}  {:>4.0} %",
                reached.threads,
                reached.prefill_tokens_per_s,
                reached.decode_tokens_per_s,
                reached.batched_tokens_per_s,
                reached.decode_gb_per_s,
                reached.machine_gb_per_s,
                100.0 * reached.decode_gb_per_s / reached.machine_gb_per_s,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_favours_neither_side() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!((median(vec![7.0]), median(Vec::new())), (7.0, 0.0));
    }
}
