//! The same bits on one, two or four slices, for any chunks, any batch, any number of threads.

use std::sync::Arc;

use butterfly::model::{Model, Sequence, SequenceStep, SliceModel, StepInput, StepOutput};
use butterfly_kernels::{Path, Pool};
use proptest::prelude::*;
use proptest::test_runner::TestRng;

use super::{bits, logits, open, step, whole};

/// What one sequence leaves behind: rows that crossed boundaries, logits after each chunk's last position, digests.
#[derive(Debug, Clone, PartialEq)]
struct Trace {
    /// Bits of the last position's logits.
    logits: Vec<u32>,
    /// For each slice.
    interiors: Vec<[u8; 32]>,
    /// Bits of the rows between slices, `[slices - 1]` of `[positions, width]`.
    boundaries: Vec<Vec<u32>>,
}

fn load(model: &Model, cuts: &[usize]) -> Vec<Arc<SliceModel>> {
    cuts.windows(2).map(|cut| model.load(cut[0]..cut[1]).unwrap()).collect()
}

/// Runs several sequences through all slices, the chunks of each as given; `batch` of them share each pass.
fn run(slices: &[Arc<SliceModel>], pool: &Pool, prompts: &[(&[u32], &[usize])]) -> Vec<Trace> {
    let mut states: Vec<Vec<Sequence>> =
        prompts.iter().map(|_| slices.iter().map(|slice| slice.new_sequence()).collect()).collect();
    let mut traces: Vec<Trace> = prompts
        .iter()
        .map(|_| Trace { logits: vec![], interiors: vec![], boundaries: vec![vec![]; slices.len() - 1] })
        .collect();
    let mut starts = vec![0; prompts.len()];
    for round in 0.. {
        let chunks: Vec<Option<&[u32]>> = prompts
            .iter()
            .zip(&mut starts)
            .map(|((tokens, chunks), start)| {
                let first = *start;
                *start = tokens.len().min(first + chunks.get(round).copied().unwrap_or(usize::MAX - first));
                (first < *start).then(|| &tokens[first..*start])
            })
            .collect();
        if chunks.iter().all(Option::is_none) {
            break;
        }
        let mut rows: Vec<Vec<f32>> = vec![vec![]; prompts.len()];
        for (index, slice) in slices.iter().enumerate() {
            let active = states.iter_mut().zip(&chunks).zip(&rows);
            let mut steps: Vec<SequenceStep<'_>> = active
                .filter_map(|((states, chunk), rows)| {
                    let input = if index == 0 { StepInput::Tokens((*chunk)?) } else { StepInput::Rows(rows) };
                    chunk.map(|_| SequenceStep::new(&mut states[index], input))
                })
                .collect();
            slice.forward(pool, &mut steps).unwrap();
            let mut outputs: Vec<StepOutput> = steps.into_iter().map(|step| step.output).collect();
            outputs.reverse();
            for ((trace, chunk), rows) in traces.iter_mut().zip(&chunks).zip(&mut rows) {
                if chunk.is_none() {
                    continue;
                }
                match outputs.pop().unwrap() {
                    StepOutput::Rows(values) => {
                        trace.boundaries[index].extend(bits(&values));
                        *rows = values;
                    }
                    output => trace.logits = bits(&logits(output)),
                }
            }
        }
    }
    for (trace, states) in traces.iter_mut().zip(&states) {
        trace.interiors = states.iter().map(Sequence::interior).collect();
    }
    traces
}

/// The logits after each prompt, all prompts sharing the passes; the chunks of each as given.
pub(crate) fn last_logits(slices: &[Arc<SliceModel>], pool: &Pool, prompts: &[(&[u32], &[usize])]) -> Vec<Vec<u32>> {
    run(slices, pool, prompts).into_iter().map(|trace| trace.logits).collect()
}

/// Random chunk sizes and token ids.
fn prompt(rng: &mut TestRng, vocabulary: u32, longest: usize) -> (Vec<u32>, Vec<usize>) {
    let length = rng.random_range(1..=longest);
    let tokens = (0..length).map(|_| rng.random_range(0..vocabulary)).collect();
    let chunks = (0..length).map(|_| rng.random_range(1..=longest / 2)).collect();
    (tokens, chunks)
}

#[test]
fn neither_slices_nor_chunks_nor_neighbours_nor_threads_change_a_bit() {
    let pools = [1, 2, 3].map(|threads| Pool::new(threads, Path::detect().unwrap()));
    let mut rng = TestRng::deterministic_rng(prop::test_runner::RngAlgorithm::ChaCha);
    for (name, cuts, longest) in [
        ("builtin:tiny-rust", vec![vec![0, 8], vec![0, 4, 8], vec![0, 2, 4, 6, 8], vec![0, 1, 7, 8]], 40),
        ("sharded-f16", vec![vec![0, 6], vec![0, 3, 6], vec![0, 1, 2, 5, 6]], 70),
    ] {
        let model = open(name);
        let vocabulary = model.manifest().vocabulary as u32;
        for round in 0..4 {
            let prompts: Vec<(Vec<u32>, Vec<usize>)> = (0..5).map(|_| prompt(&mut rng, vocabulary, longest)).collect();
            let whole = load(&model, &cuts[0]);
            // Alone, one position at a time, on one thread: nothing to share and nothing to be confused by.
            let alone: Vec<Trace> = prompts
                .iter()
                .map(|(tokens, _)| run(&whole, &pools[0], &[(tokens, &vec![1; tokens.len()])]).remove(0))
                .collect();
            for cuts in &cuts {
                let slices = load(&model, cuts);
                let pool = &pools[(round + cuts.len()) % pools.len()];
                let together: Vec<(&[u32], &[usize])> =
                    prompts.iter().map(|(tokens, chunks)| (tokens.as_slice(), chunks.as_slice())).collect();
                let together = run(&slices, pool, &together);
                for (index, ((tokens, _), alone)) in prompts.iter().zip(&alone).enumerate() {
                    let in_one_chunk = run(&slices, pool, &[(tokens, &[])]).remove(0);
                    assert_eq!(together[index], in_one_chunk, "{name} {cuts:?} prompt {index}");
                    assert_eq!(together[index].logits, alone.logits, "{name} {cuts:?} prompt {index}");
                    if cuts.len() == 2 {
                        assert_eq!(together[index].interiors, alone.interiors, "{name} prompt {index}");
                    }
                }
            }
        }
    }
}

#[test]
fn the_definition_and_the_vector_path_give_the_same_bits() {
    let model = open("sharded-f16");
    let slice = whole(&model);
    let tokens: Vec<u32> = (0..19).map(|index| index * 37 % 512).collect();
    let traces: Vec<(Vec<u32>, [u8; 32])> = Path::available()
        .into_iter()
        .map(|path| {
            let mut sequence = slice.new_sequence();
            let output = step(&slice, &Pool::new(1, path), &mut sequence, StepInput::Tokens(&tokens));
            (bits(&logits(output)), sequence.interior())
        })
        .collect();
    assert!(traces.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_dense_network_gives_the_same_bits_on_any_slices_in_any_batch() {
    let model = open("builtin:mlp");
    let manifest = model.manifest();
    let pools = [1, 2].map(|threads| Pool::new(threads, Path::detect().unwrap()));
    let mut rng = TestRng::deterministic_rng(prop::test_runner::RngAlgorithm::ChaCha);
    let inputs: Vec<Vec<f32>> =
        (0..17).map(|_| (0..manifest.input_width).map(|_| rng.random_range(-4.0_f32..4.0)).collect()).collect();
    let mut all = Vec::new();
    for (cuts, pool, batch) in [
        (vec![0, 3], &pools[0], 1),
        (vec![0, 3], &pools[1], 17),
        (vec![0, 1, 3], &pools[0], 5),
        (vec![0, 1, 2, 3], &pools[1], 7),
    ] {
        let slices = load(&model, &cuts);
        let mut outputs = Vec::new();
        for inputs in inputs.chunks(batch) {
            let mut values = inputs.to_vec();
            for slice in &slices {
                let mut sequences: Vec<Sequence> = values.iter().map(|_| slice.new_sequence()).collect();
                let mut steps: Vec<SequenceStep<'_>> = sequences
                    .iter_mut()
                    .zip(&values)
                    .map(|(sequence, values)| {
                        let first = slice.is_first();
                        let input = if first { StepInput::Vector(values) } else { StepInput::Rows(values) };
                        SequenceStep::new(sequence, input)
                    })
                    .collect();
                slice.forward(pool, &mut steps).unwrap();
                let left: Vec<StepOutput> = steps.into_iter().map(|step| step.output).collect();
                values = left
                    .into_iter()
                    .map(|output| match output {
                        StepOutput::Rows(values) if !slice.is_last() => values,
                        StepOutput::Vector(values) if slice.is_last() => values,
                        other => panic!("{other:?}"),
                    })
                    .collect();
                assert!(sequences.iter().all(|sequence| sequence.position() == 1));
            }
            outputs.extend(values.iter().map(|values| bits(values)));
        }
        assert!(outputs.iter().all(|output| output.len() == manifest.output_width));
        all.push(outputs);
    }
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_slice_is_packed_once_in_a_process() {
    let (one, two) = (open("sharded-f16"), open("sharded-f16"));
    let slice = one.load(1..3).unwrap();
    assert!(Arc::ptr_eq(&slice, &two.load(1..3).unwrap()));
    assert!(!Arc::ptr_eq(&slice, &two.load(1..4).unwrap()));
    let model = open("builtin:mlp");
    assert!(Arc::ptr_eq(&model, &open("builtin:mlp")));
}
