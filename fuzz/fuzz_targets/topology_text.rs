//! Topology files from anybody: no text panics, every diagnostic points into the text, what passes can be drawn.
#![no_main]

use std::sync::LazyLock;

use butterfly_topology::{Catalogue, render};
use libfuzzer_sys::fuzz_target;

static CATALOGUE: LazyLock<Catalogue> = LazyLock::new(butterfly::registry::catalogue);

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match butterfly_topology::parse(text, "fuzz.toml", &CATALOGUE) {
        Ok(topology) => {
            std::hint::black_box((render::dot(&topology), render::mermaid(&topology)));
            for node in &topology.cluster.nodes {
                std::hint::black_box(topology.graph.running_on(&node.id, &CATALOGUE));
            }
            let again = butterfly_topology::parse(text, "fuzz.toml", &CATALOGUE).expect("the check is a function");
            assert_eq!(render::dot(&again), render::dot(&topology));
        }
        Err(diagnostics) => {
            assert!(diagnostics.has_errors(), "a refusal has a reason");
            for label in diagnostics.iter().flat_map(|diagnostic| &diagnostic.spans) {
                assert!(text.get(label.span.clone()).is_some(), "{:?} is no place in the text", label.span);
                assert!(label.line >= 1 && label.column >= 1);
            }
            std::hint::black_box((diagnostics.render(true), diagnostics.to_json()));
        }
    }
});
