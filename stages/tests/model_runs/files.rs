//! Damaged, hostile and unfitting model folders: an error that names the place, never a panic.

use std::fs;
use std::ops::Range;
use std::path::Path;

use butterfly::model::{Model, ModelError, WeightsError};
use serde_json::{Value, json};

use super::{data, open, safetensors};

/// A private copy of the sharded fixture.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(data("sharded-f16")).unwrap() {
        let path = entry.unwrap().path();
        fs::write(folder.path().join(path.file_name().unwrap()), fs::read(&path).unwrap()).unwrap();
    }
    folder
}

fn change_json(folder: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Opens the folder and loads everything; gives the error's text.
fn refusal(folder: &Path) -> String {
    let error = Model::open(folder.to_str().unwrap(), Path::new("/nowhere"))
        .and_then(|model| model.load(0..model.manifest().layers).map(drop))
        .unwrap_err();
    let text = error.to_string();
    assert!(text.len() < 600, "{text}");
    text
}

const SECOND: &str = "model-00002-of-00004.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[test]
fn the_copy_is_sound_and_is_the_same_model() {
    let folder = copy();
    let model = Model::open(folder.path().to_str().unwrap(), Path::new("/nowhere")).unwrap();
    assert_eq!(model.manifest().root, open("sharded-f16").manifest().root);
    assert_eq!(open("sharded-f16").manifest().name, "sharded-f16");
}

#[test]
fn a_weight_file_cut_anywhere_is_refused_by_name() {
    let folder = copy();
    let path = folder.path().join(SECOND);
    let whole = fs::read(&path).unwrap();
    for length in [0, 1, 7, 8, 9, 500, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let text = refusal(folder.path());
        assert!(text.contains(SECOND) && text.contains(&format!("found {length}")), "{length}: {text}");
    }
}

#[test]
fn a_weight_that_is_not_finite_is_found_in_the_slice_that_holds_it() {
    let folder = copy();
    let path = folder.path().join(SECOND);
    let mut bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let (tensor, info) = text.as_object().unwrap().iter().find(|(name, _)| name.contains("mlp.up_proj")).unwrap();
    let place = header + info["data_offsets"][0].as_u64().unwrap() as usize + 2 * 77;
    bytes[place..place + 2].copy_from_slice(&0x7e00_u16.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    let model = Model::open(folder.path().to_str().unwrap(), Path::new("")).unwrap();
    let layer: usize = tensor.split('.').nth(2).unwrap().parse().unwrap();
    match model.load(layer..layer + 1).unwrap_err() {
        ModelError::Weights(WeightsError::NotFinite { file, tensor: found, element: 77, .. }) => {
            assert!(file.ends_with(SECOND));
            assert_eq!(&found, tensor);
        }
        other => panic!("{other}"),
    }
    model.load(0..1).unwrap();
}

#[test]
fn a_configuration_that_does_not_fit_the_weights_names_the_tensor() {
    for (field, value, expected) in [
        ("vocab_size", json!(513), "tensor 'model.embed_tokens.weight': expected shape [513, 64], found [512, 64]"),
        ("intermediate_size", json!(191), "tensor 'model.layers.0.mlp.gate_proj.weight': expected shape [191, 64]"),
        ("num_key_value_heads", json!(4), "tensor 'model.layers.0.self_attn.k_proj.weight': expected shape [64, 64]"),
        ("num_hidden_layers", json!(7), "tensor 'model.layers.6.input_layernorm.weight' is missing"),
        ("num_hidden_layers", json!(5), "tensor 'model.layers.5.input_layernorm.weight' [64] has no place"),
        (
            "attention_bias",
            json!(true),
            "tensor 'model.layers.0.self_attn.q_proj.bias' is missing; expected shape [64]",
        ),
        ("dtype", json!("float32"), "tensor 'model.embed_tokens.weight': expected F32, found F16"),
        ("model_type", json!("gemma"), "config.json: field 'model_type'"),
    ] {
        let folder = copy();
        change_json(folder.path(), "config.json", |config| config[field] = value);
        let text = refusal(folder.path());
        assert!(text.contains(expected), "{field}: {text}");
    }
}

#[test]
fn missing_misplaced_and_oversized_files_are_named() {
    type Damage = fn(&Path);
    let cases: [(Damage, &str); 8] = [
        (|folder| fs::remove_file(folder.join(SECOND)).unwrap(), SECOND),
        (|folder| fs::remove_file(folder.join(INDEX)).unwrap(), "has neither model.safetensors nor"),
        (|folder| fs::remove_file(folder.join("config.json")).unwrap(), "config.json"),
        (|folder| fs::write(folder.join("config.json"), vec![b' '; (1 << 20) + 1]).unwrap(), "1048577 bytes"),
        (|folder| fs::write(folder.join(INDEX), "{}").unwrap(), "weight_map"),
        (|folder| fs::create_dir(folder.join("tokenizer.json")).unwrap(), "tokenizer.json: not a regular file"),
        (|folder| fs::write(folder.join("tokenizer.json"), "{\"model\": 3}").unwrap(), "tokenizer.json"),
        (|folder| fs::write(folder.join("model.safetensors"), b"").unwrap(), "model.safetensors: expected 8 bytes"),
    ];
    for (damage, expected) in cases {
        let folder = copy();
        damage(folder.path());
        let text = refusal(folder.path());
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(refusal(Path::new("/nowhere/at/all")).contains("/nowhere/at/all"));
}

#[test]
fn an_index_reaches_no_file_outside_its_folder() {
    for name in ["../config.json", "/etc/passwd", "a/b", "..", ".", "", "a\u{0}b", "C:\\x"] {
        let folder = copy();
        change_json(folder.path(), INDEX, |index| index["weight_map"]["lm_head.weight"] = json!(name));
        let text = refusal(folder.path());
        assert!(text.contains("is not the name of a file beside it"), "{name}: {text}");
    }
    let folder = copy();
    change_json(folder.path(), INDEX, |index| {
        for file in 0..2000 {
            index["weight_map"][format!("t{file}")] = json!(format!("f{file}"));
        }
    });
    assert!(refusal(folder.path()).contains("weight files; 1 to 1024 are allowed"));
}

#[test]
fn weights_of_a_dense_network_are_checked_against_its_sizes() {
    let config = json!({"model_type": "mlp", "layer_sizes": [2, 1], "activation": "gelu"});
    let tensors = |weight: Vec<usize>, bias: Vec<usize>, value: f32| {
        let size = |shape: &[usize]| shape.iter().product::<usize>();
        let (weights, biases) = (vec![value; size(&weight)], vec![0.5; size(&bias)]);
        vec![("layers.0.weight".to_owned(), weight, weights), ("layers.0.bias".to_owned(), bias, biases)]
    };
    let text = |tensors: &[_]| refusal(safetensors::folder(&config, &safetensors::file(tensors)).path());
    assert!(text(&tensors(vec![2, 1], vec![1], 1.0)).contains("expected shape [1, 2], found [2, 1]"));
    assert!(text(&tensors(vec![1, 2], vec![2], 1.0)).contains("'layers.0.bias': expected shape [1], found [2]"));
    assert!(text(&tensors(vec![1, 2], vec![1], f32::INFINITY)).contains("found inf at element 0"));
    assert!(text(&tensors(vec![1, 2], vec![1], 1.0)[..1]).contains("'layers.0.bias' is missing"));
    let mut more = tensors(vec![1, 2], vec![1], 1.0);
    more.push(("layers.1.bias".to_owned(), vec![1], vec![0.0]));
    assert!(text(&more).contains("'layers.1.bias' [1] has no place"));
}

#[test]
fn layers_that_do_not_exist_cannot_be_loaded() {
    let model = open("builtin:mlp");
    for range in [0..0, Range { start: 2, end: 1 }, 0..4, 3..4, usize::MAX..usize::MAX, 0..usize::MAX] {
        assert!(matches!(model.load(range), Err(ModelError::Layers { layers: 3, .. })));
    }
    let error = Model::open("builtin:huge", Path::new("")).unwrap_err().to_string();
    assert_eq!(error, "no built-in model 'huge'; there are tiny-rust, mlp");
}

#[test]
fn a_manifest_says_what_the_model_is() {
    let model = open("builtin:tiny-rust");
    let manifest = model.manifest();
    assert_eq!((manifest.layers, manifest.hidden, manifest.vocabulary, manifest.context_length), (8, 192, 2048, 1024));
    assert_eq!((manifest.bos, manifest.eos.as_slice(), manifest.input_width), (Some(0), &[0][..], 0));
    assert_eq!(
        (manifest.boundary_width(0), manifest.boundary_width(1), manifest.boundary_width(8)),
        (None, Some(192), None)
    );
    // A tied head is counted at both ends, since a cut model holds it twice.
    let bytes: u64 = manifest.layer_costs.iter().map(|cost| cost.weight_bytes).sum();
    let file = fs::metadata(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-rust/model.safetensors")).unwrap();
    assert_eq!(bytes - 2048 * 192 * 2, file.len() - 7864 - 8);
    let model = open("builtin:mlp");
    let manifest = model.manifest();
    assert_eq!((manifest.input_width, manifest.output_width, manifest.layers), (64, 32, 3));
    assert_eq!([0, 1, 2, 3].map(|layer| manifest.boundary_width(layer)), [None, Some(128), Some(128), None]);
}
