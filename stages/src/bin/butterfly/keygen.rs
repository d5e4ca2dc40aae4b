//! `butterfly keygen`: a node's identity.

use std::path::PathBuf;

use serde_json::json;

use crate::exit::Failure;
use crate::global::Global;
use crate::key_file;

/// Make an identity key for a node, or show the public key of one
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly keygen keys/n0.key           write a new key (mode 0600), print its public key
  butterfly keygen --show keys/n0.key    print the public key of a key file
"
)]
pub(crate) struct Args {
    /// Where the secret key goes; an existing file is never overwritten
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Read FILE and print its public key, instead of writing it
    #[arg(long)]
    show: bool,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let key = if args.show {
        key_file::read(&args.file)?
    } else {
        let key = key_file::generate();
        key_file::write(&args.file, &key)?;
        global.say(&format!("wrote the secret key to {} (mode 0600); its public key:", args.file.display()));
        key
    };
    let public_key = key_file::public_hex(&key);
    if global.json {
        return global.print_json(&json!({ "file": args.file, "public_key": public_key }));
    }
    global.print(&public_key)
}
