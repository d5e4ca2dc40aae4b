use std::path::Path;

use super::super::fixture::epoch;
use super::*;
use crate::model::Model;

const RULES: Rules = Rules { mode: Mode::Full, temperature: 1.0, tokens_default: COMPLETION_TOKENS, tokens_min: 1 };

fn ask(body: &str) -> Result<Ask, Failure> {
    let mut fields = Fields::parse(body.as_bytes()).unwrap();
    let given = take(&mut fields.prompt).value("prompt")?.unwrap();
    Ask::new(&mut fields, "prompt", prompt("prompt", given)?, RULES)
}

fn resolve(body: &str) -> Result<Request, Failure> {
    let model = Model::open("builtin:tiny-rust", Path::new("")).unwrap();
    ask(body)?.resolve("alice", 5_000, [9; 32], Some(vec![1, 2, 3]), model.manifest(), &epoch(4096))
}

fn refusal(body: &str) -> (&'static str, String) {
    let failure = resolve(body).unwrap_err();
    (failure.body.code, failure.body.param.unwrap_or_default())
}

#[test]
fn defaults_are_resolved() {
    let request = resolve(r#"{"prompt": "hi"}"#).unwrap();
    let params = &request.params;
    assert_eq!((params.max_tokens, params.temperature, params.top_k, params.top_p), (16, 1.0, 0, 1.0));
    assert_eq!((request.client.as_str(), request.mode, request.now_ms), ("alice", Mode::Full, 5_000));
    assert_eq!(request.expires_ms, 5_000 + EXPIRY_MS_MAX);
    assert_eq!(request.input, Input::Text { prompt: "hi".into(), tokens: vec![1, 2, 3] });
}

#[test]
fn every_parameter_arrives() {
    let request = resolve(
        r#"{"prompt": [7, 8], "max_tokens": 5, "temperature": 0.5, "top_k": -1, "top_p": 0.25, "presence_penalty": -1,
            "frequency_penalty": 2, "logit_bias": {"3": 1}, "stop": "x", "ignore_eos": true, "seed": -4,
            "butterfly": {"verify": "full", "deadline_ms": 1000}}"#,
    )
    .unwrap();
    let expected = Params {
        max_tokens: 5,
        temperature: 0.5,
        top_k: 0,
        top_p: 0.25,
        presence_penalty: -1.0,
        frequency_penalty: 2.0,
        logit_bias: vec![(3, 1.0)],
        seed: request.params.seed,
        stop: vec!["x".into()],
        ignore_eos: true,
        choice: 0,
        logprobs: None,
        prompt_logprobs: false,
    };
    assert_eq!((&request.params, request.expires_ms), (&expected, 6_000));
}

#[test]
fn a_seed_decides_and_without_one_the_nonce_does() {
    assert_eq!(seed(&[1; 32], Some(4)), seed(&[2; 32], Some(4)));
    assert_ne!(seed(&[1; 32], Some(4)), seed(&[1; 32], Some(5)));
    assert_ne!(seed(&[1; 32], None), seed(&[2; 32], None));
    assert_ne!(seed(&[0; 32], None), seed(&[0; 32], Some(0)));
}

#[test]
fn what_cannot_be_kept_is_refused_by_name() {
    for (body, code, param) in [
        (r#"{"prompt": []}"#, "invalid_value", "prompt"),
        (r#"{"prompt": ["a", "b"]}"#, "unsupported_parameter", "prompt"),
        (r#"{"prompt": [2048]}"#, "invalid_value", "prompt"),
        (r#"{"prompt": "x", "max_tokens": 0}"#, "invalid_value", "max_tokens"),
        (r#"{"prompt": "x", "max_tokens": 1022}"#, "context_length_exceeded", "prompt"),
        (r#"{"prompt": "x", "max_tokens": 99999999999}"#, "invalid_value", "max_tokens"),
        (r#"{"prompt": "x", "temperature": 1e-8}"#, "invalid_value", "temperature"),
        (r#"{"prompt": "x", "temperature": 2.1}"#, "invalid_value", "temperature"),
        (r#"{"prompt": "x", "logit_bias": {"2048": 1}}"#, "invalid_value", "logit_bias"),
        (r#"{"prompt": "x", "butterfly": {"verify": "none"}}"#, "invalid_value", "butterfly.verify"),
        (r#"{"prompt": "x", "verify": "quorum"}"#, "unsupported_parameter", "verify"),
        (r#"{"prompt": "x", "butterfly": {"verfy": "full"}}"#, "unsupported_parameter", "butterfly.verfy"),
        (r#"{"prompt": "x", "butterfly": {"deadline_ms": 600001}}"#, "invalid_value", "butterfly.deadline_ms"),
        (r#"{"prompt": "x", "butterfly": 5}"#, "invalid_value", "butterfly"),
        (r#"{"prompt": "x", "n": 2, "best_of": 3}"#, "unsupported_parameter", "best_of"),
        (r#"{"prompt": "x", "n": 0}"#, "invalid_value", "n"),
        (r#"{"prompt": "x", "response_format": {"type": "json_object"}}"#, "unsupported_parameter", "response_format"),
        (r#"{"prompt": "x", "response_format": {"type": 7}}"#, "invalid_value", "response_format.type"),
    ] {
        assert_eq!(refusal(body), (code, param.to_owned()), "{body}");
    }
    let tokens = vec!["1"; 1024].join(",");
    assert_eq!(refusal(&format!("{{\"prompt\": [{tokens}]}}")).0, "context_length_exceeded");
    let tokens = vec!["1"; 1020].join(",");
    assert_eq!(resolve(&format!("{{\"prompt\": [{tokens}]}}")).unwrap().params.max_tokens, 4, "the default gives way");
}

#[test]
fn the_epoch_has_the_last_word_on_length() {
    let model = Model::open("builtin:tiny-rust", Path::new("")).unwrap();
    let ask = ask(r#"{"prompt": [1, 2, 3]}"#).unwrap();
    let failure = ask.resolve("", 0, [0; 32], None, model.manifest(), &epoch(4)).unwrap_err();
    assert_eq!(failure.body.code, "context_length_exceeded");
}

#[test]
fn models_of_vectors_and_of_tokens_say_what_they_take() {
    let model = Model::open("builtin:mlp", Path::new("")).unwrap();
    let resolve = |input: AskInput| {
        let mut fields = Fields::parse(b"{}").unwrap();
        let ask = Ask::new(&mut fields, "input", input, RULES).unwrap();
        ask.resolve("", 0, [0; 32], None, model.manifest(), &epoch(4096))
    };
    let width = model.manifest().input_width;
    assert_eq!(resolve(AskInput::Vector(vec![0.5; width])).unwrap().params.max_tokens, 0);
    assert!(resolve(AskInput::Vector(vec![0.5; width + 1])).unwrap_err().body.message.contains(&width.to_string()));
    assert!(resolve(AskInput::Tokens(vec![1])).unwrap_err().body.message.contains("input"));
}

#[test]
fn task_ids_fit_a_path() {
    assert!(task_id("Run_7.a:b-c".into()).is_ok());
    for wrong in ["", "a/b", "a b", "ü", &"x".repeat(129)] {
        assert_eq!(task_id(wrong.to_owned()).unwrap_err().body.param.as_deref(), Some("task_id"));
    }
}

#[test]
fn a_cluster_that_may_have_liars_verifies() {
    assert_eq!(cluster_mode(None, 0), Mode::None);
    assert_eq!(cluster_mode(None, 1), Mode::Full);
    assert_eq!(cluster_mode(Some("full"), 0), Mode::Full);
    assert_eq!(cluster_mode(Some("none"), 0), Mode::None);
}
