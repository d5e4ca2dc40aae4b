//! Whole models: against references, and the same bits however they are run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod families;
mod files;
mod gguf;
mod golden;
mod invariance;
mod minilm;
mod numeric;
mod plain;
mod reference;
mod safetensors;
#[path = "../support/minilm.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use butterfly::model::{Model, Sequence, SequenceStep, SliceModel, StepInput, StepOutput};
use butterfly_kernels::Pool;

/// A file or folder of test data.
fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn open(spec: &str) -> Arc<Model> {
    Model::open(spec, &data("")).unwrap()
}

fn whole(model: &Model) -> Arc<SliceModel> {
    model.load(0..model.manifest().layers).unwrap()
}

/// One step of one sequence.
fn step(slice: &SliceModel, pool: &Pool, sequence: &mut Sequence, input: StepInput<'_>) -> StepOutput {
    let mut steps = [SequenceStep::new(sequence, input)];
    slice.forward(pool, &mut steps).unwrap();
    let [step] = steps;
    step.output
}

fn logits(output: StepOutput) -> Vec<f32> {
    match output {
        StepOutput::Logits(logits) => logits,
        other => panic!("no logits: {other:?}"),
    }
}

/// Bit patterns, which compare where floats would let zeros of either sign pass.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
