//! A NaN or an infinity ends its own sequence, at its own position, however positions were dealt to steps.

use std::sync::Arc;

use butterfly::model::{ForwardError, Model, Sequence, SequenceStep, SliceModel, StepFault, StepInput, StepOutput};
use butterfly_kernels::{Path, Pool};
use serde_json::json;

use super::{bits, open, safetensors, step, whole};

const HIDDEN: usize = 4;
const VOCABULARY: usize = 8;
/// Its value in layer 1 is too large for f16; no other token's is, and no other token sees it from the left.
const POISON: u32 = 5;

/// Three layers, of which the second multiplies the last component of the residual, which only [`POISON`] has, by a
/// million before it becomes a value.
fn model() -> (tempfile::TempDir, Arc<Model>) {
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": true
    });
    let embedding = (0..VOCABULARY * HIDDEN).map(|index| match (index / HIDDEN, index % HIDDEN) {
        (token, 3) => f32::from(u8::from(token == POISON as usize)),
        (token, column) => ((token * 7 + column * 3) % 5) as f32 / 4.0 - 0.4,
    });
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN], embedding.collect()),
        ("model.norm.weight".to_owned(), vec![HIDDEN], vec![1.0; HIDDEN]),
    ];
    for layer in 0..3 {
        for (name, rows, columns) in [
            ("self_attn.q_proj", 4, HIDDEN),
            ("self_attn.k_proj", 2, HIDDEN),
            ("self_attn.v_proj", 2, HIDDEN),
            ("self_attn.o_proj", HIDDEN, 4),
            ("mlp.gate_proj", 3, HIDDEN),
            ("mlp.up_proj", 3, HIDDEN),
            ("mlp.down_proj", HIDDEN, 3),
        ] {
            let values = (0..rows * columns).map(|index| {
                let (row, column) = (index / columns, index % columns);
                let into_last = rows == HIDDEN && row == 3 && name != "self_attn.q_proj";
                match (name, layer, row, column) {
                    _ if into_last => 0.0,
                    ("self_attn.v_proj", 1, 1, 3) => 1e6,
                    _ => ((layer * 5 + row * 3 + column * 2) % 7) as f32 / 8.0 - 0.4,
                }
            });
            tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![rows, columns], values.collect()));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![HIDDEN], vec![1.0; HIDDEN]));
        }
    }
    let folder = safetensors::folder(&config, &safetensors::file(&tensors));
    let model = Model::open(folder.path().to_str().unwrap(), std::path::Path::new("")).unwrap();
    (folder, model)
}

/// Feeds tokens in chunks; gives the bits of the rows that left and the sequence.
fn feed(slice: &SliceModel, pool: &Pool, tokens: &[u32], chunk: usize) -> (Vec<u32>, Sequence) {
    let mut sequence = slice.new_sequence();
    let mut rows = Vec::new();
    for tokens in tokens.chunks(chunk) {
        match step(slice, pool, &mut sequence, StepInput::Tokens(tokens)) {
            StepOutput::Rows(values) | StepOutput::Numeric { rows: values } => rows.extend(bits(&values)),
            StepOutput::Logits(_) => {}
            other => panic!("{other:?}"),
        }
    }
    (rows, sequence)
}

#[test]
fn chunks_do_not_change_where_a_sequence_ends_nor_what_came_before() {
    let (_folder, model) = model();
    let pool = Pool::new(1, Path::detect().unwrap());
    let tokens = [1, 2, 3, POISON, 4, POISON, 6, 1];
    for range in [0..1, 0..2, 0..3] {
        let ends = range.end > 1;
        let finite = if ends { 3 } else { tokens.len() };
        let slice = model.load(range.clone()).unwrap();
        let (expected_rows, expected) = feed(&slice, &pool, &tokens[..finite], 1);
        assert!(!expected.is_numeric());
        for chunk in 1..=tokens.len() {
            let (rows, sequence) = feed(&slice, &pool, &tokens, chunk);
            assert_eq!(sequence.position() as usize, finite, "{range:?} by {chunk}");
            assert_eq!(sequence.is_numeric(), ends);
            assert_eq!(rows, expected_rows);
            assert_eq!(sequence.interior(), expected.interior());
            assert_eq!(sequence.bytes(), expected.bytes());
        }
    }
}

#[test]
fn neighbours_in_the_batch_are_not_affected() {
    let (_folder, model) = model();
    let pool = Pool::new(2, Path::detect().unwrap());
    let slice = whole(&model);
    let (healthy, poisoned) = ([1, 2, 3, 4, 6], [1, POISON, 2]);
    let (_, alone) = feed(&slice, &pool, &healthy, healthy.len());
    let mut sequences = [slice.new_sequence(), slice.new_sequence(), slice.new_sequence()];
    let inputs = [&healthy[..], &poisoned, &healthy];
    let mut steps: Vec<SequenceStep<'_>> = sequences
        .iter_mut()
        .zip(inputs)
        .map(|(sequence, tokens)| SequenceStep::new(sequence, StepInput::Tokens(tokens)))
        .collect();
    slice.forward(&pool, &mut steps).unwrap();
    assert!(matches!(&steps[0].output, StepOutput::Logits(logits) if logits.iter().all(|logit| logit.is_finite())));
    assert_eq!(steps[0].output, steps[2].output);
    assert_eq!(steps[1].output, StepOutput::Numeric { rows: vec![] });
    assert_eq!([0, 1, 2].map(|index| sequences[index].position()), [5, 1, 5]);
    assert_eq!(sequences[0].interior(), alone.interior());
}

#[test]
fn an_ended_sequence_takes_nothing_more() {
    let (_folder, model) = model();
    let pool = Pool::new(1, Path::detect().unwrap());
    let slice = whole(&model);
    let (_, mut sequence) = feed(&slice, &pool, &[1, POISON], 2);
    let interior = sequence.interior();
    assert_eq!(step(&slice, &pool, &mut sequence, StepInput::Tokens(&[1])), StepOutput::Numeric { rows: vec![] });
    assert_eq!((sequence.position(), sequence.interior()), (1, interior));
}

#[test]
fn a_dense_network_that_overflows_ends_as_numeric() {
    let config = json!({"model_type": "mlp", "layer_sizes": [2, 2, 1], "activation": "tanh"});
    let weights = safetensors::file(&[
        ("layers.0.weight".into(), vec![2, 2], vec![3e38, 3e38, 1.0, 0.0]),
        ("layers.0.bias".into(), vec![2], vec![0.0, 0.0]),
        ("layers.1.weight".into(), vec![1, 2], vec![1.0, 1.0]),
        ("layers.1.bias".into(), vec![1], vec![0.5]),
    ]);
    let folder = safetensors::folder(&config, &weights);
    let model = Model::open(folder.path().to_str().unwrap(), std::path::Path::new("")).unwrap();
    let slice = whole(&model);
    let pool = Pool::new(1, Path::detect().unwrap());
    let run = |input: &[f32]| step(&slice, &pool, &mut slice.new_sequence(), StepInput::Vector(input));
    // tanh of the infinity would be 1.
    assert_eq!(run(&[1.0, 1.0]), StepOutput::Numeric { rows: vec![] });
    assert_eq!(run(&[0.0, 0.0]), StepOutput::Vector(vec![0.5]));
}

#[test]
fn a_step_that_does_not_fit_is_named_and_touches_no_sequence() {
    let (_folder, model) = model();
    let pool = Pool::new(1, Path::detect().unwrap());
    let (first, second) = (model.load(0..1).unwrap(), model.load(1..3).unwrap());
    let dense = whole(&open("builtin:mlp"));
    let fault = |slice: &SliceModel, input: StepInput<'_>| {
        let (mut good, mut bad) = (slice.new_sequence(), slice.new_sequence());
        let rows = vec![0.25; slice.input_width()];
        let fitting = match (slice.is_first(), slice.input_width()) {
            (true, HIDDEN) => StepInput::Tokens(&[1]),
            (true, _) => StepInput::Vector(&rows),
            (false, _) => StepInput::Rows(&rows),
        };
        let mut steps = [SequenceStep::new(&mut good, fitting), SequenceStep::new(&mut bad, input)];
        let error = slice.forward(&pool, &mut steps).unwrap_err();
        assert!(steps.iter().all(|step| step.output == StepOutput::Pending));
        assert_eq!((good.position(), good.bytes()), (0, 0));
        match error {
            ForwardError::Step { step: 1, fault } => fault,
            other => panic!("{other}"),
        }
    };
    let long = [1; 33];
    for (slice, input, expected) in [
        (&first, StepInput::Tokens(&[]), StepFault::Empty),
        (&first, StepInput::Tokens(&[1, 8]), StepFault::Token { token: 8, vocabulary: 8 }),
        (&first, StepInput::Tokens(&[u32::MAX]), StepFault::Token { token: u32::MAX, vocabulary: 8 }),
        (&first, StepInput::Tokens(&long), StepFault::Context { position: 0, rows: 33, context_length: 32 }),
        (&first, StepInput::Rows(&[0.0; 4]), StepFault::Kind { expected: "tokens" }),
        (&first, StepInput::Vector(&[0.0; 4]), StepFault::Kind { expected: "tokens" }),
        (&second, StepInput::Tokens(&[1]), StepFault::Kind { expected: "rows" }),
        (&second, StepInput::Rows(&[0.0; 5]), StepFault::Width { values: 5, width: 4 }),
        (&second, StepInput::Rows(&[]), StepFault::Empty),
        (&second, StepInput::Rows(&[0.0, f32::NAN, 0.0, 0.0]), StepFault::NotFinite),
        (&second, StepInput::Rows(&[f32::NEG_INFINITY; 4]), StepFault::NotFinite),
        (&dense, StepInput::Tokens(&[1]), StepFault::Kind { expected: "a vector" }),
        (&dense, StepInput::Vector(&[0.0; 128]), StepFault::Context { position: 0, rows: 2, context_length: 1 }),
        (&dense, StepInput::Vector(&[0.0; 63]), StepFault::Width { values: 63, width: 64 }),
    ] {
        assert_eq!(fault(slice, input), expected);
    }
    let mut foreign = second.new_sequence();
    assert_eq!(first.check(&foreign, StepInput::Tokens(&[1])), Err(StepFault::ForeignSequence));
    let mut steps = [SequenceStep::new(&mut foreign, StepInput::Tokens(&[1]))];
    let error = first.forward(&pool, &mut steps).unwrap_err();
    assert_eq!(error, ForwardError::Step { step: 0, fault: StepFault::ForeignSequence });
    first.forward(&pool, &mut []).unwrap();
}

#[test]
fn the_context_can_be_filled_and_not_exceeded() {
    let (_folder, model) = model();
    let pool = Pool::new(1, Path::detect().unwrap());
    let slice = whole(&model);
    let (_, mut sequence) = feed(&slice, &pool, &[1; 32], 7);
    assert_eq!(sequence.position(), 32);
    let fault = slice.check(&sequence, StepInput::Tokens(&[1])).unwrap_err();
    assert_eq!(fault, StepFault::Context { position: 32, rows: 1, context_length: 32 });
    let mut steps = [SequenceStep::new(&mut sequence, StepInput::Tokens(&[1]))];
    assert!(slice.forward(&pool, &mut steps).is_err());
}
