//! `butterfly completions`: what a shell needs to complete command lines, made from the commands themselves.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::exit::Failure;
use crate::global::Global;

/// Print the completions of a shell
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly completions bash > ~/.local/share/bash-completion/completions/butterfly
  butterfly completions zsh > ~/.zfunc/_butterfly
  butterfly completions fish > ~/.config/fish/completions/butterfly.fish
"
)]
pub(crate) struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "butterfly", &mut script);
    let script = String::from_utf8_lossy(&script);
    if global.json {
        return global.print_json(&serde_json::json!({ "shell": args.shell.to_string(), "script": script }));
    }
    global.print(script.trim_end())
}
