//! Families without a reference of another implementation in the repository: random models against the plain one, which
//! is itself held against a reference that there is.

use std::sync::Arc;

use butterfly::model::{Model, SequenceStep, StepFault, StepInput, StepOutput};
use butterfly_kernels::{Path, Pool};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng};
use serde_json::{Value, json};

use super::plain::{Bert, Llama, Tensors};
use super::{bits, data, logits, safetensors, step, whole};

/// Tensors of these shapes, their values around `center` and as far from it as `spread`.
fn random(rng: &mut TestRng, tensors: &mut Tensors, name: &str, shape: &[usize], center: f32, spread: f32) {
    let count = shape.iter().product();
    let values = (0..count).map(|_| center + rng.random_range(-spread..spread)).collect();
    tensors.insert(name.to_owned(), (shape.to_vec(), values));
}

fn folder(config: &Value, tensors: &Tensors, prefix: &str) -> (tempfile::TempDir, Arc<Model>) {
    let named =
        tensors.iter().map(|(name, (shape, values))| (format!("{prefix}{name}"), shape.clone(), values.clone()));
    let folder = safetensors::folder(config, &safetensors::file(&named.collect::<Vec<_>>()));
    let model = Model::open(folder.path().to_str().unwrap(), std::path::Path::new("")).unwrap();
    (folder, model)
}

fn rng() -> TestRng {
    TestRng::deterministic_rng(RngAlgorithm::ChaCha)
}

fn llama_tensors(shape: &Llama, [hidden, wide, vocabulary]: [usize; 3], head_norms: bool) -> Tensors {
    let (mut rng, mut tensors) = (rng(), Tensors::new());
    let spread = 1.5 / (hidden as f32).sqrt();
    random(&mut rng, &mut tensors, "model.embed_tokens.weight", &[vocabulary, hidden], 0.0, 1.0);
    random(&mut rng, &mut tensors, "lm_head.weight", &[vocabulary, hidden], 0.0, spread);
    random(&mut rng, &mut tensors, "model.norm.weight", &[hidden], 1.0, 0.3);
    let (query, key) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    for layer in 0..shape.layers {
        let mut add = |name: &str, shape: &[usize], center: f32, spread: f32| {
            random(&mut rng, &mut tensors, &format!("model.layers.{layer}.{name}.weight"), shape, center, spread);
        };
        for (name, rows, columns) in [
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", key, hidden),
            ("self_attn.v_proj", key, hidden),
            ("self_attn.o_proj", hidden, query),
            ("mlp.gate_proj", wide, hidden),
            ("mlp.up_proj", wide, hidden),
            ("mlp.down_proj", hidden, wide),
        ] {
            add(name, &[rows, columns], 0.0, spread);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(name, &[hidden], 1.0, 0.3);
        }
        if head_norms {
            for name in ["self_attn.q_norm", "self_attn.k_norm"] {
                add(name, &[shape.head_dim], 1.5, 0.5);
            }
        }
    }
    tensors
}

/// The greatest difference, over the greatest expected value.
fn difference(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let greatest = expected.iter().fold(0.0_f64, |max, value| max.max(value.abs()));
    found.iter().zip(expected).fold(0.0_f64, |max, (found, value)| max.max((f64::from(*found) - value).abs()))
        / greatest
}

#[test]
fn the_plain_model_gives_the_numbers_of_another_implementation() {
    let folder = data("sharded-f16");
    let reference: Value = serde_json::from_slice(&std::fs::read(folder.join("reference.json")).unwrap()).unwrap();
    let mut tensors = Tensors::new();
    for number in 1..=4 {
        let file = std::fs::read(folder.join(format!("model-0000{number}-of-00004.safetensors"))).unwrap();
        let file = ::safetensors::SafeTensors::deserialize(&file).unwrap();
        for (name, tensor) in file.tensors() {
            let halves = tensor.data().chunks(2).map(|half| half::f16::from_le_bytes([half[0], half[1]]).to_f32());
            tensors.insert(name, (tensor.shape().to_vec(), halves.collect()));
        }
    }
    let shape = Llama { layers: 6, heads: 4, kv_heads: 2, head_dim: 16, theta: 10_000.0, epsilon: 1e-6 };
    let case = &reference["cases"][0];
    let floats = |list: &Value| list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
    let tokens: Vec<u32> = floats(&case["prompt_ids"]).into_iter().map(|token| token as u32).collect();
    let found: Vec<f32> = shape.logits(&tensors, &tokens).into_iter().map(|logit| logit as f32).collect();
    let difference = difference(&found, &floats(&case["last_logits"]));
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn qwen3_and_mistral_are_the_plain_model() {
    let pool = Pool::new(2, Path::detect().unwrap());
    let shape = Llama { layers: 3, heads: 4, kv_heads: 2, head_dim: 24, theta: 1e6, epsilon: 1e-6 };
    let sizes @ [hidden, wide, vocabulary] = [40, 72, 90];
    let tokens: Vec<u32> = (0..33).map(|index| index * 31 % 90).collect();
    for (family, head_norms, more) in [
        ("qwen3", true, json!({"use_sliding_window": false, "sliding_window": null, "max_window_layers": 3})),
        ("mistral", false, json!({"sliding_window": 64})),
    ] {
        let mut config = json!({
            "model_type": family, "hidden_size": hidden, "num_attention_heads": shape.heads, "head_dim": shape.head_dim,
            "num_key_value_heads": shape.kv_heads, "num_hidden_layers": shape.layers, "intermediate_size": wide,
            "vocab_size": vocabulary, "max_position_embeddings": 64, "rms_norm_eps": shape.epsilon,
            "rope_theta": shape.theta, "tie_word_embeddings": false, "torch_dtype": "float32",
        });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let tensors = llama_tensors(&shape, sizes, head_norms);
        let (_folder, model) = folder(&config, &tensors, "");
        let slices = [model.load(0..1).unwrap(), model.load(1..3).unwrap()];
        let mut sequences = [slices[0].new_reference_sequence(), slices[1].new_reference_sequence()];
        let StepOutput::Rows(rows) = step(&slices[0], &pool, &mut sequences[0], StepInput::Tokens(&tokens)) else {
            panic!("no rows");
        };
        let cut = logits(step(&slices[1], &pool, &mut sequences[1], StepInput::Rows(&rows)));
        let slice = whole(&model);
        let found = logits(step(&slice, &pool, &mut slice.new_reference_sequence(), StepInput::Tokens(&tokens)));
        assert_eq!(bits(&found), bits(&cut), "{family}");
        let difference = difference(&found, &shape.logits(&tensors, &tokens));
        assert!(difference < 1e-5, "{family}: {difference}");
    }
}

const BERT: Bert = Bert { layers: 3, heads: 3, epsilon: 1e-12 };
const HIDDEN: usize = 36;
const VOCABULARY: usize = 50;
const LENGTH: usize = 40;

fn bert_config() -> Value {
    json!({
        "model_type": "bert", "hidden_size": HIDDEN, "num_attention_heads": BERT.heads, "num_hidden_layers": BERT.layers,
        "intermediate_size": 60, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "type_vocab_size": 2,
        "layer_norm_eps": BERT.epsilon, "hidden_act": "gelu", "position_embedding_type": "absolute",
    })
}

fn bert_tensors() -> Tensors {
    let (mut rng, mut tensors) = (rng(), Tensors::new());
    let mut add = |name: &str, shape: &[usize], center: f32, spread: f32| {
        random(&mut rng, &mut tensors, name, shape, center, spread);
    };
    for (name, rows) in [("word", VOCABULARY), ("position", LENGTH), ("token_type", 2)] {
        add(&format!("embeddings.{name}_embeddings.weight"), &[rows, HIDDEN], 0.0, 1.0);
    }
    let mut norms = vec!["embeddings.LayerNorm".to_owned()];
    for layer in 0..BERT.layers {
        for (name, rows, columns) in [
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", 60, HIDDEN),
            ("output.dense", HIDDEN, 60),
        ] {
            add(&format!("encoder.layer.{layer}.{name}.weight"), &[rows, columns], 0.0, 0.3);
            add(&format!("encoder.layer.{layer}.{name}.bias"), &[rows], 0.0, 0.2);
        }
        norms.extend(["attention.output", "output"].map(|name| format!("encoder.layer.{layer}.{name}.LayerNorm")));
    }
    for name in norms {
        add(&format!("{name}.weight"), &[HIDDEN], 1.0, 0.3);
        add(&format!("{name}.bias"), &[HIDDEN], 0.0, 0.3);
    }
    // What files carry beside the encoder.
    add("pooler.dense.weight", &[HIDDEN, HIDDEN], 0.0, 1.0);
    tensors
}

fn vector(output: StepOutput) -> Vec<f32> {
    match output {
        StepOutput::Vector(vector) => vector,
        other => panic!("no vector: {other:?}"),
    }
}

fn texts() -> Vec<Vec<u32>> {
    [1, 2, 7, LENGTH, 16].iter().map(|length| (0..*length as u32).map(|at| (at * 17 + 5) % 50).collect()).collect()
}

#[test]
fn a_bert_is_the_plain_model_however_it_is_cut_and_whoever_its_neighbours_are() {
    let tensors = bert_tensors();
    let (_folder, model) = folder(&bert_config(), &tensors, "");
    let slice = whole(&model);
    let pool = Pool::new(2, Path::detect().unwrap());
    let alone: Vec<Vec<f32>> = texts()
        .iter()
        .map(|tokens| vector(step(&slice, &pool, &mut slice.new_sequence(), StepInput::Tokens(tokens))))
        .collect();
    for (tokens, found) in texts().iter().zip(&alone) {
        let difference = difference(found, &BERT.embedding(&tensors, tokens));
        assert!(difference < 1e-5, "{} tokens: {difference}", tokens.len());
    }
    for (cuts, path) in
        [(vec![0, 3], Path::Scalar), (vec![0, 1, 3], Path::detect().unwrap()), (vec![0, 1, 2, 3], Path::Scalar)]
    {
        let pool = Pool::new(1, path);
        let mut rows: Vec<Vec<f32>> = Vec::new();
        for cut in cuts.windows(2) {
            let slice = model.load(cut[0]..cut[1]).unwrap();
            let mut sequences: Vec<_> = alone.iter().map(|_| slice.new_sequence()).collect();
            let texts = texts();
            let mut steps: Vec<SequenceStep<'_>> = sequences
                .iter_mut()
                .enumerate()
                .map(|(index, sequence)| {
                    let input =
                        if cut[0] == 0 { StepInput::Tokens(&texts[index]) } else { StepInput::Rows(&rows[index]) };
                    SequenceStep::new(sequence, input)
                })
                .collect();
            slice.forward(&pool, &mut steps).unwrap();
            let outputs: Vec<StepOutput> = steps.into_iter().map(|step| step.output).collect();
            rows = outputs
                .into_iter()
                .map(|output| match output {
                    StepOutput::Rows(rows) if !slice.is_last() => rows,
                    output => vector(output),
                })
                .collect();
            for (sequence, text) in sequences.iter().zip(&texts) {
                assert_eq!(sequence.position() as usize, text.len());
                assert_eq!(sequence.bytes(), 0, "nothing is kept");
            }
        }
        let bits = |rows: &[Vec<f32>]| rows.iter().map(|row| bits(row)).collect::<Vec<_>>();
        assert_eq!(bits(&rows), bits(&alone), "{cuts:?} {path:?}");
    }
}

#[test]
fn an_encoder_is_found_under_its_prefix_beside_other_heads() {
    let mut tensors = bert_tensors();
    let (_plain, plain) = folder(&bert_config(), &tensors, "");
    tensors.insert("pooler.dense.bias".to_owned(), (vec![2], vec![0.5; 2]));
    let (prefixed_folder, prefixed) = folder(&bert_config(), &tensors, "bert.");
    let pool = Pool::new(1, Path::detect().unwrap());
    let run = |model: &Model| {
        let slice = whole(model);
        bits(&vector(step(&slice, &pool, &mut slice.new_sequence(), StepInput::Tokens(&[3, 1, 4]))))
    };
    assert_eq!(run(&plain), run(&prefixed));
    // A tensor that nobody knows would be another model.
    tensors.insert("encoder.layer.0.adapter.weight".to_owned(), (vec![2], vec![0.5; 2]));
    let named = tensors.iter().map(|(name, (shape, values))| (format!("bert.{name}"), shape.clone(), values.clone()));
    let file = safetensors::file(&named.collect::<Vec<_>>());
    std::fs::write(prefixed_folder.path().join("model.safetensors"), file).unwrap();
    let error = Model::open(prefixed_folder.path().to_str().unwrap(), std::path::Path::new("")).unwrap_err();
    assert!(error.to_string().contains("adapter"), "{error}");
}

#[test]
fn a_text_comes_whole_or_not_at_all() {
    let (_folder, model) = folder(&bert_config(), &bert_tensors(), "");
    let pool = Pool::new(1, Path::detect().unwrap());
    let slice = whole(&model);
    let mut sequence = slice.new_sequence();
    let long = vec![1; LENGTH + 1];
    let fault = slice.check(&sequence, StepInput::Tokens(&long)).unwrap_err();
    assert_eq!(fault, StepFault::Context { position: 0, rows: LENGTH + 1, context_length: LENGTH });
    vector(step(&slice, &pool, &mut sequence, StepInput::Tokens(&[1, 2])));
    assert_eq!(slice.check(&sequence, StepInput::Tokens(&[3])), Err(StepFault::Whole));
    assert_eq!(
        slice.check(&slice.new_sequence(), StepInput::Vector(&[0.5])),
        Err(StepFault::Kind { expected: "tokens" })
    );
}

#[test]
fn one_number_that_is_none_ends_the_whole_text_and_no_other() {
    let mut tensors = bert_tensors();
    let (_, words) = tensors.get_mut("embeddings.word_embeddings.weight").unwrap();
    words[4 * HIDDEN] = 3e38;
    words[4 * HIDDEN + 1] = 3e38;
    let (_folder, model) = folder(&bert_config(), &tensors, "");
    let pool = Pool::new(1, Path::detect().unwrap());
    let slice = model.load(0..2).unwrap();
    let healthy = step(&slice, &pool, &mut slice.new_sequence(), StepInput::Tokens(&[1, 2, 3]));
    let mut sequences = [slice.new_sequence(), slice.new_sequence()];
    let [first, second] = &mut sequences;
    let mut steps = [
        SequenceStep::new(first, StepInput::Tokens(&[1, 2, 4, 3])),
        SequenceStep::new(second, StepInput::Tokens(&[1, 2, 3])),
    ];
    slice.forward(&pool, &mut steps).unwrap();
    assert_eq!(steps[0].output, StepOutput::Numeric { rows: vec![] });
    assert_eq!(steps[1].output, healthy);
    assert_eq!((sequences[0].position(), sequences[0].is_numeric()), (0, true));
    assert_eq!(sequences[0].interior(), slice.new_sequence().interior());
}
