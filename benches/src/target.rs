//! What is loaded: a gateway somewhere, or a cluster of this process's own.

use std::net::SocketAddr;

use anyhow::Context;
use butterfly::loopback::{Cluster, Loopback};
use butterfly_engine::telemetry::Profile;
use butterfly_verify::{Answer, Epoch, Receipt, Request};
use bytes::Bytes;

use crate::client::Client;

/// A cluster to start.
pub(crate) struct Own {
    pub(crate) model: String,
    pub(crate) max_byzantine: usize,
    pub(crate) slices: usize,
    pub(crate) threads: usize,
}

/// A gateway, and the cluster behind it if it is our own.
pub(crate) struct Target {
    address: SocketAddr,
    cluster: Option<(Cluster, tempfile::TempDir)>,
}

impl Target {
    /// A gateway that runs already: `http://ADDRESS:PORT`.
    pub(crate) fn remote(url: &str) -> anyhow::Result<Self> {
        let authority = url.strip_prefix("http://").unwrap_or(url).trim_end_matches('/');
        let address = authority.parse().with_context(|| format!("--url {url}: expected http://ADDRESS:PORT"))?;
        Ok(Self { address, cluster: None })
    }

    /// Starts a cluster over loopback QUIC, with its logs in a temporary folder.
    pub(crate) async fn start(own: &Own) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let loopback = Loopback {
            model: own.model.clone(),
            max_byzantine: own.max_byzantine,
            slices: own.slices,
            settings: vec![
                ("ingest", "capacity = 256".into()),
                ("compute", format!("threads = {}", own.threads)),
                ("compute", "micro_batch = 64".into()),
                ("assign", "max_in_flight = 256".into()),
            ],
            ..Loopback::default()
        };
        let cluster = loopback.start(folder.path()).await?;
        cluster.meshed().await;
        let address = cluster.http_address().context("the gateway has no address")?;
        Ok(Self { address, cluster: Some((cluster, folder)) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Profiles of every node of the own cluster.
    pub(crate) fn profiles(&self) -> Vec<Profile> {
        let nodes = self.cluster.iter().flat_map(|(cluster, _)| &cluster.nodes);
        nodes.map(|node| node.services().telemetry.profile()).collect()
    }

    /// Fetches the bundles of some receipts and verifies them offline, as a client would. Returns how many held.
    pub(crate) async fn check_receipts(&self, receipts: &[String]) -> anyhow::Result<usize> {
        let mut client = Client::new(self.address);
        let (_, epoch) = client.call("GET", "/v1/epoch", Bytes::new()).await?;
        let epoch = Epoch::from_json(std::str::from_utf8(&epoch)?)?;
        for id in receipts {
            let (status, body) = client.call("GET", &format!("/inference/{id}"), Bytes::new()).await?;
            anyhow::ensure!(status == 200, "the gateway does not know receipt {id}: status {status}");
            let bundle: serde_json::Value = serde_json::from_slice(&body)?;
            let part = |name: &str| bundle[name].to_string();
            let request = Request::from_json(&part("request"))?;
            let answer = Answer::from_json(&part("answer"))?;
            Receipt::from_json(&part("receipt"))?
                .verify(&epoch, Some(&request), Some(&answer))
                .map_err(|fault| anyhow::anyhow!("receipt {id} does not hold: {fault}"))?;
        }
        Ok(receipts.len())
    }

    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        match self.cluster {
            Some((cluster, _folder)) => Ok(cluster.shutdown().await?),
            None => Ok(()),
        }
    }
}
