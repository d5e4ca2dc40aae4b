//! GGUF files of strangers: nothing panics, nothing is allocated by what a file claims, and what is accepted can be
//! loaded or says why not.
#![no_main]

use butterfly::model::Model;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(model) = Model::from_gguf("fuzz.gguf", data.to_vec()) else { return };
    let manifest = model.manifest();
    let stored: u64 = manifest.layer_costs.iter().map(|cost| cost.weight_bytes).sum();
    assert!(stored <= 2 * data.len() as u64, "tensors lie within the file; a tied head counts twice");
    if let Some(tokenizer) = model.tokenizer() {
        let ids = tokenizer.encode("fn main() {\n    let x = 12345; // naïve\n}").unwrap_or_default();
        assert!(ids.iter().all(|id| (*id as usize) < manifest.vocabulary));
    }
    // The rotation's table grows with the context, by design; not what is looked for here.
    if manifest.context_length <= 4096 {
        drop(model.load(0..manifest.layers));
    }
});
