//! What is loaded: a gateway somewhere, or a cluster of this process's own.

use std::sync::Arc;

use anyhow::Context;
use butterfly::loopback::{Cluster, Loopback};
use butterfly_verify::{Answer, Epoch, Receipt, Request};
use bytes::Bytes;

use crate::client::Gateway;
use crate::observe::Source;

/// A cluster to start.
#[derive(Debug, Clone)]
pub(crate) struct Own {
    pub(crate) model: String,
    pub(crate) max_byzantine: usize,
    pub(crate) slices: usize,
    pub(crate) threads: usize,
}

/// A gateway, and the cluster behind it if it is our own.
pub(crate) struct Target {
    gateway: Gateway,
    name: String,
    cluster: Option<(Cluster, tempfile::TempDir)>,
}

impl Own {
    /// The same model on one node that nobody checks.
    pub(crate) fn unchecked(&self) -> Self {
        Self { max_byzantine: 0, slices: 1, ..self.clone() }
    }

    fn loopback(&self) -> Loopback {
        Loopback {
            model: self.model.clone(),
            max_byzantine: self.max_byzantine,
            slices: self.slices,
            settings: vec![
                ("ingest", "capacity = 256".into()),
                ("compute", format!("threads = {}", self.threads)),
                ("compute", "micro_batch = 64".into()),
                ("assign", "max_in_flight = 256".into()),
            ],
            ..Loopback::default()
        }
    }
}

impl Target {
    /// A gateway that runs already.
    pub(crate) fn remote(url: &str, gateway: Gateway) -> Self {
        Self { gateway, name: url.to_owned(), cluster: None }
    }

    /// Starts a cluster over loopback QUIC, with its logs in a temporary folder.
    pub(crate) async fn start(own: &Own) -> anyhow::Result<Self> {
        let (f, slices) = (own.max_byzantine, own.slices);
        let name = format!("{} nodes of this process, f = {f}, slices = {slices}", (2 * f + 1) * slices);
        Self::start_with(&own.loopback(), name).await
    }

    /// Starts a cluster of any form.
    pub(crate) async fn start_with(loopback: &Loopback, name: String) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let cluster = loopback.start(folder.path()).await?;
        cluster.meshed().await;
        let address = cluster.http_address().context("the gateway has no address")?;
        let gateway = Gateway::new(&format!("http://{address}"), None)?;
        Ok(Self { gateway, name, cluster: Some((cluster, folder)) })
    }

    pub(crate) fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref().map(|(cluster, _)| cluster)
    }

    /// Who tells where its time goes.
    pub(crate) fn source(&self) -> Source {
        match self.cluster() {
            Some(cluster) => {
                Source::Own(cluster.nodes.iter().map(|node| Arc::clone(&node.services().telemetry)).collect())
            }
            None => Source::Metrics(self.gateway.clone()),
        }
    }

    /// The name of the first model that is served.
    pub(crate) async fn model(&self) -> anyhow::Result<String> {
        let (status, body) = self.gateway.client().call("GET", "/v1/models", Bytes::new()).await?;
        anyhow::ensure!(status == 200, "/v1/models answers {status}: {}", String::from_utf8_lossy(&body));
        let body: serde_json::Value = serde_json::from_slice(&body)?;
        body["data"][0]["id"].as_str().map(str::to_owned).context("/v1/models names no model")
    }

    /// Fetches the bundles of some receipts and verifies them offline, as a client would. Returns how many held.
    pub(crate) async fn check_receipts(&self, receipts: &[String]) -> anyhow::Result<usize> {
        let mut client = self.gateway.client();
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
