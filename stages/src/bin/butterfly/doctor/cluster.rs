//! What a topology needs of this machine: keys, the secret of the admin listener, weights, ports, disk, clocks that agree.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use butterfly::admin::read_secret;
use butterfly::node::Foundation;
use butterfly_topology::{NodeId, NodeSpec, Topology, bytes_text};

use super::Finding;
use crate::admin_client::{Admins, Said, block_on};
use crate::key_file;
use crate::lock::{self, Lock};

/// A log with less room than this stops its node soon.
const DISK_FREE_BYTES_MIN: u64 = 1 << 30;
/// How far two clocks may be apart, in milliseconds: what the transfer stage bears.
const SKEW_MS: u128 = 60_000;

pub(super) fn findings(topology: &Topology, file: &Path, only: Option<&NodeId>, data: &Path) -> Vec<Finding> {
    let is_here = |node: &&NodeSpec| match only {
        Some(only) => node.id == *only,
        None => key_file::beside(file, node.id.as_str()).exists(),
    };
    let here: Vec<&NodeSpec> = topology.cluster.nodes.iter().filter(is_here).collect();
    let mut findings = Vec::new();
    if here.is_empty() {
        findings.push(Finding::failure(
            "keys",
            format!("there is no key in {}", file.parent().unwrap_or(Path::new("")).join("keys").display()),
            "`butterfly init` makes a cluster with its keys, `butterfly keygen keys/ID.key` one key",
        ));
    }
    findings.extend(here.iter().map(|node| key(file, node)));
    findings.extend(token(topology, file, &here));
    findings.extend(weights(topology, file));
    findings.extend(here.iter().flat_map(|node| ports(topology, node)));
    findings.push(disk(data));
    findings.extend(clocks(topology));
    findings
}

/// Whether the clocks of nodes that run and can be asked agree with this one. A gateway whose clock is far from a replica's
/// has its requests dropped there.
fn clocks(topology: &Topology) -> Vec<Finding> {
    let admins = Admins::open(topology);
    let unix_ms = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let before = unix_ms();
    let Ok(said) = block_on(admins.ask_all("/livez")) else { return Vec::new() };
    let after = unix_ms();
    let clock = |said: &Said| {
        let theirs = u128::from(said.document()?["unix_ms"].as_u64()?);
        // Somewhere between the question and the answer, so nothing finer can be said.
        let apart_ms = before.saturating_sub(theirs).max(theirs.saturating_sub(after));
        let name = &said.name;
        Some(if apart_ms > SKEW_MS {
            Finding::failure(
                "clock",
                format!("that of {name} is {:.0} s from this one, and nodes bear a minute", apart_ms as f64 / 1000.0),
                "set both by the same source: timedatectl set-ntp true",
            )
        } else {
            Finding::ok("clock", format!("that of {name} agrees within {} ms", apart_ms + (after - before)))
        })
    };
    said.iter().filter_map(clock).collect()
}

/// The key is there, is its owner's alone, and is the one that the topology names.
fn key(file: &Path, node: &NodeSpec) -> Finding {
    let path = key_file::beside(file, node.id.as_str());
    match key_file::read(&path) {
        Err(failure) => {
            let (message, help) = failure.parts();
            Finding::failure("keys", message, help.unwrap_or("make a key with `butterfly keygen`"))
        }
        Ok(key) if key_file::public_hex(&key) != hex::encode(node.public_key) => Finding::failure(
            "keys",
            format!("{} is another key than the topology's for {}", path.display(), node.id),
            format!("public_key = \"{}\" in the topology of every node, or the right file", key_file::public_hex(&key)),
        ),
        Ok(_) => Finding::ok("keys", format!("{} is the key of {}, and its owner's alone", path.display(), node.id)),
    }
}

fn token(topology: &Topology, file: &Path, here: &[&NodeSpec]) -> Option<Finding> {
    here.iter().find(|node| node.admin_address.is_some())?;
    let path = file.parent().unwrap_or(Path::new("")).join(&topology.telemetry.admin_token_file);
    Some(match read_secret(&path) {
        Ok(_) => Finding::ok("admin secret", format!("{} is its owner's alone", path.display())),
        Err(error) => Finding::failure(
            "admin secret",
            error.to_string(),
            format!("(umask 077; openssl rand -hex 32 > {})", path.display()),
        ),
    })
}

/// The model opens, its digests hold, and the plan is the one that was reviewed.
fn weights(topology: &Topology, file: &Path) -> Vec<Finding> {
    let foundation = match Foundation::new(topology, file.parent().unwrap_or(Path::new(""))) {
        Ok(foundation) => foundation,
        Err(error) => {
            let fix = "the model's folder must be whole, and the same on every node: copy it again, or correct `model`";
            return vec![Finding::failure("weights", error.to_string(), fix)];
        }
    };
    let root = hex::encode(foundation.model.manifest().root);
    let root = root.get(..16).unwrap_or_default();
    let mut findings = vec![Finding::ok(
        "weights",
        format!("{} is {root}, epoch {}", topology.cluster.model, foundation.epoch.digest()),
    )];
    match Lock::read(file) {
        Ok(None) => {}
        Ok(Some(lock)) => {
            let differences = lock.differences(&Lock::new(&foundation.plan, &foundation.epoch));
            let path = lock::beside(file);
            findings.push(if differences.is_empty() {
                Finding::ok("plan", format!("as reviewed in {}", path.display()))
            } else {
                let fix = format!("if that is what you want: butterfly plan {} --write", file.display());
                Finding::failure(
                    "plan",
                    format!("another than that of {}: {}", path.display(), differences.join("; ")),
                    fix,
                )
            });
        }
        Err(failure) => {
            let (message, help) = failure.parts();
            findings.push(Finding::failure("plan", message, help.unwrap_or("remove the lock")));
        }
    }
    findings
}

/// What the node will listen on is free.
fn ports(topology: &Topology, node: &NodeSpec) -> Vec<Finding> {
    let ingest = topology.graph.of_kind("ingest");
    let http = ingest.filter(|stage| stage.on.as_ref().is_none_or(|on| on.contains(&node.id)));
    let http = http.filter_map(|stage| stage.config.address("bind_address")).map(|address| ("bind_address", address));
    let tcp = http.chain(node.admin_address.map(|address| ("admin_address", address)));
    let udp = port("listen_address", node.listen_address, |address| UdpSocket::bind(address).map(drop));
    let tcp = tcp.map(|(key, address)| port(key, address, |address| TcpListener::bind(address).map(drop)));
    std::iter::once(udp).chain(tcp).collect()
}

fn port(key: &str, address: SocketAddr, bind: impl Fn(SocketAddr) -> std::io::Result<()>) -> Finding {
    match bind(address) {
        Ok(()) => Finding::ok("ports", format!("{key} {address} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => Finding::failure(
            "ports",
            format!("{key} {address} is in use"),
            format!("stop what uses it (the node itself, if it runs), or change {key}"),
        ),
        Err(error) => Finding::failure(
            "ports",
            format!("{key} {address} cannot be bound: {error}"),
            format!("{key} must be an address of this machine, and a port that its user may bind"),
        ),
    }
}

/// The log can be written and made durable, and has room.
fn disk(data: &Path) -> Finding {
    let probe = data.join(format!(".doctor-{}", std::process::id()));
    let existed = data.exists();
    let written = fs::create_dir_all(data).and_then(|()| {
        let mut file = fs::File::create_new(&probe)?;
        file.write_all(&[7; 4096])?;
        file.sync_all()
    });
    let free = free_bytes(data);
    let _ = fs::remove_file(&probe);
    if !existed {
        // It was made only to look.
        let _ = fs::remove_dir(data);
    }
    match (written, free) {
        (Err(error), _) => Finding::failure(
            "disk",
            format!("{} cannot be written: {error}", data.display()),
            "give the user of the node a folder of its own with --data, on a disk that is not full or read-only",
        ),
        (Ok(()), Some(free)) if free < DISK_FREE_BYTES_MIN => Finding::warning(
            "disk",
            format!("{} has {} left, and a node stops when its log cannot grow", data.display(), bytes_text(free)),
            "make room, or put the logs elsewhere with --data",
        ),
        (Ok(()), free) => {
            let free = free.map_or_else(String::new, |free| format!(", {} free", bytes_text(free)));
            Finding::ok("disk", format!("{} can be written and flushed{free}", data.display()))
        }
    }
}

/// What `df` says, where there is one.
fn free_bytes(folder: &Path) -> Option<u64> {
    let output = Command::new("df").args(["-Pk", "--"]).arg(folder).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let blocks: u64 = text.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()?;
    blocks.checked_mul(1024)
}
