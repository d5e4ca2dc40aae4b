//! Faults of every kind: no acknowledged request is lost or answered twice, and each fault ends in a message that says what
//! is wrong and what to do.
//!
//! | fault | shown by |
//! | --- | --- |
//! | kill -9 at each step of the log | `commit::journal::tests::a_process_that_dies_at_any_step_of_the_log_loses_nothing_it_promised` |
//! | kill -9 at any moment of writing | `commit::journal::tests::a_killed_process_leaves_a_log_that_holds_all_it_promised` |
//! | kill -9 of a gateway under load | `cluster_crashes::a_gateway_killed_under_load_finishes_every_acknowledged_task_once_after_its_restart` |
//! | kill -9 of a worker in the middle of requests, and its rejoin | `cluster_crashes::a_worker_killed_and_restarted_under_load_costs_no_answer` |
//! | a crash at the first request | `cluster_liars::a_node_that_crashes_at_the_first_request_stops_nothing` |
//! | SIGTERM under load | `cluster_crashes::a_gateway_told_to_stop_under_load_finishes_what_runs_and_exits_with_success` |
//! | a gateway that leaves before its request is done here | `compute::tests::requests_of_a_gateway_that_has_left_are_waited_for_no_longer` |
//! | SIGTERM while starting | [`a_signal_while_starting_stops_the_node`] |
//! | a second SIGTERM | [`a_second_signal_stops_at_once_and_the_log_keeps_what_ran`] |
//! | disk full under load | [`a_full_disk_stops_the_gateway_and_loses_nothing_acknowledged`] |
//! | disk full, read-only or broken at each operation | `commit::journal::tests::storage_that_fails_at_any_operation_keeps_what_was_promised` |
//! | truncated log | [`a_log_that_was_cut_is_named`], `commit::journal::tests::a_log_that_was_cut_or_overwritten_is_an_error_and_never_a_panic` |
//! | overwritten pages | `commit::journal::tests::a_log_that_was_cut_or_overwritten_is_an_error_and_never_a_panic` |
//! | log of another node | [`a_log_of_another_node_is_named`] |
//! | log in use by another process | `commit::journal::tests::a_log_that_is_open_elsewhere_is_refused` |
//! | task id used again across a restart | [`a_task_id_stays_taken_across_a_restart_and_its_task_is_answered_once`] |
//! | a worker that stands still (half-open link) | [`a_worker_that_stands_still_costs_no_answer_and_comes_back`] |
//! | a gateway that stands still until its links are given up | [`a_gateway_that_stands_still_answers_what_it_had_taken_in`] |
//! | a replica that comes late to what runs | [`a_replica_whose_link_comes_up_late_votes_for_what_runs`] |
//! | partition without a quorum | [`without_a_quorum_requests_fail_and_after_healing_they_do_not`] |
//! | half-open and slow HTTP: writer, reader, connections | `ingest::body::tests::a_client_that_drips_is_cut`, `ingest::server::tests::a_peer_that_reads_nothing_is_given_up_and_one_that_reads_is_not`, `http_api::one_connection_too_many_is_told_so` |
//! | a client that goes away | `http_api::a_client_that_goes_away_cancels_its_work` |
//! | a stream that breaks | `http_api::a_stream_that_fails_is_told_and_breaks_off` |
//! | kill -9 between checkpoints | [`checkpoints_are_certified_and_a_killed_gateway_goes_on_from_the_last`] |
//! | clock jumps | `ingest::board::tests::a_clock_that_jumps_ends_what_expired_and_nothing_else` |
//! | expired in the queue | `http_api::a_deadline_ends_what_waits` |
//! | queue full | `http_api::a_full_queue_says_so_at_once_and_writes_nothing` |
//! | memory budget too small for all requests at once | `compute::tests::a_request_waits_while_memory_is_taken`, [`a_budget_for_one_request_serves_many_one_after_another`] |
//! | log that outgrows its window | `commit::journal::tests::a_process_that_dies_while_it_lets_go_loses_nothing_within_the_window` |
//! | model file changed on disk | [`a_model_that_was_changed_on_disk_is_named`] |
//! | peer of another epoch | [`a_node_of_another_epoch_is_refused_and_named`], `transport::tests::meshes::another_epoch_is_refused` |
//! | peer with another key | `transport::tests::meshes::another_key_is_refused` |
//! | another key than the topology says, missing key, key that others can read | [`keys_that_will_not_do_are_named`] |
//! | port in use | [`a_port_in_use_is_named`] |
//! | gateway that sends another's request first | `compute::tests::a_request_that_another_gateway_sends_first_is_still_computed_for_its_own` |
//! | lies: wrong, contradictory, silent, colluding nodes | `cluster_liars` |

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;

use butterfly::loopback::Loopback;
use serde_json::{Value, json};
use support::{Processes, call, completion, get_text, receipt_id, reference, token_ids, until_node, verified};

fn mlp() -> Loopback {
    Loopback { model: "builtin:mlp".into(), ..Loopback::default() }
}

fn vector(index: usize) -> Value {
    let input: Vec<f32> = (0..64).map(|i| ((index * 7 + i) % 13) as f32 / 13.0).collect();
    json!({ "input": input, "task_id": format!("task-{index}"), "wait": false })
}

/// A text generation under an id of its own.
fn text(task: &str) -> Value {
    json!({ "prompt": "Ownership", "max_tokens": 8, "task_id": task, "wait": false })
}

/// A cluster in which nothing is ever answered: two of three nodes take requests and say nothing.
fn mute() -> Loopback {
    Loopback { adversaries: [(1, "silent"), (2, "silent")].into(), ..Loopback::default() }
}

/// Restarts the two as honest nodes.
fn speak(cluster: &mut Processes) {
    let path = cluster.path("topology.toml");
    let topology = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, topology.replace("adversary = \"silent\"", "")).unwrap();
    for node in [1, 2] {
        cluster.kill(node);
        cluster.spawn(node);
    }
}

async fn status_of(cluster: &Processes, task: &str) -> Value {
    let (status, body) = call(cluster.http, "GET", &format!("/inference/{task}"), None).await.unwrap();
    assert_eq!(status, 200, "{task}: {body}");
    body
}

/// Polls a task until it has been answered; its bundle must verify.
async fn answered(cluster: &Processes, task: &str) -> String {
    loop {
        let body = status_of(cluster, task).await;
        match body["status"].as_str() {
            Some("completed") => {
                verified(cluster.http, task, &cluster.epoch()).await;
                return receipt_id(&json!({ "butterfly": { "receipt_id": body["receipt_id"] } }));
            }
            Some("queued" | "running") => tokio::task::yield_now().await,
            _ => panic!("{task}: {body}"),
        }
    }
}

/// Asks one prompt of the reference; the answer must be right.
async fn is_answered(cluster: &Processes) {
    let (prompt, expected) = reference().swap_remove(0);
    let body = completion(&prompt, expected.len());
    let (status, response) = call(cluster.http, "POST", "/v1/completions", Some(body)).await.unwrap();
    assert_eq!(status, 200, "{response}");
    assert_eq!(token_ids(&response), expected);
    verified(cluster.http, &receipt_id(&response), &cluster.epoch()).await;
}

/// The node does not start, and its last words say why.
fn refuses_to_start(cluster: &mut Processes, index: usize, words: &[&str]) {
    ends_at_start(cluster, index, 4, words);
}

fn ends_at_start(cluster: &mut Processes, index: usize, code: i32, words: &[&str]) {
    cluster.spawn(index);
    let status = cluster.wait_for_end(index);
    let log = cluster.log(index);
    assert_eq!(status.code(), Some(code), "{log}");
    for word in words {
        assert!(log.contains(word), "{word:?} is missing in\n{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_the_gateway_and_loses_nothing_acknowledged() {
    let mut cluster = Processes::start(&mlp()).await;
    cluster.kill(0);
    let size = std::fs::metadata(cluster.path("data/n0/commit.redb")).unwrap().len();
    // Room for the file to grow a few times; it doubles.
    cluster.spawn_on_full_disk(0, 4 * size);
    cluster.wait_until_up(2).await;
    let mut acknowledged = Vec::new();
    let mut next = 0..;
    let mut is_full = false;
    while !is_full {
        // The first alone, so that there is one that was acknowledged.
        let batch: Vec<usize> = next.by_ref().take(if acknowledged.is_empty() { 1 } else { 32 }).collect();
        let calls = batch.iter().map(|index| call(cluster.http, "POST", "/inference", Some(vector(*index))));
        for (index, answer) in batch.iter().zip(futures::future::join_all(calls).await) {
            match answer {
                Ok((202, _)) => acknowledged.push(*index),
                Ok((429, _)) => {}
                // It cannot promise anything any more, or it is gone.
                Ok((500 | 503, _)) | Err(_) => is_full = true,
                Ok((status, body)) => panic!("{status}: {body}"),
            }
        }
    }
    assert!(!cluster.wait_for_end(0).success());
    assert!(cluster.log(0).contains("the log takes nothing more"), "{}", cluster.log(0));
    cluster.spawn(0);
    cluster.wait_until_up(2).await;
    let mut receipts = BTreeSet::new();
    for index in &acknowledged {
        assert!(receipts.insert(answered(&cluster, &format!("task-{index}")).await), "task {index} shares a receipt");
    }
    assert!(!acknowledged.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_cut_is_named() {
    let mut cluster = Processes::start(&mlp()).await;
    cluster.kill(0);
    let path = cluster.path("data/n0/commit.redb");
    let log = std::fs::File::options().write(true).open(&path).unwrap();
    log.set_len(log.metadata().unwrap().len() / 2).unwrap();
    refuses_to_start(&mut cluster, 0, &["commit.redb", "the log is damaged", "restore it from a copy"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_another_node_is_named() {
    let mut cluster = Processes::start(&mlp()).await;
    cluster.kill(0);
    cluster.kill(1);
    std::fs::copy(cluster.path("data/n1/commit.redb"), cluster.path("data/n0/commit.redb")).unwrap();
    refuses_to_start(&mut cluster, 0, &["belongs to loopback/n1", "a data directory of its own"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_will_not_do_are_named() {
    let mut cluster = Processes::start(&mlp()).await;
    cluster.kill(2);
    let key = cluster.path("keys/n2.key");
    let own = std::fs::read(&key).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    refuses_to_start(&mut cluster, 2, &["n2.key", "chmod 600"]);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&key, std::fs::read(cluster.path("keys/n1.key")).unwrap()).unwrap();
    refuses_to_start(&mut cluster, 2, &["the key of 'n2'", "correct `public_key`, or use the right key file"]);
    std::fs::remove_file(&key).unwrap();
    refuses_to_start(&mut cluster, 2, &["n2.key", "No such file"]);
    std::fs::write(&key, own).unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    cluster.spawn(2);
    until_node(cluster.http, "n2", |entry| entry["state"] == "up").await;
}

/// What the reviewed plan says of the model is held against the files that are there.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_was_changed_on_disk_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in support::folder(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/sharded-f16").as_ref()) {
        std::fs::copy(&file, model.join(file.file_name().unwrap())).unwrap();
    }
    let mut cluster =
        Processes::start(&Loopback { model: model.to_str().unwrap().to_owned(), ..Loopback::default() }).await;
    let topology = cluster.path("topology.toml");
    let planned =
        std::process::Command::new(env!("CARGO_BIN_EXE_butterfly")).arg("plan").arg(&topology).arg("--write").output();
    assert!(planned.unwrap().status.success());
    cluster.kill(2);
    let weights =
        support::folder(&model).into_iter().find(|file| file.extension().is_some_and(|kind| kind == "safetensors"));
    let weights = weights.unwrap();
    let own = std::fs::read(&weights).unwrap();
    let mut changed = own.clone();
    *changed.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, changed).unwrap();
    let model = format!("the files of {} are not those that were reviewed", model.display());
    ends_at_start(&mut cluster, 2, 3, &["topology.lock", "model: ", &model, "bring them back"]);
    std::fs::write(&weights, own).unwrap();
    cluster.spawn(2);
    until_node(cluster.http, "n2", |entry| entry["state"] == "up").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_another_epoch_is_refused_and_named() {
    let mut cluster = Processes::start(&Loopback::default()).await;
    let topology = cluster.path("topology.toml");
    let own = std::fs::read_to_string(&topology).unwrap();
    // As after a change of the file that did not reach every machine: another trust domain for one of the others.
    let other = own.replacen("domain = \"lab-b\"", "domain = \"elsewhere\"", 1);
    assert_ne!(own, other);
    cluster.kill(2);
    std::fs::write(&topology, other).unwrap();
    cluster.spawn(2);
    let says = |entry: &Value| entry["reason"].as_str().is_some_and(|reason| reason.contains("another epoch"));
    let entry = until_node(cluster.http, "n2", says).await;
    let reason = entry["reason"].as_str().unwrap();
    assert!(reason.contains("roster, model, numerics profile or plan") && reason.contains("epoch.json"), "{reason}");
    let (status, response) =
        call(cluster.http, "POST", "/v1/completions", Some(completion("Ownership is", 4))).await.unwrap();
    assert_eq!(status, 200, "the others go on: {response}");
    cluster.kill(2);
    std::fs::write(&topology, own).unwrap();
    cluster.spawn(2);
    until_node(cluster.http, "n2", |entry| entry["state"] == "up").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named() {
    let mut cluster = Processes::start(&mlp()).await;
    cluster.kill(0);
    let taken = TcpListener::bind(cluster.http).unwrap();
    cluster.spawn(0);
    assert!(!cluster.wait_for_end(0).success());
    let log = cluster.log(0);
    assert!(log.contains(&format!("listen on {}", cluster.http)) && log.contains("in use"), "{log}");
    drop(taken);
    cluster.kill(2);
    let topology = std::fs::read_to_string(cluster.path("topology.toml")).unwrap();
    let address = topology.lines().filter_map(|line| line.strip_prefix("listen_address = ")).nth(2).unwrap();
    let address = address.trim_matches('"').to_owned();
    let _taken = UdpSocket::bind(&address).unwrap();
    refuses_to_start(&mut cluster, 2, &[&address, "in use"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stands_still_costs_no_answer_and_comes_back() {
    let cluster = Processes::start(&Loopback::default()).await;
    cluster.signal(2, "-STOP");
    // Its links are open and say nothing: the others decide.
    is_answered(&cluster).await;
    until_node(cluster.http, "n2", |entry| entry["state"] == "down").await;
    is_answered(&cluster).await;
    cluster.signal(2, "-CONT");
    let entry = until_node(cluster.http, "n2", |entry| entry["state"] == "up").await;
    assert_eq!((&entry["standing"], &entry["conduct"]["accused"]), (&json!("good"), &json!({})), "silence is no lie");
    // It works again: without n1 there is a quorum with it alone.
    cluster.signal(1, "-STOP");
    until_node(cluster.http, "n1", |entry| entry["state"] == "down").await;
    is_answered(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_stands_still_answers_what_it_had_taken_in() {
    let cluster = Processes::start(&Loopback::default()).await;
    let tasks: Vec<String> = (0..8).map(|index| format!("long-{index}")).collect();
    for task in &tasks {
        let long = json!({ "prompt": "Ownership", "max_tokens": 128, "task_id": task, "wait": false });
        let (status, body) = call(cluster.http, "POST", "/inference", Some(long)).await.unwrap();
        assert_eq!(status, 202, "{body}");
    }
    cluster.signal(0, "-STOP");
    for node in [1, 2] {
        while !cluster.log(node).contains("link down") {
            tokio::task::yield_now().await;
        }
    }
    cluster.signal(0, "-CONT");
    let mut receipts = BTreeSet::new();
    for task in &tasks {
        assert!(receipts.insert(answered(&cluster, task).await), "{task} shares a receipt");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_link_comes_up_late_votes_for_what_runs() {
    // One of three says nothing, so an answer needs the other two.
    let mut cluster = Processes::start(&Loopback { adversaries: [(1, "silent")].into(), ..mlp() }).await;
    cluster.kill(2);
    until_node(cluster.http, "n2", |entry| entry["state"] == "down").await;
    let (status, body) = call(cluster.http, "POST", "/inference", Some(vector(0))).await.unwrap();
    assert_eq!(status, 202, "{body}");
    while status_of(&cluster, "task-0").await["status"] != "running" {
        tokio::task::yield_now().await;
    }
    cluster.spawn(2);
    answered(&cluster, "task-0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_requests_fail_and_after_healing_they_do_not() {
    let cluster = Processes::start(&Loopback::default()).await;
    for node in [1, 2] {
        cluster.signal(node, "-STOP");
    }
    for node in ["n1", "n2"] {
        until_node(cluster.http, node, |entry| entry["state"] == "down").await;
    }
    let (status, refused) = call(cluster.http, "POST", "/v1/completions", Some(completion("x", 1))).await.unwrap();
    assert_eq!((status, &refused["error"]["code"]), (503, &json!("no_quorum")), "{refused}");
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains("slice 0 has 1 of the 2 live replicas it needs"), "{message}");
    let (status, health) = call(cluster.http, "GET", "/health", None).await.unwrap();
    assert_eq!((status, &health["reasons"]), (503, &json!(["no_quorum"])));
    cluster.signal(1, "-CONT");
    until_node(cluster.http, "n1", |entry| entry["state"] == "up").await;
    is_answered(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_id_stays_taken_across_a_restart_and_its_task_is_answered_once() {
    let mut cluster = Processes::start(&mute()).await;
    // Nobody votes, so the task lives when its gateway dies.
    let (status, body) = call(cluster.http, "POST", "/inference", Some(text("mine"))).await.unwrap();
    assert_eq!(status, 202, "{body}");
    cluster.kill(0);
    cluster.spawn(0);
    let refused = loop {
        match call(cluster.http, "POST", "/inference", Some(text("mine"))).await {
            Ok((503, body)) if body["error"]["code"] == "model_loading" => {}
            Ok(answer) => break answer,
            Err(_) => {}
        }
        tokio::task::yield_now().await;
    };
    assert_eq!((refused.0, &refused.1["error"]["code"]), (409, &json!("task_already_exists")), "{}", refused.1);
    cluster.kill(0);
    speak(&mut cluster);
    cluster.spawn(0);
    cluster.wait_until_up(2).await;
    answered(&cluster, "mine").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_stops_at_once_and_the_log_keeps_what_ran() {
    let mut cluster = Processes::start(&mute()).await;
    let (status, body) = call(cluster.http, "POST", "/inference", Some(text("mine"))).await.unwrap();
    assert_eq!(status, 202, "{body}");
    let mut gateway = cluster.terminate(0);
    while !cluster.log(0).contains("a second signal stops at once") {
        tokio::task::yield_now().await;
    }
    support::send_signal(&gateway, "-TERM");
    let stopped = gateway.wait().unwrap();
    assert_eq!(stopped.code(), Some(1), "{}", cluster.log(0));
    assert!(cluster.log(0).contains("stopped before everything was drained"), "{}", cluster.log(0));
    speak(&mut cluster);
    cluster.spawn(0);
    cluster.wait_until_up(2).await;
    answered(&cluster, "mine").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_while_starting_stops_the_node() {
    let mut cluster = Processes::start(&mlp()).await;
    cluster.kill(0);
    let started = cluster.log(0).matches("epoch written").count();
    cluster.spawn(0);
    // From here on signals are heard.
    while cluster.log(0).matches("epoch written").count() == started {
        tokio::task::yield_now().await;
    }
    let mut gateway = cluster.terminate(0);
    assert!(gateway.wait().unwrap().success(), "{}", cluster.log(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_for_one_request_serves_many_one_after_another() {
    let loopback = Loopback { settings: vec![("compute", "kv_budget = \"1 MiB\"".into())], ..Loopback::default() };
    let cluster = Processes::start(&loopback).await;
    let asked: Vec<_> = (0..6).map(|_| is_answered(&cluster)).collect();
    futures::future::join_all(asked).await;
}

/// Waits until a counter has reached a number.
async fn until_counted(cluster: &Processes, counter: &str, number: u64) {
    let counted = |line: &str| line.strip_prefix(counter).and_then(|value| value.trim().parse::<u64>().ok());
    while !get_text(cluster.http, "/metrics").await.lines().filter_map(counted).any(|value| value >= number) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_are_certified_and_a_killed_gateway_goes_on_from_the_last() {
    let mut cluster =
        Processes::start(&Loopback { settings: vec![("commit", "checkpoint_every = 4".into())], ..mlp() }).await;
    for index in 0..9 {
        let (status, body) = call(cluster.http, "POST", "/inference", Some(vector(index))).await.unwrap();
        assert_eq!(status, 202, "{body}");
        answered(&cluster, &format!("task-{index}")).await;
    }
    until_counted(&cluster, "butterfly_checkpoints_total", 2).await;
    cluster.kill(0);
    cluster.spawn(0);
    cluster.wait_until_up(2).await;
    assert!(cluster.log(0).contains("receipts=9"), "{}", cluster.log(0));
    assert!(cluster.log(0).contains("since_checkpoint=1"), "{}", cluster.log(0));
    for index in 9..12 {
        call(cluster.http, "POST", "/inference", Some(vector(index))).await.unwrap();
        answered(&cluster, &format!("task-{index}")).await;
    }
    // The replicas still know the ninth answer, which was given before.
    until_counted(&cluster, "butterfly_checkpoints_total", 1).await;
}
