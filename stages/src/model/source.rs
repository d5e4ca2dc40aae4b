//! Where the bytes of a model come from: a folder, a GGUF file, or this program itself.
//!
//! Invariants: the parts of a [`Source`] are in one fixed order (config, tokenizer, its config, chat template, index, weight
//! files by name, what lies beside an encoder); small parts are private copies, so what is digested is what is parsed;
//! weight files are mapped. Embedded bytes may lie at any address: nothing here promises alignment. What a GGUF file holds
//! besides weights is derived from it, and so only the
//! file itself is digested.
//!
//! It refuses to know what the bytes mean, apart from the file names in a shard index.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use butterfly_mapping::Mapped;
use serde::Deserialize;

use super::builtin;
use super::gguf::{self, Gguf, GgufError};

/// Size of `config.json`, at most.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;
/// Size of `tokenizer.json`, at most.
pub const TOKENIZER_BYTES_MAX: usize = 64 << 20;
/// Size of `tokenizer_config.json`, at most.
pub const TOKENIZER_CONFIG_BYTES_MAX: usize = 16 << 20;
/// Size of `chat_template.jinja`, at most.
pub const CHAT_TEMPLATE_BYTES_MAX: usize = 1 << 20;
/// Size of `model.safetensors.index.json`, at most.
pub const INDEX_BYTES_MAX: usize = 16 << 20;
/// Weight files of one model, at most.
pub const WEIGHT_FILES_MAX: usize = 1024;

const CONFIG_FILE: &str = "config.json";
const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
const CHAT_TEMPLATE_FILE: &str = "chat_template.jinja";
const WEIGHTS_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const MODULES_FILE: &str = "modules.json";
const POOLING_FILE: &str = "1_Pooling/config.json";
const SENTENCES_FILE: &str = "sentence_bert_config.json";

/// The bytes of a model, unread.
#[derive(Debug)]
pub(super) struct Source {
    /// The model's name: of the folder, or of the built-in model.
    pub(super) name: String,
    pub(super) config: Part,
    pub(super) tokenizer: Option<Part>,
    /// What says how an encoder's rows become one vector.
    pub(super) sentences: Sentences,
    /// `tokenizer_config.json`, for what it says of chats.
    pub(super) tokenizer_config: Option<Part>,
    /// `chat_template.jinja`, which precedes a template inside of `tokenizer_config.json`; or the one of a GGUF file.
    pub(super) chat_template: Option<Part>,
    /// The shard index, where the weights are in several files.
    pub(super) index: Option<Part>,
    /// Ascending by file name.
    pub(super) weights: Vec<Part>,
    /// How the weight files are written.
    pub(super) format: Format,
}

/// How weight files are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Safetensors,
    /// One file, which config and tokenizer were derived from.
    Gguf,
}

/// The files that sentence-transformers puts beside an encoder, as far as they are there.
#[derive(Debug, Default)]
pub(super) struct Sentences {
    /// `modules.json`: what follows the encoder.
    pub(super) modules: Option<Part>,
    /// `1_Pooling/config.json`.
    pub(super) pooling: Option<Part>,
    /// `sentence_bert_config.json`: where texts are cut.
    pub(super) limits: Option<Part>,
}

/// One file of a model.
#[derive(Debug)]
pub(super) struct Part {
    /// How errors name it: a path, or `builtin:…`.
    pub(super) file: String,
    /// The file's name without its folder.
    pub(super) name: String,
    pub(super) bytes: Bytes,
}

/// Bytes that live as long as the model.
#[derive(Debug)]
pub(super) enum Bytes {
    Embedded(&'static [u8]),
    Owned(Vec<u8>),
    Mapped(Mapped),
}

impl Bytes {
    /// Whether they are those of a file.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(self, Self::Mapped(_))
    }

    /// Tells that a range was read and is not needed in memory for now; it can be read again.
    pub(super) fn release(&self, range: Range<usize>) {
        if let Self::Mapped(mapped) = self {
            mapped.release(range);
        }
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Embedded(bytes) => bytes,
            Self::Owned(bytes) => bytes,
            Self::Mapped(bytes) => bytes,
        }
    }
}

/// Why the bytes of a model could not be found.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No built-in model has this name.
    #[error("no built-in model '{name}'; there are {}", builtin::NAMES.join(", "))]
    UnknownBuiltin {
        /// The name after `builtin:`.
        name: String,
    },
    /// The folder is not there.
    #[error("'{}' is neither a folder with a model nor a GGUF file", folder.display())]
    NotAFolder {
        /// Its path.
        folder: PathBuf,
    },
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Unreadable {
        /// Its path.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file that has to be small is not.
    #[error("{file}: {found} bytes are more than the {max} allowed")]
    TooLarge {
        /// Its path.
        file: String,
        /// Its size.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// The folder has neither a weight file nor an index of weight files.
    #[error("'{}' has neither {WEIGHTS_FILE} nor {INDEX_FILE}", folder.display())]
    NoWeights {
        /// Its path.
        folder: PathBuf,
    },
    /// The GGUF file is malformed, or of a model that is not supported.
    #[error("{file}: {error}")]
    Gguf {
        /// Its path.
        file: String,
        /// What is wrong with it.
        error: GgufError,
    },
    /// The shard index is malformed.
    #[error("{file}: {problem}")]
    Index {
        /// Its path.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// What a shard index says.
#[derive(Debug, Deserialize)]
pub(super) struct Index {
    /// Tensor name to file name.
    pub(super) weight_map: std::collections::BTreeMap<String, String>,
}

impl Source {
    /// A folder, or a file whose name ends in `.gguf`.
    pub(super) fn open(path: &Path) -> Result<Self, SourceError> {
        let is_gguf = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
        if !is_gguf || path.is_dir() {
            return Self::folder(path);
        }
        let (folder, file) = (path.parent().unwrap_or(Path::new("")), path.file_name().unwrap_or_default());
        let name = path.file_stem().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
        Self::gguf(name, Part::mapped(folder, &file.to_string_lossy())?)
    }

    /// A GGUF file, from which config and tokenizer are derived.
    pub(super) fn gguf(name: String, weights: Part) -> Result<Self, SourceError> {
        let wrong = |error: GgufError| SourceError::Gguf { file: weights.file.clone(), error };
        let derived = |name: &str, json: &serde_json::Value| Part {
            file: format!("{}, as {name}", weights.file),
            name: name.to_owned(),
            bytes: Bytes::Owned(json.to_string().into_bytes()),
        };
        let gguf = Gguf::parse(weights.bytes.as_ref()).map_err(wrong)?;
        let config = derived(CONFIG_FILE, &gguf::config::config(&gguf).map_err(wrong)?);
        let tokenizer = gguf::tokenizer::tokenizer(&gguf).map_err(wrong)?;
        let tokenizer = tokenizer.map(|json| derived(TOKENIZER_FILE, &json));
        let chat_template = gguf.text("tokenizer.chat_template").map_err(wrong)?;
        let chat_template = chat_template.map(|text| Part {
            file: format!("{}, as {CHAT_TEMPLATE_FILE}", weights.file),
            name: CHAT_TEMPLATE_FILE.to_owned(),
            bytes: Bytes::Owned(text.as_bytes().to_vec()),
        });
        Ok(Self {
            name,
            config,
            tokenizer,
            sentences: Sentences::default(),
            tokenizer_config: None,
            chat_template,
            index: None,
            weights: vec![weights],
            format: Format::Gguf,
        })
    }

    /// A folder with `config.json`, safetensors, and usually `tokenizer.json`. A single `model.safetensors` is preferred
    /// to an index, as transformers does.
    pub(super) fn folder(folder: &Path) -> Result<Self, SourceError> {
        if !folder.is_dir() {
            return Err(SourceError::NotAFolder { folder: folder.to_owned() });
        }
        let name = folder
            .canonicalize()
            .ok()
            .and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()))
            .unwrap_or_else(|| "model".to_owned());
        let config = Part::small(folder, CONFIG_FILE, CONFIG_BYTES_MAX)?;
        let tokenizer = Part::small_if_there(folder, TOKENIZER_FILE, TOKENIZER_BYTES_MAX)?;
        let beside = |name: &str| Part::small_if_there(folder, name, CONFIG_BYTES_MAX);
        let sentences = Sentences {
            modules: beside(MODULES_FILE)?,
            pooling: beside(POOLING_FILE)?,
            limits: beside(SENTENCES_FILE)?,
        };
        let tokenizer_config = Part::small_if_there(folder, TOKENIZER_CONFIG_FILE, TOKENIZER_CONFIG_BYTES_MAX)?;
        let chat_template = Part::small_if_there(folder, CHAT_TEMPLATE_FILE, CHAT_TEMPLATE_BYTES_MAX)?;
        let (index, weights) = if is_there(folder, WEIGHTS_FILE) {
            (None, vec![Part::mapped(folder, WEIGHTS_FILE)?])
        } else if let Some(index) = Part::small_if_there(folder, INDEX_FILE, INDEX_BYTES_MAX)? {
            let listed = index.index()?;
            let files = listed.files(&index.file)?;
            let weights = files.iter().map(|file| Part::mapped(folder, file)).collect::<Result<_, _>>()?;
            (Some(index), weights)
        } else {
            return Err(SourceError::NoWeights { folder: folder.to_owned() });
        };
        let format = Format::Safetensors;
        Ok(Self { name, config, tokenizer, sentences, tokenizer_config, chat_template, index, weights, format })
    }
}

impl Part {
    fn mapped(folder: &Path, name: &str) -> Result<Self, SourceError> {
        let path = folder.join(name);
        let file = path.display().to_string();
        match Mapped::open(&path) {
            Ok(map) => Ok(Self { file, name: name.to_owned(), bytes: Bytes::Mapped(map) }),
            Err(source) => Err(SourceError::Unreadable { file, source }),
        }
    }

    fn small(folder: &Path, name: &str, max: usize) -> Result<Self, SourceError> {
        let mut part = Self::mapped(folder, name)?;
        let bytes = part.bytes.as_ref();
        if bytes.len() > max {
            return Err(SourceError::TooLarge { found: bytes.len(), file: part.file, max });
        }
        part.bytes = Bytes::Owned(bytes.to_vec());
        Ok(part)
    }

    fn small_if_there(folder: &Path, name: &str, max: usize) -> Result<Option<Self>, SourceError> {
        if is_there(folder, name) { Self::small(folder, name, max).map(Some) } else { Ok(None) }
    }

    /// Parses a shard index.
    pub(super) fn index(&self) -> Result<Index, SourceError> {
        serde_json::from_slice(self.bytes.as_ref())
            .map_err(|error| SourceError::Index { file: self.file.clone(), problem: error.to_string() })
    }
}

impl Index {
    /// The distinct files it names, each of which must lie beside it.
    fn files(&self, file: &str) -> Result<BTreeSet<&str>, SourceError> {
        let wrong = |problem: String| SourceError::Index { file: file.to_owned(), problem };
        let files: BTreeSet<&str> = self.weight_map.values().map(String::as_str).collect();
        if files.is_empty() || files.len() > WEIGHT_FILES_MAX {
            return Err(wrong(format!("names {} weight files; 1 to {WEIGHT_FILES_MAX} are allowed", files.len())));
        }
        for name in &files {
            let plain = !name.is_empty()
                && name.len() <= 255
                && !name.starts_with('.')
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
            if !plain {
                let shown: String = name.chars().take(80).collect();
                return Err(wrong(format!("'{shown}' is not the name of a file beside it")));
            }
        }
        Ok(files)
    }
}

/// Whether something has this name, so that what cannot be read is an error and not taken for absent.
fn is_there(folder: &Path, name: &str) -> bool {
    folder.join(name).symlink_metadata().is_ok()
}
