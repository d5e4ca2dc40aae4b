//! How a command ends: the exit statuses, and failures with a cure.

use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;

use crate::global::Global;

/// The exit statuses other than 0 that this program chooses itself; 99 comes from `butterfly-bench`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// What was asked for could not be done.
    Failure = 1,
    /// The command line is wrong; also what clap uses.
    Usage = 2,
    /// The topology file does not hold.
    InvalidTopology = 3,
    /// The machine lacks something: a file, a permission, a port, an instruction.
    Environment = 4,
    /// A receipt does not prove its answer.
    VerificationFailed = 5,
}

/// Why a command fails, for people.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
    help: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), help: None }
    }

    /// A failure whose message has been shown already, such as rendered diagnostics.
    pub(crate) fn told(exit: Exit) -> Self {
        Self::new(exit, "")
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub(crate) fn environment(message: impl Into<String>) -> Self {
        Self::new(Exit::Environment, message)
    }

    /// A file or folder that could not be read or written: `action` is a verb.
    pub(crate) fn file(action: &str, path: &Path, error: &impl Display) -> Self {
        Self::environment(format!("cannot {action} {}: {error}", path.display()))
    }

    /// What the reader can do about it.
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// What happened, and what can be done about it.
    pub(crate) fn parts(&self) -> (&str, Option<&str>) {
        (&self.message, self.help.as_deref())
    }

    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }

    /// Says it on standard error.
    pub(crate) fn tell(&self, global: &Global) {
        if self.message.is_empty() {
            return;
        }
        let ink = global.ink_stderr();
        global.say(&format!("{}: {}", ink.bad("error"), self.message));
        if let Some(help) = &self.help {
            global.say(&format!("  {}: {help}", ink.strong("help")));
        }
    }
}
