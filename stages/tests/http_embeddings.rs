//! Embeddings over HTTP: a text or its tokens in, a proved vector out, on any slices.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "support/minilm.rs"]
mod minilm;
mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use butterfly::loopback::{Cluster, Loopback};
use butterfly_verify::{Answer, Epoch, Input};
use serde_json::{Value, json};
use support::{call, verified};

const HIDDEN: usize = 24;
const VOCABULARY: usize = 14;
const LENGTH: usize = 20;
/// Tokens of a text at most, as sentence_bert_config.json says.
const TEXT_TOKENS_MAX: usize = 9;

/// A small encoder whose words are numbers, with all files that sentence-transformers writes.
fn model() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny-bert");
    std::fs::create_dir_all(path.join("1_Pooling")).unwrap();
    let write = |name: &str, value: Value| std::fs::write(path.join(name), value.to_string()).unwrap();
    write(
        "config.json",
        json!({"model_type": "bert", "hidden_size": HIDDEN, "num_attention_heads": 2, "num_hidden_layers": 3,
            "intermediate_size": 40, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "type_vocab_size": 2,
            "layer_norm_eps": 1e-12, "hidden_act": "gelu"}),
    );
    write(
        "modules.json",
        json!([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]),
    );
    write("1_Pooling/config.json", json!({"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": true}));
    write("sentence_bert_config.json", json!({"max_seq_length": TEXT_TOKENS_MAX, "do_lower_case": false}));
    let words = ["[UNK]", "[CLS]", "[SEP]"].map(str::to_owned).into_iter().chain((0..10).map(|word| word.to_string()));
    let vocab: serde_json::Map<String, Value> = words.enumerate().map(|(id, word)| (word, json!(id))).collect();
    write(
        "tokenizer.json",
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocab}}),
    );
    std::fs::write(path.join("model.safetensors"), weights()).unwrap();
    (folder, path)
}

fn weights() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    let mut add = |name: String, shape: &[usize], center: f32| {
        let start = data.len();
        let count = shape.iter().product();
        data.extend((0..count).flat_map(|_| (center + next()).to_le_bytes()));
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    };
    for (name, rows) in [("word", VOCABULARY), ("position", LENGTH), ("token_type", 2)] {
        add(format!("embeddings.{name}_embeddings.weight"), &[rows, HIDDEN], 0.0);
    }
    let mut norms = vec!["embeddings.LayerNorm".to_owned()];
    for layer in (0..3).map(|layer| format!("encoder.layer.{layer}")) {
        for (name, rows, columns) in [
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", 40, HIDDEN),
            ("output.dense", HIDDEN, 40),
        ] {
            add(format!("{layer}.{name}.weight"), &[rows, columns], 0.0);
            add(format!("{layer}.{name}.bias"), &[rows], 0.0);
        }
        norms.extend(["attention.output", "output"].map(|name| format!("{layer}.{name}.LayerNorm")));
    }
    for name in norms {
        add(format!("{name}.weight"), &[HIDDEN], 1.0);
        add(format!("{name}.bias"), &[HIDDEN], 0.0);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// A cluster, where its gateway listens, and its epoch.
struct Running {
    cluster: Cluster,
    http: SocketAddr,
    epoch: Arc<Epoch>,
    _data: tempfile::TempDir,
}

async fn start(model: &Path, max_byzantine: usize, slices: usize, spares: usize) -> Running {
    let model = model.to_str().unwrap().to_owned();
    let loopback = Loopback { model, max_byzantine, slices, spares, ..Loopback::default() };
    let data = tempfile::tempdir().unwrap();
    let cluster = loopback.start(data.path()).await.unwrap();
    cluster.meshed().await;
    let http = cluster.http_address().unwrap();
    let epoch = Arc::clone(&cluster.nodes[0].services().epoch);
    Running { cluster, http, epoch, _data: data }
}

async fn embed(http: SocketAddr, mut body: Value, input: Value) -> (u16, Value) {
    body["input"] = input;
    call(http, "POST", "/v1/embeddings", Some(body)).await.unwrap()
}

fn vectors(response: &Value) -> Vec<Vec<f32>> {
    let values = |list: &Value| list.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect();
    let data = response["data"].as_array().unwrap_or_else(|| panic!("no data: {response}"));
    for (index, entry) in data.iter().enumerate() {
        assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(index)));
    }
    data.iter().map(|entry| values(&entry["embedding"])).collect()
}

fn receipts(response: &Value) -> Vec<String> {
    let ids = response["butterfly"]["receipt_ids"].as_array().unwrap().iter();
    ids.map(|id| id.as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_embedding_is_the_same_and_proved_on_any_slices_with_any_liars() {
    let (_folder, path) = model();
    let long = "1 2 3 4 5 6 7 8 9 1 2 3";
    let texts = json!(["", "1 2 3", "3 2 1", long]);
    let mut seen = Vec::new();
    for (max_byzantine, slices) in [(0, 1), (1, 1), (0, 3), (1, 2)] {
        let running = start(&path, max_byzantine, slices, 0).await;
        let (status, response) = embed(running.http, json!({"model": "tiny-bert"}), texts.clone()).await;
        assert_eq!(status, 200, "{response}");
        let found = vectors(&response);
        assert_eq!(response["usage"], json!({"prompt_tokens": 2 + 5 + 5 + 9, "total_tokens": 21}));
        let certified = if max_byzantine > 0 { "certified" } else { "unverified" };
        assert_eq!(response["butterfly"]["verification"]["status"], certified);
        for (index, id) in receipts(&response).iter().enumerate() {
            let (request, answer, receipt) = verified(running.http, id, &running.epoch).await;
            assert_eq!(receipt.slices.len(), slices);
            assert_eq!(answer, Answer::Vector { values: found[index].clone() });
            let Input::Text { prompt, tokens } = &request.input else { panic!("no text") };
            assert_eq!(prompt, texts[index].as_str().unwrap());
            // What is around a text stays when it is cut.
            assert_eq!((tokens.first(), tokens.last()), (Some(&1), Some(&2)));
            assert_eq!(request.params.max_tokens, 0);
        }
        seen.push(found);
        running.cluster.shutdown().await.unwrap();
    }
    assert!(seen.windows(2).all(|pair| pair[0] == pair[1]));
    let [empty, up, down, _] = &seen[0][..] else { panic!("not four") };
    assert!(empty != up && up != down);
    let length: f64 = up.iter().map(|value| f64::from(*value).powi(2)).sum();
    assert!((length - 1.0).abs() < 1e-6);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_form_of_input_and_encoding_gives_the_same_vector() {
    let (_folder, path) = model();
    let Running { cluster, http, epoch, _data } = start(&path, 0, 2, 0).await;
    let plain = json!({"model": "tiny-bert", "user": "someone", "dimensions": HIDDEN});
    let (_, text) = embed(http, plain.clone(), json!("4 5")).await;
    let expected = vectors(&text);
    for input in [json!(["4 5"]), json!([1, 7, 8, 2]), json!([[1, 7, 8, 2]])] {
        let (status, response) = embed(http, plain.clone(), input).await;
        assert_eq!((status, vectors(&response)), (200, expected.clone()));
    }
    // Token ids are taken as they are, up to the model's own length.
    let (_, response) = embed(http, plain.clone(), json!([vec![3; LENGTH], vec![3]])).await;
    assert_eq!(response["usage"]["prompt_tokens"], LENGTH + 1);
    let mut encoded = plain.clone();
    encoded["encoding_format"] = json!("base64");
    let (_, response) = embed(http, encoded, json!("4 5")).await;
    let bytes = expected[0].iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    assert_eq!(response["data"][0]["embedding"], <base64ct::Base64 as base64ct::Encoding>::encode_string(&bytes));

    let (status, task) = call(http, "POST", "/inference", Some(json!({"text": "4 5"}))).await.unwrap();
    assert_eq!(status, 200, "{task}");
    let output: Vec<f32> =
        task["output"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect();
    assert_eq!(output, expected[0]);
    verified(http, task["receipt_id"].as_str().unwrap(), &epoch).await;
    let (_, models) = call(http, "GET", "/v1/models", None).await.unwrap();
    assert_eq!(models["data"][0]["capabilities"], json!(["embeddings", "inference"]));
    assert_eq!(
        (&models["data"][0]["output_width"], &models["data"][0]["context_length"]),
        (&json!(HIDDEN), &json!(LENGTH))
    );
    cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_embedded_is_refused_by_name() {
    let (_folder, path) = model();
    let Running { cluster, http, .. } = start(&path, 0, 1, 0).await;
    for (body, code, param) in [
        (json!({"input": "1", "dimensions": 12}), "unsupported_parameter", "dimensions"),
        (json!({"input": "1", "encoding_format": "hex"}), "invalid_value", "encoding_format"),
        (json!({"input": "1", "stream": true}), "unsupported_parameter", "stream"),
        (json!({"input": [99]}), "invalid_value", "input"),
        (json!({"input": [[1], []]}), "invalid_value", "input"),
        (json!({"input": vec![1; LENGTH + 1]}), "context_length_exceeded", "input"),
        (json!({"input": []}), "invalid_value", "input"),
        (json!({"input": "1", "model": "other"}), "model_not_found", "model"),
    ] {
        let (status, response) = call(http, "POST", "/v1/embeddings", Some(body.clone())).await.unwrap();
        let error = &response["error"];
        assert!(status == 400 || status == 404, "{body}: {response}");
        assert_eq!((&error["code"], &error["param"]), (&json!(code), &json!(param)), "{body}");
    }
    let (status, response) = call(http, "POST", "/v1/completions", Some(json!({"prompt": "1"}))).await.unwrap();
    assert_eq!((status, &response["error"]["param"]), (400, &json!("model")), "{response}");
    assert!(response["error"]["message"].as_str().unwrap().contains("/v1/embeddings"));
    // One wrong text among many is the answer to all, and leaves nothing behind.
    let (status, response) = embed(http, json!({}), json!([[1, 2], [3], [99], [4]])).await;
    assert_eq!((status, &response["error"]["param"]), (400, &json!("input")), "{response}");
    let (status, response) = embed(http, json!({}), json!(vec!["1 2"; 200])).await;
    assert_eq!((status, vectors(&response).len()), (200, 200));
    cluster.shutdown().await.unwrap();

    let Running { cluster, http, .. } = start(Path::new("builtin:tiny-rust"), 0, 1, 0).await;
    let (status, response) = embed(http, json!({}), json!("text")).await;
    assert_eq!((status, &response["error"]["param"]), (400, &json!("model")), "{response}");
    assert!(response["error"]["message"].as_str().unwrap().contains("/v1/completions"));
    cluster.shutdown().await.unwrap();
}

/// Three nodes and two slices, and six of which one in each three may lie: the embeddings that another implementation computed of a pretrained model.
#[tokio::test(flavor = "multi_thread")]
async fn a_pretrained_model_on_two_slices_gives_the_references_embeddings() {
    let Some(folder) = minilm::folder() else { return };
    for (max_byzantine, spares) in [(0, 1), (1, 0)] {
        let Running { cluster, http, epoch, _data } = start(&folder, max_byzantine, 2, spares).await;
        assert_eq!(cluster.nodes.len(), [3, 6][max_byzantine]);
        let cases = minilm::reference();
        let texts: Vec<&str> = cases.iter().map(|case| case.text.as_str()).collect();
        let (status, response) = embed(http, json!({}), json!(texts)).await;
        assert_eq!(status, 200, "{response}");
        let found = vectors(&response);
        for ((case, found), id) in cases.iter().zip(&found).zip(receipts(&response)) {
            case.assert_near(found);
            let (request, _, receipt) = verified(http, &id, &epoch).await;
            assert_eq!(
                (request.input.tokens().unwrap().len(), receipt.slices.len()),
                (case.tokens, 2),
                "{:?}",
                case.text
            );
        }
        let tokens: usize = cases.iter().map(|case| case.tokens).sum();
        assert_eq!(response["usage"]["prompt_tokens"], tokens);
        cluster.shutdown().await.unwrap();
    }
}
