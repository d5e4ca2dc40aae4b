//! Writes the seeds: one small example of each thing that the targets read, so that a fuzzer need not guess a format.
//!
//! `cargo run --example write_seeds` in this folder, after a format has changed. Seeds that were added by hand stay.

use std::fs;
use std::path::Path;

use butterfly::model::gguf::convert;
use butterfly::model::gguf::quantise::Encoding;
use butterfly_engine::frame::Frame;
use butterfly_fuzz::{Meta, epoch, key};
use butterfly_verify::{
    Answer, Ballot, Digest, Finish, Input, Mode, NodeIndex, Params, PrePrepare, Request, RequestParts, Signer, Vote,
};

fn main() {
    frames();
    models();
    topologies();
    protocol();
}

fn frames() {
    let meta = Meta { request: [3; 32], slice: 1, positions: vec![0, 1, 2], label: Some("a label".to_owned()) };
    let tensor = Frame::tensor(&meta, &[1; 96]).expect("a small frame");
    let control = Frame::control(b"canonical bytes").expect("a small frame");
    write("frame_bytes", "tensor", tensor.as_bytes());
    write("frame_bytes", "control", control.as_bytes());
    // The stream half of the target takes its chunk length from the first byte.
    let mut stream = vec![63];
    stream.extend_from_slice(tensor.as_bytes());
    stream.extend_from_slice(control.as_bytes());
    write("frame_bytes", "stream", &stream);
    write("frame_bytes", "header", &control.as_bytes()[..64]);
}

/// One small model in each encoding that its width allows, without and with a tokenizer.
fn models() {
    let config = |family: &str| {
        serde_json::json!({
            "model_type": family, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 270, "max_position_embeddings": 32,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 0,
        })
        .to_string()
    };
    let byte = |byte: u8| {
        let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let rank = (0..byte).filter(|byte| !printable(*byte)).count() as u32;
        let char = if printable(byte) { char::from(byte) } else { char::from_u32(0x100 + rank).expect("a letter") };
        char.to_string()
    };
    let tokens = (0..=255).map(byte).chain(["ab".to_owned()]).enumerate();
    let vocabulary: serde_json::Map<String, serde_json::Value> = tokens.map(|(id, text)| (text, id.into())).collect();
    let byte_level = serde_json::json!({ "type": "ByteLevel", "add_prefix_space": false, "use_regex": true });
    let tokenizer = serde_json::json!({
        "added_tokens": [], "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocabulary, "merges": ["a b"] },
    })
    .to_string();
    for (name, family, encoding, tokenizer) in [
        ("llama-q8_0", "llama", Encoding::Q8_0, Some(&tokenizer)),
        ("llama-q4_0", "llama", Encoding::Q4_0, None),
        ("qwen2-f16", "qwen2", Encoding::F16, None),
    ] {
        let rows = |_: &str, row: usize, numbers: &mut [f32]| {
            numbers.iter_mut().enumerate().for_each(|(index, number)| *number = ((index * 7 + row) % 13) as f32 / 13.0);
            Ok(())
        };
        let mut file = Vec::new();
        let tokenizer = tokenizer.map(|text| text.as_bytes());
        convert::model(config(family).as_bytes(), tokenizer, name, encoding, rows, &mut file).expect("a small model");
        write("gguf_bytes", name, &file);
        write("gguf_bytes", &format!("{name}-cut"), &file[..file.len() / 2]);
    }
}

/// The examples, and each of them with one thing wrong.
fn topologies() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    for entry in fs::read_dir(examples).expect("the examples") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).expect("a topology");
            write("topology_text", &name, text.as_bytes());
            write("topology_text", &format!("{name}-misspelt"), text.replace("kind = \"c", "knid = \"c").as_bytes());
            write("topology_text", &format!("{name}-cut"), &text.as_bytes()[..text.len() / 2]);
        }
    }
}

fn protocol() {
    let epoch = epoch();
    let request = Request::new(RequestParts {
        client: "client".to_owned(),
        nonce: [9; 32],
        model: "model".to_owned(),
        mode: Mode::Full,
        input: Input::Text { prompt: "Ownership is".to_owned(), tokens: vec![1, 2, 3] },
        params: Params {
            temperature: 0.5,
            stop: vec!["\n".to_owned()],
            logit_bias: vec![(1, 0.25)],
            ..Params::default()
        },
        now_ms: 1_000,
        expires_ms: 2_000,
    })
    .expect("a valid request");
    let answer = Answer::Text {
        tokens: vec![4, 5],
        text: b" a set of rules".to_vec(),
        finish: Finish::Length,
        prompt_tokens: 3,
        choice: 0,
    };
    let vote = Vote {
        rd: request.digest(),
        slice: 1,
        positions: 4,
        input_root: Digest([1; 32]),
        output_root: answer.root(),
        tag: Digest([2; 32]),
    };
    let signer = Signer::new(key(0), NodeIndex(0), &epoch).expect("n0 is in the roster");
    let ballot = Ballot { vote, answer: Some(answer.clone()) };
    let ballots = signer.sign_ballots(vec![ballot]).expect("a batch");
    let pre_prepare = PrePrepare { request: request.clone(), attempt: 0 };
    let pre_prepares = signer.sign_pre_prepares(vec![pre_prepare]).expect("a batch");

    // The first byte chooses what the target reads.
    for (operation, name, bytes) in [
        (0, "ballots", ballots),
        (1, "pre_prepares", pre_prepares),
        (2, "request", request.encode()),
        (3, "answer", answer.encode()),
        (6, "epoch_json", epoch.to_json().into_bytes()),
        (7, "request_json", request.to_json().into_bytes()),
        (7, "answer_json", answer.to_json().into_bytes()),
        (8, "changed_in_transit", vec![40, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8]),
    ] {
        let mut seed: Vec<u8> = vec![operation];
        seed.extend_from_slice(&bytes);
        write("vote_bytes", name, &seed);
    }
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    fs::create_dir_all(&folder).expect("a folder for the seeds");
    fs::write(folder.join(name), bytes).expect("a seed");
}
