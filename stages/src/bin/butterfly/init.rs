//! `butterfly init`: a topology to start from, and the keys of its nodes.
//!
//! A secret key is made on the machine that will use it. For several machines each makes its own with `--role node`, which
//! prints what the others need to know of it; the gateway puts these together with `--role gateway`. Only the role `demo`
//! makes all keys in one place. Nothing is ever overwritten, and nothing is written before everything has been checked.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use butterfly::registry::catalogue;
use butterfly_topology::cluster::NODES_MAX;
use butterfly_topology::{NodeId, TelemetrySpec};
use clap::ValueEnum;
use k256::ecdsa::{SigningKey, VerifyingKey};
use serde_json::json;

use crate::exit::{Exit, Failure};
use crate::global::Global;
use crate::key_file;

mod template;

use template::{Member, Template};

/// First port of a cluster on one machine.
const FIRST_PORT: u16 = 9000;
/// First port of the admin listeners of a machine.
const FIRST_ADMIN_PORT: u16 = 9100;
/// Where the first gateway takes requests.
const HTTP_ADDRESS: &str = "127.0.0.1:8080";

/// Write a commented topology and the keys of its nodes, ready to serve
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly init                                 three nodes on this machine, in ./cluster
  butterfly init --dir big --nodes 6 --slices 2  six nodes, the model cut in two

  Three machines, each with its own secret:
  n1$ butterfly init --role node --id n1 --listen 10.0.0.2:9000
  n2$ butterfly init --role node --id n2 --listen 10.0.0.3:9000
  n0$ butterfly init --role gateway --id n0 --listen 10.0.0.1:9000 --peer n1=02…@10.0.0.2:9000 --peer n2=03…@10.0.0.3:9000
"
)]
pub(crate) struct Args {
    /// What this machine is to be
    #[arg(long, value_enum, default_value = "demo")]
    role: Role,
    /// Where to write
    #[arg(long, default_value = "cluster", value_name = "DIR")]
    dir: PathBuf,
    /// The cluster's name
    #[arg(long, default_value = "demo")]
    name: String,
    /// The model: builtin:tiny-rust, builtin:mlp, or a folder with config.json and *.safetensors
    #[arg(long, default_value = "builtin:tiny-rust")]
    model: String,
    /// How many nodes [default: 3, or as many as are named]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=NODES_MAX as i64))]
    nodes: Option<u16>,
    /// Into how many slices the model is cut [default: the planner chooses]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    slices: Option<u16>,
    /// How many nodes may lie; each slice is held by 2f+1 nodes [default: 1 from three nodes on, else 0]
    #[arg(long, value_name = "F")]
    max_byzantine: Option<u16>,
    /// This node's id (roles node and gateway)
    #[arg(long, value_parser = NodeId::parse)]
    id: Option<NodeId>,
    /// Where this node listens for its peers, UDP (roles node and gateway)
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Another node, as its own `init --role node` printed it (role gateway)
    #[arg(long, value_name = "ID=KEY@ADDRESS")]
    peer: Vec<Peer>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Role {
    /// A whole cluster on this machine
    Demo,
    /// The node that takes requests, and the topology of all
    Gateway,
    /// One node: its key, and what the gateway must know of it
    Node,
}

/// A node somewhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Peer {
    id: NodeId,
    public_key: String,
    address: SocketAddr,
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (id, rest) = text.split_once('=').ok_or("expected ID=KEY@ADDRESS")?;
        let (key, address) = rest.split_once('@').ok_or("expected ID=KEY@ADDRESS")?;
        let bytes = hex::decode(key).map_err(|error| format!("the key is not hex: {error}"))?;
        if bytes.len() != 33 || VerifyingKey::from_sec1_bytes(&bytes).is_err() {
            return Err("the key is not a compressed secp256k1 public key (66 hex digits)".to_owned());
        }
        Ok(Self {
            id: NodeId::parse(id).map_err(|error| format!("the id: {error}"))?,
            public_key: hex::encode(bytes),
            address: address.parse().map_err(|_| format!("`{address}` is not an address with a port"))?,
        })
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}@{}", self.id, self.public_key, self.address)
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    refuse_misplaced(args)?;
    match args.role {
        Role::Demo => demo(args, global),
        Role::Gateway => gateway(args, global),
        Role::Node => node(args, global),
    }
}

fn refuse_misplaced(args: &Args) -> Result<(), Failure> {
    let one_machine = args.role == Role::Demo;
    if one_machine && (args.id.is_some() || args.listen.is_some()) {
        return Err(Failure::usage("--id and --listen belong to --role node and --role gateway"));
    }
    if args.role != Role::Gateway && !args.peer.is_empty() {
        return Err(Failure::usage("--peer belongs to --role gateway"));
    }
    Ok(())
}

/// All nodes and all keys on this machine.
fn demo(args: &Args, global: &Global) -> Result<(), Failure> {
    let count = args.nodes.unwrap_or(3);
    let mut members = Vec::new();
    let mut keys = Vec::new();
    for index in 0..count {
        let id = NodeId::parse(&format!("n{index}")).map_err(|error| Failure::usage(error.to_string()))?;
        let key = key_file::generate();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_PORT + index));
        let admin = admin_address(FIRST_ADMIN_PORT + index);
        members.push(Member { id: id.clone(), public_key: key_file::public_hex(&key), address, admin });
        keys.push((id, key));
    }
    let topology = write_topology(args, members)?;
    for (id, key) in &keys {
        key_file::write(&key_file::beside(&topology, id.as_str()), key)?;
    }
    let serve = format!("butterfly serve {}", topology.display());
    tell(
        global,
        &topology,
        &format!("wrote {} and {} keys beside it", topology.display(), keys.len()),
        &[("run it", serve), ("ask it", ask(&args.model))],
    )
}

/// The topology of all, and this node's key.
fn gateway(args: &Args, global: &Global) -> Result<(), Failure> {
    let (id, address) = own_place(args)?;
    let count = 1 + args.peer.len();
    if args.nodes.is_some_and(|nodes| usize::from(nodes) != count) {
        return Err(Failure::usage(format!("--nodes says otherwise than the {count} nodes that --id and --peer name")));
    }
    let topology = args.dir.join("topology.toml");
    refuse_existing(&topology)?;
    let (key, is_new) = own_key(&key_file::beside(&topology, id.as_str()))?;
    // Each on its own machine, where the port is free.
    let admin = admin_address(FIRST_ADMIN_PORT);
    let mut members = vec![Member { id: id.clone(), public_key: key_file::public_hex(&key), address, admin }];
    members.extend(args.peer.iter().map(|peer| Member {
        id: peer.id.clone(),
        public_key: peer.public_key.clone(),
        address: peer.address,
        admin,
    }));
    let topology = write_topology(args, members)?;
    if is_new {
        key_file::write(&key_file::beside(&topology, id.as_str()), &key)?;
    }
    let mut next = vec![("run this node", format!("butterfly serve {} --node {id}", topology.display()))];
    for peer in &args.peer {
        next.push((
            "copy the topology to the others, there",
            format!("butterfly serve topology.toml --node {}", peer.id),
        ));
    }
    next.push(("ask it", ask(&args.model)));
    tell(global, &topology, &format!("wrote {} for {count} nodes", topology.display()), &next)
}

/// This node's key alone.
fn node(args: &Args, global: &Global) -> Result<(), Failure> {
    let (id, address) = own_place(args)?;
    let path = key_file::beside(&args.dir.join("topology.toml"), id.as_str());
    let key = key_file::generate();
    key_file::write(&path, &key)?;
    write_token(&args.dir)?;
    let peer = Peer { id, public_key: key_file::public_hex(&key), address };
    if global.json {
        return global.print_json(&json!({
            "key_file": path,
            "node": { "id": peer.id, "public_key": peer.public_key, "listen_address": peer.address },
        }));
    }
    global.say(&format!("wrote the secret key to {} (mode 0600)", path.display()));
    global.say(&format!(
        "next, on the gateway: butterfly init --role gateway --id … --listen … --peer {peer}\nthen bring its topology.toml into {}. This node is, for --peer:",
        args.dir.display()
    ));
    global.print(&peer.to_string())
}

fn own_place(args: &Args) -> Result<(NodeId, SocketAddr), Failure> {
    match (&args.id, args.listen) {
        (Some(id), Some(listen)) if !listen.ip().is_unspecified() => Ok((id.clone(), listen)),
        (Some(_), Some(listen)) => {
            Err(Failure::usage(format!("--listen {listen}: the others cannot dial this address"))
                .help("name the address under which they reach this machine"))
        }
        _ => {
            Err(Failure::usage("this role needs --id and --listen").help("for example: --id n1 --listen 10.0.0.2:9000"))
        }
    }
}

/// A gateway may have made its key before, as a node.
fn own_key(path: &Path) -> Result<(SigningKey, bool), Failure> {
    if path.exists() { Ok((key_file::read(path)?, false)) } else { Ok((key_file::generate(), true)) }
}

/// Checks all that was asked for, then writes the topology.
fn write_topology(args: &Args, members: Vec<Member>) -> Result<PathBuf, Failure> {
    let nodes = members.len();
    let max_byzantine = args.max_byzantine.map_or(usize::from(nodes >= 3), usize::from);
    let needed = 2 * max_byzantine + 1;
    if nodes < needed {
        return Err(Failure::usage(format!("{nodes} nodes cannot bear {max_byzantine} liars: that takes {needed}"))
            .help(format!("--nodes {needed}, or --max-byzantine {}", (nodes - 1) / 2)));
    }
    let distinct: BTreeSet<&NodeId> = members.iter().map(|member| &member.id).collect();
    if distinct.len() != nodes {
        return Err(Failure::usage("two nodes have the same id"));
    }
    let topology = args.dir.join("topology.toml");
    refuse_existing(&topology)?;
    for member in members.iter().filter(|_| args.role == Role::Demo) {
        refuse_existing(&key_file::beside(&topology, member.id.as_str()))?;
    }
    let template = Template {
        name: &args.name,
        model: &model_spec(&args.model)?,
        max_byzantine,
        slices: args.slices,
        members: &members,
        http_address: HTTP_ADDRESS,
    };
    let text = template.text();
    // What is written must hold; what does not hold came from the arguments.
    if let Err(diagnostics) = butterfly_topology::parse(&text, "topology.toml", &catalogue()) {
        return Err(Failure::usage(format!("these arguments make no valid topology:\n{}", diagnostics.render(false))));
    }
    std::fs::create_dir_all(&args.dir).map_err(|error| Failure::file("create", &args.dir, &error))?;
    write_new(&topology, &text)?;
    let schema = serde_json::to_string_pretty(&butterfly_topology::json_schema(&catalogue()))
        .map_err(|error| Failure::new(Exit::Failure, format!("the schema cannot be written: {error}")))?;
    let path = args.dir.join("topology.schema.json");
    std::fs::write(&path, schema + "\n").map_err(|error| Failure::file("write", &path, &error))?;
    write_token(&args.dir)?;
    Ok(topology)
}

fn admin_address(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// The secret of the admin listeners of this machine, unless there is one already.
fn write_token(dir: &Path) -> Result<(), Failure> {
    let path = dir.join(TelemetrySpec::default().admin_token_file);
    if path.exists() {
        return Ok(());
    }
    let mut secret = [0; 32];
    getrandom::fill(&mut secret)
        .map_err(|error| Failure::environment(format!("the system gives no random bytes: {error}")))?;
    key_file::write_secret(&path, &format!("{}\n", hex::encode(secret)))
}

fn write_new(path: &Path, text: &str) -> Result<(), Failure> {
    let mut file = std::fs::File::create_new(path).map_err(|error| Failure::file("write", path, &error))?;
    std::io::Write::write_all(&mut file, text.as_bytes()).map_err(|error| Failure::file("write", path, &error))
}

fn refuse_existing(path: &Path) -> Result<(), Failure> {
    if path.exists() {
        return Err(Failure::new(Exit::Failure, format!("{} exists already, and is left as it is", path.display()))
            .help("choose another --dir, or move it away first"));
    }
    Ok(())
}

/// A folder is named in full, because the topology may be read from anywhere.
fn model_spec(model: &str) -> Result<String, Failure> {
    if model.starts_with("builtin:") {
        return Ok(model.to_owned());
    }
    let path = Path::new(model);
    let full = path.canonicalize().map_err(|error| Failure::file("find the model", path, &error))?;
    full.into_os_string().into_string().map_err(|_| Failure::usage("the model's path is not UTF-8"))
}

fn ask(model: &str) -> String {
    let body = match model {
        // The built-in dense layers take 64 numbers.
        "builtin:mlp" => r#""{\"input\": [$(seq -s, 64)]}""#,
        _ => r#"'{"prompt": "Ownership is"}'"#,
    };
    format!("curl http://{HTTP_ADDRESS}/inference -H 'content-type: application/json' -d {body}")
}

fn tell(global: &Global, topology: &Path, done: &str, next: &[(&str, String)]) -> Result<(), Failure> {
    if global.json {
        let commands: Vec<&String> = next.iter().map(|(_, command)| command).collect();
        return global.print_json(&json!({ "topology": topology, "next": commands }));
    }
    let ink = global.ink_stdout();
    let mut text = format!("{done}\n");
    for (what, command) in next {
        text.push_str(&format!("\n{}\n  {}\n", ink.faint(&format!("{what}:")), ink.strong(command)));
    }
    global.print(text.trim_end())
}
