//! Every file under `tests/bad` is refused, and what its author is told is under review: one snapshot for each file.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::fs;
use std::path::Path;

use butterfly_topology::parse;

#[test]
fn every_bad_file_is_refused_with_the_words_of_its_snapshot() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bad");
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    assert!(files.len() >= 30, "{} bad files", files.len());
    let catalogue = support::catalogue();
    for path in files {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let problems = match parse(&text, &format!("{name}.toml"), &catalogue) {
            Ok(_) => panic!("{name}.toml is accepted"),
            Err(problems) => problems,
        };
        assert!(problems.has_errors(), "{name}.toml is refused without an error");
        insta::with_settings!({
            snapshot_path => "bad",
            prepend_module_to_snapshot => false,
            omit_expression => true,
        }, {
            insta::assert_snapshot!(name, problems.render(false));
        });
    }
}
