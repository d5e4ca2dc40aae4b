//! `butterfly serve`: runs one node of a topology, or all of them in this process.
//!
//! The first SIGTERM or Ctrl-C drains: running requests are finished, new ones refused. The second stops at once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use butterfly::node::{Node, NodeError, NodeOptions};
use butterfly_engine::running::RunError;
use butterfly_engine::transport::LocalHub;
use butterfly_topology::{NodeId, Topology};
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::{Exit, Failure};
use crate::global::Global;
use crate::{key_file, lock, topology_file};

/// Run a node, or every node of a topology
#[derive(clap::Args)]
#[command(
    help_template = crate::HELP,
    before_help = "Examples:
  butterfly serve cluster/topology.toml              every node, in one process
  butterfly serve cluster/topology.toml --node n0    one node; its key is cluster/keys/n0.key
"
)]
pub(crate) struct Args {
    /// The topology file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The node to run
    #[arg(long, env = "BUTTERFLY_NODE", value_name = "ID", value_parser = NodeId::parse)]
    node: Option<NodeId>,
    /// Folder of the nodes' logs [default: data, beside the topology file]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, global: &Global) -> Result<(), Failure> {
    let topology = Arc::new(topology_file::load(&args.file, global)?);
    let nodes: Vec<NodeId> = match &args.node {
        Some(node) if topology.cluster.node(node).is_none() => {
            let known: Vec<&str> = topology.cluster.nodes.iter().map(|node| node.id.as_ref()).collect();
            return Err(Failure::usage(format!("the topology has no node `{node}`"))
                .help(format!("it has {}", known.join(", "))));
        }
        Some(node) => vec![node.clone()],
        None => topology.cluster.nodes.iter().map(|node| node.id.clone()).collect(),
    };
    let base_dir = args.file.parent().unwrap_or(Path::new("")).to_owned();
    let data = args.data.clone().unwrap_or_else(|| base_dir.join("data"));
    let hub = LocalHub::new();
    let mut options = Vec::new();
    for node in nodes {
        options.push(NodeOptions {
            topology: Arc::clone(&topology),
            identity: key_file::read(&key_file::beside(&args.file, node.as_ref()))?,
            data_dir: data.join(node.as_ref()),
            base_dir: base_dir.clone(),
            socket: None,
            hub: args.node.is_none().then(|| hub.clone()),
            extension: None,
            node,
        });
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::environment(format!("the runtime does not start: {error}")))?;
    let served = runtime.block_on(serve(&topology, options, &args.file));
    // What still blocks after a forced stop must not keep the process.
    runtime.shutdown_background();
    served
}

async fn serve(topology: &Topology, options: Vec<NodeOptions>, file: &Path) -> Result<(), Failure> {
    let unavailable = |error: std::io::Error| Failure::environment(format!("signals cannot be received: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(unavailable)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(unavailable)?;
    let mut nodes = Vec::new();
    for options in options {
        let node = options.node.clone();
        nodes.push(Node::start(options).await.map_err(|error| cannot(&node, &error))?);
    }
    if let Some(node) = nodes.first() {
        let services = node.services();
        lock::check(file, &topology.cluster.model, &services.plan, &services.epoch)?;
    }
    write_epoch(topology, &nodes, file.parent().unwrap_or(Path::new("")))?;
    let serving = async {
        all_ready(&nodes).await;
        announce(&nodes);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = serving => {}
        error = any_failed(&nodes) => tracing::error!(%error, "this process drains and stops"),
        _ = terminate.recv() => tracing::info!("draining; a second signal stops at once"),
        _ = interrupt.recv() => tracing::info!("draining; a second signal stops at once"),
    }
    tokio::select! {
        stopped = stop(nodes) => stopped,
        _ = terminate.recv() => Err(Failure::new(Exit::Failure, "stopped before everything was drained")),
        _ = interrupt.recv() => Err(Failure::new(Exit::Failure, "stopped before everything was drained")),
    }
}

/// A node that fails before it is ready shows in `any_failed`.
async fn all_ready(nodes: &[Node]) {
    for node in nodes {
        if node.ready().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn any_failed(nodes: &[Node]) -> RunError {
    let failed = nodes.iter().map(|node| Box::pin(node.failed()));
    futures::future::select_all(failed).await.0
}

async fn stop(nodes: Vec<Node>) -> Result<(), Failure> {
    let stopped = futures::future::join_all(nodes.into_iter().map(Node::shutdown)).await;
    for result in stopped {
        result.map_err(|error| Failure::new(Exit::Failure, error.to_string()))?;
    }
    tracing::info!("stopped");
    Ok(())
}

fn announce(nodes: &[Node]) {
    for node in nodes {
        let services = node.services();
        match node.http_address() {
            Some(address) => tracing::info!(node = %services.node, "ready: http://{address}"),
            None => tracing::info!(node = %services.node, "ready"),
        }
        if let Some(address) = node.admin_address() {
            tracing::info!(node = %services.node, "watched at http://{address}, with the secret of admin_token_file");
        }
    }
}

/// Keeps the epoch beside the topology, for whoever verifies receipts.
fn write_epoch(topology: &Topology, nodes: &[Node], base_dir: &Path) -> Result<(), Failure> {
    let Some(node) = nodes.first() else { return Ok(()) };
    let epoch = &node.services().epoch;
    let path = base_dir.join("epoch.json");
    std::fs::write(&path, epoch.to_json()).map_err(|error| Failure::file("write", &path, &error))?;
    tracing::info!(cluster = %topology.cluster.name, epoch = %epoch.digest(), "epoch written to {}", path.display());
    Ok(())
}

fn cannot(node: &NodeId, error: &NodeError) -> Failure {
    let failure = match error {
        NodeError::Topology(_)
        | NodeError::UnknownNode { .. }
        | NodeError::Unverified(_)
        | NodeError::LocalAlone
        | NodeError::NoAdversary(_) => Failure::new(Exit::InvalidTopology, format!("node {node}: {error}")),
        _ => Failure::environment(format!("node {node} cannot start: {error}")),
    };
    match error {
        NodeError::WrongKey { .. } => failure.help(format!("the key is read from keys/{node}.key beside the topology")),
        _ => failure,
    }
}
