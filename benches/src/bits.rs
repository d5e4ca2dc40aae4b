//! Whether a model computes the same bits whatever the instructions, the batch, the chunks and the threads.
//!
//! Windows of a text are computed once as a whole, alone and with one thread, and then again in other ways. For every
//! token the row that enters the last layer is compared, and for every window the logits of its last token.
//!
//! Invariant: floats are compared as bits, so that zeros of two signs differ.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use anyhow::Context;
use butterfly::model::{Model, Sequence, SequenceStep, SliceModel, StepInput, StepOutput};
use butterfly_kernels::{Path, Pool};
use clap::Args;
use serde::Serialize;

use crate::synth::absolute;

#[derive(Args)]
pub(crate) struct BitsArgs {
    /// A GGUF file or a folder with a model of two layers or more that takes tokens.
    #[arg(long)]
    model: PathBuf,
    /// Where the tokens come from: windows from all over this text.
    #[arg(long)]
    text: PathBuf,
    /// Tokens to compare in each way.
    #[arg(long, default_value_t = 1_000_000)]
    tokens: usize,
    /// Tokens to compare with the scalar definition, which is slow.
    #[arg(long, default_value_t = 20_000)]
    definition_tokens: usize,
    /// Tokens of a window.
    #[arg(long, default_value_t = 256)]
    window: usize,
}

/// Windows that a way may compute together.
const GROUP: usize = 8;

/// How a group of windows is computed.
struct Way {
    pool: Pool,
    /// Windows at once.
    batch: usize,
    /// Tokens of each of them at once.
    chunk: usize,
    tokens: usize,
    found: Compared,
}

/// What one way showed.
#[derive(Serialize)]
pub(crate) struct Compared {
    path: String,
    threads: usize,
    batch: usize,
    chunk: usize,
    tokens: usize,
    /// Tokens whose row differs in a bit, and windows whose logits do.
    different_rows: usize,
    different_logits: usize,
}

/// All ways.
#[derive(Serialize)]
pub(crate) struct Bits {
    model: String,
    reference: String,
    ways: Vec<Compared>,
}

impl Bits {
    /// True if no bit differed.
    pub(crate) fn holds(&self) -> bool {
        self.ways.iter().all(|way| way.different_rows == 0 && way.different_logits == 0)
    }
}

/// Compares.
pub(crate) fn run(args: &BitsArgs) -> anyhow::Result<Bits> {
    let path = Path::detect().context("this processor cannot keep the profile")?;
    let model = Model::open(&absolute(&args.model)?, std::path::Path::new(""))?;
    let layers = model.manifest().layers;
    anyhow::ensure!(layers > 1, "a model of two layers or more is needed");
    let slices = Slices { body: model.load(0..layers - 1)?, head: model.load(layers - 1..layers)? };
    let text = std::fs::read_to_string(&args.text).with_context(|| format!("reading {}", args.text.display()))?;
    let ids = model.tokenizer().context("the model has no tokenizer")?.encode(&text)?;
    let window = args.window.max(1);
    anyhow::ensure!(ids.len() > window, "the text has {} tokens, fewer than a window", ids.len());

    let reference = Pool::new(1, path);
    let mut ways = ways(args, path, window);
    let groups = ways.iter().map(|way| way.tokens.div_ceil(GROUP * window)).max().unwrap_or(0);
    for group in 0..groups {
        // A prime stride, so that windows begin everywhere before they repeat.
        let start = |index: usize| (group * GROUP + index) * 7919 % (ids.len() - window);
        let windows: Vec<&[u32]> =
            (0..GROUP).filter_map(|index| ids.get(start(index)..start(index) + window)).collect();
        let mut expected = Vec::with_capacity(GROUP);
        for alone in windows.chunks(1) {
            expected.extend(slices.compute(&reference, alone, window)?);
        }
        for way in ways.iter_mut().filter(|way| way.found.tokens < way.tokens) {
            for (windows, expected) in windows.chunks(way.batch).zip(expected.chunks(way.batch)) {
                let computed = slices.compute(&way.pool, windows, way.chunk)?;
                way.found.add(expected, &computed, slices.head.input_width());
            }
        }
    }
    Ok(Bits {
        model: model.manifest().name.clone(),
        reference: format!("{}, 1 thread, whole windows of {window}", path.name()),
        ways: ways.into_iter().map(|way| way.found).collect(),
    })
}

/// The ways that are compared: one token at a time as in decoding, odd chunks of a batch, a batch of decoding, and the
/// definition.
fn ways(args: &BitsArgs, path: Path, window: usize) -> Vec<Way> {
    let way = |path: Path, threads, batch, chunk, tokens| {
        let path_name = path.name().to_owned();
        let found =
            Compared { path: path_name, threads, batch, chunk, tokens: 0, different_rows: 0, different_logits: 0 };
        Way { pool: Pool::new(threads, path), batch, chunk, tokens, found }
    };
    vec![
        way(path, 1, 1, 1, args.tokens),
        way(path, 2, GROUP, 1, args.tokens),
        way(path, 2, 3, 7, args.tokens),
        way(path, 3, GROUP, window, args.tokens),
        way(Path::Scalar, 2, 2, 32, args.definition_tokens),
    ]
}

/// The rows that enter the last layer, `[tokens, width]`, and the logits of the last token.
struct Outputs {
    rows: Vec<f32>,
    logits: Vec<f32>,
}

/// All layers but the last, and the last.
struct Slices {
    body: std::sync::Arc<SliceModel>,
    head: std::sync::Arc<SliceModel>,
}

impl Slices {
    /// Windows of one length, together, so many tokens of each at a time.
    fn compute(&self, pool: &Pool, windows: &[&[u32]], chunk: usize) -> anyhow::Result<Vec<Outputs>> {
        let mut bodies: Vec<Sequence> = windows.iter().map(|_| self.body.new_sequence()).collect();
        let mut heads: Vec<Sequence> = windows.iter().map(|_| self.head.new_sequence()).collect();
        let mut outputs: Vec<Outputs> =
            windows.iter().map(|_| Outputs { rows: Vec::new(), logits: Vec::new() }).collect();
        let length = windows.first().map_or(0, |window| window.len());
        for start in (0..length).step_by(chunk) {
            let chunks = windows.iter().map(|window| &window[start..length.min(start + chunk)]);
            let inputs = chunks.map(StepInput::Tokens);
            let rows: Vec<Vec<f32>> = forward(&self.body, pool, &mut bodies, inputs)?
                .into_iter()
                .map(|output| match output {
                    StepOutput::Rows(rows) => Ok(rows),
                    _ => anyhow::bail!("the model's arithmetic left the finite numbers"),
                })
                .collect::<anyhow::Result<_>>()?;
            let inputs = rows.iter().map(|rows| StepInput::Rows(rows));
            let logits = forward(&self.head, pool, &mut heads, inputs)?;
            for ((output, rows), logits) in outputs.iter_mut().zip(&rows).zip(logits) {
                output.rows.extend_from_slice(rows);
                if let StepOutput::Logits(logits) = logits {
                    output.logits = logits;
                }
            }
        }
        Ok(outputs)
    }
}

/// One pass of one step for each sequence.
fn forward<'a>(
    slice: &SliceModel,
    pool: &Pool,
    sequences: &mut [Sequence],
    inputs: impl Iterator<Item = StepInput<'a>>,
) -> anyhow::Result<Vec<StepOutput>> {
    let mut steps: Vec<SequenceStep<'_>> =
        sequences.iter_mut().zip(inputs).map(|(sequence, input)| SequenceStep::new(sequence, input)).collect();
    slice.forward(pool, &mut steps)?;
    Ok(steps.into_iter().map(|step| step.output).collect())
}

impl Compared {
    fn add(&mut self, expected: &[Outputs], computed: &[Outputs], width: usize) {
        for (expected, computed) in expected.iter().zip(computed) {
            let rows = expected.rows.chunks(width).zip(computed.rows.chunks(width));
            self.tokens += expected.rows.len() / width;
            self.different_rows += expected.rows.len().abs_diff(computed.rows.len()) / width;
            self.different_rows += rows.filter(|(expected, computed)| !same_bits(expected, computed)).count();
            self.different_logits += usize::from(!same_bits(&expected.logits, &computed.logits));
        }
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

impl Display for Bits {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, beside {}", self.model, self.reference)?;
        writeln!(f, "path     threads  batch  chunk     tokens  rows that differ  logits that differ")?;
        for way in &self.ways {
            writeln!(
                f,
                "{:<7}  {:>7}  {:>5}  {:>5}  {:>9}  {:>16}  {:>18}",
                way.path, way.threads, way.batch, way.chunk, way.tokens, way.different_rows, way.different_logits
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outputs(rows: &[f32], logits: &[f32]) -> Outputs {
        Outputs { rows: rows.to_vec(), logits: logits.to_vec() }
    }

    #[test]
    fn one_bit_is_a_difference() {
        let mut found = Compared {
            path: String::new(),
            threads: 1,
            batch: 1,
            chunk: 1,
            tokens: 0,
            different_rows: 0,
            different_logits: 0,
        };
        let expected = [outputs(&[1.0, 0.0, 3.0, f32::NAN], &[0.0])];
        found.add(&expected, &[outputs(&[1.0, 0.0, 3.0, f32::NAN], &[0.0])], 2);
        assert_eq!((found.tokens, found.different_rows, found.different_logits), (2, 0, 0));
        found.add(&expected, &[outputs(&[1.0, -0.0, 3.0, f32::NAN], &[-0.0])], 2);
        assert_eq!((found.tokens, found.different_rows, found.different_logits), (4, 1, 1));
        found.add(&expected, &[outputs(&[1.0, 0.0], &[0.0])], 2);
        assert_eq!((found.tokens, found.different_rows, found.different_logits), (6, 2, 1));
    }
}
