//! Tokenizers from metadata, run on text.

use super::super::write::{Field, write};
use super::*;
use crate::model::tokenizer::Tokenizer;

fn file(fields: &[(&str, Field)]) -> Vec<u8> {
    let fields: Vec<(String, Field)> =
        fields.iter().map(|(key, field)| (format!("tokenizer.ggml.{key}"), field.clone())).collect();
    let mut out = Vec::new();
    write(&mut out, &fields, &[], |_, _, _| Ok(())).unwrap();
    out
}

fn json(fields: &[(&str, Field)]) -> Result<Option<Json>, GgufError> {
    tokenizer(&Gguf::parse(&file(fields)).unwrap())
}

fn parsed(fields: &[(&str, Field)], vocabulary: usize) -> Tokenizer {
    let text = json(fields).unwrap().unwrap().to_string();
    Tokenizer::parse("test", text.as_bytes(), vocabulary).unwrap()
}

fn texts(list: impl IntoIterator<Item = impl Into<String>>) -> Field {
    Field::Texts(list.into_iter().map(Into::into).collect())
}

/// Unknown, beginning, end, the bytes, and some words; scores as a trained model has them, rarer words lower.
fn spaced(prefix: bool) -> Vec<(&'static str, Field)> {
    let words = ["\u{2581}", "a", "b", "c", "\u{2581}a", "ab", "bc", "\u{2581}ab"];
    let scores = [-9.0, -10.0, -11.0, -12.0, -3.0, -2.0, -1.0, -5.0];
    let tokens = ["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()].into_iter();
    let tokens = tokens.chain((0..=255).map(|byte| format!("<0x{byte:02X}>"))).chain(words.map(str::to_owned));
    let kinds = [2, 3, 3].into_iter().chain([6; 256]).chain([1; 8]);
    vec![
        ("model", Field::Text("llama".to_owned())),
        ("tokens", texts(tokens)),
        ("token_type", Field::Integers(kinds.collect())),
        ("scores", Field::Floats([0.0; 259].into_iter().chain(scores).collect())),
        ("bos_token_id", Field::Unsigned(1)),
        ("eos_token_id", Field::Unsigned(2)),
        ("add_space_prefix", Field::Flag(prefix)),
    ]
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = parsed(&spaced(true), 267);
    let [space, a, _, _, space_a, _, bc, space_ab] = [259, 260, 261, 262, 263, 264, 265, 266];
    // "bc" has the best score of all, so "a" is left to what stands before it.
    assert_eq!(tokenizer.encode("abc").unwrap(), [1, space_a, bc]);
    assert_eq!(tokenizer.encode("ab  a").unwrap(), [1, space_ab, space, space_a]);
    assert_eq!(tokenizer.encode("a\né").unwrap(), [1, space_a, 3 + 0x0a, 3 + 0xc3, 3 + 0xa9]);
    let bytes: Vec<&[u8]> = [space_ab, 3 + 0xc3, 1].iter().map(|id| tokenizer.token_bytes(*id)).collect();
    assert_eq!(bytes, [&b" ab"[..], &[0xc3], b""]);
    assert_eq!(parsed(&spaced(false), 267).encode("a").unwrap(), [1, a]);
}

#[test]
fn what_is_not_known_is_refused_by_its_key() {
    let model = |name: &str| json(&[("model", Field::Text(name.to_owned()))]);
    assert!(matches!(model("bert"), Err(GgufError::Unsupported { .. })));
    assert!(matches!(model("gpt2"), Err(GgufError::Missing(_))));
    assert!(model("no_vocab").unwrap().is_none());
    let fields = |split: &str| {
        let kinds = vec![1; 2];
        [
            ("model", Field::Text("gpt2".to_owned())),
            ("tokens", texts(["a", "b"])),
            ("token_type", Field::Integers(kinds)),
            ("merges", texts(["a b"])),
            ("pre", Field::Text(split.to_owned())),
        ]
    };
    for known in ["llama-bpe", "qwen2", "tekken", "smollm", "gpt-2", "default"] {
        let json = json(&fields(known)).unwrap().unwrap();
        assert!(known == "default" || name_of(&json) == Some(known), "{known}");
    }
    assert!(matches!(json(&fields("klingon")), Err(GgufError::Unsupported { .. })));
    let mut short = fields("gpt-2");
    short[2].1 = Field::Integers(vec![1]);
    assert!(matches!(json(&short), Err(GgufError::Kind { .. })));
    short[2].1 = Field::Integers(vec![1, 1]);
    short[1].1 = texts(["a", "a"]);
    assert!(matches!(json(&short), Err(GgufError::Repeated { .. })));
}
