//! The machine, the program and the command of a run: what a figure is worth without them is nothing.
//!
//! Command lines hold no secrets here: API keys come from the environment or from files.

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use butterfly_engine::clock::{Clock, RealClock};
use serde::{Deserialize, Serialize};

static COMMIT: LazyLock<Option<String>> = LazyLock::new(commit);

/// Where and how a run was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Environment {
    pub(crate) command: String,
    pub(crate) version: String,
    /// Of the working tree that the program lies in, `-dirty` if it was changed; absent outside of one.
    pub(crate) commit: Option<String>,
    /// `release` or `debug`.
    pub(crate) build: String,
    pub(crate) os: String,
    pub(crate) cpu: String,
    /// Threads the machine can run at once.
    pub(crate) cores: usize,
    /// Instructions that the kernels use.
    pub(crate) instructions: String,
    pub(crate) began_unix_ms: u64,
}

impl Environment {
    pub(crate) fn now() -> Self {
        let path = butterfly_kernels::Path::detect();
        Self {
            command: command(),
            version: env!("CARGO_PKG_VERSION").into(),
            commit: COMMIT.clone(),
            build: if cfg!(debug_assertions) { "debug" } else { "release" }.into(),
            os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: cpu().unwrap_or_else(|| "unknown".into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            instructions: path.map_or_else(|_| "none".into(), |path| path.name().into()),
            began_unix_ms: RealClock::new().unix_ms(),
        }
    }

    /// Why figures of the two cannot be compared as they are.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let pairs = [
            ("cpu", &self.cpu, &other.cpu),
            ("instructions", &self.instructions, &other.instructions),
            ("build", &self.build, &other.build),
            ("os", &self.os, &other.os),
        ];
        let mut differences: Vec<String> = pairs
            .iter()
            .filter(|(_, one, other)| one != other)
            .map(|(name, one, other)| format!("{name}: {one} and {other}"))
            .collect();
        if self.cores != other.cores {
            differences.push(format!("cores: {} and {}", self.cores, other.cores));
        }
        differences
    }
}

/// The command line, with the program by its name.
fn command() -> String {
    let mut words = std::env::args();
    let program = words.next().unwrap_or_default();
    let program = Path::new(&program).file_name().map_or(program.clone(), |name| name.to_string_lossy().into_owned());
    let quoted = |word: String| if word.contains([' ', '>', '<', '\'']) { format!("{word:?}") } else { word };
    std::iter::once(program).chain(words.map(quoted)).collect::<Vec<_>>().join(" ")
}

fn commit() -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(program.parent()?).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let is_clean = git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(if is_clean { commit } else { format!("{commit}-dirty") })
}

fn cpu() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
