//! `butterfly top`: the page of `butterfly status`, drawn again and again; shares are of the time between two drawings.

use std::time::Duration;

use crate::admin_client::{Where, block_on};
use crate::exit::Failure;
use crate::global::Global;
use crate::status::{Seen, text};

/// Moves to the top left and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Watch the cluster: tasks, stages and the bottleneck, as they change
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly top                           the nodes of ./topology.toml, until Ctrl-C
  butterfly top cluster/topology.toml --interval 5
  butterfly top --once                    two looks, one page, no screen: for a script
"
)]
pub(crate) struct Args {
    #[command(flatten)]
    r#where: Where,
    /// Seconds between two looks
    #[arg(long, default_value = "2", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Print one page and end
    #[arg(long)]
    once: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let admins = args.r#where.admins(global)?;
    let interval = Duration::from_secs(args.interval);
    block_on(async {
        let mut before = Seen::ask(&admins).await;
        loop {
            tokio::time::sleep(interval).await;
            let seen = Seen::ask(&admins).await;
            if global.json {
                global.print_json(&seen.json())?;
            } else {
                let page = text(&seen, Some(&before), global.ink_stdout());
                let clear = if args.once { "" } else { CLEAR };
                global.print(&format!("{clear}{}", page.trim_end()))?;
            }
            if args.once {
                return Ok(());
            }
            before = seen;
        }
    })?
}
