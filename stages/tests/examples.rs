//! The examples hold: their topologies pass the check, their programs run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Command;

use butterfly::loopback::Loopback;
use butterfly::registry::{SIGNATURES, catalogue};

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

#[test]
fn the_catalogue_has_no_faults_and_names_the_seven_kinds() {
    assert!(catalogue().faults().is_empty(), "{:?}", catalogue().faults());
    let kinds: Vec<&str> = SIGNATURES.iter().map(|signature| signature.kind).collect();
    assert_eq!(kinds, ["ingest", "partition", "assign", "transfer", "compute", "consensus", "commit"]);
}

#[test]
fn every_example_topology_passes_the_check() {
    let mut checked = 0;
    for entry in std::fs::read_dir(examples()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        if !text.contains("[cluster]\n") {
            continue;
        }
        if let Err(diagnostics) = butterfly_topology::parse(&text, &path.display().to_string(), &catalogue()) {
            panic!("{}", diagnostics.render(false));
        }
        checked += 1;
    }
    assert!(checked >= 4, "dev, test, prod and adversary");
}

/// The example's own kind is wired from its topology file: one prompt passes it, the other is refused by it.
#[test]
fn the_custom_stage_runs_from_its_topology_file() {
    let program = std::env::current_exe().unwrap().parent().unwrap().with_file_name("examples").join("custom_stage");
    assert!(program.is_file(), "{} is built by `cargo test`, without --test", program.display());
    let output = Command::new(program).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let (allowed, refused) = text.split_once("\"The unsafe keyword\"").expect("both prompts");
    assert!(allowed.contains("HTTP/1.1 200") && allowed.contains("receipt_id"), "{allowed}");
    assert!(refused.contains("HTTP/1.1 400") && refused.contains("must not contain"), "{refused}");
}

/// The client of the examples, beside a running cluster.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_streams_an_answer_and_names_its_receipt() {
    let program = std::env::current_exe().unwrap().parent().unwrap().with_file_name("examples").join("client");
    assert!(program.is_file(), "{} is built by `cargo test`, without --test", program.display());
    let folder = tempfile::tempdir().unwrap();
    let cluster = Loopback::default().start(folder.path()).await.unwrap();
    cluster.meshed().await;
    let url = format!("http://{}", cluster.http_address().unwrap());
    let run = move |prompt: String| {
        let output =
            Command::new(program).arg(prompt).env("BUTTERFLY_URL", url).env_remove("BUTTERFLY_API_KEY").output();
        let output = output.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status, text(output.stdout), text(output.stderr))
    };
    let client = run.clone();
    let (status, said, proof) = tokio::task::spawn_blocking(move || client("Ownership is".to_owned())).await.unwrap();
    assert!(status.success(), "{proof}");
    assert!(said.starts_with("Ownership is") && said.trim_end().len() > "Ownership is".len(), "{said}");
    assert!(proof.starts_with("receipt ") && proof.contains("certified"), "{proof}");
    let (status, _, failure) = tokio::task::spawn_blocking(move || run("word ".repeat(5000))).await.unwrap();
    assert!(!status.success() && failure.contains("context_length_exceeded"), "{failure}");
    cluster.shutdown().await.unwrap();
}

/// The command in the systemd unit is one that the program understands: only the topology is missing here.
#[test]
fn the_systemd_unit_starts_the_program_as_it_wants_to_be_started() {
    let unit = std::fs::read_to_string(examples().join("butterfly.service")).unwrap();
    let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{key}"));
    let mut command = value("ExecStart=").split_whitespace();
    assert_eq!(Path::new(command.next().unwrap()).file_name().unwrap(), "butterfly");
    let (name, node) = value("Environment=").split_once('=').unwrap();
    let folder = tempfile::tempdir().unwrap();
    let arguments: Vec<String> =
        command.map(|word| word.replace("/etc/butterfly", &folder.path().display().to_string())).collect();
    let output = Command::new(env!("CARGO_BIN_EXE_butterfly")).args(arguments).env(name, node).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{message}");
    assert!(message.contains("topology.toml"), "{message}");
    for status in value("RestartPreventExitStatus=").split_whitespace() {
        assert!(["2", "3", "4"].contains(&status), "{status}");
    }
}
