//! The secret of an admin listener: one line of a file that only its owner may read.
//!
//! The operator's tools read the same file, so that the secret never is an argument. It is kept as a digest.
//!
//! Invariants: a file that others can read is refused; comparing takes the same time wherever two secrets differ.
//!
//! It refuses to know what the secret opens.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// A secret is one line.
const FILE_BYTES_MAX: u64 = 4096;
/// Shorter ones can be guessed.
const SECRET_BYTES_MIN: usize = 16;

/// The secret of an admin listener.
pub(super) struct Token {
    digest: [u8; 32],
}

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error(
        "the secret of the admin listener cannot be read from {}: {source}; make one with \
         `(umask 077; openssl rand -hex 32 > {})`, or remove `admin_address`", path.display(), path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Others can read it.
    #[error("{} can be read by others (mode {mode:04o}); chmod 600 {}", path.display(), path.display())]
    Shared {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It holds no secret.
    #[error("{}: one line of {SECRET_BYTES_MIN} visible ASCII characters or more is expected", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

impl Token {
    /// Reads the secret.
    pub(super) fn read(path: &Path) -> Result<Self, TokenError> {
        let secret = read_secret(path)?;
        Ok(Self { digest: Sha256::digest(secret.as_bytes()).into() })
    }

    /// Whether this is the secret.
    pub(super) fn is(&self, secret: &str) -> bool {
        let given: [u8; 32] = Sha256::digest(secret.as_bytes()).into();
        let difference = self.digest.iter().zip(given).fold(0, |difference, (left, right)| difference | (left ^ right));
        std::hint::black_box(difference) == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a secret")
    }
}

/// Reads the secret of an admin listener, for whoever talks to one.
///
/// # Errors
/// When the file cannot be read, is not its owner's alone, or holds no secret.
pub fn read_secret(path: &Path) -> Result<String, TokenError> {
    let unreadable = |source| TokenError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    refuse_shared(path, &file)?;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(unreadable)?;
    let secret = text.trim();
    let is_secret = secret.len() >= SECRET_BYTES_MIN && secret.bytes().all(|byte| byte.is_ascii_graphic());
    if is_secret { Ok(secret.to_owned()) } else { Err(TokenError::Malformed { path: path.to_owned() }) }
}

#[cfg(unix)]
fn refuse_shared(path: &Path, file: &File) -> Result<(), TokenError> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = file.metadata().map_err(|source| TokenError::Read { path: path.to_owned(), source })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 == 0 { Ok(()) } else { Err(TokenError::Shared { path: path.to_owned(), mode }) }
}

#[cfg(not(unix))]
fn refuse_shared(_: &Path, _: &File) -> Result<(), TokenError> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(text: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.token");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        (folder, path)
    }

    #[test]
    fn only_the_secret_itself_opens() {
        let (_folder, path) = file("0123456789abcdef\n", 0o600);
        let token = Token::read(&path).unwrap();
        assert!(token.is("0123456789abcdef"));
        assert!(!token.is("0123456789abcdeF") && !token.is("") && !token.is("0123456789abcdef\n"));
        assert_eq!(format!("{token:?}"), "a secret");
    }

    #[test]
    fn what_is_no_secret_is_refused() {
        for text in ["", "short", "two words of a secret", "0123456789abcdef\n0123456789abcdef\n"] {
            let (_folder, path) = file(text, 0o600);
            assert!(matches!(Token::read(&path), Err(TokenError::Malformed { .. })), "{text:?}");
        }
        let (_folder, path) = file("0123456789abcdef", 0o640);
        assert!(matches!(Token::read(&path), Err(TokenError::Shared { mode: 0o640, .. })));
        assert!(matches!(Token::read(Path::new("/nowhere/admin.token")), Err(TokenError::Read { .. })));
    }
}
