//! Clusters within one process, their nodes joined without a network: the same answers and the same proofs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeMap;

use butterfly::loopback::Loopback;
use butterfly::node::{Node, NodeError, NodeOptions};
use support::{call, completion, receipt_id, reference, token_ids, verified};

fn local() -> Loopback {
    Loopback { settings: vec![("transfer", "backend_type = \"local\"".into())], ..Loopback::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_prompt_of_the_reference_is_answered_rightly_over_four_slices() {
    let loopback = Loopback { slices: 4, adversaries: BTreeMap::from([(4, "wrong-vote")]), ..local() };
    let folder = tempfile::tempdir().unwrap();
    let cluster = loopback.start(folder.path()).await.unwrap();
    cluster.meshed().await;
    let http = cluster.http_address().unwrap();
    let epoch = std::sync::Arc::clone(&cluster.nodes[0].services().epoch);
    let asked: Vec<_> = reference()
        .into_iter()
        .map(|(prompt, expected)| {
            let body = completion(&prompt, expected.len());
            tokio::spawn(async move {
                let (status, response) = call(http, "POST", "/v1/completions", Some(body)).await.unwrap();
                assert_eq!(status, 200, "{response}");
                assert_eq!(token_ids(&response), expected, "{prompt:?}");
                receipt_id(&response)
            })
        })
        .collect();
    for answer in asked {
        let (_, _, receipt) = verified(http, &answer.await.unwrap(), &epoch).await;
        assert_eq!(receipt.slices.len(), 4);
    }
    cluster.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_node_alone_cannot_be_joined_within_its_process() {
    let folder = tempfile::tempdir().unwrap();
    let options = local().prepare().unwrap().options(folder.path()).swap_remove(0);
    let alone = NodeOptions { hub: None, ..options };
    assert!(matches!(Node::start(alone).await, Err(NodeError::LocalAlone)));
}
