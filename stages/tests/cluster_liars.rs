//! Clusters of real processes over loopback QUIC, some of whose nodes lie, keep silent or crash.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeMap;

use butterfly::loopback::Loopback;
use butterfly_verify::Answer;
use serde_json::Value;
use support::{Processes, call, completion, receipt_id, reference, token_ids, until_node, verified};

fn with(adversaries: &[(usize, &'static str)]) -> Loopback {
    Loopback { adversaries: adversaries.iter().copied().collect::<BTreeMap<_, _>>(), ..Loopback::default() }
}

/// Asks some prompts of the reference; every answer must be right and every receipt hold.
async fn answers_are_right(cluster: &Processes) {
    for (prompt, expected) in reference().into_iter().take(3) {
        let body = completion(&prompt, expected.len());
        let (status, response) = call(cluster.http, "POST", "/v1/completions", Some(body)).await.unwrap();
        assert_eq!(status, 200, "{response}");
        assert_eq!(token_ids(&response), expected, "{prompt:?}");
        let (_, answer, receipt) = verified(cluster.http, &receipt_id(&response), &cluster.epoch()).await;
        assert!(matches!(answer, Answer::Text { tokens, .. } if tokens == expected));
        assert!(receipt.slices.iter().all(|slice| slice.votes.len() == 2), "f+1 votes on every slice");
    }
}

fn accused(entry: &Value, kind: &str) -> bool {
    entry["conduct"]["accused"][kind].as_u64().unwrap_or(0) > 0
}

/// `words` are the kinds of evidence that may come up: a lie about a token shows in the output of its vote, and where the
/// liar goes on from it, in the input.
async fn liar_is_named(behaviour: &'static str, words: &[&str]) {
    let cluster = Processes::start(&with(&[(2, behaviour)])).await;
    answers_are_right(&cluster).await;
    let entry = until_node(cluster.http, "n2", |entry| words.iter().any(|word| accused(entry, word))).await;
    assert_eq!(entry["standing"], "quarantined", "f+1 others contradict it; a broken kernel would look the same");
    // The gateway keeps the signed votes that show it, for anyone to check.
    let kept = loop {
        let (status, kept) = call(cluster.http, "GET", "/v1/evidence", None).await.unwrap();
        assert_eq!(status, 200);
        if kept["data"].as_array().is_some_and(|kept| !kept.is_empty()) {
            break kept;
        }
        // It is shown at once and kept a moment later.
        tokio::task::yield_now().await;
    };
    let epoch = cluster.epoch();
    let evidence: Vec<butterfly_verify::Evidence> =
        kept["data"].as_array().unwrap().iter().map(|one| serde_json::from_value(one.clone()).unwrap()).collect();
    for one in evidence {
        assert_eq!(one.accused, epoch.index_of("n2").unwrap());
        one.verify(&epoch).expect("the evidence holds");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_activations_are_outvoted_and_named() {
    liar_is_named("wrong-activations", &["wrong_output", "wrong_input"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_vote_is_outvoted_and_named() {
    liar_is_named("wrong-vote", &["wrong_output"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn feeding_back_another_token_than_sampled_is_outvoted_and_named() {
    liar_is_named("feed-back-other", &["wrong_input"]).await;
}

/// The ids of the evidence that the gateway keeps, once it keeps some.
async fn evidence_ids(cluster: &Processes) -> Vec<String> {
    loop {
        let (status, kept) = call(cluster.http, "GET", "/v1/evidence", None).await.unwrap();
        assert_eq!(status, 200);
        let ids = kept["ids"].as_array().unwrap();
        assert_eq!(ids.len(), kept["data"].as_array().unwrap().len());
        if !ids.is_empty() {
            return ids.iter().map(|id| id.as_str().unwrap().to_owned()).collect();
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_proven_to_lie_gets_no_more_work_until_the_operator_sets_the_evidence_aside() {
    let mut cluster = Processes::start(&with(&[(2, "equivocate")])).await;
    let excluded = |entry: &Value| entry["standing"] == "excluded" && accused(entry, "equivocation");
    answers_are_right(&cluster).await;
    until_node(cluster.http, "n2", excluded).await;
    evidence_ids(&cluster).await;
    // Nobody counts on it: it is up, and without n1 there is no quorum all the same.
    cluster.kill(1);
    until_node(cluster.http, "n1", |entry| entry["state"] == "down").await;
    let (prompt, expected) = reference().swap_remove(0);
    let body = completion(&prompt, expected.len());
    let (status, response) = call(cluster.http, "POST", "/v1/completions", Some(body)).await.unwrap();
    assert_eq!((status, &response["error"]["code"]), (503, &Value::from("no_quorum")), "{response}");
    let (status, health) = call(cluster.http, "GET", "/health", None).await.unwrap();
    assert_eq!((status, &health["reasons"][0]), (503, &Value::from("no_quorum")));
    cluster.spawn(1);
    cluster.wait_until_up(2).await;
    // A restart forgets nothing.
    cluster.kill(0);
    cluster.spawn(0);
    cluster.wait_until_up(2).await;
    until_node(cluster.http, "n2", excluded).await;
    answers_are_right(&cluster).await;
    // The operator has looked into it.
    let ids = evidence_ids(&cluster).await.join("\n");
    std::fs::write(cluster.path("data/n0/set-aside.txt"), ids).unwrap();
    cluster.kill(0);
    cluster.spawn(0);
    cluster.wait_until_up(2).await;
    until_node(cluster.http, "n2", |entry| entry["standing"] == "good").await;
    // What it does from now on counts again.
    answers_are_right(&cluster).await;
    until_node(cluster.http, "n2", excluded).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_unavailability_and_never_an_accusation() {
    let cluster = Processes::start(&with(&[(2, "silent")])).await;
    answers_are_right(&cluster).await;
    let entry = until_node(cluster.http, "n2", |entry| entry["conduct"]["silent"].as_u64().unwrap_or(0) > 0).await;
    assert_eq!(entry["conduct"]["accused"], serde_json::json!({}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_crashes_at_the_first_request_stops_nothing() {
    let mut cluster = Processes::start(&with(&[(2, "crash")])).await;
    answers_are_right(&cluster).await;
    assert!(!cluster.wait_for_end(2).success());
    answers_are_right(&cluster).await;
    until_node(cluster.http, "n2", |entry| entry["state"] == "down").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_three_that_lie_differently_get_no_answer_through() {
    let cluster = Processes::start(&with(&[(1, "wrong-activations"), (2, "wrong-vote")])).await;
    for (prompt, expected) in reference().into_iter().take(2) {
        let body = completion(&prompt, expected.len());
        let (status, response) = call(cluster.http, "POST", "/v1/completions", Some(body)).await.unwrap();
        assert_eq!((status, &response["error"]["code"]), (502, &Value::from("verification_failed")), "{response}");
    }
}

/// The bound is tight: f+1 nodes that agree on a lie get it certified. This is what the number f means.
#[tokio::test(flavor = "multi_thread")]
async fn two_of_three_that_collude_forge_a_receipt() {
    let cluster = Processes::start(&with(&[(1, "collude"), (2, "collude")])).await;
    let (prompt, expected) = reference().swap_remove(0);
    let body = completion(&prompt, expected.len());
    let (status, response) = call(cluster.http, "POST", "/v1/completions", Some(body)).await.unwrap();
    assert_eq!(status, 200, "{response}");
    assert_ne!(token_ids(&response), expected);
    verified(cluster.http, &receipt_id(&response), &cluster.epoch()).await;
}

/// One liar in each replica set: more than f nodes of the cluster lie, and no replica set has more than f liars.
#[tokio::test(flavor = "multi_thread")]
async fn two_slices_with_a_liar_each_still_answer_rightly() {
    let loopback = Loopback { slices: 2, ..with(&[(2, "wrong-activations"), (5, "wrong-activations")]) };
    let cluster = Processes::start(&loopback).await;
    for (prompt, expected) in reference().into_iter().take(2) {
        let body = completion(&prompt, expected.len());
        let (status, response) = call(cluster.http, "POST", "/v1/completions", Some(body)).await.unwrap();
        assert_eq!(status, 200, "{response}");
        assert_eq!(token_ids(&response), expected, "{prompt:?}");
        let (_, _, receipt) = verified(cluster.http, &receipt_id(&response), &cluster.epoch()).await;
        assert_eq!(receipt.slices.len(), 2);
    }
}
