//! Kill -9, restart and drain of real processes under load: nothing acknowledged is lost or answered twice.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::net::SocketAddr;

use butterfly::loopback::Loopback;
use serde_json::{Value, json};
use support::{Processes, call, completion, receipt_id, reference, token_ids, verified};

fn vector(index: usize) -> Value {
    let input: Vec<f32> = (0..64).map(|i| ((index * 7 + i) % 13) as f32 / 13.0).collect();
    json!({ "input": input, "task_id": format!("task-{index}"), "wait": false })
}

fn mlp() -> Loopback {
    Loopback { model: "builtin:mlp".into(), ..Loopback::default() }
}

/// Submits tasks until one is refused a connection; returns those that were acknowledged.
async fn submit_until_down(address: SocketAddr, enough: tokio::sync::oneshot::Sender<()>) -> Vec<usize> {
    let mut acknowledged = Vec::new();
    let mut enough = Some(enough);
    for index in 0.. {
        match call(address, "POST", "/inference", Some(vector(index))).await {
            Ok((202, _)) => acknowledged.push(index),
            Ok((429, _)) => {}
            Ok((status, body)) => panic!("{status}: {body}"),
            Err(_) => break,
        }
        if acknowledged.len() == 100
            && let Some(enough) = enough.take()
        {
            let _ = enough.send(());
        }
    }
    acknowledged
}

/// Polls a task until it has ended.
async fn ended(address: SocketAddr, task: &str) -> Value {
    loop {
        let (status, body) = call(address, "GET", &format!("/inference/{task}"), None).await.unwrap();
        assert_eq!(status, 200, "{task}: {body}");
        if body["status"] == "completed" || body["status"] == "failed" {
            return body;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_killed_under_load_finishes_every_acknowledged_task_once_after_its_restart() {
    let mut cluster = Processes::start(&mlp()).await;
    let (enough, reached) = tokio::sync::oneshot::channel();
    let submitting = tokio::spawn(submit_until_down(cluster.http, enough));
    reached.await.unwrap();
    cluster.kill(0);
    let acknowledged = submitting.await.unwrap();
    assert!(acknowledged.len() >= 100);
    cluster.spawn(0);
    cluster.wait_until_up(2).await;
    let epoch = cluster.epoch();
    let mut receipts = BTreeSet::new();
    for index in acknowledged {
        let task = format!("task-{index}");
        let body = ended(cluster.http, &task).await;
        assert_eq!(body["status"], "completed", "{task}: {body}");
        verified(cluster.http, &task, &epoch).await;
        assert!(receipts.insert(body["receipt_id"].as_str().unwrap().to_owned()), "{task} shares a receipt");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_and_restarted_under_load_costs_no_answer() {
    let mut cluster = Processes::start(&Loopback::default()).await;
    let cases = reference();
    let (prompt, expected) = cases[0].clone();
    let ask = |http: SocketAddr| {
        let (prompt, expected) = (prompt.clone(), expected.clone());
        tokio::spawn(async move {
            let (status, response) =
                call(http, "POST", "/v1/completions", Some(completion(&prompt, expected.len()))).await.unwrap();
            assert_eq!(status, 200, "{response}");
            assert_eq!(token_ids(&response), expected);
            receipt_id(&response)
        })
    };
    for round in 0..2 {
        let asked: Vec<_> = (0..8).map(|_| ask(cluster.http)).collect();
        cluster.kill(2);
        for answer in asked {
            verified(cluster.http, &answer.await.unwrap(), &cluster.epoch()).await;
        }
        cluster.spawn(2);
        cluster.wait_until_up(2).await;
        ask(cluster.http).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_told_to_stop_under_load_finishes_what_runs_and_exits_with_success() {
    let mut cluster = Processes::start(&Loopback::default()).await;
    let (prompt, expected) = reference().swap_remove(0);
    let http = cluster.http;
    let asked: Vec<_> = (0..6)
        .map(|_| {
            let body = completion(&prompt, 64);
            tokio::spawn(async move { call(http, "POST", "/v1/completions", Some(body)).await.unwrap() })
        })
        .collect();
    loop {
        let (_, health) = call(http, "GET", "/health", None).await.unwrap();
        if health["services"]["tasks"].as_u64().unwrap_or(0) >= 6 {
            break;
        }
        if asked.iter().any(tokio::task::JoinHandle::is_finished) {
            break;
        }
        tokio::task::yield_now().await;
    }
    let mut gateway = cluster.terminate(0);
    for answer in asked {
        let (status, response) = answer.await.unwrap();
        assert_eq!(status, 200, "{response}");
        assert_eq!(token_ids(&response)[..expected.len()], expected);
    }
    assert!(gateway.wait().unwrap().success(), "{}", cluster.log(0));
}
