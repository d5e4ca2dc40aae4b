//! Properties of byte-level tokenizers, on one small enough to read.

use super::*;
use serde_json::{Value, json};

const SIZE: usize = 300;

/// A byte-level tokenizer: 256 bytes, `ab`, a special and a plain added token.
fn minimal() -> Value {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255_u8 {
        vocab.insert(byte_char(byte).to_string(), json!(byte));
    }
    vocab.insert("ab".to_owned(), json!(256));
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(257, "<|end|>", true), added(258, "a tool", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["a", "b"]]}
    })
}

/// A tokenizer whose first 256 ids are the bytes; 256 is `ab`, 257 is special, 258 is `a tool`.
pub(in super::super) fn bytes_tokenizer() -> Tokenizer {
    parse(&minimal()).unwrap()
}

fn parse(value: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::parse("tokenizer.json", value.to_string().as_bytes(), SIZE)
}

#[test]
fn encodes_bytes_merges_and_added_tokens() {
    let tokenizer = parse(&minimal()).unwrap();
    assert_eq!(tokenizer.encode("abé").unwrap(), [256, 0xc3, 0xa9]);
    assert_eq!(tokenizer.encode("a tool<|end|>\0").unwrap(), [258, 257, 0]);
    assert!(tokenizer.encode("").unwrap().is_empty());
    assert_eq!(tokenizer.vocabulary(), SIZE);
    for (id, bytes) in [(256, &b"ab"[..]), (0xc3, &[0xc3]), (0, &[0]), (257, b""), (258, b"a tool"), (299, b"")] {
        assert_eq!(tokenizer.token_bytes(id), bytes);
    }
    assert_eq!(tokenizer.token_bytes(300), b"");
    assert_eq!(tokenizer.token_bytes(u32::MAX), b"");
}

#[test]
fn no_byte_of_any_text_is_lost() {
    let tokenizer = parse(&minimal()).unwrap();
    let long = " \n\t".repeat(20_000) + &"\u{10ffff}x".repeat(10_000);
    for text in ["", " ", "\u{0}\u{7f}\u{80}", "naïve 🦀 ab\r\n\u{feff}", &long] {
        let ids = tokenizer.encode(text).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
        assert_eq!(bytes, text.as_bytes());
    }
}

#[test]
fn a_text_above_the_limit_is_refused() {
    let tokenizer = parse(&minimal()).unwrap();
    let text = "a".repeat(TEXT_BYTES_MAX + 1);
    assert_eq!(tokenizer.encode(&text), Err(EncodeError::TooLong { found: TEXT_BYTES_MAX + 1 }));
}

#[test]
fn what_the_file_says_about_truncation_and_padding_is_ignored() {
    let mut value = minimal();
    value["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    value["padding"] = json!({"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    assert_eq!(parse(&value).unwrap().encode("xyzw").unwrap().len(), 4);
}

#[test]
fn what_is_not_byte_level_bpe_or_not_deterministic_is_named() {
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let nested = (0..10).fold(metaspace.clone(), |inner, _| json!({"type": "Sequence", "pretokenizers": [inner]}));
    for (pointer, change) in [
        ("/model/type", json!("Unigram")),
        ("/model/dropout", json!(0.1)),
        ("/model/continuing_subword_prefix", json!("##")),
        ("/model/end_of_word_suffix", json!("</w>")),
        ("/model/byte_fallback", json!("yes")),
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ("/pre_tokenizer", metaspace),
        ("/pre_tokenizer", nested),
        ("/pre_tokenizer", Value::Null),
        ("/post_processor", json!({"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2]})),
        ("/decoder", json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
    ] {
        let mut value = minimal();
        *value.pointer_mut(pointer).unwrap() = change;
        let error = parse(&value).unwrap_err().to_string();
        assert!(error.contains(&format!("'{}'", &pointer[1..].replace('/', "."))), "{pointer}: {error}");
    }
}

#[test]
fn hostile_tables_are_refused() {
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut value = minimal();
        change(&mut value);
        parse(&value).unwrap_err()
    };
    let error = changed(&|value| value["model"]["vocab"]["ab"] = json!(97));
    assert!(matches!(error, TokenizerError::Repeated { id: 97, .. }), "{error}");
    let error = changed(&|value| value["model"]["vocab"]["ab"] = json!(SIZE));
    assert!(matches!(error, TokenizerError::OutsideVocabulary { .. }), "{error}");
    let error = changed(&|value| value["model"]["vocab"]["ab"] = json!(u64::MAX));
    assert!(matches!(error, TokenizerError::Malformed { .. }), "{error}");
    let error = changed(&|value| value["added_tokens"][0]["id"] = json!(u32::MAX));
    assert!(matches!(error, TokenizerError::OutsideVocabulary { .. }), "{error}");
    let error = changed(&|value| value["added_tokens"][0]["id"] = json!(97));
    assert!(matches!(error, TokenizerError::Repeated { id: 97, .. }), "{error}");
    let error = changed(&|value| value["added_tokens"][1]["id"] = json!(257));
    assert!(matches!(error, TokenizerError::Repeated { id: 257, .. }), "{error}");
    let error = changed(&|value| value["added_tokens"][1]["id"] = json!(270));
    assert!(matches!(error, TokenizerError::Malformed { .. }), "{error}");
    let error = changed(&|value| value["added_tokens"][0]["content"] = json!(""));
    assert!(matches!(error, TokenizerError::Malformed { .. }), "{error}");
    // The library would write past its buffer's end and panic.
    let error = changed(&|value| value["model"]["merges"] = json!([["ab", "ab"]]));
    assert!(matches!(error, TokenizerError::Merge { merge: 0, .. }), "{error}");
    let error = changed(&|value| value["model"]["merges"] = json!(["a", "b c d"]));
    assert!(matches!(error, TokenizerError::Merge { merge: 0, .. }), "{error}");
    let error = changed(&|value| {
        value["model"]["vocab"].as_object_mut().unwrap().remove("é");
    });
    assert!(matches!(error, TokenizerError::ByteMissing { byte: 0xe9, .. }), "{error}");
    let split = json!({"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false});
    let error = changed(&|value| {
        let byte_level = value["pre_tokenizer"].clone();
        value["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [split, byte_level]});
    });
    assert!(matches!(error, TokenizerError::Malformed { .. }), "{error}");
}

#[test]
fn a_repeated_string_is_refused() {
    let text = minimal().to_string().replace("\"ab\":256", "\"ab\":256,\"ab\":259");
    let error = Tokenizer::parse("tokenizer.json", text.as_bytes(), SIZE).unwrap_err();
    assert!(matches!(error, TokenizerError::Repeated { .. }), "{error}");
}

#[test]
fn cut_and_garbled_files_are_errors() {
    let whole = minimal().to_string();
    for length in (0..whole.len()).step_by(97) {
        let cut = whole.as_bytes().get(..length).unwrap();
        assert!(matches!(Tokenizer::parse("t", cut, SIZE), Err(TokenizerError::Malformed { .. })), "{length}");
    }
    for text in ["", "null", "[]", "{}", "{\"model\":{}}", &"[".repeat(100_000)] {
        assert!(matches!(Tokenizer::parse("t", text.as_bytes(), SIZE), Err(TokenizerError::Malformed { .. })));
    }
}

fn template(single: Value) -> Value {
    let mut value = minimal();
    value["post_processor"] = json!({"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        {"type": "TemplateProcessing", "single": single, "pair": [],
            "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [257], "tokens": ["<|end|>"]},
                "far": {"id": "far", "ids": [300], "tokens": ["far"]}}}
    ]});
    value
}

#[test]
fn a_template_puts_special_tokens_around_the_text() {
    let special = json!({"SpecialToken": {"id": "<|end|>", "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let encoded = |single| parse(&template(single)).unwrap().encode("ab").unwrap();
    assert_eq!(encoded(json!([special, text])), [257, 256]);
    assert_eq!(encoded(json!([special, special, text, special])), [257, 257, 256, 257]);
}

#[test]
fn the_post_processor_of_bert_puts_one_token_on_either_side() {
    let mut value = minimal();
    value["post_processor"] = json!({"type": "BertProcessing", "sep": ["<|end|>", 257], "cls": ["ab", 256]});
    assert_eq!(parse(&value).unwrap().encode("xy").unwrap(), [256, 120, 121, 257]);
    value["post_processor"]["sep"] = json!(["<|end|>", SIZE]);
    assert!(matches!(parse(&value).unwrap_err(), TokenizerError::OutsideVocabulary { .. }));
    value["post_processor"]["sep"] = json!("<|end|>");
    assert!(matches!(parse(&value).unwrap_err(), TokenizerError::Unsupported { .. }));
}

/// As SentencePiece models are converted: 0 is unknown, 3 to 258 are the bytes, then characters and what they make.
fn fallback() -> Value {
    let mut vocab = serde_json::Map::new();
    let bytes = (0..=255).map(|byte: u8| format!("<0x{byte:02X}>"));
    let tokens = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes);
    for token in tokens.chain(["▁", "a", "b", "▁a", "▁ab", "é"].map(str::to_owned)) {
        vocab.insert(token, json!(vocab.len()));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let sequence = |list: &str, members: Value| json!({"type": "Sequence", list: members});
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": sequence("normalizers", json!([{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}])),
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": sequence("decoders", json!([{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}])),
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": ["▁ a", "▁a b"]}
    })
}

#[test]
fn a_fallback_vocabulary_loses_no_byte_either() {
    let tokenizer = parse(&fallback()).unwrap();
    let id = |byte: u8| u32::from(byte) + 3;
    assert_eq!(tokenizer.encode("ab b").unwrap(), [1, 263, 259, 261]);
    // The butterfly has no token, so its four bytes stand for it.
    let butterfly = [0xf0, 0x9f, 0xa6, 0x8b].map(id);
    assert_eq!(tokenizer.encode("é🦋").unwrap(), [&[1, 259, 264], &butterfly[..]].concat());
    for text in ["ab b", "", "naïve 🦋 \0\n  x", "<0x41>", "▁"] {
        let ids = tokenizer.encode(text).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
        // The space before the first word is the tokenizer's own, and its sign for a space comes back as one.
        let expected = if text.is_empty() { String::new() } else { format!(" {}", text.replace('▁', " ")) };
        assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    }
    for (pointer, change) in [
        ("/normalizer/normalizers/0/prepend", json!("x")),
        ("/normalizer/normalizers/1/content", json!("")),
        ("/normalizer/normalizers/1/pattern", json!({"Regex": " +"})),
        ("/pre_tokenizer", json!({"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": false})),
        ("/pre_tokenizer", json!({"type": "UnicodeScripts"})),
        ("/decoder", json!({"type": "CTC"})),
    ] {
        let mut value = fallback();
        *value.pointer_mut(pointer).unwrap() = change;
        assert!(matches!(parse(&value), Err(TokenizerError::Unsupported { .. })), "{pointer}");
    }
    let mut value = fallback();
    value["model"]["vocab"].as_object_mut().unwrap().remove("<0xE9>");
    assert!(matches!(parse(&value), Err(TokenizerError::ByteMissing { byte: 0xe9, .. })));
}

/// As BERT has it.
fn pieces() -> Value {
    let vocab: serde_json::Map<String, Value> =
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "fly", "butter", "##fly", "##s", "!"]
            .into_iter()
            .enumerate()
            .map(|(id, token)| (token.to_owned(), json!(id)))
            .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab}
    })
}

#[test]
fn word_pieces_are_the_longest_and_a_long_text_is_cut_between_its_ends() {
    let tokenizer = parse(&pieces()).unwrap();
    assert_eq!(tokenizer.encode("Bütterflys fly  zebra!").unwrap(), [2, 5, 6, 7, 4, 1, 8, 3]);
    assert_eq!(tokenizer.encode("").unwrap(), [2, 3]);
    let bytes: Vec<u8> = [5, 6, 4].iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
    assert_eq!(bytes, b" butterfly fly");
    let tokenizer = tokenizer.cutting(Some(5));
    assert_eq!(tokenizer.encode("fly fly fly").unwrap(), [2, 4, 4, 4, 3]);
    assert_eq!(tokenizer.encode("fly fly butterfly fly").unwrap(), [2, 4, 4, 5, 3]);
    assert_eq!(tokenizer.cutting(Some(1)).encode("fly").unwrap(), [2, 3], "what goes around stays");
}

#[test]
fn parts_that_do_not_go_with_word_pieces_are_named() {
    for (pointer, change) in [
        ("/model/unk_token", json!("absent")),
        ("/model/unk_token", Value::Null),
        ("/model/continuing_subword_prefix", json!("")),
        ("/normalizer", json!({"type": "Prepend", "prepend": "x"})),
        ("/pre_tokenizer", Value::Null),
        ("/decoder", json!({"type": "Fuse"})),
    ] {
        let mut value = pieces();
        *value.pointer_mut(pointer).unwrap() = change;
        let error = parse(&value).unwrap_err().to_string();
        assert!(error.contains(&format!("'{}'", &pointer[1..].replace('/', "."))), "{pointer}: {error}");
    }
}

#[test]
fn a_template_that_repeats_the_text_or_names_unknown_tokens_is_refused() {
    let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    for single in [
        json!([]),
        json!([special("<|end|>")]),
        json!([special("absent"), text("A")]),
        json!([special("far"), text("A")]),
        json!([text("A"), text("A")]),
        json!([text("B")]),
        json!([{"Other": {}}, text("A")]),
        Value::Array(vec![special("<|end|>"); 100]),
    ] {
        let error = parse(&template(single.clone())).unwrap_err();
        let named = matches!(error, TokenizerError::Unsupported { .. } | TokenizerError::OutsideVocabulary { .. });
        assert!(named, "{single}: {error}");
    }
}
