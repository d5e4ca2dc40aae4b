//! Digests of what the built-in models are and give. A change of one bit anywhere fails here, and is a new numerics
//! profile or a new model, never a detail.

use butterfly::model::StepInput;
use butterfly_kernels::{Path, Pool, argmax};
use sha2::{Digest, Sha256};

use super::{logits, open, step, whole};

fn digest<'a>(rows: impl IntoIterator<Item = &'a [f32]>) -> String {
    let mut digest = Sha256::new();
    for value in rows.into_iter().flatten() {
        digest.update(value.to_le_bytes());
    }
    hex::encode(digest.finalize())
}

#[test]
fn roots_of_the_built_in_models() {
    assert_eq!(hex::encode(open("builtin:tiny-rust").manifest().root), TINY_RUST_ROOT);
    assert_eq!(hex::encode(open("builtin:mlp").manifest().root), MLP_ROOT);
    assert_eq!(hex::encode(open("sharded-f16").manifest().root), SHARDED_ROOT);
}

#[test]
fn logits_and_inner_values_of_tiny_rust() {
    let model = open("builtin:tiny-rust");
    let slice = whole(&model);
    let pool = Pool::new(2, Path::detect().unwrap());
    let prompt = model.tokenizer().unwrap().encode("// Ownership is Rust's most unique feature\nfn main() {").unwrap();
    let mut sequence = slice.new_sequence();
    let mut rows = vec![logits(step(&slice, &pool, &mut sequence, StepInput::Tokens(&prompt)))];
    for _ in 0..16 {
        let token = argmax(rows.last().unwrap()).unwrap() as u32;
        rows.push(logits(step(&slice, &pool, &mut sequence, StepInput::Tokens(&[token]))));
    }
    assert_eq!(digest(rows.iter().map(Vec::as_slice)), TINY_RUST_LOGITS);
    assert_eq!(hex::encode(sequence.interior()), TINY_RUST_INTERIOR);
}

#[test]
fn the_vector_that_the_dense_network_gives() {
    let model = open("builtin:mlp");
    let slice = whole(&model);
    let pool = Pool::new(1, Path::detect().unwrap());
    // Quarters, exact in f32.
    let input: Vec<f32> = (0_u8..64).map(|index| f32::from(index % 17) / 4.0 - 2.0).collect();
    let mut sequence = slice.new_sequence();
    match step(&slice, &pool, &mut sequence, StepInput::Vector(&input)) {
        butterfly::model::StepOutput::Vector(values) => assert_eq!(digest([values.as_slice()]), MLP_OUTPUT),
        other => panic!("{other:?}"),
    }
    assert_eq!(hex::encode(sequence.interior()), MLP_INTERIOR);
}

const TINY_RUST_ROOT: &str = "ad22f4f7d4765b171afe6fa27d7490f3d279f475e15d5187218daa6a02db5447";
const MLP_ROOT: &str = "47cf84a742496b65381434faf6ccbaa5937bddd12b6ed8f1f625c2663cad1664";
const SHARDED_ROOT: &str = "3cea97a644cccec42f08f98dc224234211536d1b3e7e7b9d01733230293e90e3";
const TINY_RUST_LOGITS: &str = "4c1a9efcfc1305aad8366bdfe2bdee322e5860d404c3edb0b00a49247e571f15";
const TINY_RUST_INTERIOR: &str = "38c0790f741d0d1bcbf4a950d65b13df4deb5aba9aaa332bc55194ada1beedc0";
const MLP_OUTPUT: &str = "9493d749fd1e8648e33150085074f3b56e9aee23b2bfb166d085fa9e3924deb6";
const MLP_INTERIOR: &str = "7ac023c6a6cc761fa096e9f1d15a24eb72d3cec6e722bd6b183c0778608ccbcd";
