//! The commands of an operator that need no running node: plan and its lock, doctor, schema, completions.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

fn butterfly(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_butterfly")).args(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// A new cluster whose ports are free.
fn cluster(folder: &Path) -> PathBuf {
    let dir = folder.join("cluster");
    let made = butterfly(&["init", "--dir", dir.to_str().unwrap(), "--nodes", "3"]);
    assert!(made.status.success(), "{made:?}");
    let topology = dir.join("topology.toml");
    let mut text = std::fs::read_to_string(&topology).unwrap();
    let free: Vec<TcpListener> = (0..4).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let free_udp: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    let mut replace = |old: String, new: String| {
        assert!(text.contains(&old), "{old}");
        text = text.replace(&old, &new);
    };
    for (index, port) in free_udp.iter().enumerate() {
        replace(format!("\"127.0.0.1:{}\"", 9000 + index), format!("\"{}\"", port.local_addr().unwrap()));
    }
    for (index, port) in free.iter().take(3).enumerate() {
        replace(format!("\"127.0.0.1:{}\"", 9100 + index), format!("\"{}\"", port.local_addr().unwrap()));
    }
    replace("\"127.0.0.1:8080\"".to_owned(), format!("\"{}\"", free[3].local_addr().unwrap()));
    std::fs::write(&topology, text).unwrap();
    topology
}

#[test]
fn a_plan_is_locked_and_another_plan_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let topology = cluster(folder.path());
    let file = topology.to_str().unwrap();
    let plan = json(&butterfly(&["plan", file, "--json"]));
    assert_eq!(plan["plan"]["slices"].as_array().unwrap().len(), 1);
    assert_eq!(plan["plan"]["slices"][0]["replicas"].as_array().unwrap().len(), 3);
    assert!(plan["forecast"]["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(plan["plan"]["fallbacks"][0][1].as_str().unwrap().contains("compute"), "{plan}");
    let written = butterfly(&["plan", file, "--write"]);
    assert!(written.status.success(), "{written:?}");
    let lock = std::fs::read_to_string(topology.with_extension("lock")).unwrap();
    assert!(lock.contains(plan["epoch"].as_str().unwrap()) && lock.contains("[[slice]]"), "{lock}");
    assert_eq!(json(&butterfly(&["plan", file, "--json"]))["lock"]["differences"], serde_json::json!([]));
    let text = String::from_utf8(butterfly(&["plan", file]).stdout).unwrap();
    assert!(text.contains("says the same") && text.contains("tokens/s"), "{text}");

    let other = ["--set", "cluster.name=other"];
    let differs = json(&butterfly(&["plan", file, "--json", other[0], other[1]]));
    assert!(differs["lock"]["differences"][0].as_str().unwrap().starts_with("roster"), "{differs}");
    let refused = butterfly(&["serve", file, other[0], other[1]]);
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("topology.lock"), "{refused:?}");
}

#[test]
fn who_is_left_out_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("five");
    assert!(butterfly(&["init", "--dir", dir.to_str().unwrap(), "--nodes", "5"]).status.success());
    let topology = dir.join("topology.toml");
    let set = ["--set", "node.n1.memory=1 MiB"];
    let plan = json(&butterfly(&["plan", topology.to_str().unwrap(), "--json", set[0], set[1]]));
    let rejected = plan["forecast"]["rejected"].as_array().unwrap();
    assert_eq!(rejected.len(), 2, "{plan}");
    let reason = |node: &str| rejected.iter().find(|entry| entry["node"] == node).map(|entry| entry["reason"].clone());
    assert!(reason("n1").unwrap().as_str().unwrap().contains("1 MiB of memory"), "{rejected:?}");
    assert!(rejected.iter().any(|entry| entry["reason"].as_str().unwrap().contains("5 nodes make 1")), "{rejected:?}");
}

#[test]
fn the_doctor_finds_what_is_wrong_and_says_how_to_mend_it() {
    let folder = tempfile::tempdir().unwrap();
    let topology = cluster(folder.path());
    let file = topology.to_str().unwrap();
    let healthy = butterfly(&["doctor", file, "--json"]);
    assert!(healthy.status.success(), "{}", String::from_utf8_lossy(&healthy.stdout));
    assert!(!topology.with_file_name("data").exists(), "a look leaves nothing behind");

    let key = topology.with_file_name("keys").join("n1.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let own = topology.with_file_name("keys").join("n2.key");
    std::fs::copy(topology.with_file_name("keys").join("n0.key"), &own).unwrap();
    let document = std::fs::read_to_string(&topology).unwrap();
    let table: toml::Table = document.parse().unwrap();
    let address = table["node"][0]["admin_address"].as_str().unwrap();
    let _taken = TcpListener::bind(address).unwrap();
    let sick = butterfly(&["doctor", file, "--json"]);
    assert_eq!(sick.status.code(), Some(4));
    let findings = json(&sick);
    let failures: Vec<&Value> =
        findings["findings"].as_array().unwrap().iter().filter(|finding| finding["state"] == "failure").collect();
    let about = |text: &str| failures.iter().any(|finding| finding["detail"].as_str().unwrap().contains(text));
    assert!(about("can be read by others") && about("another key") && about("is in use"), "{failures:?}");
    assert!(failures.iter().all(|finding| finding["fix"].is_string()), "{failures:?}");
    let missing = butterfly(&["doctor", file, "--set", "cluster.model=/nowhere"]);
    assert_eq!(missing.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&missing.stdout).contains("weights"), "{missing:?}");
}

/// A child that does not outlive its test.
struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_init_writes_is_served_reports_at_intervals_and_can_be_watched() {
    let folder = tempfile::tempdir().unwrap();
    let topology = cluster(folder.path());
    let file = topology.to_str().unwrap();
    let collect = ["--set", "telemetry.collector_type=json", "--set", "telemetry.export_interval_secs=1"];
    let mut serve = Command::new(env!("CARGO_BIN_EXE_butterfly"));
    serve.args(["serve", file, "-q"]).args(collect).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut serving = Serving(serve.spawn().unwrap());
    let mut lines = BufReader::new(serving.0.stdout.take().unwrap()).lines();
    let report: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert!(report["node"].as_str().unwrap().starts_with('n'));
    let named = |name: &str| report["metrics"].as_array().unwrap().iter().any(|metric| metric["name"] == name);
    assert!(named("butterfly_tasks_waiting") && named("butterfly_build_info"), "{report}");
    // Reports go on while nodes come up, so a line is a moment to look again.
    let ready = lines.find(|line| line.is_ok() && butterfly(&["status", file]).status.success());
    assert!(ready.is_some(), "the nodes never became ready");
    let status = json(&butterfly(&["status", file, "--json"]));
    assert_eq!(status["nodes"].as_array().unwrap().len(), 3);
    let doctor = json(&butterfly(&["doctor", file, "--json"]));
    let clocks = doctor["findings"].as_array().unwrap().iter().filter(|finding| finding["check"] == "clock");
    assert!(
        clocks.filter(|finding| finding["state"] == "ok").count() >= 4,
        "three clocks agree with this one: {doctor}"
    );
}

#[test]
fn shells_and_editors_get_what_they_complete_from() {
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(butterfly(&["completions", shell]).stdout).unwrap();
        assert!(script.contains("butterfly") && script.contains("doctor"), "{shell}");
    }
    let schema = json(&butterfly(&["schema"]));
    assert_eq!(schema["properties"]["stage"]["items"]["oneOf"].as_array().unwrap().len(), 7);
    let folder = tempfile::tempdir().unwrap();
    let topology = cluster(folder.path());
    let beside = topology.with_file_name("topology.schema.json");
    let kept: Value = serde_json::from_str(&std::fs::read_to_string(beside).unwrap()).unwrap();
    assert_eq!(kept, schema);
    assert!(std::fs::read_to_string(&topology).unwrap().starts_with("#:schema ./topology.schema.json\n"));
    let mode = std::fs::metadata(topology.with_file_name("admin.token")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
