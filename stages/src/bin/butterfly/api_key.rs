//! API keys of clients: made here, kept by the client, known to the gateway by their SHA-256 alone.
//!
//! A key has 256 random bits, so that its hash needs no salt and no stretching. It knows no topology and no gateway.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::exit::Failure;
use crate::key_file;

/// What a key begins with, so that people and secret scanners tell what it is.
const PREFIX: &str = "bf-";
/// Bytes of a client's name at most.
const CLIENT_BYTES_MAX: usize = 64;

/// A fresh key.
pub(crate) fn generate() -> Result<String, Failure> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::environment(format!("the system gives no random bytes: {error}")))?;
    Ok(format!("{PREFIX}{}", hex::encode(bytes)))
}

/// What the gateway compares.
pub(crate) fn digest(key: &str) -> String {
    hex::encode(Sha256::digest(key))
}

/// Writes a key that only its owner may read; a file that exists is left alone.
pub(crate) fn write(path: &Path, key: &str) -> Result<(), Failure> {
    key_file::write_secret(path, &format!("{key}\n"))
}

/// Reads a key from a file that only its owner can read.
pub(crate) fn read(path: &Path) -> Result<String, Failure> {
    let text = key_file::read_secret(path)?;
    let key = text.trim();
    if key.is_empty() || key.contains(char::is_whitespace) {
        return Err(Failure::environment(format!("{} holds no API key", path.display())).help("an API key is one word"));
    }
    Ok(key.to_owned())
}

/// Whether the gateway would take this name.
pub(crate) fn check_client(name: &str) -> Result<(), Failure> {
    let is_plain = |char: char| !char.is_control() && !char.is_whitespace() && char != '#';
    if name.is_empty() || name == "-" || name.len() > CLIENT_BYTES_MAX || !name.chars().all(is_plain) {
        return Err(Failure::usage(format!("'{}' is no name for a client", name.escape_debug()))
            .help(format!("1 to {CLIENT_BYTES_MAX} bytes without spaces and without #")));
    }
    Ok(())
}
