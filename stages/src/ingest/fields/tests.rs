use super::*;

fn fields(body: &str) -> Fields {
    Fields::parse(body.as_bytes()).unwrap()
}

fn param(failure: Failure) -> (&'static str, String) {
    (failure.body.code, failure.body.param.unwrap_or_default())
}

#[test]
fn values_of_the_wrong_type_name_their_field() {
    let fields =
        fields(r#"{"temperature": "hot", "max_tokens": 1.5, "stream": 1, "seed": [], "top_p": 1.01, "model": {}}"#);
    assert_eq!(param(fields.number("temperature", 0.0..=2.0).unwrap_err()), ("invalid_value", "temperature".into()));
    assert_eq!(param(fields.integer("max_tokens", 1..=9).unwrap_err()), ("invalid_value", "max_tokens".into()));
    assert_eq!(param(fields.flag("stream", false).unwrap_err()), ("invalid_value", "stream".into()));
    assert_eq!(param(fields.integer("seed", 0..=9).unwrap_err()), ("invalid_value", "seed".into()));
    assert_eq!(param(fields.number("top_p", 0.0..=1.0).unwrap_err()), ("invalid_value", "top_p".into()));
    let mut fields = fields;
    assert_eq!(param(fields.text("model").unwrap_err()), ("invalid_value", "model".into()));
}

#[test]
fn null_and_absent_are_the_same_and_unknown_fields_are_ignored() {
    let fields = fields(r#"{"temperature": null, "prompt": null, "stop": null, "user": "me", "x": {"deep": [1, {}]}}"#);
    assert_eq!(fields.number("temperature", 0.0..=2.0).unwrap(), None);
    assert_eq!(fields.prompt.value("prompt").unwrap(), None);
    assert_eq!(fields.stop.value("stop").unwrap(), None);
    assert_eq!(fields.logit_bias.value("logit_bias").unwrap(), None);
}

#[test]
fn what_is_known_and_unsupported_is_refused_unless_it_changes_nothing() {
    let harmless = r#"{"n": 1, "best_of": 1, "logprobs": null, "tools": [], "tool_choice": "none", "min_p": 0, "repetition_penalty": 1.0,
        "stop_token_ids": [], "suffix": null, "use_beam_search": false}"#;
    fields(harmless).refuse_unsupported().unwrap();
    for (body, name) in [
        (r#"{"best_of": 4}"#, "best_of"),
        (r#"{"best_of": 1, "n": 2}"#, "best_of"),
        (r#"{"suffix": ""}"#, "suffix"),
        (r#"{"tools": [{}]}"#, "tools"),
        (r#"{"tool_choice": "auto"}"#, "tool_choice"),
        (r#"{"stop_token_ids": [1]}"#, "stop_token_ids"),
        (r#"{"priority": "high"}"#, "priority"),
    ] {
        let failure = fields(body).refuse_unsupported().unwrap_err();
        assert_eq!(param(failure), ("unsupported_parameter", name.into()), "{body}");
    }
    fields(r#"{"n": 2, "best_of": 2}"#).refuse_unsupported().unwrap();
    assert_eq!(param(fields(r#"{"n": "two"}"#).refuse_unsupported().unwrap_err()).0, "invalid_value");
}

#[test]
fn prompts_are_texts_or_lists_of_tokens() {
    let prompt = |json: &str| fields(&format!("{{\"prompt\": {json}}}")).prompt.value("prompt");
    let (text, tokens) = (|text: &str| Prompt::Text(text.into()), |tokens: &[u32]| Prompt::Tokens(tokens.to_vec()));
    assert_eq!(prompt(r#""hi""#).unwrap(), Some(Prompts(vec![text("hi")])));
    assert_eq!(prompt(r#"["hi"]"#).unwrap(), Some(Prompts(vec![text("hi")])));
    assert_eq!(prompt("[1, 2]").unwrap(), Some(Prompts(vec![tokens(&[1, 2])])));
    assert_eq!(prompt("[[1, 2]]").unwrap(), Some(Prompts(vec![tokens(&[1, 2])])));
    assert_eq!(prompt(r#"["a", "b"]"#).unwrap(), Some(Prompts(vec![text("a"), text("b")])));
    assert_eq!(prompt(r#"[[1], "b"]"#).unwrap(), Some(Prompts(vec![tokens(&[1]), text("b")])));
    for wrong in [
        "[]",
        "[-1]",
        "[1, -1]",
        "[\"a\", 1]",
        "[1.5]",
        "[1, \"a\"]",
        "[[1, {}]]",
        "[null]",
        "[{\"a\": 1}]",
        "7",
        "true",
        "{}",
    ] {
        assert_eq!(param(prompt(wrong).unwrap_err()), ("invalid_value", "prompt".into()), "{wrong}");
    }
    assert_eq!(prompt("[4294967295]").unwrap(), Some(Prompts(vec![tokens(&[u32::MAX])])));
    let many = |count: usize| format!("[{}]", vec!["\"a\""; count].join(","));
    assert!(prompt(&many(128)).is_ok() && prompt(&many(129)).is_err());
    assert!(prompt("[4294967296]").is_err());
}

#[test]
fn vectors_are_finite_numbers() {
    let input = |json: &str| fields(&format!("{{\"input\": {json}}}")).input.value("input");
    assert_eq!(
        input("[1, -2.5, 1e-3]").unwrap(),
        Some(Inputs::Numbers { values: vec![1.0, -2.5, 1e-3], are_ids: false })
    );
    assert_eq!(input("[]").unwrap(), Some(Inputs::Numbers { values: vec![], are_ids: false }));
    for wrong in ["[1e39]", "[1, 1e39]", "[null]", "[1, null]", "[1, \"1\"]", "{}", "[1, [2]]", "[[1], 2]"] {
        assert_eq!(param(input(wrong).unwrap_err()), ("invalid_value", "input".into()), "{wrong}");
    }
    assert_eq!(Fields::parse(br#"{"input": [1e999]}"#).unwrap_err().body.code, "invalid_json");
}

#[test]
fn stops_and_biases_keep_their_limits() {
    let stop = |json: &str| fields(&format!("{{\"stop\": {json}}}")).stop.value("stop");
    assert_eq!(stop(r#""end""#).unwrap(), Some(Stops(vec!["end".into()])));
    assert_eq!(stop(r#"["a", "b"]"#).unwrap(), Some(Stops(vec!["a".into(), "b".into()])));
    assert_eq!(stop(r#""""#).unwrap(), Some(Stops(vec![])));
    let many = format!("[{}]", vec!["\"x\""; 17].join(","));
    let long = format!("\"{}\"", "x".repeat(1025));
    for wrong in [many.as_str(), long.as_str(), "[\"\"]", "[1]", "5"] {
        assert_eq!(param(stop(wrong).unwrap_err()), ("invalid_value", "stop".into()));
    }
    let bias = |json: &str| fields(&format!("{{\"logit_bias\": {json}}}")).logit_bias.value("logit_bias");
    assert_eq!(bias(r#"{"7": -100, "3": 0.5}"#).unwrap(), Some(Bias(vec![(3, 0.5), (7, -100.0)])));
    for wrong in [r#"{"x": 1}"#, r#"{"1": 101}"#, r#"{"1": null}"#, r#"{"1": 1, "01": 2}"#, "[1]", r#"{"-1": 1}"#] {
        assert_eq!(param(bias(wrong).unwrap_err()), ("invalid_value", "logit_bias".into()), "{wrong}");
    }
}

#[test]
fn what_is_no_object_and_what_is_there_twice_is_no_json_of_ours() {
    for body in [
        "",
        "{",
        "[]",
        "\"x\"",
        "null",
        r#"{"stream": true, "stream": false}"#,
        r#"{"prompt": 1, "prompt": 2}"#,
        "{\"a\": ",
    ] {
        assert_eq!(Fields::parse(body.as_bytes()).unwrap_err().body.code, "invalid_json", "{body}");
    }
    assert_eq!(Fields::parse(b"{\"prompt\": \"\xff\"}").unwrap_err().body.code, "invalid_json");
}

#[test]
fn depth_costs_nothing() {
    let deep = format!("{}1{}", "[".repeat(1_000_000), "]".repeat(1_000_000));
    for name in ["unknown", "temperature", "prompt", "input", "stop", "logit_bias", "butterfly"] {
        let body = format!("{{\"{name}\": {deep}}}");
        // Passed over or refused, but read without recursion.
        let _ = Fields::parse(body.as_bytes());
    }
}
