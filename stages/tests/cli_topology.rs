//! The built program on topologies and keys: exit statuses, messages, file modes, and that nothing is overwritten.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use sha2::Digest;

/// Runs the program in a folder, without the settings of whoever runs the tests.
fn butterfly(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, arguments).output().unwrap()
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_butterfly"));
    command.args(arguments).current_dir(folder).env_remove("NO_COLOR").env_remove("BUTTERFLY_LOG");
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn init(folder: &Path) {
    let output = butterfly(folder, &["init"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

fn change(folder: &Path, from: &str, to: &str) {
    let path = folder.join("cluster/topology.toml");
    let before = fs::read_to_string(&path).unwrap();
    assert!(before.contains(from), "{from}");
    fs::write(path, before.replacen(from, to, 1)).unwrap();
}

#[test]
fn what_init_writes_passes_the_check() {
    let folder = tempfile::tempdir().unwrap();
    for (name, arguments) in [
        ("demo", &[][..]),
        ("two-slices", &["--nodes", "6", "--slices", "2"]),
        ("alone", &["--nodes", "1"]),
        ("wide", &["--nodes", "5", "--max-byzantine", "2", "--model", "builtin:mlp", "--name", "a \"name\""]),
    ] {
        let output = butterfly(folder.path(), &[&["init", "--dir", name][..], arguments].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(text(&output.stdout).contains(&format!("butterfly serve {name}/topology.toml")));
        let output = butterfly(folder.path(), &["check", &format!("{name}/topology.toml")]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(text(&output.stdout).contains("valid"));
        assert_eq!(text(&output.stderr), "", "no warnings about what this program wrote itself");
    }
}

#[test]
fn init_overwrites_nothing() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path());
    let keep = |path: &str| fs::read(folder.path().join(path)).unwrap();
    let before = (keep("cluster/topology.toml"), keep("cluster/keys/n0.key"));
    let output = butterfly(folder.path(), &["init"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("exists already"));
    fs::remove_file(folder.path().join("cluster/topology.toml")).unwrap();
    let output = butterfly(folder.path(), &["init"]);
    assert_eq!(output.status.code(), Some(1), "a key is not overwritten either");
    assert!(!folder.path().join("cluster/topology.toml").exists(), "and then nothing is written at all");
    assert_eq!(before.1, keep("cluster/keys/n0.key"));
}

#[test]
fn three_machines_make_one_cluster_without_sharing_a_secret() {
    let machines = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let node = |machine: usize| {
        let (id, listen) = (format!("n{machine}"), format!("10.0.0.{}:9000", machine + 1));
        let output = butterfly(machines[machine].path(), &["init", "--role", "node", "--id", &id, "--listen", &listen]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout).trim().to_owned()
    };
    let (one, two) = (node(1), node(2));
    let arguments =
        ["init", "--role", "gateway", "--id", "n0", "--listen", "10.0.0.1:9000", "--peer", &one, "--peer", &two];
    let output = butterfly(machines[0].path(), &arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("butterfly serve topology.toml --node n2"));

    let topology = fs::read_to_string(machines[0].path().join("cluster/topology.toml")).unwrap();
    for (machine, folder) in machines.iter().enumerate() {
        let keys: Vec<_> = fs::read_dir(folder.path().join("cluster/keys")).unwrap().collect();
        assert_eq!(keys.len(), 1, "a machine has its own key and no other");
        let key = format!("cluster/keys/n{machine}.key");
        let public = butterfly(folder.path(), &["keygen", "--show", &key]);
        assert!(topology.contains(text(&public.stdout).trim()));
    }
    let output = butterfly(machines[0].path(), &["check", "cluster/topology.toml"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn init_refuses_what_makes_no_cluster() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, message) in [
        (&["--nodes", "2", "--max-byzantine", "1"][..], "2 nodes cannot bear 1 liars: that takes 3"),
        (&["--role", "node"], "needs --id and --listen"),
        (&["--role", "node", "--id", "n1", "--listen", "0.0.0.0:9000"], "cannot dial"),
        (&["--role", "gateway", "--id", "n0", "--listen", "10.0.0.1:1", "--peer", "n1=02ab@10.0.0.2:1"], "the key"),
        (&["--id", "n1"], "--role"),
        (&["--nodes", "0"], "0"),
        (&["--model", "no/such/folder"], "no/such/folder"),
    ] {
        let output = butterfly(folder.path(), &[&["init"][..], arguments].concat());
        assert!(matches!(output.status.code(), Some(2 | 4)), "{arguments:?}: {:?}", output.status);
        assert!(text(&output.stderr).contains(message), "{arguments:?}: {}", text(&output.stderr));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{arguments:?} wrote something");
    }
}

#[cfg(unix)]
#[test]
fn a_secret_key_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    init(folder.path());
    let output = butterfly(folder.path(), &["keygen", "other.key"]);
    assert_eq!(output.status.code(), Some(0));
    let public = text(&output.stdout).trim().to_owned();
    assert_eq!(public.len(), 66);
    for key in ["other.key", "cluster/keys/n0.key", "cluster/keys/n2.key"] {
        let path = folder.path().join(key);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{key}");
    }
    let shown = butterfly(folder.path(), &["keygen", "--show", "other.key"]);
    assert_eq!(text(&shown.stdout).trim(), public);

    let before = fs::read(folder.path().join("other.key")).unwrap();
    let output = butterfly(folder.path(), &["keygen", "other.key"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("never overwritten"));
    assert_eq!(fs::read(folder.path().join("other.key")).unwrap(), before);

    fs::set_permissions(folder.path().join("other.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let output = butterfly(folder.path(), &["keygen", "--show", "other.key"]);
    assert_eq!(output.status.code(), Some(4), "a key that others can read is refused");
    assert!(text(&output.stderr).contains("chmod 600"));
}

#[test]
fn an_api_key_goes_to_its_client_and_its_hash_to_the_gateway() {
    let folder = tempfile::tempdir().unwrap();
    let made = butterfly(folder.path(), &["keygen", "--api-key", "alice", "alice.key"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let key = std::fs::read_to_string(folder.path().join("alice.key")).unwrap();
    let line = format!("{} alice\n", hex::encode(sha2::Sha256::digest(key.trim())));
    assert_eq!(text(&made.stdout), line);
    assert!(!text(&made.stderr).contains(key.trim()), "the key is in its file alone");
    assert_eq!(text(&butterfly(folder.path(), &["keygen", "--show", "--api-key", "alice", "alice.key"]).stdout), line);
    let again = butterfly(folder.path(), &["keygen", "--api-key", "alice", "alice.key"]);
    assert!(text(&again.stderr).contains("never overwritten"));
    assert_eq!(butterfly(folder.path(), &["keygen", "--api-key", "a b", "b.key"]).status.code(), Some(2));
}

#[test]
fn check_shows_every_error_at_once_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path());
    change(folder.path(), "max_queue_size", "max_qeue_size");
    change(folder.path(), "kind = \"compute\"", "kind = \"compote\"");
    change(folder.path(), "listen_address = \"127.0.0.1:9001\"", "listen_address = \"127.0.0.1\"");
    let output = butterfly(folder.path(), &["check", "cluster/topology.toml"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(text(&output.stdout), "");
    let messages = text(&output.stderr);
    for expected in ["cluster/topology.toml:", "max_qeue_size", "`max_queue_size`", "compote", "`compute`", "127.0.0.1"]
    {
        assert!(messages.contains(expected), "{expected} is missing from:\n{messages}");
    }

    let output = butterfly(folder.path(), &["check", "cluster/topology.toml", "--json"]);
    assert_eq!(output.status.code(), Some(3));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["valid"], false);
    assert!(document["diagnostics"].as_array().unwrap().len() >= 3);
}

#[test]
fn a_key_that_is_no_point_of_the_curve_is_an_error_of_the_topology() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path());
    let topology = fs::read_to_string(folder.path().join("cluster/topology.toml")).unwrap();
    let key = topology.lines().find(|line| line.starts_with("public_key")).unwrap().to_owned();
    // 5 is the abscissa of no point: 5³ + 7 is not a square.
    change(folder.path(), &key, &format!("public_key = \"02{:064x}\"", 5));
    let output = butterfly(folder.path(), &["check", "cluster/topology.toml"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("no point of secp256k1"), "{}", text(&output.stderr));
}

#[test]
fn a_setting_goes_over_the_environment_and_that_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path());
    let graph = |arguments: &[&str], environment: &[(&str, &str)]| {
        let arguments = [&["graph", "cluster/topology.toml", "--json"], arguments].concat();
        let output = command(folder.path(), &arguments).envs(environment.iter().copied()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        document["cluster"].as_str().unwrap().to_owned()
    };
    let environment = [("BUTTERFLY_CLUSTER__NAME", "from-the-environment")];
    assert_eq!(graph(&[], &[]), "demo");
    assert_eq!(graph(&[], &environment), "from-the-environment");
    assert_eq!(graph(&["--set", "cluster.name=from-the-line"], &environment), "from-the-line");

    let output = butterfly(folder.path(), &["check", "cluster/topology.toml", "--set", "stage.ingst.on=n0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("it has ingest, partition"));
    let output = butterfly(folder.path(), &["check", "cluster/topology.toml", "--set", "cluster.max_byzantine=2"]);
    assert_eq!(output.status.code(), Some(3), "a setting passes the same check as the file");
}

#[test]
fn graph_draws_the_seven_stages() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path());
    for format in ["dot", "mermaid", "svg", "json"] {
        let output = butterfly(folder.path(), &["graph", "cluster/topology.toml", "--format", format]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        for kind in ["ingest", "partition", "assign", "transfer", "compute", "consensus", "commit"] {
            assert!(text(&output.stdout).contains(kind), "{format} lacks {kind}");
        }
    }
}

#[test]
fn files_that_cannot_be_read_are_the_machines_fault_and_not_the_topologys() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["check", "missing.toml"][..],
        &["graph", "missing.toml"],
        &["serve", "missing.toml"],
        &["keygen", "--show", "missing.key"],
        &["verify", "missing.json", "--epoch", "missing.json"],
    ] {
        let output = butterfly(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(4), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("missing."), "{arguments:?}");
    }
    fs::write(folder.path().join("latin1.toml"), b"[cluster]\nname = \"\xe9\"\n").unwrap();
    let output = butterfly(folder.path(), &["check", "latin1.toml"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("latin1.toml:2"));
}

#[test]
fn help_begins_with_examples_and_says_the_exit_statuses() {
    let folder = tempfile::tempdir().unwrap();
    let output = butterfly(folder.path(), &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = text(&output.stdout);
    assert!(help.find("Examples:").unwrap() < help.find("Usage:").unwrap());
    assert!(help.contains("3 invalid topology") && help.contains("5 verification failed"));
    for command in ["demo", "init", "check", "graph", "serve", "verify", "keygen", "version"] {
        let output = butterfly(folder.path(), &[command, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{command}");
        let help = text(&output.stdout);
        assert!(help.find("Examples:").unwrap() < help.find("Usage:").unwrap(), "{command}");
    }
    for wrong in [&["chek"][..], &["check"], &["check", "a", "--colour"], &[]] {
        assert_eq!(butterfly(folder.path(), wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn version_names_the_numerics() {
    let folder = tempfile::tempdir().unwrap();
    let output = butterfly(folder.path(), &["version", "--json"]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(document["profile"], butterfly_kernels::PROFILE);
    assert_eq!(document["profile_digest"].as_str().unwrap().len(), 64);
}

#[test]
fn color_is_for_people() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("bad.toml"), "[cluster]\nnmae = 1\n").unwrap();
    let escapes = |arguments: &[&str]| {
        let output = butterfly(folder.path(), &[&["check", "bad.toml"], arguments].concat());
        text(&output.stderr).contains('\u{1b}')
    };
    assert!(!escapes(&[]), "a pipe is not a person");
    assert!(escapes(&["--color", "always"]));
    assert!(!escapes(&["--color", "never"]));
}
