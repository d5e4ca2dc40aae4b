//! `topology.lock`: the plan that was reviewed, beside the topology that it follows from.
//!
//! A plan follows from the topology, the model and the program, so any of these can change it without anybody saying so.
//! Whoever keeps the lock beside the topology is told: `butterfly serve` does not start with another plan than the one that
//! was reviewed.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use butterfly_topology::Plan;
use butterfly_verify::Epoch;
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};

const VERSION: u32 = 1;
/// A lock of the largest cluster is far smaller.
const LOCK_BYTES_MAX: u64 = 4 << 20;

const HEAD: &str = "\
# The plan of the topology beside this file, as `butterfly plan --write` found it. Review it as you review Cargo.lock:
# `butterfly serve` refuses to start with another plan. After a change that you want: butterfly plan FILE --write

";

/// What was reviewed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Lock {
    version: u32,
    /// Digest over roster, model, numerics and plan.
    epoch: String,
    /// Root of the model's manifest.
    model: String,
    /// The numerics profile, and its digest.
    profile: String,
    profile_digest: String,
    strategy: String,
    #[serde(rename = "slice")]
    slices: Vec<LockedSlice>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LockedSlice {
    /// `[first, last)`.
    layers: [usize; 2],
    replicas: Vec<String>,
}

impl Lock {
    /// The lock of a plan and its epoch.
    pub(crate) fn new(plan: &Plan, epoch: &Epoch) -> Self {
        let parts = epoch.parts();
        let slices = plan.slices.iter().map(|slice| LockedSlice {
            layers: [slice.layers.start, slice.layers.end],
            replicas: slice.replicas.iter().map(ToString::to_string).collect(),
        });
        Self {
            version: VERSION,
            epoch: epoch.digest().to_string(),
            model: parts.manifest.to_string(),
            profile: parts.profile.clone(),
            profile_digest: parts.profile_digest.to_string(),
            strategy: plan.strategy.to_string(),
            slices: slices.collect(),
        }
    }

    /// Reads the lock beside a topology, if there is one.
    pub(crate) fn read(topology: &Path) -> Result<Option<Self>, Failure> {
        let path = beside(topology);
        match std::fs::metadata(&path) {
            Ok(metadata) if metadata.len() > LOCK_BYTES_MAX => {
                return Err(malformed(&path, &"it is larger than any lock"));
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::file("read", &path, &error)),
        }
        let text = std::fs::read_to_string(&path).map_err(|error| Failure::file("read", &path, &error))?;
        let lock: Self = toml::from_str(&text).map_err(|error| malformed(&path, &error.message()))?;
        if lock.version != VERSION {
            let problem = format!("it has version {}, and this program reads version {VERSION}", lock.version);
            return Err(malformed(&path, &problem));
        }
        Ok(Some(lock))
    }

    /// Writes the lock beside a topology.
    pub(crate) fn write(&self, topology: &Path) -> Result<PathBuf, Failure> {
        let path = beside(topology);
        let text = toml::to_string(self)
            .map_err(|error| Failure::new(Exit::Failure, format!("the lock cannot be written: {error}")))?;
        std::fs::write(&path, format!("{HEAD}{text}")).map_err(|error| Failure::file("write", &path, &error))?;
        Ok(path)
    }

    /// How `found` differs from what was reviewed, one line each; empty when it does not.
    pub(crate) fn differences(&self, found: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let texts = [
            ("model", &self.model, &found.model),
            ("numerics profile", &self.profile, &found.profile),
            ("numerics", &self.profile_digest, &found.profile_digest),
            ("strategy", &self.strategy, &found.strategy),
        ];
        for (what, locked, found) in texts.into_iter().filter(|(_, locked, found)| locked != found) {
            differences.push(format!("{what}: {} was reviewed, {} was found", short(locked), short(found)));
        }
        for index in 0..self.slices.len().max(found.slices.len()) {
            let (locked, found) = (self.slices.get(index), found.slices.get(index));
            if locked != found {
                let mut line = format!("slice {index}: ");
                // Writing into a string cannot fail.
                let _ = write!(line, "{} was reviewed, {} was found", slice(locked), slice(found));
                differences.push(line);
            }
        }
        if differences.is_empty() && self.epoch != found.epoch {
            differences.push("roster: a name, an id, a key or a domain is another".to_owned());
        }
        differences
    }
}

/// Where the lock of a topology lies.
pub(crate) fn beside(topology: &Path) -> PathBuf {
    topology.with_extension("lock")
}

/// Refuses a plan that is another than the one that was reviewed; `model` is where the model lies.
pub(crate) fn check(topology: &Path, model: &str, plan: &Plan, epoch: &Epoch) -> Result<(), Failure> {
    let Some(lock) = Lock::read(topology)? else { return Ok(()) };
    let found = Lock::new(plan, epoch);
    let differences = lock.differences(&found);
    if differences.is_empty() {
        return Ok(());
    }
    let path = beside(topology);
    Err(Failure::new(
        Exit::InvalidTopology,
        format!("the plan is another than that of {}:\n  {}", path.display(), differences.join("\n  ")),
    )
    .help(match lock.model == found.model {
        true => format!("if that is what you want: butterfly plan {} --write", topology.display()),
        false => format!(
            "the files of {model} are not those that were reviewed: bring them back; or if that is what you want: \
             butterfly plan {} --write",
            topology.display()
        ),
    }))
}

fn malformed(path: &Path, problem: &dyn std::fmt::Display) -> Failure {
    Failure::new(Exit::InvalidTopology, format!("{} is no lock: {problem}", path.display()))
        .help("remove it, or make it anew with butterfly plan FILE --write")
}

fn short(text: &str) -> &str {
    text.get(..16).unwrap_or(text)
}

fn slice(slice: Option<&LockedSlice>) -> String {
    match slice {
        Some(LockedSlice { layers: [first, last], replicas }) => {
            format!("layers {first}..{last} on {}", replicas.join(", "))
        }
        None => "nothing".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock() -> Lock {
        Lock {
            version: VERSION,
            epoch: "e".repeat(64),
            model: "a".repeat(64),
            profile: "cpu-1".to_owned(),
            profile_digest: "b".repeat(64),
            strategy: "uniform".to_owned(),
            slices: vec![LockedSlice { layers: [0, 4], replicas: vec!["n0".to_owned(), "n1".to_owned()] }],
        }
    }

    #[test]
    fn a_lock_survives_its_file_and_tells_what_changed() {
        let folder = tempfile::tempdir().unwrap();
        let topology = folder.path().join("topology.toml");
        assert_eq!(Lock::read(&topology).unwrap(), None);
        lock().write(&topology).unwrap();
        let read = Lock::read(&topology).unwrap().unwrap();
        assert_eq!(read, lock());
        assert!(read.differences(&lock()).is_empty());
        let mut other = lock();
        other.slices[0].replicas.pop();
        other.model = "c".repeat(64);
        other.epoch = "f".repeat(64);
        let differences = read.differences(&other);
        assert_eq!(differences.len(), 2, "{differences:?}");
        assert!(differences[1].contains("layers 0..4 on n0, n1 was reviewed, layers 0..4 on n0 was found"));
        let renamed = Lock { epoch: "f".repeat(64), ..lock() };
        assert!(read.differences(&renamed)[0].starts_with("roster"));
    }

    #[test]
    fn what_is_no_lock_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let topology = folder.path().join("topology.toml");
        for text in ["", "version = 1\n", "not toml"] {
            std::fs::write(beside(&topology), text).unwrap();
            assert!(Lock::read(&topology).is_err(), "{text:?}");
        }
        Lock { version: 2, ..lock() }.write(&topology).unwrap();
        assert!(Lock::read(&topology).is_err());
    }
}
