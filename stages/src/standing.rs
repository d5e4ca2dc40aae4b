//! What this node holds against others, and what follows: nothing, quarantine, or exclusion.
//!
//! Proof (two answers of one node to one question) excludes: the node gets no more work from this gateway and nobody waits
//! for its votes. A contradiction by f+1 others quarantines: it is shown and no more, because a broken kernel could frame
//! an honest node. The roster, n and f stay as the epoch has them.
//!
//! Evidence is in the log, so a restart forgets nothing. The operator sets a piece aside by naming it in a file; evidence
//! found later counts again.
//!
//! It refuses to know how evidence comes about, and silence is never held against a node.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use butterfly_verify::{Digest, Epoch, Evidence, Grade, NodeIndex};
use sha2::{Digest as _, Sha256};

/// The file that names evidence to be set aside, beside the log.
pub const SET_ASIDE_FILE: &str = "set-aside.txt";
/// Bytes of that file at most.
const SET_ASIDE_BYTES_MAX: u64 = 1 << 20;

/// What this node holds against others.
#[derive(Debug, Default)]
pub struct Standing {
    nodes: Mutex<BTreeMap<NodeIndex, Conduct>>,
}

/// The record of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conduct {
    /// Votes that agreed with a certificate.
    pub agreed: u64,
    /// Pieces of evidence, by kind.
    pub accused: BTreeMap<String, u64>,
    /// Requests for which no vote came in time: unavailability, never called lying.
    pub silent: u64,
    /// What follows from the evidence.
    pub grade: Option<Grade>,
}

impl Conduct {
    /// What follows, as a word.
    #[must_use]
    pub fn standing(&self) -> &'static str {
        match self.grade {
            None => "good",
            Some(Grade::Quarantine) => "quarantined",
            Some(Grade::Proof) => "excluded",
        }
    }
}

/// Evidence that the operator has set aside, by its id.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SetAside(BTreeSet<Digest>);

/// Why the file of evidence set aside cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum SetAsideError {
    /// It cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is larger than such a file can be.
    #[error("{}: larger than {SET_ASIDE_BYTES_MAX} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// A line names no evidence.
    #[error("{}, line {line}: not the id of a piece of evidence; GET /v1/evidence shows them", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
}

impl SetAside {
    /// Reads a file: one id a line, `#` begins a comment. No file sets nothing aside.
    ///
    /// # Errors
    /// When it cannot be read, or a line is no id.
    pub fn read(path: &Path) -> Result<Self, SetAsideError> {
        let unreadable = |source| SetAsideError::Read { path: path.to_owned(), source };
        match std::fs::metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(unreadable(error)),
            Ok(file) if file.len() > SET_ASIDE_BYTES_MAX => {
                return Err(SetAsideError::TooLong { path: path.to_owned() });
            }
            Ok(_) => {}
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let lines = (1..).zip(text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()));
        let ids = lines
            .filter(|(_, id)| !id.is_empty())
            .map(|(line, id)| id.parse().map_err(|_| SetAsideError::Line { path: path.to_owned(), line }));
        ids.collect::<Result<_, _>>().map(Self)
    }
}

/// The id of a piece of evidence: the digest of its JSON form as it is kept.
#[must_use]
pub fn evidence_id(json: &[u8]) -> Digest {
    Digest(Sha256::digest(json).into())
}

impl Standing {
    /// What follows from the evidence that was kept, each piece as JSON. What does not hold in this epoch says nothing.
    #[must_use]
    pub fn new(kept: &[Vec<u8>], epoch: &Epoch, set_aside: &SetAside) -> Self {
        let standing = Self::default();
        for json in kept.iter().filter(|json| !set_aside.0.contains(&evidence_id(json))) {
            let Ok(evidence) = serde_json::from_slice::<Evidence>(json) else { continue };
            if let Ok(grade) = evidence.verify(epoch) {
                standing.accused(evidence.accused, evidence.kind().name(), grade);
            }
        }
        standing
    }

    /// Counts a vote that agreed.
    pub fn agreed(&self, node: NodeIndex) {
        self.lock().entry(node).or_default().agreed += 1;
    }

    /// Counts evidence of a kind. Returns whether the node's standing has changed by it.
    pub fn accused(&self, node: NodeIndex, kind: &str, grade: Grade) -> bool {
        let mut nodes = self.lock();
        let conduct = nodes.entry(node).or_default();
        *conduct.accused.entry(kind.to_owned()).or_default() += 1;
        let before = conduct.grade;
        conduct.grade = before.max(Some(grade));
        conduct.grade != before
    }

    /// Counts a vote that did not come.
    pub fn silent(&self, node: NodeIndex) {
        self.lock().entry(node).or_default().silent += 1;
    }

    /// Whether a node is proven to lie.
    #[must_use]
    pub fn is_excluded(&self, node: NodeIndex) -> bool {
        self.lock().get(&node).is_some_and(|conduct| conduct.grade == Some(Grade::Proof))
    }

    /// The record so far.
    #[must_use]
    pub fn conduct(&self) -> BTreeMap<NodeIndex, Conduct> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeIndex, Conduct>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proof_excludes_a_contradiction_quarantines_and_silence_does_neither() {
        let (liar, odd, mute) = (NodeIndex(1), NodeIndex(2), NodeIndex(3));
        let standing = Standing::default();
        assert!(standing.accused(odd, "wrong_output", Grade::Quarantine));
        assert!(!standing.accused(odd, "wrong_input", Grade::Quarantine), "nothing new follows");
        assert!(standing.accused(liar, "equivocation", Grade::Proof));
        assert!(!standing.accused(liar, "wrong_output", Grade::Quarantine), "and nothing less");
        standing.silent(mute);
        let words = standing.conduct();
        let words: Vec<_> = [liar, odd, mute].iter().map(|node| words[node].standing()).collect();
        assert_eq!(words, ["excluded", "quarantined", "good"]);
        assert_eq!([liar, odd, mute].map(|node| standing.is_excluded(node)), [true, false, false]);
    }

    #[test]
    fn the_file_of_evidence_set_aside_says_what_is_wrong_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SET_ASIDE_FILE);
        assert_eq!(SetAside::read(&path).unwrap(), SetAside::default());
        let id = evidence_id(b"{}");
        std::fs::write(&path, format!("# reviewed\n{id} # a broken fan\n\n")).unwrap();
        assert_eq!(SetAside::read(&path).unwrap(), SetAside(BTreeSet::from([id])));
        std::fs::write(&path, "\nn2\n").unwrap();
        let error = SetAside::read(&path).unwrap_err();
        assert!(error.to_string().contains("set-aside.txt, line 2"), "{error}");
    }

    #[test]
    fn what_is_no_evidence_of_this_epoch_says_nothing() {
        let epoch = crate::ingest::fixture::epoch(4096);
        let standing = Standing::new(&[b"{}".to_vec(), b"nonsense".to_vec()], &epoch, &SetAside::default());
        assert!(standing.conduct().is_empty());
    }
}
