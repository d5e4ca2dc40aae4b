//! Models: what runs, apart from where.
//!
//! Purpose: from a name in a topology to packed weights, tokens and answers. [`Model::open`] reads and checks everything
//! but the weights' values; [`Model::load`] packs a range of layers, checking those too; [`SliceModel::forward`] computes;
//! [`Generation`] turns logits into tokens and text. Replicas and gateways run this same code.
//!
//! Invariants: what a model computes is a function of the bytes under its [`Manifest`]'s root; hostile or damaged files
//! are errors that name the place, never a panic and never an unbounded allocation; slices with the same content are
//! packed once in a process, however many nodes it plays.
//!
//! It refuses to know nodes, plans, votes on the wire and HTTP. It reads files only in [`Model::open`] and
//! [`Model::load`].

mod bert;
mod builtin;
mod chat;
pub mod config;
mod generation;
pub mod gguf;
mod llama;
mod loading;
mod manifest;
mod mlp;
mod packed;
mod sampled;
mod sequence;
mod slice;
mod source;
mod tokenizer;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use butterfly_kernels::RopeError;

use bert::BertSlice;
use config::pooling::Pooling;
use config::{Config, ConfigError};
use gguf::tensors::ROPE_FACTORS;
use llama::LlamaSlice;
use loading::Loading;
use mlp::MlpSlice;
use slice::Layers;
use source::{Bytes, Format, Part, Source};
use weights::Weights;

pub use chat::{ChatError, ChatTemplate, MESSAGES_MAX, Message, Messages, Role};
pub use generation::Generation;
pub use manifest::{Architecture, LayerCost, Manifest};
pub use packed::PackedWeights;
pub use sampled::Sampled;
pub use sequence::{Scoring, Sequence, SequenceStep, StepFault, StepInput, StepOutput};
pub use slice::{ForwardError, SliceModel};
pub use source::{
    CHAT_TEMPLATE_BYTES_MAX, CONFIG_BYTES_MAX, INDEX_BYTES_MAX, SourceError, TOKENIZER_BYTES_MAX,
    TOKENIZER_CONFIG_BYTES_MAX, WEIGHT_FILES_MAX,
};
pub use tokenizer::{EncodeError, TEXT_BYTES_MAX, Tokenizer, TokenizerError};
pub use weights::{HEADER_BYTES_MAX, WeightsError};

/// What begins the name of a model inside this program.
const BUILTIN: &str = "builtin:";

/// A model that was read and checked, with no weights in memory but those of slices that are loaded.
#[derive(Debug)]
pub struct Model {
    source: Source,
    config: Config,
    weights: Weights,
    tokenizer: Option<Tokenizer>,
    chat: Result<ChatTemplate, ChatError>,
    manifest: Manifest,
    packed: OnceLock<PackedWeights>,
}

/// Why a model cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Its files are not there, or not readable.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Its configuration is malformed or asks for something that is not supported.
    #[error("{file}: {error}")]
    Config {
        /// The file.
        file: String,
        /// Which field, and why.
        error: ConfigError,
    },
    /// Its tokenizer is malformed or not supported.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Its weights are malformed or do not fit the configuration.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Its rotation makes no table.
    #[error("rotary embedding: {0}")]
    Rotation(RopeError),
    /// No such layers.
    #[error("layers {first}..{last} are not a range of the model's {layers} layers")]
    Layers {
        /// First layer asked for.
        first: usize,
        /// One past the last.
        last: usize,
        /// Layers of the model.
        layers: usize,
    },
}

impl Model {
    /// Opens `builtin:<name>`, or relative to `base` a GGUF file (`….gguf`) or a folder with `config.json`, safetensors
    /// and usually `tokenizer.json`. Reads every byte once, for the root. Built-in models are opened once in a process.
    ///
    /// # Errors
    ///
    /// [`ModelError`], naming file and place.
    pub fn open(spec: &str, base: &Path) -> Result<Arc<Self>, ModelError> {
        static OPENED: Mutex<BTreeMap<String, Weak<Model>>> = Mutex::new(BTreeMap::new());
        let Some(name) = spec.strip_prefix(BUILTIN) else {
            return Self::check(Source::open(&base.join(spec))?).map(Arc::new);
        };
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = opened.get(name).and_then(Weak::upgrade) {
            return Ok(model);
        }
        let model = Arc::new(Self::check(builtin::source(name)?)?);
        opened.insert(name.to_owned(), Arc::downgrade(&model));
        Ok(model)
    }

    /// Opens a GGUF file that is in memory already.
    ///
    /// # Errors
    ///
    /// [`ModelError`], naming the place; `name` is also how errors name the file.
    pub fn from_gguf(name: &str, bytes: Vec<u8>) -> Result<Arc<Self>, ModelError> {
        let part = Part { file: name.to_owned(), name: name.to_owned(), bytes: Bytes::Owned(bytes) };
        Self::check(Source::gguf(name.to_owned(), part)?).map(Arc::new)
    }

    fn check(source: Source) -> Result<Self, ModelError> {
        let config = Config::parse(source.config.bytes.as_ref())
            .map_err(|error| ModelError::Config { file: source.config.file.clone(), error })?;
        let index = source.index.as_ref().map(Part::index).transpose()?;
        let weights = match source.format {
            Format::Safetensors => Weights::open(&source.weights, index.as_ref())?,
            Format::Gguf => Weights::gguf(&source.weights, &config)?,
        };
        check_tensors(&config, &weights)?;
        let manifest = Manifest::new(&source, &config, &weights);
        let text_tokens_max = match &config {
            Config::Bert(config) => Some(Pooling::read(config, &source.sentences)?.text_tokens_max),
            Config::Llama(_) | Config::Mlp(_) => None,
        };
        let tokenizer = match &source.tokenizer {
            Some(part) if manifest.vocabulary > 0 => {
                let tokenizer = Tokenizer::parse(&part.file, part.bytes.as_ref(), manifest.vocabulary)?;
                Some(tokenizer.cutting(text_tokens_max))
            }
            _ => None,
        };
        let chat = chat::of_files(source.tokenizer_config.as_ref(), source.chat_template.as_ref());
        let chat = chat.map(|template| template.with_tokens(&manifest, tokenizer.as_ref()));
        Ok(Self { source, config, weights, tokenizer, chat, manifest, packed: OnceLock::new() })
    }

    /// Keeps packed weights on disk from now on, and takes those that are there, so that a later start need not pack
    /// again. The first folder that is named stays; weights inside this program are not kept.
    pub fn keep_packed(&self, packed: PackedWeights) {
        self.packed.get_or_init(|| packed);
    }

    /// What the model is.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its tokenizer; `None` for a dense network, and for a folder without one, which takes token ids only.
    #[must_use]
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Whether messages of a chat can be turned into a prompt.
    ///
    /// # Errors
    ///
    /// Why they cannot.
    pub fn check_chat(&self) -> Result<(), ChatError> {
        self.chat.as_ref().map(drop).map_err(ChatError::clone)
    }

    /// The tokens of the prompt that messages make at `now_ms`, in milliseconds since 1970.
    ///
    /// # Errors
    ///
    /// [`ChatError`], also where the model has no template or no tokenizer.
    pub fn chat_tokens(&self, messages: &Messages, now_ms: u64) -> Result<Vec<u32>, ChatError> {
        let template = self.chat.as_ref().map_err(ChatError::clone)?;
        template.tokens(messages, now_ms, self.tokenizer.as_ref().ok_or(ChatError::NoTokenizer)?)
    }

    /// Packs the layers `layers`; the first slice also embeds, the last one also has the head. A slice of the same content
    /// that is loaded anywhere in this process is shared. Blocks for as long as reading and packing take.
    ///
    /// # Errors
    ///
    /// [`ModelError`] if there is no such range, or a weight is NaN or infinite.
    pub fn load(&self, layers: Range<usize>) -> Result<Arc<SliceModel>, ModelError> {
        type Key = ([u8; 32], usize, usize);
        static LOADED: Mutex<BTreeMap<Key, Weak<SliceModel>>> = Mutex::new(BTreeMap::new());
        let (first, last) = (layers.start, layers.end);
        if first >= last || last > self.manifest.layers {
            return Err(ModelError::Layers { first, last, layers: self.manifest.layers });
        }
        // Held while packing, so that nodes of one process that start together do not pack the same weights twice.
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (self.manifest.root, first, last);
        if let Some(slice) = loaded.get(&key).and_then(Weak::upgrade) {
            return Ok(slice);
        }
        let total =
            self.manifest.layer_costs.get(first..last).unwrap_or_default().iter().map(|cost| cost.weight_bytes).sum();
        let loading = Loading::new(&self.source.weights, self.manifest.root, self.packed.get(), total);
        let layers = match &self.config {
            Config::Llama(config) => {
                Layers::Llama(Box::new(LlamaSlice::load(config, &self.weights, &loading, first..last)?))
            }
            Config::Bert(config) => {
                let pooling = Pooling::read(config, &self.source.sentences)?;
                Layers::Bert(Box::new(BertSlice::load(config, pooling, &self.weights, &loading, first..last)?))
            }
            Config::Mlp(config) => Layers::Mlp(MlpSlice::load(config, &self.weights, &loading, first..last)?),
        };
        loading.finish();
        let slice = Arc::new(SliceModel {
            root: self.manifest.root,
            range: first..last,
            context_length: self.manifest.context_length,
            layers,
        });
        loaded.retain(|_, slice| slice.strong_count() > 0);
        loaded.insert(key, Arc::downgrade(&slice));
        Ok(slice)
    }
}

/// Checks that the files hold the model's tensors and no others.
fn check_tensors(config: &Config, weights: &Weights) -> Result<(), WeightsError> {
    let (shapes, dtype) = match config {
        Config::Llama(config) => (llama::shapes(config), config.dtype),
        Config::Bert(config) => (bert::shapes(config, weights), config.dtype),
        Config::Mlp(config) => (mlp::shapes(config), config.dtype),
    };
    for (tensor, shape) in &shapes {
        weights.check(tensor, shape, dtype)?;
    }
    if let Config::Llama(config) = config
        && weights.has(ROPE_FACTORS)
    {
        weights.check(ROPE_FACTORS, &[config.head_dim / 2], None)?;
    }
    let known: BTreeSet<&str> = shapes.iter().map(|(tensor, _)| tensor.as_str()).collect();
    let takes_no_part = |tensor: &str| match config {
        Config::Llama(config) => llama::takes_no_part(config, tensor) || tensor == ROPE_FACTORS,
        Config::Bert(_) => bert::takes_no_part(weights, tensor),
        Config::Mlp(_) => false,
    };
    match weights.names().find(|tensor| !known.contains(tensor) && !takes_no_part(tensor)) {
        Some(tensor) => Err(weights.unexpected(tensor)),
        None => Ok(()),
    }
}
