//! Packed weights on disk, so that a second start reads them as they will lie in memory.
//!
//! Purpose: packing reorders every weight once. What it gives is kept, one file for each matrix, and mapped by later
//! starts: pages come from the disk as they are used, and processes of one machine share them.
//!
//! Invariants: an entry is named by everything its bytes follow from (the model's root, the tensor, its shape and format,
//! and how this build lays weights out), and holds a digest of that and of its bytes. What does not agree with it, or is
//! cut, is removed and packed anew; an entry appears under its name only once it is whole. A folder that cannot be
//! written costs time at the next start and nothing else.
//!
//! It refuses to know what the weights are for. Entries of models that are no longer used are the operator's to delete.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use butterfly_kernels::{Dtype, Matrix, WeightView};
use butterfly_mapping::Mapped;
use sha2::{Digest, Sha256};

const KEY_DOMAIN: &[u8] = b"butterfly/1 packed weights\0";
const MAGIC: &[u8; 8] = b"BFPACKED";
/// Bytes before the weights: magic, digest, zeros up to the alignment of packed weights.
const HEAD_BYTES: usize = 64;
const DIGEST_BYTES: usize = 32;

/// A folder of packed weights.
#[derive(Debug, Clone)]
pub struct PackedWeights {
    folder: PathBuf,
}

/// What the bytes of an entry follow from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packing<'a> {
    pub(super) root: &'a [u8; 32],
    pub(super) tensor: &'a str,
    pub(super) dtype: Dtype,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl PackedWeights {
    /// Keeps packed weights in `folder`, which is made when something is written to it.
    #[must_use]
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// In the user's cache folder: `$XDG_CACHE_HOME/butterfly/packed`, or under `$HOME/.cache`. `None` without either.
    #[must_use]
    pub fn of_user() -> Option<Self> {
        let from = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let cache = from("XDG_CACHE_HOME").or_else(|| from("HOME").map(|home| home.join(".cache")))?;
        Some(Self::new(cache.join("butterfly/packed")))
    }

    /// The kept matrix, if there is one and it is whole.
    pub(super) fn find(&self, packing: Packing<'_>) -> Option<Matrix> {
        let key = packing.key()?;
        let path = self.path(&key);
        let mapped = Mapped::open(&path).ok()?;
        let matrix = Entry::checked(mapped, &key).and_then(|entry| {
            let Packing { dtype, rows, columns, .. } = packing;
            Matrix::from_packed(dtype, rows, columns, Arc::new(entry)).ok()
        });
        if matrix.is_none() {
            tracing::warn!(entry = %path.display(), "packed weights are damaged; packing them anew");
            let _ = fs::remove_file(&path);
        }
        matrix
    }

    /// Keeps a matrix.
    pub(super) fn keep(&self, packing: Packing<'_>, matrix: &Matrix) {
        let Some(key) = packing.key() else { return };
        if let Err(error) = self.write(&key, matrix.packed_bytes()) {
            tracing::warn!(folder = %self.folder.display(), %error, "packed weights are not kept");
        }
    }

    fn write(&self, key: &[u8; 32], weights: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let path = self.path(key);
        // Another process that writes the same entry has a name of its own.
        let unfinished = path.with_extension(format!("{}.part", std::process::id()));
        let written = fs::File::create(&unfinished).and_then(|mut file| {
            let mut head = MAGIC.to_vec();
            head.extend(digest(key, weights));
            head.resize(HEAD_BYTES, 0);
            file.write_all(&head)?;
            file.write_all(weights)
        });
        let kept = written.and_then(|()| fs::rename(&unfinished, path));
        if kept.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        kept
    }

    fn path(&self, key: &[u8; 32]) -> PathBuf {
        self.folder.join(hex::encode(key))
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Packing<'_> {
    fn key(&self) -> Option<[u8; 32]> {
        let mut key = Sha256::new();
        key.update(KEY_DOMAIN);
        key.update(layout(self.dtype)?);
        key.update(self.root);
        for size in [self.rows, self.columns, self.tensor.len()] {
            key.update((size as u64).to_le_bytes());
        }
        key.update(self.tensor);
        Some(key.finalize().into())
    }
}

/// How this build lays weights of a format out: a digest of what packing makes of known bytes, so that no version number
/// has to be kept. `None` if it cannot pack them.
fn layout(dtype: Dtype) -> Option<[u8; 32]> {
    static LAYOUTS: Mutex<BTreeMap<String, Option<[u8; 32]>>> = Mutex::new(BTreeMap::new());
    const ROWS: usize = 17;
    const COLUMNS: usize = 512;
    let name = format!("{dtype:?}");
    let mut layouts = LAYOUTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = layouts.get(&name) {
        return *known;
    }
    let digest = dtype.row_bytes(COLUMNS).and_then(|row| {
        // Below 0x60, so that no pattern of bits is a NaN, an infinity or a scale out of its range.
        let bytes: Vec<u8> = (0..row * ROWS).map(|index| (index * 31 % 89) as u8).collect();
        let matrix = Matrix::pack(WeightView { dtype, bytes: &bytes, rows: ROWS, columns: COLUMNS }).ok()?;
        let mut digest = Sha256::new();
        digest.update(&name);
        digest.update(matrix.packed_bytes());
        Some(digest.finalize().into())
    });
    layouts.insert(name, digest);
    digest
}

/// Covers the key, so that an entry under another's name is noticed.
fn digest(key: &[u8; 32], weights: &[u8]) -> [u8; DIGEST_BYTES] {
    let mut digest = blake3::Hasher::new();
    digest.update(key);
    digest.update(weights);
    *digest.finalize().as_bytes()
}

/// The weights of a mapped entry.
struct Entry(Mapped);

impl Entry {
    fn checked(mapped: Mapped, key: &[u8; 32]) -> Option<Self> {
        let stated = mapped.get(..HEAD_BYTES)?.strip_prefix(MAGIC)?.first_chunk::<DIGEST_BYTES>().copied()?;
        let entry = Self(mapped);
        (digest(key, entry.as_ref()) == stated).then_some(entry)
    }
}

impl AsRef<[u8]> for Entry {
    fn as_ref(&self) -> &[u8] {
        self.0.get(HEAD_BYTES..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKING: Packing<'_> =
        Packing { root: &[7; 32], tensor: "layer.weight", dtype: Dtype::F16, rows: 18, columns: 4 };

    fn matrix() -> Matrix {
        let bytes: Vec<u8> = (0..18_u8 * 4).flat_map(|index| [index, 0x30]).collect();
        Matrix::pack(WeightView { dtype: Dtype::F16, bytes: &bytes, rows: 18, columns: 4 }).unwrap()
    }

    #[test]
    fn what_was_kept_is_found_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let kept = PackedWeights::new(folder.path().join("packed"));
        assert!(kept.find(PACKING).is_none());
        kept.keep(PACKING, &matrix());
        assert_eq!(kept.find(PACKING).unwrap().packed_bytes(), matrix().packed_bytes());
        for other in [
            Packing { root: &[8; 32], ..PACKING },
            Packing { tensor: "layer.weights", ..PACKING },
            Packing { dtype: Dtype::Bf16, ..PACKING },
            Packing { rows: 17, ..PACKING },
            Packing { rows: 4, columns: 18, ..PACKING },
        ] {
            assert!(kept.find(other).is_none());
        }
    }

    #[test]
    fn damaged_entries_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let kept = PackedWeights::new(folder.path().to_owned());
        kept.keep(PACKING, &matrix());
        let path = kept.path(&PACKING.key().unwrap());
        let whole = fs::read(&path).unwrap();
        let other = kept.path(&Packing { root: &[8; 32], ..PACKING }.key().unwrap());
        fs::copy(&path, &other).unwrap();
        assert!(kept.find(Packing { root: &[8; 32], ..PACKING }).is_none(), "an entry under another's name");
        let digested = (0..MAGIC.len() + DIGEST_BYTES).chain(HEAD_BYTES..whole.len());
        let flipped = digested.map(|place| {
            let mut bytes = whole.clone();
            bytes[place] ^= 1;
            bytes
        });
        let cut = (0..whole.len()).step_by(7).map(|length| whole[..length].to_vec());
        for bytes in flipped.chain(cut).chain([[&whole[..], &[0]].concat()]) {
            // As a crash would leave it; an entry is never written in place.
            fs::remove_file(&path).ok();
            fs::write(&path, &bytes).unwrap();
            assert!(kept.find(PACKING).is_none());
            assert!(!path.exists());
        }
        kept.keep(PACKING, &matrix());
        assert!(kept.find(PACKING).is_some());
        assert!(fs::read_dir(folder.path()).unwrap().all(|entry| !entry.unwrap().path().ends_with(".part")));
    }
}
