//! What a model is: its shape, what each layer costs, and one digest over everything that decides its function.
//!
//! Invariants: the root covers the exact bytes of config, tokenizer, its config, chat template, index, weight files and what
//! lies beside an encoder in that order, each under a role of its own and with its length, so no two different models
//! share one; of a GGUF file, which holds all of these, it covers the file. It does not cover names or paths, so the same
//! model has the same root on every machine.
//!
//! It refuses to know nodes and plans.

use sha2::{Digest, Sha256};

use super::config::{BertConfig, Config, LlamaConfig, MlpConfig};
use super::source::{Format, Part, Sentences, Source};
use super::weights::Weights;
use super::{bert, llama, mlp};

const PART_DOMAIN: &[u8] = b"butterfly/1 model part\0";
const ROOT_DOMAIN: &[u8] = b"butterfly/1 model root\0";
/// Bytes of a mapped file that are in memory at a time while it is digested.
const HASHED_AT_ONCE: usize = 16 << 20;

/// What a model is, without its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// The name clients ask for: of the folder, or of the built-in model.
    pub name: String,
    /// The family.
    pub architecture: Architecture,
    /// Layers that can be dealt to slices.
    pub layers: usize,
    /// Width of the residual stream; of the widest layer for a dense network.
    pub hidden: usize,
    /// Token ids are below this; 0 for a dense network.
    pub vocabulary: usize,
    /// Positions of prompt and answer together, at most; 1 for a dense network.
    pub context_length: usize,
    /// Elements of an input vector; 0 for a model that takes tokens.
    pub input_width: usize,
    /// Elements of an output vector; 0 for a model that gives tokens.
    pub output_width: usize,
    /// Begins a sequence.
    pub bos: Option<u32>,
    /// Each ends a sequence; ascending.
    pub eos: Vec<u32>,
    /// SHA-256 over config, tokenizer and weights.
    pub root: [u8; 32],
    /// One entry per layer; what surrounds the layers is counted with the first and the last.
    pub layer_costs: Vec<LayerCost>,
}

/// The family of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Decoder-only transformers of the llama family: tokens in, tokens out.
    Llama,
    /// Encoders of the BERT family: a text in, a vector out.
    Bert,
    /// Dense layers: a vector in, a vector out.
    Mlp,
}

/// What holding and running one layer takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerCost {
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Bytes of keys and values for one position of one sequence.
    pub kv_bytes_per_position: u64,
    /// Multiply-adds for one position, attention over earlier positions left out.
    pub work: f64,
    /// Bytes that leave it for one position.
    pub boundary_bytes: u64,
}

impl Manifest {
    pub(super) fn new(source: &Source, config: &Config, weights: &Weights) -> Self {
        let (name, root) = (source.name.clone(), root(source));
        match config {
            Config::Llama(config) => Self {
                name,
                architecture: Architecture::Llama,
                layers: config.layers,
                hidden: config.hidden,
                vocabulary: config.vocabulary,
                context_length: config.context_length,
                input_width: 0,
                output_width: 0,
                bos: config.bos,
                eos: config.eos.clone(),
                root,
                layer_costs: llama_costs(config, weights),
            },
            Config::Bert(config) => Self {
                name,
                architecture: Architecture::Bert,
                layers: config.layers,
                hidden: config.hidden,
                vocabulary: config.vocabulary,
                context_length: config.context_length,
                input_width: 0,
                output_width: config.hidden,
                bos: None,
                eos: Vec::new(),
                root,
                layer_costs: bert_costs(config, weights),
            },
            Config::Mlp(config) => Self {
                name,
                architecture: Architecture::Mlp,
                layers: config.layer_sizes.len().saturating_sub(1),
                hidden: config.layer_sizes.iter().copied().max().unwrap_or(0),
                vocabulary: 0,
                context_length: 1,
                input_width: config.layer_sizes.first().copied().unwrap_or(0),
                output_width: config.layer_sizes.last().copied().unwrap_or(0),
                bos: None,
                eos: Vec::new(),
                root,
                layer_costs: mlp_costs(config, weights),
            },
        }
    }

    /// Elements of the f32 rows that enter `layer` from the layer before it; `None` for the first layer and beyond the
    /// last.
    #[must_use]
    pub fn boundary_width(&self, layer: usize) -> Option<usize> {
        let before = layer.checked_sub(1).filter(|before| before + 1 < self.layers)?;
        self.layer_costs.get(before).map(|cost| cost.boundary_bytes as usize / size_of::<f32>())
    }
}

/// Bytes of one number as keys and values are kept: f16.
const KV_BYTES: usize = 2;

fn llama_costs(config: &LlamaConfig, weights: &Weights) -> Vec<LayerCost> {
    let embedding = config.vocabulary * config.hidden;
    let mut costs = vec![
        LayerCost {
            weight_bytes: 0,
            kv_bytes_per_position: (2 * config.kv_heads * config.head_dim * KV_BYTES) as u64,
            work: llama::layer_shapes(config).iter().filter(|(_, shape)| shape.len() == 2).map(elements).sum::<usize>()
                as f64,
            boundary_bytes: (config.hidden * size_of::<f32>()) as u64,
        };
        config.layers
    ];
    for (layer, cost) in costs.iter_mut().enumerate() {
        let tensors = llama::layer_shapes(config).into_iter().map(|(name, _)| llama::layer_tensor(layer, name));
        cost.weight_bytes = tensors.map(|tensor| weights.stored_bytes(&tensor)).sum();
    }
    if let Some(first) = costs.first_mut() {
        first.weight_bytes += weights.stored_bytes(llama::EMBEDDING);
    }
    if let Some(last) = costs.last_mut() {
        // On one slice a tied head costs nothing more; a planner that cuts the model needs it on both ends.
        let head = if config.tied_head { llama::EMBEDDING } else { llama::HEAD };
        last.weight_bytes += weights.stored_bytes(head) + weights.stored_bytes(llama::FINAL_NORM);
        last.work += embedding as f64;
        last.boundary_bytes = size_of::<u32>() as u64;
    }
    costs
}

fn elements<N>((_, shape): &(N, Vec<usize>)) -> usize {
    shape.iter().product()
}

/// Nothing is kept between steps, so keys and values cost no memory.
fn bert_costs(config: &BertConfig, weights: &Weights) -> Vec<LayerCost> {
    let shapes = bert::layer_shapes(config);
    let stored = |names: Vec<String>| names.iter().map(|name| weights.stored_bytes(name)).sum::<u64>();
    let mut costs: Vec<LayerCost> = (0..config.layers)
        .map(|layer| LayerCost {
            weight_bytes: stored(bert::layer_tensors(config, weights, layer)),
            kv_bytes_per_position: 0,
            work: shapes.iter().filter(|(_, shape)| shape.len() == 2).map(elements).sum::<usize>() as f64,
            boundary_bytes: (config.hidden * size_of::<f32>()) as u64,
        })
        .collect();
    if let Some(first) = costs.first_mut() {
        first.weight_bytes += stored(bert::entry_tensors(config, weights));
    }
    costs
}

fn mlp_costs(config: &MlpConfig, weights: &Weights) -> Vec<LayerCost> {
    let sizes = config.layer_sizes.windows(2);
    sizes
        .enumerate()
        .filter_map(|(layer, pair)| match *pair {
            [inputs, outputs] => Some(LayerCost {
                weight_bytes: weights.stored_bytes(&mlp::weight(layer)) + weights.stored_bytes(&mlp::bias(layer)),
                kv_bytes_per_position: 0,
                work: (inputs * outputs) as f64,
                boundary_bytes: (outputs * size_of::<f32>()) as u64,
            }),
            _ => None,
        })
        .collect()
}

fn root(source: &Source) -> [u8; 32] {
    let small = [
        (b'c', Some(&source.config)),
        (b't', source.tokenizer.as_ref()),
        (b'k', source.tokenizer_config.as_ref()),
        (b'j', source.chat_template.as_ref()),
        (b'i', source.index.as_ref()),
    ];
    let small = small.into_iter().filter_map(|(role, part)| part.map(|part| (role, part)));
    let weights = source.weights.iter().map(|part| (b'w', part));
    let parts: Vec<(u8, &Part)> = match source.format {
        Format::Safetensors => small.chain(weights).chain(beside(&source.sentences)).collect(),
        Format::Gguf => source.weights.iter().map(|part| (b'g', part)).collect(),
    };
    let mut root = Sha256::new();
    root.update(ROOT_DOMAIN);
    root.update((parts.len() as u64).to_le_bytes());
    for (role, part) in parts {
        let bytes = part.bytes.as_ref();
        let mut digest = Sha256::new();
        digest.update(PART_DOMAIN);
        digest.update([role]);
        digest.update((bytes.len() as u64).to_le_bytes());
        // Mapped pages are given back as they were read: hashing a file takes no memory of its size.
        for start in (0..bytes.len()).step_by(HASHED_AT_ONCE) {
            let chunk = start..bytes.len().min(start + HASHED_AT_ONCE);
            digest.update(bytes.get(chunk.clone()).unwrap_or_default());
            part.bytes.release(chunk);
        }
        root.update(digest.finalize());
    }
    root.finalize().into()
}

fn beside(Sentences { modules, pooling, limits }: &Sentences) -> impl Iterator<Item = (u8, &Part)> {
    let roles = [(b'm', modules), (b'p', pooling), (b's', limits)].into_iter();
    roles.filter_map(|(role, part)| part.as_ref().map(|part| (role, part)))
}

#[cfg(test)]
mod tests {
    use super::super::source::Bytes;
    use super::*;

    fn source(config: &[u8], tokenizer: Option<&[u8]>, weights: &[&[u8]]) -> Source {
        let part = |bytes: &[u8]| Part { file: "f".into(), name: "n".into(), bytes: Bytes::Owned(bytes.to_vec()) };
        Source {
            name: "m".into(),
            config: part(config),
            tokenizer: tokenizer.map(part),
            sentences: Sentences::default(),
            tokenizer_config: None,
            chat_template: None,
            index: None,
            weights: weights.iter().map(|bytes| part(bytes)).collect(),
            format: Format::Safetensors,
        }
    }

    /// The root of a source with a tokenizer's config and a chat template.
    fn chatty(config: &[u8], template: Option<&[u8]>) -> [u8; 32] {
        let mut source = source(b"c", None, &[b"w"]);
        let part = |bytes: &[u8]| Part { file: "f".into(), name: "n".into(), bytes: Bytes::Owned(bytes.to_vec()) };
        source.tokenizer_config = Some(part(config));
        source.chat_template = template.map(part);
        root(&source)
    }

    #[test]
    fn every_part_and_its_role_reach_the_root() {
        let roots = [
            source(b"c", None, &[b"w"]),
            source(b"d", None, &[b"w"]),
            source(b"c", None, &[b"v"]),
            source(b"c", Some(b"w"), &[]),
            source(b"c", Some(b"t"), &[b"w"]),
            source(b"c", None, &[b"w", b""]),
            source(b"c", None, &[b"", b"w"]),
            source(b"cw", None, &[b""]),
        ]
        .map(|source| root(&source))
        .into_iter()
        .chain([chatty(b"c", None), chatty(b"", Some(b"c")), chatty(b"", None)])
        .collect::<Vec<_>>();
        for (index, one) in roots.iter().enumerate() {
            assert!(roots.iter().skip(index + 1).all(|other| other != one), "{index}");
        }
    }

    #[test]
    fn what_lies_beside_an_encoder_reaches_the_root() {
        let part =
            |bytes: &[u8]| Some(Part { file: "f".into(), name: "n".into(), bytes: Bytes::Owned(bytes.to_vec()) });
        let with = |sentences| root(&Source { sentences, ..source(b"c", None, &[b"w"]) });
        let roots = [
            with(Sentences::default()),
            with(Sentences { modules: part(b"x"), ..Sentences::default() }),
            with(Sentences { pooling: part(b"x"), ..Sentences::default() }),
            with(Sentences { limits: part(b"x"), ..Sentences::default() }),
            with(Sentences { limits: part(b"y"), ..Sentences::default() }),
        ];
        for (index, one) in roots.iter().enumerate() {
            assert!(roots.iter().skip(index + 1).all(|other| other != one), "{index}");
        }
    }

    #[test]
    fn names_do_not_reach_the_root() {
        let one = source(b"c", None, &[b"w"]);
        let mut other = source(b"c", None, &[b"w"]);
        other.name = "another".into();
        other.config.file = "elsewhere".into();
        assert_eq!(root(&one), root(&other));
    }
}
