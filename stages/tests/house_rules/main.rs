//! The rules of the house, as tests over `cargo metadata` and over the text of the sources: who may import whom, where
//! `unsafe`, clocks, queues and transports may be named, and what every file must have. A failure names file, line and cure.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod source;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use source::sources;

/// Who may import whom inside the workspace, dev- and build-dependencies included.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("butterfly-topology", &[]),
    ("butterfly-mapping", &[]),
    ("butterfly-kernels", &[]),
    ("butterfly-verify", &[]),
    ("butterfly-engine", &["butterfly-topology", "butterfly-mapping"]),
    (
        "butterfly",
        &["butterfly-topology", "butterfly-engine", "butterfly-mapping", "butterfly-kernels", "butterfly-verify"],
    ),
    (
        "butterfly-bench",
        &[
            "butterfly",
            "butterfly-topology",
            "butterfly-engine",
            "butterfly-mapping",
            "butterfly-kernels",
            "butterfly-verify",
        ],
    ),
];

/// The only folders that may say `unsafe`.
const UNSAFE_FOLDERS: &[&str] = &["engine/mapping/", "stages/kernels/"];

const LINES_MAX: usize = 1000;

/// The given top level and what every project has. `true`: must be there.
const TOP_LEVEL: &[(&str, bool)] = &[
    ("Cargo.toml", true),
    ("engine", true),
    ("stages", true),
    ("topology", true),
    ("benches", true),
    ("fuzz", true),
    ("examples", true),
    ("README.md", true),
    ("ARCHITECTURE.md", true),
    ("CONTRIBUTING.md", true),
    ("CHANGELOG.md", true),
    ("LICENSE-MIT", true),
    ("LICENSE-APACHE", true),
    ("deny.toml", true),
    ("Cargo.lock", true),
    (".ci", true),
    ("clippy.toml", false),
    ("rustfmt.toml", false),
    (".gitignore", false),
    (".gitattributes", false),
];

/// Names that say nothing about what is inside, so that everything ends up inside.
const EMPTY_NAMES: &[&str] = &["common", "helper", "helpers", "manager", "misc", "util", "utils"];

const KINDS: &[&str] = &["ingest", "partition", "assign", "transfer", "compute", "consensus", "commit"];

#[test]
fn imports_point_down() {
    let mut faults = Faults::new("an import against topology <- engine <- stages <- benches");
    let packages = packages();
    for (name, package) in packages {
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(of, _)| of == name) else {
            faults.add(
                &package.manifest,
                1,
                &format!("crate `{name}` has no place in the import order: give it one in MAY_IMPORT"),
            );
            continue;
        };
        for dependency in &package.dependencies {
            if packages.contains_key(dependency) && !allowed.contains(&dependency.as_str()) {
                let line = line_of(&package.manifest, dependency);
                faults.add(&package.manifest, line, &format!("`{name}` must not import `{dependency}`: move the shared part down, or hand it over as data or a trait"));
            }
        }
    }
    faults.report();
}

#[test]
fn nothing_imports_a_binary() {
    let mut faults = Faults::new("an import of a binary");
    let packages = packages();
    for (name, package) in packages {
        for dependency in &package.dependencies {
            if packages.get(dependency).is_some_and(|of| !of.has_library) {
                let line = line_of(&package.manifest, dependency);
                faults.add(
                    &package.manifest,
                    line,
                    &format!(
                        "`{name}` imports `{dependency}`, which is only a program: move what is shared into a library"
                    ),
                );
            }
        }
    }
    for source in sources() {
        for (number, line) in source.lines.iter().enumerate() {
            if line.code.contains("#[path") && line.with_strings.contains("bin/") {
                faults.add(&source.path, number + 1, "a module taken out of a program: move it into the library");
            }
        }
    }
    faults.report();
}

#[test]
fn unsafe_stays_in_its_two_crates() {
    let mut faults = Faults::new("`unsafe` outside the mapping and kernels crates");
    for source in sources().iter().filter(|source| !source.is_under(UNSAFE_FOLDERS)) {
        for number in source.lines_with_word("unsafe") {
            faults.add(&source.path, number, "use safe code, or put the smallest unsafe part into engine/mapping or stages/kernels, with its SAFETY argument");
        }
    }
    for package in packages().values() {
        let manifest = read(&package.manifest);
        let own_lints = UNSAFE_FOLDERS.iter().any(|folder| package.manifest.starts_with(folder));
        if !own_lints && !manifest.contains("[lints]\nworkspace = true") {
            faults.add(
                &package.manifest,
                1,
                "a crate without the workspace's lints: add `[lints]` with `workspace = true`",
            );
        }
    }
    if !read("Cargo.toml").contains("unsafe_code = \"forbid\"") {
        faults.add(
            "Cargo.toml",
            1,
            "the workspace's lints no longer forbid unsafe code: restore `unsafe_code = \"forbid\"`",
        );
    }
    faults.report();
}

#[test]
fn only_the_clock_reads_the_time() {
    let mut faults = Faults::new("a wall clock outside engine/src/clock.rs, benches and programs");
    // A program may tell people how long something took; nothing that computes may know.
    let allowed = ["engine/src/clock.rs", "benches/", "stages/kernels/benches/", "stages/src/bin/"];
    for source in sources().iter().filter(|source| !source.is_under(&allowed)) {
        for name in ["Instant::now", "SystemTime::now"] {
            for number in source.lines_with_text(name) {
                faults.add(
                    &source.path,
                    number,
                    &format!("`{name}`: take a `Clock` and ask it, so that a test can hold the time still"),
                );
            }
        }
        for number in source.lines_with_text("thread::sleep") {
            faults.add(&source.path, number, "`thread::sleep`: wait for a condition, or ask the `Clock` to sleep");
        }
    }
    faults.report();
}

#[test]
fn every_queue_is_bounded() {
    let mut faults = Faults::new("a queue without a bound");
    for source in sources() {
        // The standard library's `channel()` has no bound either; tokio's takes one as its argument.
        for name in [
            "unbounded(",
            "unbounded::<",
            "unbounded_channel",
            "UnboundedSender",
            "UnboundedReceiver",
            "mpsc::channel()",
            "mpsc::channel::<()>()",
        ] {
            for number in source.lines_with_text(name) {
                faults.add(
                    &source.path,
                    number,
                    &format!("`{name}`: name a limit and say what happens when it is reached"),
                );
            }
        }
    }
    faults.report();
}

#[test]
fn no_file_swells() {
    let mut faults = Faults::new("a file that holds too much");
    for source in sources() {
        if source.lines.len() > LINES_MAX {
            faults.add(
                &source.path,
                LINES_MAX + 1,
                &format!("{} lines, at most {LINES_MAX}: split it along what it knows", source.lines.len()),
            );
        }
    }
    faults.report();
}

#[test]
fn every_module_opens_with_its_purpose() {
    let mut faults = Faults::new("a module that does not say what it is for");
    // A module of tests is about the module it lies in.
    for source in
        sources().iter().filter(|source| source.path.contains("src/") || source.is_under(&["examples/", "fuzz/"]))
    {
        if !source.text.starts_with("//!") && !source.path.ends_with("/tests.rs") {
            faults.add(
                &source.path,
                1,
                "open the file with `//!`: its purpose, its invariants, what it refuses to know",
            );
        }
    }
    faults.report();
}

#[test]
fn no_file_has_an_empty_name() {
    let mut faults = Faults::new("a name that says nothing");
    for source in sources() {
        for part in Path::new(&source.path).iter().filter_map(|part| part.to_str()) {
            let stem = part.strip_suffix(".rs").unwrap_or(part);
            if EMPTY_NAMES.contains(&stem) {
                faults.add(&source.path, 1, &format!("`{stem}`: name it after the one thing it knows"));
            }
        }
    }
    faults.report();
}

#[test]
fn transports_do_not_leak() {
    let mut faults = Faults::new("a transport crate outside engine/src/transport");
    for source in sources().iter().filter(|source| !source.is_under(&["engine/src/transport"])) {
        for name in ["quinn", "rustls", "rcgen"] {
            for number in source.lines_with_word(name) {
                faults.add(
                    &source.path,
                    number,
                    &format!("`{name}`: use `Mesh` and `PeerPort`; what they lack belongs into engine/src/transport"),
                );
            }
        }
    }
    faults.report();
}

#[test]
fn only_the_channel_knows_its_queue() {
    let mut faults = Faults::new("flume outside engine/src/channel.rs");
    for source in sources().iter().filter(|source| !source.is_under(&["engine/src/channel"])) {
        for number in source.lines_with_word("flume") {
            faults.add(
                &source.path,
                number,
                "use the engine's `Sender` and `Receiver`: they count items, bytes and waiting, and are safe to cancel",
            );
        }
    }
    faults.report();
}

#[test]
fn http_stays_at_the_edges() {
    let mut faults = Faults::new("HTTP outside the ingest stage and the admin listener");
    let server_side = ["topology/", "engine/", "stages/src/", "stages/kernels/", "stages/verify/"];
    let allowed = ["stages/src/ingest", "stages/src/admin/", "stages/src/bin/"];
    for source in sources().iter().filter(|source| source.is_under(&server_side) && !source.is_under(&allowed)) {
        for name in ["axum", "hyper", "hyper_util", "http_body_util", "StatusCode"] {
            for number in source.lines_with_word(name) {
                faults.add(
                    &source.path,
                    number,
                    &format!("`{name}`: let the item carry a domain error, and turn it into HTTP in stages/src/ingest"),
                );
            }
        }
    }
    faults.report();
}

#[test]
fn the_engine_knows_no_kind_of_stage() {
    let mut faults = Faults::new("a kind of stage named in the engine");
    for source in sources().iter().filter(|source| source.is_under(&["engine/src/"])) {
        for (number, line) in
            source.lines.iter().enumerate().take_while(|(_, line)| !line.code.contains("#[cfg(test)]"))
        {
            for kind in KINDS {
                if line.with_strings.contains(&format!("\"{kind}\"")) {
                    faults.add(
                        &source.path,
                        number + 1,
                        &format!("`{kind}`: let the kind's signature say what is special about it"),
                    );
                }
            }
        }
    }
    faults.report();
}

#[test]
fn every_dependency_has_a_reason_and_one_version() {
    let mut faults = Faults::new("a dependency without a reason, or with a version of its own");
    for (number, line) in section_lines("Cargo.toml", |section| section == "workspace.dependencies") {
        if !line.contains("path = ") && !line.contains(" # ") {
            faults.add("Cargo.toml", number, "write the reason behind the dependency, as `# …` on its line");
        }
    }
    for package in packages().values() {
        for (number, line) in section_lines(&package.manifest, |section| section.ends_with("dependencies")) {
            if !line.contains("workspace = true") {
                faults.add(&package.manifest, number, "take the version from the workspace: `name.workspace = true`");
            }
        }
    }
    faults.report();
}

#[test]
fn the_readme_gives_the_two_commands() {
    let mut faults = Faults::new("a README that does not say how to begin");
    let readme = read("README.md");
    for command in ["cargo run --release -- demo", "cargo test --workspace"] {
        if !readme.lines().any(|line| line.trim() == command) {
            faults.add("README.md", 1, &format!("put `{command}` on a line of its own in a code block"));
        }
    }
    faults.report();
}

#[test]
fn the_top_level_is_as_given() {
    let mut faults = Faults::new("a top level other than the given one");
    let present = top_level();
    for name in &present {
        if !TOP_LEVEL.iter().any(|(known, _)| known == name) {
            faults.add(name, 1, "not part of the top level: move it into the folder it belongs to");
        }
    }
    for (name, _) in TOP_LEVEL.iter().filter(|(_, required)| *required) {
        if !present.iter().any(|found| found == name) {
            faults.add(name, 1, "missing from the top level: restore it");
        }
    }
    faults.report();
}

/// What broke a rule, gathered so that one run shows everything.
struct Faults {
    rule: &'static str,
    text: String,
}

impl Faults {
    fn new(rule: &'static str) -> Self {
        Self { rule, text: String::new() }
    }

    fn add(&mut self, path: &str, line: usize, cure: &str) {
        writeln!(self.text, "  {path}:{line}: {cure}").unwrap();
    }

    fn report(self) {
        assert!(self.text.is_empty(), "{}:\n{}", self.rule, self.text);
    }
}

struct Package {
    manifest: String,
    dependencies: Vec<String>,
    has_library: bool,
}

/// The workspace's own crates by name.
fn packages() -> &'static BTreeMap<String, Package> {
    static PACKAGES: LazyLock<BTreeMap<String, Package>> = LazyLock::new(metadata);
    &PACKAGES
}

fn metadata() -> BTreeMap<String, Package> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages: BTreeMap<_, _> = list(&metadata["packages"])
        .iter()
        .map(|package| {
            let manifest = Path::new(text(&package["manifest_path"])).strip_prefix(root()).unwrap();
            let libraries = list(&package["targets"]).iter().flat_map(|target| list(&target["kind"]));
            let entry = Package {
                manifest: manifest.to_str().unwrap().to_owned(),
                dependencies: list(&package["dependencies"]).iter().map(|of| text(&of["name"]).to_owned()).collect(),
                has_library: libraries.into_iter().any(|kind| kind == "lib"),
            };
            (text(&package["name"]).to_owned(), entry)
        })
        .collect();
    assert!(packages.len() >= MAY_IMPORT.len(), "cargo metadata shows only {:?}", packages.keys());
    packages
}

fn list(value: &serde_json::Value) -> &[serde_json::Value] {
    value.as_array().unwrap()
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().unwrap()
}

/// The entries, with their line numbers, of the manifest's sections that `wanted` picks.
fn section_lines(manifest: &str, wanted: impl Fn(&str) -> bool) -> Vec<(usize, String)> {
    let mut inside = false;
    let mut found = Vec::new();
    for (index, line) in read(manifest).lines().enumerate() {
        if let Some(section) = line.strip_prefix('[') {
            inside = wanted(section.trim_end_matches(']'));
        } else if inside && line.contains('=') && !line.starts_with('#') {
            found.push((index + 1, line.to_owned()));
        }
    }
    found
}

/// What is tracked at the top level; outside a git checkout, what lies there.
fn top_level() -> Vec<String> {
    let tracked = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let mut names: Vec<String> = match tracked {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            let listed = String::from_utf8(output.stdout).unwrap();
            listed.split('\0').filter_map(|path| path.split('/').next()).map(str::to_owned).collect()
        }
        _ => {
            let entries = std::fs::read_dir(root()).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.filter(|name| !["target", ".git", ".butterfly"].contains(&name.as_str())).collect()
        }
    };
    names.retain(|name| !name.is_empty());
    names.sort();
    names.dedup();
    names
}

fn line_of(path: &str, wanted: &str) -> usize {
    read(path).lines().position(|line| line.starts_with(wanted)).map_or(1, |index| index + 1)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace")
}
