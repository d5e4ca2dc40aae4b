//! What every command understands, and how it speaks: data to standard output, messages to standard error, colour where a
//! person looks.

use std::io::{self, IsTerminal, Write};

use clap::{ArgAction, Args, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::exit::{Exit, Failure};
use crate::settings::Setting;

/// The levels `-v` and `-q` move along.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

#[derive(Args)]
pub(crate) struct Global {
    /// Print data as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// When to colour; `NO_COLOR` is obeyed too
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN")]
    color: Color,
    /// Log more; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Log less; twice for nothing
    #[arg(short, long, global = true, action = ArgAction::Count)]
    quiet: u8,
    /// How to log on standard error
    #[arg(long, global = true, value_enum, default_value = "pretty", value_name = "FORMAT")]
    log_format: LogFormat,
    /// Set a key of the topology, over environment (`BUTTERFLY_STAGE__INGEST__BIND_ADDRESS`) over file
    #[arg(long, global = true, value_name = "stage.ingest.bind_address=…")]
    pub(crate) set: Vec<Setting>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Pretty,
    Json,
}

impl Global {
    /// Logs to standard error from `level` on, moved by `-v` and `-q`; `BUTTERFLY_LOG` may say it per module instead.
    pub(crate) fn start_logging(&self, level: &str) {
        let start = LEVELS.iter().position(|of| *of == level).unwrap_or(2);
        let moved = (start + usize::from(self.verbose)).saturating_sub(usize::from(self.quiet));
        let level = LEVELS[moved.min(LEVELS.len() - 1)];
        let filter = EnvFilter::try_from_env("BUTTERFLY_LOG").unwrap_or_else(|_| EnvFilter::new(level));
        let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
        // An error means that a subscriber is there already, and that is all that is wanted.
        let _ = match self.log_format {
            LogFormat::Pretty => builder.with_ansi(self.ink_stderr().on).with_target(false).try_init(),
            LogFormat::Json => builder.json().try_init(),
        };
    }

    /// Writes data. A reader that has seen enough (`| head`) is no failure.
    pub(crate) fn print(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Failure::environment(format!("cannot write to standard output: {error}")))
            }
            _ => Ok(()),
        }
    }

    /// Writes a document as JSON.
    pub(crate) fn print_json(&self, document: &impl serde::Serialize) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(document)
            .map_err(|error| Failure::new(Exit::Failure, format!("cannot write JSON: {error}")))?;
        self.print(&text)
    }

    /// Writes a message for people; where nobody listens, nothing is lost.
    pub(crate) fn say(&self, text: &str) {
        let _ = writeln!(io::stderr().lock(), "{text}");
    }

    pub(crate) fn ink_stdout(&self) -> Ink {
        self.ink(io::stdout().is_terminal())
    }

    pub(crate) fn ink_stderr(&self) -> Ink {
        self.ink(io::stderr().is_terminal())
    }

    fn ink(&self, is_terminal: bool) -> Ink {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let on = match self.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => is_terminal && !no_color,
        };
        Ink { on }
    }
}

/// Colours, or none.
#[derive(Clone, Copy)]
pub(crate) struct Ink {
    pub(crate) on: bool,
}

impl Ink {
    pub(crate) fn good(self, text: &str) -> String {
        self.paint("1;32", text)
    }

    pub(crate) fn bad(self, text: &str) -> String {
        self.paint("1;31", text)
    }

    pub(crate) fn warn(self, text: &str) -> String {
        self.paint("1;33", text)
    }

    pub(crate) fn strong(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub(crate) fn faint(self, text: &str) -> String {
        self.paint("2", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
