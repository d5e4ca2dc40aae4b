//! What the topology file says about the public listener, and the API keys it names.
//!
//! A key is never stored: the file holds SHA-256 digests. Keys name clients, so that rate limits, task ids and results of
//! different clients do not meet.
//!
//! Invariants: a listener that others can reach has keys; comparing a key takes the same time wherever it differs.
//!
//! It refuses to know requests.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use butterfly_engine::stage::StageError;
use butterfly_topology::StageConfig;
use sha2::{Digest, Sha256};

use super::cors::Cors;

/// Keys in a file at most; each request is compared with all of them.
pub(super) const KEYS_MAX: usize = 4096;
/// Bytes of a file of keys at most.
const KEYS_FILE_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a client's name at most.
const CLIENT_NAME_BYTES_MAX: usize = 64;

/// The settings of the stage.
#[derive(Debug)]
pub(super) struct Settings {
    /// Where the listener binds.
    pub bind_address: SocketAddr,
    /// Largest body of a request.
    pub body_bytes_max: usize,
    /// How long a task may stand still.
    pub request_timeout: Duration,
    /// Requests per second and client.
    pub rate_per_second: Option<u32>,
    /// Open client connections.
    pub connections_max: usize,
    /// Bytes of answers that are kept for repeats.
    pub cache_bytes: u64,
    /// Pages that may ask.
    pub cors: Cors,
    /// Who may send requests; anyone, if absent.
    pub keys: Option<ApiKeys>,
}

impl Settings {
    /// Reads the stage's keys of the topology file, and the file of API keys if it names one. `base` is where its relative
    /// path begins.
    ///
    /// # Errors
    /// When a listener that others can reach has no API keys, and when their file is not as it should be.
    pub(super) fn new(config: &StageConfig, base: &Path) -> Result<Self, StageError> {
        let bind_address = config
            .address("bind_address")
            .ok_or_else(|| StageError::configuration("bind_address", "is needed: an address such as 127.0.0.1:8080"))?;
        let keys = config.text("tokens_file").map(|file| ApiKeys::read(&base.join(file))).transpose();
        let keys = keys.map_err(|error| StageError::configuration("tokens_file", error.to_string()))?;
        if keys.is_none() && !bind_address.ip().is_loopback() {
            let problem = format!(
                "{bind_address} can be reached from elsewhere, so API keys are needed: name a file with the SHA-256 of each \
                 key in `tokens_file` (made with `printf %s \"$KEY\" | sha256sum`), or bind to 127.0.0.1"
            );
            return Err(StageError::configuration("bind_address", problem));
        }
        let cors = Cors::parse(config.text("cors_origins").unwrap_or_default())
            .map_err(|problem| StageError::configuration("cors_origins", problem))?;
        let count = |key: &str, otherwise: usize| {
            config.integer(key).and_then(|value| usize::try_from(value).ok()).unwrap_or(otherwise)
        };
        Ok(Self {
            bind_address,
            body_bytes_max: count("max_request_size_mb", 100) << 20,
            request_timeout: Duration::from_secs(count("request_timeout_secs", 30) as u64),
            rate_per_second: config.integer("rate_limit_per_second").and_then(|rate| u32::try_from(rate).ok()),
            connections_max: count("max_connections", 1024),
            cache_bytes: config.bytes("result_cache").unwrap_or(0),
            cors,
            keys,
        })
    }
}

/// The clients that are known, by the digests of their keys.
pub(super) struct ApiKeys(Vec<ApiKey>);

struct ApiKey {
    digest: [u8; 32],
    client: String,
}

/// Why a file of API keys was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeysError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others than its owner may change it, and so add keys of their own.
    #[error("{}: others can write it (mode {mode:04o}); run: chmod go-w {}", path.display(), path.display())]
    Shared {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// It is larger than a file of keys can be.
    #[error("{}: larger than {KEYS_FILE_BYTES_MAX} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// A line is not a digest and a name.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// It has no keys.
    #[error("{}: no key in it; each line is the SHA-256 of a key in hex, and optionally a name for its client", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

impl ApiKeys {
    /// Reads a file: one key a line as SHA-256 in hex, optionally followed by a name for the client; `#` begins a comment.
    ///
    /// # Errors
    /// When it cannot be read or a line is not as it should be.
    pub(super) fn read(path: &Path) -> Result<Self, KeysError> {
        let unreadable = |source| KeysError::Read { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        if metadata.len() > KEYS_FILE_BYTES_MAX {
            return Err(KeysError::TooLong { path: path.to_owned() });
        }
        #[cfg(unix)]
        {
            let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777;
            if mode & 0o022 != 0 {
                return Err(KeysError::Shared { path: path.to_owned(), mode });
            }
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        Self::parse(&text).map_err(|fault| match fault {
            Some((line, problem)) => KeysError::Line { path: path.to_owned(), line, problem },
            None => KeysError::Empty { path: path.to_owned() },
        })
    }

    fn parse(text: &str) -> Result<Self, Option<(usize, &'static str)>> {
        let mut keys: Vec<ApiKey> = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.split('#').next().unwrap_or_default().trim();
            if text.is_empty() {
                continue;
            }
            let wrong = |problem| Some((line, problem));
            let (digest, name) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
            let mut bytes = [0; 32];
            hex::decode_to_slice(digest, &mut bytes).map_err(|_| wrong("not the SHA-256 of a key, 64 hex digits"))?;
            let name = name.trim_start_matches(['*', ' ', '\t']);
            // What sha256sum writes for its standard input is no name.
            let client = match name {
                "" | "-" => hex::encode(&bytes[..8]),
                name => name.to_owned(),
            };
            if client.len() > CLIENT_NAME_BYTES_MAX || client.chars().any(char::is_control) {
                return Err(wrong("the client's name is longer than 64 bytes or has control characters"));
            }
            if keys.iter().any(|key| key.digest == bytes) {
                return Err(wrong("this key is in the file twice"));
            }
            if keys.len() == KEYS_MAX {
                return Err(wrong("more than the 4096 keys that one file may have"));
            }
            keys.push(ApiKey { digest: bytes, client });
        }
        if keys.is_empty() { Err(None) } else { Ok(Self(keys)) }
    }

    /// The client whose key this is.
    #[must_use]
    pub(super) fn client(&self, key: &str) -> Option<&str> {
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        // All are compared, and each to its last byte.
        self.0
            .iter()
            .fold(None, |found, key| if equal(&key.digest, &digest) { Some(key.client.as_str()) } else { found })
    }
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} API keys", self.0.len())
    }
}

/// Whether two digests are equal, in a time that does not depend on where they differ.
fn equal(left: &[u8; 32], right: &[u8; 32]) -> bool {
    let difference = left.iter().zip(right).fold(0, |difference, (left, right)| difference | (left ^ right));
    std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(key: &str) -> String {
        hex::encode(Sha256::digest(key))
    }

    #[test]
    fn keys_are_found_by_what_they_hash_to() {
        let text = format!("# clients\n\n{} alice\n{}  -\n{} # no name\n", digest("a"), digest("b"), digest("c"));
        let keys = ApiKeys::parse(&text).unwrap();
        assert_eq!(keys.client("a"), Some("alice"));
        assert_eq!(keys.client("b"), Some(&digest("b")[..16]));
        assert_eq!(keys.client("c"), Some(&digest("c")[..16]));
        assert_eq!(keys.client(&digest("a")), None, "the digest is not the key");
        assert_eq!(keys.client(""), None);
        assert_eq!(format!("{keys:?}"), "3 API keys");
    }

    #[test]
    fn a_line_that_is_no_key_is_named() {
        let fault = |text: &str| ApiKeys::parse(text).err().unwrap();
        assert_eq!(fault("# nothing\n"), None);
        assert_eq!(fault("\nplain-key alice\n").unwrap().0, 2);
        assert_eq!(fault(&format!("{0}\n{0} twice\n", digest("a"))).unwrap().0, 2);
        assert_eq!(fault(&format!("{} {}\n", digest("a"), "n".repeat(65))).unwrap().0, 1);
        let error = ApiKeys::read(Path::new("/nowhere/tokens.txt")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/tokens.txt"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_to_which_others_could_add_keys_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.txt");
        std::fs::write(&path, digest("a")).unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o620);
        assert!(ApiKeys::read(&path).unwrap_err().to_string().contains("chmod go-w"));
        mode(0o644);
        assert_eq!(ApiKeys::read(&path).unwrap().client("a"), Some(&digest("a")[..16]));
    }
}
