//! Files with a node's secret identity key: a comment with the public key, and the secret scalar as 64 hex digits.
//!
//! Only the owner may read one. A key is never written over another, and a file that others can read is refused, because
//! whoever has read it can sign as the node.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use k256::ecdsa::SigningKey;
use k256::elliptic_curve::Generate;

use crate::exit::Failure;

/// A key file is one comment and one line.
const KEY_FILE_BYTES_MAX: u64 = 4096;

/// A fresh identity.
pub(crate) fn generate() -> SigningKey {
    SigningKey::generate()
}

/// The compressed public key in hex, as the topology file wants it.
pub(crate) fn public_hex(key: &SigningKey) -> String {
    hex::encode(key.verifying_key().to_sec1_point(true).as_bytes())
}

/// Where the key of a node lies unless something else is said: `keys/ID.key` beside the topology file.
pub(crate) fn beside(topology: &Path, node: &str) -> PathBuf {
    topology.parent().unwrap_or(Path::new("")).join("keys").join(format!("{node}.key"))
}

/// Writes a new key file with mode 0600; one that exists is left alone.
pub(crate) fn write(path: &Path, key: &SigningKey) -> Result<(), Failure> {
    let text = format!(
        "# Secret identity key of a Butterfly node (secp256k1). Never share this file. Public key:\n# {}\n{}\n",
        public_hex(key),
        hex::encode(key.to_bytes()),
    );
    write_secret(path, &text)
}

/// Writes a new file with mode 0600; one that exists is left alone.
pub(crate) fn write_secret(path: &Path, text: &str) -> Result<(), Failure> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|error| Failure::file("create", folder, &error))?;
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(|error| {
        let failure = Failure::file("write", path, &error);
        match error.kind() {
            std::io::ErrorKind::AlreadyExists => failure.help(
                "a key is never overwritten, because whoever has it may lose what it stands for; choose another name",
            ),
            _ => failure,
        }
    })?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|error| Failure::file("write", path, &error))
}

/// Reads a key file that only its owner can read.
pub(crate) fn read(path: &Path) -> Result<SigningKey, Failure> {
    parse(&read_secret(path)?).ok_or_else(|| {
        Failure::environment(format!("{} holds no secret key", path.display()))
            .help("a key file has one line of 64 hex digits, and comments that begin with #")
    })
}

/// Reads a file that only its owner can read.
pub(crate) fn read_secret(path: &Path) -> Result<String, Failure> {
    let file = File::open(path).map_err(|error| {
        Failure::file("read", path, &error)
            .help("make one with `butterfly keygen FILE`, and put its public part where it is needed")
    })?;
    refuse_shared(path, &file)?;
    let mut text = String::new();
    let mut limited = file.take(KEY_FILE_BYTES_MAX);
    limited.read_to_string(&mut text).map_err(|error| Failure::file("read", path, &error))?;
    Ok(text)
}

#[cfg(unix)]
fn refuse_shared(path: &Path, file: &File) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = file.metadata().map_err(|error| Failure::file("read", path, &error))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    Err(Failure::environment(format!("{} can be read by others (mode {mode:04o})", path.display()))
        .help(format!("chmod 600 {}", path.display())))
}

#[cfg(not(unix))]
fn refuse_shared(_: &Path, _: &File) -> Result<(), Failure> {
    Ok(())
}

fn parse(text: &str) -> Option<SigningKey> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let bytes = hex::decode(lines.next()?).ok()?;
    if lines.next().is_some() {
        return None;
    }
    SigningKey::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_file_and_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys/n0.key");
        let key = generate();
        write(&path, &key).unwrap();
        assert_eq!(read(&path).unwrap(), key);
        assert!(write(&path, &generate()).is_err());
        assert_eq!(read(&path).unwrap(), key);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let zero = "0".repeat(64);
        let over_the_order = "f".repeat(64);
        for text in ["", "# only a comment\n", "abcd\n", "not hex\n", &zero, &over_the_order] {
            assert!(parse(text).is_none(), "{text}");
        }
        let one = format!("{}1", "0".repeat(63));
        assert!(parse(&one).is_some());
        assert!(parse(&format!("{one}\n{one}\n")).is_none());
    }

    #[cfg(unix)]
    #[test]
    fn a_key_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("n0.key");
        write(&path, &generate()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(read(&path).is_err());
    }
}
