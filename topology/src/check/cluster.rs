//! The cluster: names, distinct nodes, and enough of them for the faults to be tolerated.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use crate::cluster::{Cluster, NodeSpec};
use crate::diagnostic::{Code, Diagnostic, quote};
use crate::name::NodeId;
use crate::planner::Domains;
use crate::schema::{Declared, Span, Table};

/// The longest cluster name, model or domain, in bytes.
const TEXT_BYTES_MAX: usize = 512;

/// What is known of the cluster, even when parts of it are wrong.
pub(super) struct Crew {
    /// Ids that could be read.
    pub(super) ids: Vec<NodeId>,
    pub(super) places: Vec<(NodeId, Span)>,
    /// Whether every node has an id of its own.
    pub(super) complete: bool,
    pub(super) max_byzantine: Option<usize>,
    /// The cluster, when nothing about it is wrong.
    pub(super) cluster: Option<Cluster>,
}

pub(super) fn check(declared: &Declared<'_>, problems: &mut Vec<Diagnostic>) -> Crew {
    let before = problems.len();
    let ids: Vec<Option<NodeId>> = declared.nodes.iter().map(|node| id(node, problems)).collect();
    let places: Vec<(NodeId, Span)> = ids
        .iter()
        .zip(&declared.nodes)
        .filter_map(|(id, node)| Some((id.clone()?, node.values.place("id")?)))
        .collect();
    let mut nodes = Vec::new();
    for (node, id) in declared.nodes.iter().zip(&ids) {
        let public_key = public_key(node, problems);
        let listen_address = listen_address(node, problems);
        let domain = text(node, "domain", problems);
        if let (Some(id), Some(public_key), Some(listen_address)) = (id, public_key, listen_address) {
            nodes.push(NodeSpec {
                id: id.clone(),
                listen_address,
                public_key,
                domain,
                memory_bytes: node.values.bytes("memory"),
                compute: node.values.number("compute"),
                bandwidth: node.values.bytes("bandwidth"),
                admin_address: node.values.address("admin_address"),
                adversary: node.values.text("adversary").map(str::to_owned),
            });
        }
    }
    duplicates(&declared.nodes, "id", "id", problems);
    duplicates(&declared.nodes, "listen_address", "address", problems);
    duplicates(&declared.nodes, "public_key", "key", problems);
    let head = declared.cluster.as_ref().and_then(|table| head(table, declared, problems));
    let distinct: BTreeSet<&NodeId> = ids.iter().flatten().collect();
    let complete = distinct.len() == declared.nodes.len() && !declared.nodes.is_empty();
    let whole = nodes.len() == declared.nodes.len() && problems.len() == before;
    let max_byzantine = declared.cluster.as_ref().and_then(|table| integer(table, "max_byzantine"));
    let cluster = match head {
        Some(cluster) if whole => {
            let cluster = Cluster { nodes, ..cluster };
            spread(&cluster, declared, problems);
            Some(cluster)
        }
        _ => None,
    };
    Crew { ids: ids.into_iter().flatten().collect(), places, complete, max_byzantine, cluster }
}

fn integer(table: &Table, key: &str) -> Option<usize> {
    table.values.integer(key).and_then(|value| usize::try_from(value).ok())
}

/// `[cluster]`, and how it goes with the list of nodes.
fn head(table: &Table, declared: &Declared<'_>, problems: &mut Vec<Diagnostic>) -> Option<Cluster> {
    let name = text(table, "name", problems);
    let model = text(table, "model", problems);
    let max_byzantine = integer(table, "max_byzantine");
    let slices = integer(table, "slices");
    let count = declared.nodes.len();
    if let (Some(size), Some(place)) = (integer(table, "cluster_size"), table.values.place("cluster_size"))
        && size != count
    {
        let message = format!("`cluster_size` is {size}, and {} listed", nodes_are(count));
        problems.push(
            Diagnostic::error(Code::ClusterSize, message)
                .at(place, format!("{} listed", nodes_are(count)))
                .help("`cluster_size` is a check of the list: correct it, complete the list, or leave it out"),
        );
    }
    if let (Some(f), Some(place)) = (max_byzantine, table.values.place("max_byzantine"))
        && count > 0
        && count < 2 * f + 1
    {
        quorum(f, place, slices.zip(table.values.place("slices")), count, problems);
    }
    Some(Cluster { name: name?, model: model?, max_byzantine: max_byzantine?, slices, nodes: Vec::new() })
}

fn quorum(f: usize, place: Span, slices: Option<(usize, Span)>, count: usize, problems: &mut Vec<Diagnostic>) {
    let message = format!("{} too few to tolerate {f} that lie{}", nodes_are(count), if f == 1 { "s" } else { "" });
    let mut diagnostic =
        Diagnostic::error(Code::Quorum, message).at(place, format!("needs 2 × {f} + 1 = {} nodes", 2 * f + 1));
    if let Some((slices, place)) = slices {
        diagnostic = diagnostic.also(place, format!("each of the {slices} slices is held by {} nodes", 2 * f + 1));
    }
    let tolerated = (count - 1) / 2;
    let verdict = match tolerated {
        0 => "`max_byzantine = 0`, which verifies nothing".to_owned(),
        tolerated => format!("`max_byzantine = {tolerated}`"),
    };
    problems.push(diagnostic.help(format!("list {} more, or set {verdict}", 2 * f + 1 - count)));
}

fn nodes_are(count: usize) -> String {
    if count == 1 { "1 node is".to_owned() } else { format!("{count} nodes are") }
}

fn id(node: &Table, problems: &mut Vec<Diagnostic>) -> Option<NodeId> {
    let text = node.values.text("id")?;
    match NodeId::parse(text) {
        Ok(id) => Some(id),
        Err(error) => {
            let diagnostic =
                Diagnostic::error(Code::InvalidValue, format!("{} is not a node id: {error}", quote(text)));
            problems.push(
                place(diagnostic, node, "id", "not an id")
                    .help("ids are made of a-z, 0-9 and -, and start with a letter or a digit"),
            );
            None
        }
    }
}

fn place(diagnostic: Diagnostic, table: &Table, key: &str, label: impl Into<String>) -> Diagnostic {
    diagnostic.at(table.values.place(key).unwrap_or_else(|| table.header.clone()), label)
}

/// A text of reasonable length without control characters.
fn text(table: &Table, key: &str, problems: &mut Vec<Diagnostic>) -> Option<String> {
    let text = table.values.text(key)?;
    let reason = if text.len() > TEXT_BYTES_MAX {
        format!("has at most {TEXT_BYTES_MAX} bytes")
    } else if text.chars().any(char::is_control) {
        "cannot have control characters".to_owned()
    } else {
        return Some(text.to_owned());
    };
    let diagnostic = Diagnostic::error(Code::InvalidValue, format!("`{key}` {reason}"));
    problems.push(place(diagnostic, table, key, ""));
    None
}

fn public_key(node: &Table, problems: &mut Vec<Diagnostic>) -> Option<[u8; 33]> {
    const KEY_BYTES: usize = 33;
    let text = node.values.text("public_key")?;
    let mut key = [0; KEY_BYTES];
    let digits = text.chars().count();
    let (message, label) = match hex::decode_to_slice(text, &mut key) {
        Ok(()) if k256::PublicKey::from_sec1_bytes(&key).is_ok() => return Some(key),
        Ok(()) if matches!(key.first(), Some(2 | 3)) => (
            "this is not a public key: no point of secp256k1 has these coordinates".to_owned(),
            "not a point".to_owned(),
        ),
        Ok(()) => {
            let message = "a public key is a compressed point and starts with 02 or 03".to_owned();
            (message, format!("starts with {}", quote(text.get(..2).unwrap_or_default())))
        }
        Err(_) => match text.chars().find(|c| !c.is_ascii_hexdigit()) {
            Some(bad) => {
                let message = format!("{} is not a public key", quote(text));
                (message, format!("{} is not a hexadecimal digit", quote(bad.encode_utf8(&mut [0; 4]))))
            }
            None => {
                let message = format!("a public key has {} hexadecimal digits, this one has {digits}", 2 * KEY_BYTES);
                (message, format!("{digits} digits"))
            }
        },
    };
    let diagnostic = Diagnostic::error(Code::InvalidValue, message);
    problems.push(
        place(diagnostic, node, "public_key", label)
            .help("`butterfly keygen` makes a key and prints the public part; `butterfly init` does so for all nodes"),
    );
    None
}

fn listen_address(node: &Table, problems: &mut Vec<Diagnostic>) -> Option<SocketAddr> {
    let address = node.values.address("listen_address")?;
    let (message, help) = if address.port() == 0 {
        ("peers cannot dial port 0", "choose a port from 1 to 65535")
    } else if address.ip().is_unspecified() {
        ("peers cannot dial an unspecified address", "write the address by which the other nodes reach this one")
    } else {
        return Some(address);
    };
    let diagnostic = Diagnostic::error(Code::InvalidValue, message);
    problems.push(place(diagnostic, node, "listen_address", "not an address to dial").help(help));
    None
}

/// Values that several nodes share, compared as they are meant: keys without regard to the case of their digits.
fn duplicates(nodes: &[Table], key: &str, word: &str, problems: &mut Vec<Diagnostic>) {
    let mut first: BTreeMap<String, &Table> = BTreeMap::new();
    for node in nodes {
        let value = match (node.values.text(key), node.values.address(key)) {
            (Some(text), _) => text.to_ascii_lowercase(),
            (None, Some(address)) => address.to_string(),
            (None, None) => continue,
        };
        let Some(earlier) = first.get(&value) else {
            first.insert(value, node);
            continue;
        };
        let owner =
            earlier.values.text("id").map_or_else(|| "another node".to_owned(), |id| format!("node {}", quote(id)));
        let message = match key {
            "id" => format!("two nodes have the id {}", quote(&value)),
            _ => format!("this node has the {word} of {owner}"),
        };
        let mut diagnostic = place(Diagnostic::error(Code::Duplicate, message), node, key, format!("same {word}"));
        if let Some(span) = earlier.values.place(key) {
            diagnostic = diagnostic.also(span, "first used here");
        }
        problems.push(match key {
            "public_key" => diagnostic.help("two nodes with one key could vote twice; make a key for each"),
            _ => diagnostic,
        });
    }
}

/// Warns where the nodes allow less than the numbers suggest.
fn spread(cluster: &Cluster, declared: &Declared<'_>, problems: &mut Vec<Diagnostic>) {
    let Some(table) = &declared.cluster else { return };
    let (count, replicas) = (cluster.nodes.len(), cluster.replicas());
    if let (Some(slices), Some(span)) = (cluster.slices, table.values.place("slices"))
        && slices.saturating_mul(replicas) > count
    {
        let message = format!(
            "{slices} slices of {replicas} replicas need {} nodes to each have one of its own, and {} listed",
            slices.saturating_mul(replicas),
            nodes_are(count)
        );
        problems.push(
            Diagnostic::warning(Code::Slices, message)
                .at(span, "nodes will hold several slices")
                .help("that works, and saves no memory; fewer slices answer sooner"),
        );
    }
    let disjoint = cluster.slices.filter(|slices| slices.saturating_mul(replicas) <= count);
    let share = Domains::new(&cluster.nodes).least_share(disjoint.unwrap_or(1), replicas).unwrap_or(replicas);
    if share > 1
        && let Some(span) = table.values.place("max_byzantine")
    {
        let message = format!("one trust domain holds {share} of the {replicas} replicas of a slice");
        let label = if share > cluster.max_byzantine {
            format!("its operator alone could forge results: {} equal votes decide", cluster.max_byzantine + 1)
        } else {
            format!("tolerates {} that lie, of one operator or several", cluster.max_byzantine)
        };
        problems.push(
            Diagnostic::warning(Code::Domains, message)
                .at(span, label)
                .help(format!("spread the nodes over more domains: {replicas} for each slice")),
        );
    }
}
