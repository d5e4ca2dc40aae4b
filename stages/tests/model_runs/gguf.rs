//! GGUF files: the same model as the safetensors they were made from, and nothing from damaged ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use butterfly::model::gguf::convert;
use butterfly::model::gguf::quantise::Encoding;
use butterfly::model::{Model, SliceModel, StepInput, StepOutput};
use butterfly_kernels::{Pool, argmax};

use super::{bits, logits, open, safetensors, step, whole};

const PROMPTS: [&str; 4] = [
    "Ownership is",
    "// A trait's method\nfn main() {\n    let x = vec![1, 22, 333];",
    "  \n\n\tIt's 2024 – naïve «Unicode» 你好 🦋, isn't it?  ",
    "<|endoftext|>The compiler",
];

fn tiny_rust() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-rust")
}

fn converted(folder: &Path, encoding: Encoding) -> Vec<u8> {
    let mut file = Vec::new();
    convert::folder(folder, encoding, &mut file).unwrap();
    file
}

fn model(file: Vec<u8>) -> Arc<Model> {
    Model::from_gguf("test.gguf", file).unwrap()
}

/// Greedy tokens and the bits of all logits, through all slices.
fn greedy(slices: &[Arc<SliceModel>], pool: &Pool, prompt: &[u32], count: usize) -> (Vec<u32>, Vec<Vec<u32>>) {
    let mut sequences: Vec<_> = slices.iter().map(|slice| slice.new_sequence()).collect();
    let (mut tokens, mut rows) = (prompt.to_vec(), Vec::new());
    for round in 0..count {
        let start = if round == 0 { 0 } else { tokens.len() - 1 };
        let mut input: Vec<f32> = Vec::new();
        for (index, (slice, sequence)) in slices.iter().zip(&mut sequences).enumerate() {
            let entry = if index == 0 { StepInput::Tokens(&tokens[start..]) } else { StepInput::Rows(&input) };
            match step(slice, pool, sequence, entry) {
                StepOutput::Rows(values) => input = values,
                output => {
                    let values = logits(output);
                    tokens.push(argmax(&values).unwrap() as u32);
                    rows.push(bits(&values));
                    break;
                }
            }
        }
    }
    (tokens.split_off(prompt.len()), rows)
}

#[test]
fn the_f16_file_of_tiny_rust_is_tiny_rust() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny-rust-f16.gguf");
    std::fs::write(&path, converted(&tiny_rust(), Encoding::F16)).unwrap();
    let (plain, file) = (open("builtin:tiny-rust"), open(path.to_str().unwrap()));
    let (one, other) = (plain.manifest(), file.manifest());
    assert_eq!(other.name, "tiny-rust-f16");
    assert_ne!(one.root, other.root);
    assert_eq!((one.layers, one.hidden, one.vocabulary), (other.layers, other.hidden, other.vocabulary));
    assert_eq!((one.context_length, one.bos, &one.eos), (other.context_length, other.bos, &other.eos));
    let pool = Pool::new(2, butterfly_kernels::Path::detect().unwrap());
    for prompt in PROMPTS {
        let tokens = plain.tokenizer().unwrap().encode(prompt).unwrap();
        assert_eq!(file.tokenizer().unwrap().encode(prompt).unwrap(), tokens, "{prompt:?}");
        let expected = greedy(&[whole(&plain)], &pool, &tokens, 24);
        assert_eq!(greedy(&[whole(&file)], &pool, &tokens, 24), expected, "{prompt:?}");
        let cut = [file.load(0..3).unwrap(), file.load(3..8).unwrap()];
        assert_eq!(greedy(&cut, &pool, &tokens, 24), expected, "{prompt:?}");
    }
    for id in 0..2048 {
        let (one, other) = (plain.tokenizer().unwrap(), file.tokenizer().unwrap());
        assert_eq!(one.token_bytes(id), other.token_bytes(id), "{id}");
    }
}

/// A configuration and weights of its shape, so small that a damaged copy of every byte can be tried.
fn small(change: impl FnOnce(&mut serde_json::Value)) -> Small {
    let mut config = serde_json::json!({
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 270, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": [0, 3],
    });
    change(&mut config);
    let tensors = convert::shapes(config.to_string().as_bytes()).unwrap();
    let mut state = 7_u32;
    let tensors = tensors.into_iter().map(|(name, shape)| {
        let values = (0..shape.iter().product::<usize>()).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) as f32 / 65_536.0 - 0.4
        });
        let values = values.collect();
        (name, shape, values)
    });
    let weights = safetensors::file(&tensors.collect::<Vec<_>>());
    let folder = safetensors::folder(&config, &weights);
    let vocabulary: serde_json::Map<String, serde_json::Value> = std::iter::once("<|endoftext|>".to_owned())
        .chain((0..=255).map(byte_char))
        .chain(["ab".to_owned(), "abc".to_owned()])
        .enumerate()
        .map(|(id, token)| (token, id.into()))
        .collect();
    let byte_level =
        serde_json::json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = serde_json::json!({
        "added_tokens": [{ "id": 0, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true }],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocabulary, "merges": ["a b", "ab c"] },
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Small { folder }
}

struct Small {
    folder: tempfile::TempDir,
}

impl Small {
    fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// The character that stands for a byte in a byte-level vocabulary.
fn byte_char(byte: u8) -> String {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let rank = (0..byte).filter(|byte| !printable(*byte)).count() as u32;
    let char = if printable(byte) { char::from(byte) } else { char::from_u32(0x100 + rank).unwrap() };
    char.to_string()
}

/// Biases, separate and tied heads, stretched rotations: the file computes what the folder does, bit for bit where the
/// format keeps all bits.
#[test]
fn every_shape_of_the_family_survives_the_conversion() {
    type Change = fn(&mut serde_json::Value);
    let llama3 = |config: &mut serde_json::Value| {
        config["rope_scaling"] = serde_json::json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        });
    };
    let changes: [Change; 5] = [
        |_| {},
        |config| config["attention_bias"] = true.into(),
        |config| config["tie_word_embeddings"] = true.into(),
        |config| config["model_type"] = "qwen2".into(),
        llama3,
    ];
    let pool = Pool::new(1, butterfly_kernels::Path::detect().unwrap());
    let tokens: Vec<u32> = (0..17).map(|index| index * 37 % 270).collect();
    let mut seen = Vec::new();
    for change in changes {
        let small = small(change);
        let plain = open(small.path().to_str().unwrap());
        let file = model(converted(small.path(), Encoding::F32));
        assert_eq!(file.manifest().eos, [0]);
        let expected = greedy(&[whole(&plain)], &pool, &tokens, 8);
        assert_eq!(greedy(&[whole(&file)], &pool, &tokens, 8), expected);
        assert!(!seen.contains(&expected), "what was changed is computed with");
        seen.push(expected);
    }
}

/// Opens a changed copy and loads it: an error, or a model that is known to be another one.
fn open_changed(file: &[u8], root: [u8; 32]) {
    if let Ok(model) = Model::from_gguf("changed.gguf", file.to_vec()) {
        assert_ne!(model.manifest().root, root);
        drop(model.load(0..model.manifest().layers));
    }
}

#[test]
fn a_file_that_was_cut_or_changed_is_refused_or_another_model() {
    let small = small(|_| {});
    let file = converted(small.path(), Encoding::Q8_0);
    let root = model(file.clone()).manifest().root;
    let head = file.len() - model(file.clone()).load(0..2).unwrap().weight_bytes();
    assert!((2_000..12_000).contains(&head), "{head}");
    for length in (0..file.len()).step_by(61).chain(file.len() - 40..file.len()) {
        assert!(Model::from_gguf("cut.gguf", file[..length].to_vec()).is_err(), "{length}");
    }
    // Lengths and counts above all: most of the head is texts, of which a part will do.
    for place in (0..300).chain((300..head).step_by(11)) {
        for change in [0x01, 0xff] {
            let mut changed = file.clone();
            changed[place] ^= change;
            open_changed(&changed, root);
        }
    }
}

#[test]
fn packed_weights_that_were_kept_give_the_same_bits_and_damaged_ones_are_packed_anew() {
    let small = small(|_| {});
    let path = small.path().join("small.gguf");
    std::fs::write(&path, converted(small.path(), Encoding::Q8_0)).unwrap();
    let pool = Pool::new(1, butterfly_kernels::Path::detect().unwrap());
    let kept = small.path().join("packed");
    let entries = || {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(&kept).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        entries
    };
    let run = |range: std::ops::Range<usize>| {
        let model = open(path.to_str().unwrap());
        model.keep_packed(butterfly::model::PackedWeights::new(kept.clone()));
        let last = model.load(range.clone()).unwrap();
        let slices = if range.start == 0 { vec![last] } else { vec![model.load(0..range.start).unwrap(), last] };
        greedy(&slices, &pool, &[1, 2, 3], 6)
    };
    let expected = greedy(&[whole(&model(std::fs::read(&path).unwrap()))], &pool, &[1, 2, 3], 6);
    // A slice keeps its own matrices and no others: seven of a layer, and the head.
    open(path.to_str().unwrap()).load(1..2).unwrap();
    assert!(!kept.exists());
    assert_eq!(run(0..2), expected);
    assert_eq!(entries().len(), 2 * 7 + 2);
    assert_eq!(run(0..2), expected, "from what was kept");
    assert_eq!(run(1..2), expected, "another cut finds the same matrices");
    for entry in entries() {
        let mut bytes = std::fs::read(&entry).unwrap();
        let place = bytes.len() - 3;
        bytes[place] ^= 0x40;
        std::fs::remove_file(&entry).unwrap();
        std::fs::write(&entry, if place % 2 == 0 { &bytes[..] } else { &bytes[..place] }).unwrap();
    }
    assert_eq!(run(0..2), expected, "packed anew");
    assert_eq!(run(0..2), expected, "and kept again");
    assert_eq!(entries().len(), 2 * 7 + 2);
}

/// Quantised matrices on any slices, in any chunks, beside any neighbours, on any number of threads.
#[test]
fn a_quantised_file_gives_the_same_bits_however_it_is_run() {
    let file = model(converted(&tiny_rust(), Encoding::Q4_0));
    let path = butterfly_kernels::Path::detect().unwrap();
    let pools = [1, 2, 3].map(|threads| Pool::new(threads, path));
    let prompts: Vec<Vec<u32>> =
        (1..6).map(|seed| (0..seed * 7).map(|index| index * 131 * seed % 2048).collect()).collect();
    let alone: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| {
            super::invariance::last_logits(&[whole(&file)], &pools[0], &[(prompt, &vec![1; prompt.len()])]).remove(0)
        })
        .collect();
    for (pool, cuts) in pools.iter().zip([vec![0, 8], vec![0, 3, 8], vec![0, 1, 4, 8]]) {
        let slices: Vec<_> = cuts.windows(2).map(|cut| file.load(cut[0]..cut[1]).unwrap()).collect();
        for chunk in [2, 5, 64] {
            let chunks: Vec<Vec<usize>> = prompts.iter().map(|prompt| vec![chunk; prompt.len()]).collect();
            let together: Vec<(&[u32], &[usize])> =
                prompts.iter().zip(&chunks).map(|(prompt, chunks)| (prompt.as_slice(), chunks.as_slice())).collect();
            assert_eq!(super::invariance::last_logits(&slices, pool, &together), alone, "{cuts:?}, chunks of {chunk}");
        }
    }
}
