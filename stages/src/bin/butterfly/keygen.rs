//! `butterfly keygen`: a node's identity, or a client's API key.

use std::path::PathBuf;

use serde_json::json;

use crate::exit::Failure;
use crate::global::Global;
use crate::{api_key, key_file};

/// Make an identity key for a node or an API key for a client, or show the public part of one
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly keygen keys/n0.key           write a new key (mode 0600), print its public key
  butterfly keygen --show keys/n0.key    print the public key of a key file
  butterfly keygen --api-key alice alice.key >> cluster/tokens.txt
                                         write a new API key, and let the gateway know it by its hash
"
)]
pub(crate) struct Args {
    /// Where the secret key goes; an existing file is never overwritten
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Read FILE and print its public part, instead of writing it
    #[arg(long)]
    show: bool,
    /// Make an API key for this client, and print its line for the gateway's `tokens_file`
    #[arg(long, value_name = "CLIENT")]
    api_key: Option<String>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    if let Some(client) = &args.api_key {
        return for_client(args, client, global);
    }
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

fn for_client(args: &Args, client: &str, global: &Global) -> Result<(), Failure> {
    api_key::check_client(client)?;
    let key = if args.show {
        api_key::read(&args.file)?
    } else {
        let key = api_key::generate()?;
        api_key::write(&args.file, &key)?;
        global.say(&format!(
            "wrote the API key to {} (mode 0600): the client sends it as `Authorization: Bearer …`; its line for tokens_file:",
            args.file.display()
        ));
        key
    };
    let sha256 = api_key::digest(&key);
    if global.json {
        return global.print_json(&json!({ "file": args.file, "client": client, "sha256": sha256 }));
    }
    global.print(&format!("{sha256} {client}"))
}
