//! Models made of random numbers, of any shape, and files for other engines made from real models.
//!
//! Invariants: a file is a function of the arguments; each row follows from seed, tensor and row alone. Weights are
//! scaled by the width of their rows, so that a forward pass stays among the finite numbers. The tokenizer is a valid
//! byte-level one whose merges spell words of small letters.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use butterfly::model::gguf::convert;
use butterfly::model::gguf::quantise::Encoding;
use clap::Args;
use serde_json::{Map, Value, json};

#[derive(Args)]
pub(crate) struct SynthArgs {
    /// A file whose name ends in .gguf, or a folder, which gets safetensors.
    out: PathBuf,
    /// How matrices are stored: F32, F16, BF16, and in GGUF Q8_0, Q4_0, Q4_K, Q5_K, Q6_K.
    #[arg(long, default_value = "Q8_0", value_parser = encoding)]
    encoding: Encoding,
    /// A folder of safetensors to write as GGUF, instead of random numbers.
    #[arg(long)]
    from: Option<PathBuf>,
    /// llama, qwen2 or qwen3.
    #[arg(long, default_value = "llama")]
    architecture: String,
    /// Width of the residual stream.
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    #[arg(long, default_value_t = 16)]
    layers: usize,
    /// Query heads.
    #[arg(long, default_value_t = 32)]
    heads: usize,
    /// Heads of keys and values.
    #[arg(long, default_value_t = 8)]
    kv_heads: usize,
    /// Elements of a head; without it hidden / heads.
    #[arg(long)]
    head_dim: Option<usize>,
    /// Width of the gated MLP.
    #[arg(long, default_value_t = 5632)]
    intermediate: usize,
    #[arg(long, default_value_t = 32_000)]
    vocabulary: usize,
    /// Positions, at most.
    #[arg(long, default_value_t = 2048)]
    context: usize,
    /// The head is the embedding.
    #[arg(long)]
    tied: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn encoding(name: &str) -> Result<Encoding, String> {
    let known = || Encoding::ALL.map(Encoding::name).join(", ");
    Encoding::parse(name).ok_or_else(|| format!("'{name}' is none of {}", known()))
}

/// Writes the model.
pub(crate) fn run(args: &SynthArgs) -> anyhow::Result<()> {
    let is_gguf = args.out.extension().is_some_and(|extension| extension == "gguf");
    if !is_gguf {
        anyhow::ensure!(args.from.is_none(), "--from writes GGUF: name a file that ends in .gguf");
        return safetensors(args).with_context(|| format!("writing {}", args.out.display()));
    }
    let file = File::create(&args.out).with_context(|| format!("writing {}", args.out.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    match &args.from {
        Some(folder) => convert::folder(folder, args.encoding, &mut out)?,
        None => {
            let (config, tokenizer) = (args.config().to_string(), tokenizer(args.vocabulary));
            let tokenizer = tokenizer.map(|json| json.to_string());
            let name = args.out.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let rows = |tensor: &str, row: usize, out: &mut [f32]| {
                fill(args.seed, tensor, row, out);
                Ok(())
            };
            let tokenizer = tokenizer.as_ref().map(String::as_bytes);
            convert::model(config.as_bytes(), tokenizer, &name, args.encoding, rows, &mut out)?;
        }
    }
    println!("{}: {:.1} MB", args.out.display(), fs::metadata(&args.out)?.len() as f64 / 1e6);
    Ok(())
}

impl SynthArgs {
    fn config(&self) -> Value {
        let mut config = json!({
            "model_type": self.architecture, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate, "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
            "tie_word_embeddings": self.tied, "bos_token_id": 0, "eos_token_id": 0,
        });
        if let Some(size) = self.head_dim {
            config["head_dim"] = json!(size);
        }
        config
    }
}

/// A folder with config.json, tokenizer.json and model.safetensors.
fn safetensors(args: &SynthArgs) -> anyhow::Result<()> {
    let dtype = match args.encoding {
        Encoding::F32 => "float32",
        Encoding::F16 => "float16",
        Encoding::Bf16 => "bfloat16",
        other => anyhow::bail!("safetensors hold F32, F16 or BF16, not {}", other.name()),
    };
    fs::create_dir_all(&args.out)?;
    let mut config = args.config();
    config["dtype"] = json!(dtype);
    fs::write(args.out.join("config.json"), config.to_string())?;
    if let Some(tokenizer) = tokenizer(args.vocabulary) {
        fs::write(args.out.join("tokenizer.json"), tokenizer.to_string())?;
    }
    let tensors = convert::shapes(config.to_string().as_bytes())?;
    let mut header = String::from("{");
    let mut end = 0;
    for (index, (name, shape)) in tensors.iter().enumerate() {
        let start = end;
        let columns = shape.last().copied().unwrap_or(1);
        let rows: usize = shape.iter().rev().skip(1).product();
        end += rows * args.encoding.row_bytes(columns).unwrap_or_default();
        let (comma, dtype) = (if index == 0 { "" } else { "," }, args.encoding.name());
        write!(header, r#"{comma}"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)?;
    }
    header.push('}');
    let mut out = BufWriter::with_capacity(1 << 20, File::create(args.out.join("model.safetensors"))?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    write_rows(args, &tensors, &mut out)?;
    println!("{}: {:.1} MB", args.out.display(), end as f64 / 1e6);
    Ok(())
}

fn write_rows(args: &SynthArgs, tensors: &[(String, Vec<usize>)], out: &mut impl Write) -> io::Result<()> {
    let (mut row, mut encoded) = (Vec::new(), Vec::new());
    for (name, shape) in tensors {
        row.resize(shape.last().copied().unwrap_or(1), 0.0);
        for number in 0..shape.iter().rev().skip(1).product::<usize>() {
            fill(args.seed, name, number, &mut row);
            encoded.clear();
            args.encoding.encode(&row, &mut encoded);
            out.write_all(&encoded)?;
        }
    }
    out.flush()
}

/// One row of a tensor: ones for a norm, small numbers otherwise.
fn fill(seed: u64, tensor: &str, row: usize, out: &mut [f32]) {
    if tensor.ends_with("norm.weight") {
        return out.fill(1.0);
    }
    // FNV-1a: one stream of numbers for each tensor and row.
    let name = tensor
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut state = name ^ seed.rotate_left(32) ^ (row as u64).wrapping_mul(0xd134_2543_de82_ef95);
    // Four 16-bit numbers add up to nearly a normal one, of deviation 2^16 / sqrt(3).
    let scale = 3.0_f32.sqrt() / 65_536.0 / (out.len() as f32).sqrt();
    for number in out {
        let bits = splitmix64(&mut state);
        let sum = (0..4).map(|part| ((bits >> (16 * part)) & 0xffff) as i32).sum::<i32>() - 2 * 65_535;
        *number = sum as f32 * scale;
    }
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
pub(crate) fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A byte-level tokenizer of exactly `vocabulary` tokens; `None` if that is fewer than there are bytes.
fn tokenizer(vocabulary: usize) -> Option<Value> {
    const END: &str = "<|endoftext|>";
    let mut tokens = vec![END.to_owned()];
    tokens.extend((0..=255).map(|byte| byte_char(byte).to_string()));
    if vocabulary < tokens.len() {
        return None;
    }
    let mut words: Vec<String> =
        [byte_char(b' ').to_string()].into_iter().chain(('a'..='z').map(String::from)).collect();
    let mut merges = Vec::new();
    let mut next = 0;
    'full: while let Some(word) = words.get(next).cloned() {
        for letter in 'a'..='z' {
            if tokens.len() == vocabulary {
                break 'full;
            }
            let longer = format!("{word}{letter}");
            merges.push(format!("{word} {letter}"));
            tokens.push(longer.clone());
            words.push(longer);
        }
        next += 1;
    }
    let ids: Map<String, Value> = tokens.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    Some(json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 0, "content": END, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        }],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "vocab": ids, "merges": merges },
    }))
}

/// The character that stands for a byte in a byte-level vocabulary.
fn byte_char(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|byte| !printable(*byte)).count() as u32;
    char::from_u32(0x100 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Whether a path is one of a model that can be opened as it is.
pub(crate) fn absolute(path: &Path) -> anyhow::Result<String> {
    let path = path.canonicalize().with_context(|| format!("no model at {}", path.display()))?;
    path.into_os_string().into_string().map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use butterfly::model::{Model, SequenceStep, StepInput, StepOutput};
    use butterfly_kernels::{Path as Instructions, Pool};

    use super::*;

    fn args(out: PathBuf, encoding: Encoding) -> SynthArgs {
        SynthArgs {
            out,
            encoding,
            from: None,
            architecture: "llama".to_owned(),
            hidden: 256,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: None,
            intermediate: 256,
            vocabulary: 300,
            context: 32,
            tied: false,
            seed: 7,
        }
    }

    /// Logits after a text; the same model in two formats gives the same ones where both keep all bits.
    fn logits(path: &Path) -> Vec<f32> {
        let model = Model::open(&absolute(path).unwrap(), Path::new("")).unwrap();
        let tokens = model.tokenizer().unwrap().encode(" abcab\u{e9}").unwrap();
        assert!(tokens.contains(&257), "' a' is the first merge");
        let slice = model.load(0..2).unwrap();
        let mut sequence = slice.new_sequence();
        let mut steps = [SequenceStep::new(&mut sequence, StepInput::Tokens(&tokens))];
        slice.forward(&Pool::new(1, Instructions::detect().unwrap()), &mut steps).unwrap();
        let [step] = steps;
        match step.output {
            StepOutput::Logits(logits) => logits,
            other => panic!("no logits: {other:?}"),
        }
    }

    #[test]
    fn models_of_every_encoding_can_be_run_and_are_much_alike() {
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        run(&args(plain.clone(), Encoding::F32)).unwrap();
        let expected = logits(&plain);
        let energy: f32 = expected.iter().map(|logit| logit * logit).sum();
        for encoding in Encoding::ALL {
            let path = folder.path().join(format!("{}.gguf", encoding.name()));
            run(&args(path.clone(), encoding)).unwrap();
            let fault: f32 = expected.iter().zip(logits(&path)).map(|(one, other)| (one - other).powi(2)).sum();
            let relative = (fault / energy).sqrt();
            // Random weights have no structure that rounding could spare; layers add up what it costs.
            let bound = if matches!(encoding.name(), "Q4_0" | "Q4_K" | "Q5_K") { 0.6 } else { 0.15 };
            assert!(relative < bound, "{}: {relative}", encoding.name());
            assert_eq!(relative == 0.0, encoding == Encoding::F32);
        }
    }
}
