//! Read-only memory maps of files.
//!
//! Purpose: weight files are larger than what a node wants to copy, so they are mapped, and the pages are shared by
//! every process of the machine that maps the same file.
//!
//! Invariants: a [`Mapped`] derefs to the bytes that the file had when it was opened, for as long as it lives; its
//! length never changes; nothing can be written through it.
//!
//! It refuses to know what the bytes mean, and it never maps anything but a regular file.
//!
//! # The hazard of a file that changes under its map
//!
//! A map shows the file, not a copy. If another process rewrites the file in place, the bytes seen here change; if it
//! truncates the file, touching a page beyond the new end kills this process with SIGBUS (on Windows the truncation is
//! refused instead). No check made at open can rule that out, and advisory locks bind only those who ask for them.
//! So the contract is with whoever operates the node: **replace a model file by renaming a new one over it, never by
//! writing into it**. A rename leaves the mapped inode as it was. Readers keep the window short where it matters:
//! weights are digested and repacked into private memory at load, and are not read from the map after that. A file
//! that was changed between the two gives wrong votes of this one node, never a wrong answer of the cluster.

use std::fs::{self, File};
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

#[cfg(unix)]
use memmap2::UncheckedAdvice;
use memmap2::{Mmap, MmapOptions};

/// The bytes of one regular file, mapped read-only. Cheap to create, shared pages, unmapped on drop.
#[derive(Debug)]
pub struct Mapped {
    /// `None` for an empty file, which no platform maps the same way.
    map: Option<Mmap>,
}

impl Mapped {
    /// Maps the whole file at `path`.
    ///
    /// # Errors
    ///
    /// What the system says when the file cannot be opened or mapped; `InvalidInput` when `path` is not a regular file
    /// (opening a FIFO would block, and a directory or device has no length to map).
    pub fn open(path: &Path) -> io::Result<Self> {
        if !fs::metadata(path)?.is_file() {
            return Err(not_regular());
        }
        let file = File::open(path)?;
        // Asked again of the open handle: the path may have been replaced in between.
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(not_regular());
        }
        if metadata.len() == 0 {
            return Ok(Self { map: None });
        }
        let length = usize::try_from(metadata.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "file does not fit the address space"))?;
        let mut options = MmapOptions::new();
        options.len(length);
        // SAFETY: the map is read-only and private to this value, covers exactly the length the file had a moment ago,
        // and is handed out only as `&[u8]` bound to `self`, for which every bit pattern is valid. What remains is that
        // the file must not be written or truncated while it is mapped: that cannot be enforced from here, is the
        // documented obligation of whoever operates the node (see the module), and holds for files replaced by rename.
        let map = unsafe { options.map(&file) }?;
        Ok(Self { map: Some(map) })
    }
}

impl Mapped {
    /// Takes the pages of `range` out of this process's memory, as far as they lie wholly within it; reading them again
    /// brings them back from the file. For what was read once, such as weights that are packed now. A range that is not
    /// within the file, and a platform that cannot do so, change nothing.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = self.map.as_ref().filter(|map| range.start < range.end && range.end <= map.len()) {
            // SAFETY: the map is of a file and read-only, so no page holds anything that the file does not, and a page
            // that is dropped is read from the file again: the bytes that `deref` hands out do not change.
            let dropped = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
            // It is advice: pages that stay are only memory.
            drop(dropped);
        }
        #[cfg(not(unix))]
        drop(range);
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

fn not_regular() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn shows_exactly_the_bytes_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        for length in [0_usize, 1, 4095, 4096, 4097, 100_000] {
            let bytes: Vec<u8> = (0..length).map(|i| (i * 31 % 251) as u8).collect();
            fs::write(&path, &bytes).unwrap();
            assert_eq!(&*Mapped::open(&path).unwrap(), &bytes[..]);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn keeps_the_old_bytes_when_the_file_is_replaced_by_rename() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("weights"), folder.path().join("new"));
        fs::write(&path, b"first").unwrap();
        let mapped = Mapped::open(&path).unwrap();
        fs::write(&other, b"second, and longer").unwrap();
        fs::rename(&other, &path).unwrap();
        assert_eq!(&*mapped, b"first");
        assert_eq!(&*Mapped::open(&path).unwrap(), b"second, and longer");
    }

    #[test]
    fn what_was_released_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let bytes: Vec<u8> = (0..100_000).map(|i| (i * 31 % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let mapped = Mapped::open(&path).unwrap();
        for range in [0..100_000, 1..99_999, 5000..5001, 7..7, 99_999..100_001, usize::MAX - 1..usize::MAX] {
            assert_eq!(&*mapped, &bytes[..]);
            mapped.release(range);
        }
        assert_eq!(&*mapped, &bytes[..]);
    }

    #[test]
    fn refuses_what_is_not_a_regular_file() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Mapped::open(folder.path()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Mapped::open(&folder.path().join("absent")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
