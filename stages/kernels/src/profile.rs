//! The profile's name and digest, which epochs and receipts carry.
//!
//! The digest covers the definition as text and what this machine computes from fixed inputs. A build, a processor or a
//! floating-point environment that computes other bits therefore has another digest, and does not pass for `cpu-1`.

use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use crate::path::Path;
use crate::pool::Pool;

mod golden;

pub(crate) use golden::{Output, path_outputs};

/// Name of the profile.
pub const PROFILE: &str = "cpu-1";

/// The rules. A change of any rule is a new profile with a new name.
const DEFINITION: &str = include_str!("cpu-1.txt");

/// SHA-256 over the definition and the golden outputs of the profile, computed once by this machine's fastest path.
pub fn profile_digest() -> [u8; 32] {
    static DIGEST: OnceLock<[u8; 32]> = OnceLock::new();
    *DIGEST.get_or_init(|| digest(Path::detect().unwrap_or(Path::Scalar)))
}

fn digest(path: Path) -> [u8; 32] {
    let mut hasher = Sha256::new();
    // By lines, so that a checkout that rewrites line ends keeps the digest.
    for line in DEFINITION.lines() {
        hasher.update(line);
        hasher.update(b"\n");
    }
    for Output { operation, bits } in golden::profile_outputs(&Pool::new(1, path)) {
        hasher.update(operation);
        hasher.update((bits.len() as u64).to_le_bytes());
        for bits in bits {
            hasher.update(bits.to_le_bytes());
        }
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If this fails, the profile's bits changed: undo the change, or give the profile a new name.
    #[test]
    fn every_path_has_the_golden_digest() {
        const GOLDEN: &str = "5df69300c699e2a2292528a9b43a1ea2db99b6015260b4140a17cf9aa7f68a4d";
        for path in Path::available() {
            let hex: String = digest(path).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, GOLDEN, "{}", path.name());
        }
        assert_eq!(profile_digest(), digest(Path::Scalar));
    }
}
