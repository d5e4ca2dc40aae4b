//! Any text at all: parsing gives a topology or problems, never a panic, and problems can always be shown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use butterfly_topology::{parse, render};
use proptest::prelude::*;

const GOOD: [&str; 3] =
    [include_str!("good/cluster.toml"), include_str!("good/shuffled.toml"), include_str!("good/warnings.toml")];

fn survive(text: &str) {
    match parse(text, "any.toml", &support::catalogue()) {
        Ok(topology) => {
            assert!(render::dot(&topology).ends_with("}\n"));
            assert!(render::mermaid(&topology).starts_with("flowchart"));
            let picture = render::svg(&topology);
            assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
            assert_eq!(picture.matches("<rect ").count(), 1 + topology.graph.stages.len());
            assert!(!topology.warnings.render(false).contains('\u{1b}'));
        }
        Err(problems) => {
            assert!(problems.has_errors(), "refused without an error: {text:?}");
            let shown = problems.render(false);
            assert!(!shown.contains('\u{1b}'), "an escape reaches the terminal: {text:?}");
            assert!(problems.to_json().is_object());
        }
    }
}

/// Changes to a file: a piece removed, doubled, or replaced.
#[derive(Clone, Debug)]
enum Edit {
    Remove(usize, usize),
    Double(usize, usize),
    Insert(usize, String),
    SwapLines(usize, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    let piece = prop_oneof![
        "[a-z_]{1,12}",
        "\\PC{1,8}",
        "[\\[\\]{}=\"'#.,\n\r\t0-9-]{1,6}",
        Just("= nan".to_owned()),
        Just("\u{1b}[31m".to_owned()),
        Just("[[stage]]\nkind = \"rewrite\"\n".to_owned()),
        Just("\"\u{202e}\"".to_owned()),
    ];
    prop_oneof![
        (0..4000_usize, 1..40_usize).prop_map(|(at, length)| Edit::Remove(at, length)),
        (0..4000_usize, 1..200_usize).prop_map(|(at, length)| Edit::Double(at, length)),
        (0..4000_usize, piece).prop_map(|(at, text)| Edit::Insert(at, text)),
        (0..100_usize, 0..100_usize).prop_map(|(a, b)| Edit::SwapLines(a, b)),
    ]
}

fn apply(text: &str, edit: &Edit) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |offset: usize| offset % (chars.len() + 1);
    match edit {
        Edit::Remove(start, length) => {
            let start = at(*start);
            chars[..start].iter().chain(chars.iter().skip(start + length)).collect()
        }
        Edit::Double(start, length) => {
            let start = at(*start);
            let end = (start + length).min(chars.len());
            chars[..end].iter().chain(&chars[start..]).collect()
        }
        Edit::Insert(start, piece) => {
            let start = at(*start);
            chars[..start].iter().copied().chain(piece.chars()).chain(chars[start..].iter().copied()).collect()
        }
        Edit::SwapLines(a, b) => {
            let mut lines: Vec<&str> = text.split('\n').collect();
            let count = lines.len();
            lines.swap(a % count, b % count);
            lines.join("\n")
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn arbitrary_text_is_survived(text in "(?s).{0,400}") {
        survive(&text);
    }

    #[test]
    fn text_made_of_toml_is_survived(text in "[\\[\\]{}=\"'#.,_ \n\r\ta-c0-2-]{0,300}") {
        survive(&text);
    }

    #[test]
    fn edited_files_are_survived(which in 0..GOOD.len(), edits in prop::collection::vec(edit(), 1..8)) {
        let mut text = GOOD[which].to_owned();
        for edit in &edits {
            text = apply(&text, edit);
        }
        survive(&text);
    }
}

#[test]
fn deep_and_large_texts_are_survived() {
    survive(&format!("a = {}", "[".repeat(100_000)));
    survive(&format!("a = {}", "{ b = ".repeat(50_000)));
    survive(&format!("[{}a]", "a.".repeat(50_000)));
    survive(&"x".repeat(2 << 20));
    survive(&"[[stage]]\n".repeat(2_000));
    survive(&"[[node]]\n".repeat(5_000));
    survive(&(0..5_000).map(|i| format!("key{i} = 1\n")).collect::<String>());
    survive(&format!("node = [{}]", "1,".repeat(400_000)));
    survive(&format!("node = [{}]", "1,\n".repeat(300_000)));
    survive("\u{feff}[cluster]\r\nname = 1\r");
}

#[test]
fn a_ring_of_many_stages_is_one_problem() {
    let ring: String = (0..250)
        .map(|i| format!("[[stage]]\nkind = \"rewrite\"\nname = \"s{i}\"\ninput = \"s{}\"\n", (i + 1) % 250))
        .collect();
    let problems = parse(&ring, "ring.toml", &support::catalogue()).unwrap_err();
    let cycles = problems.iter().filter(|problem| problem.code == butterfly_topology::Code::Cycle).count();
    assert_eq!(cycles, 1);
}
