//! The models inside this program, so that a first run needs no download.
//!
//! `builtin:tiny-rust` is a small llama trained on the documentation of Rust; `builtin:mlp` is a dense network whose
//! weights are made here, integer by integer, so that they are the same wherever this program is built.
//!
//! It refuses to know how models are run: both go through the same parsing and checks as a folder.

use std::fmt::Write as _;

use super::source::{Bytes, Format, Part, Sentences, Source, SourceError};

/// What may follow `builtin:`.
pub(super) const NAMES: [&str; 2] = ["tiny-rust", "mlp"];

const MLP_SIZES: [usize; 4] = [64, 128, 128, 32];
/// State the weights' generator starts from.
const MLP_SEED: u64 = 0x6275_7474_6572_666c;

/// The bytes of a built-in model.
pub(super) fn source(name: &str) -> Result<Source, SourceError> {
    match name {
        "tiny-rust" => Ok(Source {
            name: name.to_owned(),
            config: embedded(name, "config.json", include_bytes!("../../models/tiny-rust/config.json")),
            tokenizer: Some(embedded(name, "tokenizer.json", include_bytes!("../../models/tiny-rust/tokenizer.json"))),
            sentences: Sentences::default(),
            tokenizer_config: None,
            chat_template: Some(embedded(
                name,
                "chat_template.jinja",
                include_bytes!("../../models/tiny-rust/chat_template.jinja"),
            )),
            index: None,
            weights: vec![embedded(
                name,
                "model.safetensors",
                include_bytes!("../../models/tiny-rust/model.safetensors"),
            )],
            format: Format::Safetensors,
        }),
        "mlp" => {
            let config = format!(r#"{{"model_type":"mlp","layer_sizes":{MLP_SIZES:?},"activation":"relu"}}"#);
            Ok(Source {
                name: name.to_owned(),
                config: part(name, "config.json", Bytes::Owned(config.into_bytes())),
                tokenizer: None,
                sentences: Sentences::default(),
                tokenizer_config: None,
                chat_template: None,
                index: None,
                weights: vec![part(name, "model.safetensors", Bytes::Owned(mlp_weights()))],
                format: Format::Safetensors,
            })
        }
        _ => Err(SourceError::UnknownBuiltin { name: name.chars().take(80).collect() }),
    }
}

fn embedded(model: &str, name: &str, bytes: &'static [u8]) -> Part {
    part(model, name, Bytes::Embedded(bytes))
}

fn part(model: &str, name: &str, bytes: Bytes) -> Part {
    Part { file: format!("builtin:{model}/{name}"), name: name.to_owned(), bytes }
}

/// A safetensors file: every weight a twelve-bit integer times 2^-13, so from -1/4 up to but not including 1/4, exact
/// in f32. Tensors in the order in which the layers use them.
fn mlp_weights() -> Vec<u8> {
    let mut state = MLP_SEED;
    let mut data: Vec<u8> = Vec::new();
    let mut header = String::from("{");
    for (layer, sizes) in MLP_SIZES.windows(2).enumerate() {
        let &[inputs, outputs] = sizes else { continue };
        for (kind, shape) in [("weight", vec![outputs, inputs]), ("bias", vec![outputs])] {
            let start = data.len();
            for _ in 0..shape.iter().product::<usize>() {
                // The upper twelve bits, as an integer from -2048 to 2047.
                let integer = (splitmix64(&mut state) >> 52) as i16 - 2048;
                data.extend_from_slice(&(f32::from(integer) / 8192.0).to_le_bytes());
            }
            let separator = if start == 0 { "" } else { "," };
            let end = data.len();
            // Writing to a string cannot fail.
            let _ = write!(
                header,
                r#"{separator}"layers.{layer}.{kind}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
            );
        }
    }
    header.push('}');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    file
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        let mut state = 1_234_567;
        let drawn: Vec<u64> = (0..3).map(|_| splitmix64(&mut state)).collect();
        assert_eq!(drawn, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }
}
