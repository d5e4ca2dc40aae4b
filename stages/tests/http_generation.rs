//! What clients ask of generation over HTTP, on clusters within one process: three replicas, one of which may lie.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use butterfly::loopback::{Cluster, Loopback};
use butterfly_engine::telemetry::TextFormat;
use butterfly_verify::Input;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use support::{call, receipt_id, verified};
use tokio::net::TcpStream;

struct Gateway {
    address: SocketAddr,
    cluster: Cluster,
    _folder: tempfile::TempDir,
}

/// Three replicas, the last of which lies about its votes.
async fn gateway() -> Gateway {
    let settings = vec![("transfer", "backend_type = \"local\"".to_owned())];
    let adversaries = BTreeMap::from([(2, "wrong-vote")]);
    let folder = tempfile::tempdir().unwrap();
    let cluster = Loopback { settings, adversaries, ..Loopback::default() }.start(folder.path()).await.unwrap();
    cluster.meshed().await;
    Gateway { address: cluster.http_address().unwrap(), cluster, _folder: folder }
}

impl Gateway {
    async fn ask(&self, path: &str, body: &Value) -> Value {
        let (status, response) = call(self.address, "POST", path, Some(body.clone())).await.unwrap();
        assert_eq!(status, 200, "{response}");
        response
    }

    /// The events of a stream, which must come to its proper end.
    async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let request =
            hyper::Request::post(path).header("host", "gateway").body(Full::new(Bytes::from(body.to_string())));
        let response = sender.send_request(request.unwrap()).await.unwrap();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        connection.abort();
        let text = std::str::from_utf8(&bytes).unwrap();
        let frames = text.split("\n\n").filter(|frame| !frame.is_empty() && !frame.starts_with(':'));
        let mut events: Vec<Value> = frames
            .map(|frame| {
                let data = frame.strip_prefix("data: ").unwrap_or_else(|| panic!("no data frame: {frame}"));
                serde_json::from_str(data).unwrap_or(Value::String(data.into()))
            })
            .collect();
        assert_eq!(events.pop(), Some(json!("[DONE]")), "{events:?}");
        events
    }
}

fn floats(values: &Value) -> Vec<f64> {
    values.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_those_of_the_reference_and_the_same_in_a_stream() {
    let gateway = gateway().await;
    let text = include_str!("data/tiny-rust-reference.json");
    let reference: Value = serde_json::from_str(text).unwrap();
    for case in reference["cases"].as_array().unwrap() {
        let logits = floats(&case["last_logits"]);
        let body = json!({
            "prompt": case["prompt_ids"], "max_tokens": 6, "temperature": 0, "logprobs": 3, "return_token_ids": true,
        });
        let whole = gateway.ask("/v1/completions", &body).await;
        let choice = &whole["choices"][0];
        let listed = &choice["logprobs"];
        let first = choice["token_ids"][0].as_u64().unwrap() as usize;
        let expected = logits[first] - logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        let found = floats(&listed["token_logprobs"]);
        assert!((found[0] - expected).abs() < 5e-3, "{found:?} {expected}");
        assert_eq!(found.len(), choice["token_ids"].as_array().unwrap().len());
        // Greedy: the chosen token is the likeliest, so there are no more than were asked for.
        for (position, top) in listed["top_logprobs"].as_array().unwrap().iter().enumerate() {
            let top = top.as_object().unwrap();
            assert_eq!(top.len(), 3);
            assert_eq!(top[listed["tokens"][position].as_str().unwrap()], listed["token_logprobs"][position]);
            assert!(top.values().map(|value| value.as_f64().unwrap().exp()).sum::<f64>() <= 1.0 + 1e-6);
        }
        assert_eq!(listed["text_offset"][0], 0);
        let streamed = gateway.stream("/v1/completions", &body).await;
        for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let pieces = streamed.iter().filter_map(|event| event["choices"][0]["logprobs"][field].as_array());
            let joined: Vec<&Value> = pieces.flatten().collect();
            assert_eq!(json!(joined), listed[field], "{field}");
        }
    }
    gateway.cluster.shutdown().await.unwrap();
}

/// What harnesses measure models with: the prompt's own tokens, each with how likely it was after those before it.
async fn prompts_are_scored(slices: usize) {
    let settings = vec![("transfer", "backend_type = \"local\"".to_owned())];
    let adversaries = BTreeMap::from([(2, "wrong-vote")]);
    let folder = tempfile::tempdir().unwrap();
    let loopback = Loopback { settings, adversaries, slices, ..Loopback::default() };
    let cluster = loopback.start(folder.path()).await.unwrap();
    cluster.meshed().await;
    let gateway = Gateway { address: cluster.http_address().unwrap(), cluster, _folder: folder };
    let reference: Value = serde_json::from_str(include_str!("data/tiny-rust-reference.json")).unwrap();
    for case in reference["cases"].as_array().unwrap() {
        let prompt = case["prompt_ids"].as_array().unwrap();
        let sampled = json!({
            "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 3, "return_token_ids": true,
        });
        let generated = gateway.ask("/v1/completions", &sampled).await["choices"][0].clone();
        let all: Vec<&Value> = prompt.iter().chain(generated["token_ids"].as_array().unwrap()).collect();
        let body = json!({
            "prompt": all, "max_tokens": 0, "echo": true, "temperature": 0, "logprobs": 3, "return_token_ids": true,
        });
        let scored = gateway.ask("/v1/completions", &body).await;
        let choice = &scored["choices"][0];
        let listed = &choice["logprobs"];
        let found = listed["token_logprobs"].as_array().unwrap();
        assert_eq!((found.len(), &found[0], &listed["top_logprobs"][0]), (all.len(), &Value::Null, &Value::Null));
        assert!(found[1..].iter().all(|one| one.as_f64().unwrap() <= 0.0));
        // Whether a token is generated or given, after the same tokens it has the same bits.
        for field in ["tokens", "token_logprobs", "top_logprobs"] {
            let tail = &listed[field].as_array().unwrap()[prompt.len()..];
            assert_eq!(json!(tail), generated["logprobs"][field], "{field}");
        }
        let logits = floats(&case["last_logits"]);
        let next = generated["token_ids"][0].as_u64().unwrap() as usize;
        let expected = logits[next] - logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        assert!((found[prompt.len()].as_f64().unwrap() - expected).abs() < 5e-3);
        assert_eq!((&choice["finish_reason"], &choice["token_ids"]), (&json!("length"), &json!([])));
        let usage = &scored["usage"];
        assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(all.len()), &json!(0)));
        assert_eq!(scored["butterfly"]["verification"]["status"], "certified");
    }
    let body = json!({ "prompt": "Ownership is a set of rules", "max_tokens": 4, "echo": true, "temperature": 0, "logprobs": 2 });
    let whole = gateway.ask("/v1/completions", &body).await["choices"][0].clone();
    assert!(whole["text"].as_str().unwrap().starts_with("Ownership is a set of rules"), "{whole}");
    let offsets = whole["logprobs"]["text_offset"].as_array().unwrap();
    let lengths = whole["logprobs"]["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap().len());
    let expected: Vec<usize> = lengths.scan(0, |at, length| Some(std::mem::replace(at, *at + length))).collect();
    assert_eq!(json!(offsets), json!(expected), "each token begins where it stands in the text");
    let events = gateway.stream("/v1/completions", &body).await;
    let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, whole["text"]);
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let pieces = events.iter().filter_map(|event| event["choices"][0]["logprobs"][field].as_array());
        assert_eq!(json!(pieces.flatten().collect::<Vec<_>>()), whole["logprobs"][field], "{field}");
    }
    for unscored in [json!({ "echo": true }), json!({ "logprobs": 1 })] {
        let mut body = unscored;
        (body["prompt"], body["max_tokens"]) = (json!("x"), json!(0));
        let (status, refused) = call(gateway.address, "POST", "/v1/completions", Some(body)).await.unwrap();
        assert_eq!((status, &refused["error"]["param"]), (400, &json!("max_tokens")));
    }
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_scored_on_one_slice() {
    prompts_are_scored(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_scored_on_two_slices() {
    prompts_are_scored(2).await;
}

fn user(content: &str) -> Value {
    json!([{ "role": "user", "content": content }])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_answered_whole_and_in_a_stream_and_both_are_proved() {
    let gateway = gateway().await;
    let parts = json!([{ "type": "text", "text": "What is " }, { "type": "text", "text": "ownership?" }]);
    let messages = json!([
        { "role": "developer", "content": "Write about Rust." },
        { "role": "user", "content": parts },
        { "role": "assistant", "content": null },
    ]);
    let mut body = json!({
        "model": "tiny-rust", "messages": messages, "max_completion_tokens": 12, "temperature": 0, "logprobs": true,
        "top_logprobs": 2, "response_format": { "type": "text" }, "tools": [], "tool_choice": "none", "unknown": 1,
    });
    let whole = gateway.ask("/v1/chat/completions", &body).await;
    assert_eq!(whole["object"], "chat.completion");
    let choice = &whole["choices"][0];
    assert_eq!((&choice["message"]["role"], &choice["finish_reason"]), (&json!("assistant"), &json!("length")));
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(!text.is_empty());
    let detailed = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(detailed.len(), 12);
    assert!(
        detailed.iter().all(|one| one["top_logprobs"][0]["logprob"] == one["logprob"]),
        "greedy takes the likeliest"
    );
    let bytes = detailed.iter().flat_map(|one| one["bytes"].as_array().unwrap().clone());
    let bytes: Vec<u8> = bytes.map(|byte| byte.as_u64().unwrap() as u8).collect();
    assert_eq!(String::from_utf8_lossy(&bytes), text);
    let epoch = std::sync::Arc::clone(&gateway.cluster.nodes[0].services().epoch);
    let (request, ..) = verified(gateway.address, &receipt_id(&whole), &epoch).await;
    let Input::Chat { messages, tokens } = &request.input else { panic!("{request:?}") };
    let rendered = r#"[{"role":"developer","content":"Write about Rust."},{"role":"user","content":"What is ownership?"},{"role":"assistant","content":""}]"#;
    assert_eq!(messages, rendered);
    assert_eq!(whole["usage"]["prompt_tokens"], tokens.len());
    let id = whole["id"].as_str().unwrap();
    assert!(id.starts_with("chatcmpl-"));
    assert_eq!(call(gateway.address, "GET", &format!("/inference/{id}"), None).await.unwrap().0, 200);

    body["stream_options"] = json!({ "include_usage": true });
    let events = gateway.stream("/v1/chat/completions", &body).await;
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    assert_eq!(events[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let pieces = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), text);
    let listed = events.iter().filter_map(|event| event["choices"][0]["logprobs"]["content"].as_array()).flatten();
    assert_eq!(json!(listed.collect::<Vec<_>>()), choice["logprobs"]["content"]);
    let [.., last, usage] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(last["butterfly"]["verification"]["status"], "certified");
    assert_eq!((&usage["usage"], &usage["choices"]), (&whole["usage"], &json!([])));
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seed_makes_choices_repeat_and_each_choice_is_another() {
    let gateway = gateway().await;
    let body = json!({ "messages": user("Traits"), "max_tokens": 8, "seed": 7, "n": 3 });
    let texts = |response: &Value| -> Vec<String> {
        let choices = response["choices"].as_array().unwrap().iter().enumerate();
        choices
            .map(|(index, choice)| {
                assert_eq!(choice["index"], index);
                assert_eq!(choice["butterfly"]["verification"]["status"], "certified");
                choice["message"]["content"].as_str().unwrap().to_owned()
            })
            .collect()
    };
    let (first, again) =
        futures::join!(gateway.ask("/v1/chat/completions", &body), gateway.ask("/v1/chat/completions", &body));
    let all = texts(&first);
    assert_eq!(all, texts(&again));
    assert!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2], "{all:?}");
    assert_eq!(first["usage"]["completion_tokens"], 24);
    let mut streamed = vec![String::new(); 3];
    for event in gateway.stream("/v1/chat/completions", &body).await {
        let choice = &event["choices"][0];
        let piece = choice["delta"]["content"].as_str().unwrap_or_default();
        streamed[choice["index"].as_u64().unwrap() as usize] += piece;
    }
    assert_eq!(streamed, all);
    let mut other = body.clone();
    other["seed"] = json!(8);
    assert_ne!(texts(&gateway.ask("/v1/chat/completions", &other).await), all);
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prompts_are_answered_in_order_with_their_prompts_if_wanted() {
    let gateway = gateway().await;
    let prompts = json!(["The borrow checker", [47, 917, 1797, 310]]);
    let mut several = json!({ "prompt": prompts, "n": 2, "max_tokens": 5, "temperature": 0, "echo": true });
    let response = gateway.ask("/v1/completions", &several).await;
    let texts: Vec<&str> =
        response["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 4);
    assert!(texts[0].starts_with("The borrow checker") && texts[2].starts_with("Ownership is"), "{texts:?}");
    assert!(texts[0] == texts[1] && texts[2] == texts[3], "greedy choices are the same");
    let body = json!({ "prompt": "The borrow checker", "max_tokens": 5, "temperature": 0 });
    let alone = gateway.ask("/v1/completions", &body).await;
    assert_eq!(format!("The borrow checker{}", alone["choices"][0]["text"].as_str().unwrap()), texts[0]);
    let usage = &response["usage"];
    assert_eq!(usage["completion_tokens"], 20);
    let counted = gateway.ask("/tokenize", &json!({ "prompt": "The borrow checker" })).await;
    assert_eq!(usage["prompt_tokens"], counted["count"].as_u64().unwrap() + 4, "each prompt counts once");
    several["echo"] = json!(false);
    let streamed = gateway.stream("/v1/completions", &several).await;
    let of = |index: usize| -> String {
        let own = streamed.iter().filter(|event| event["choices"][0]["index"] == index);
        own.filter_map(|event| event["choices"][0]["text"].as_str()).collect()
    };
    assert_eq!(format!("Ownership is{}", of(3)), texts[3]);
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_text_go_both_ways() {
    let gateway = gateway().await;
    let tokens = gateway.ask("/tokenize", &json!({ "prompt": "Ownership is", "return_token_strs": true })).await;
    assert_eq!(
        (&tokens["tokens"], &tokens["count"], &tokens["max_model_len"]),
        (&json!([47, 917, 1797, 310]), &json!(4), &json!(1024))
    );
    assert_eq!(tokens["token_strs"].as_array().unwrap().len(), 4);
    let text = gateway.ask("/detokenize", &json!({ "tokens": tokens["tokens"] })).await;
    assert_eq!(text, json!({ "prompt": "Ownership is" }));
    let chat = gateway.ask("/tokenize", &json!({ "messages": user("Ownership is") })).await;
    let text = gateway.ask("/detokenize", &json!({ "tokens": chat["tokens"] })).await;
    assert_eq!(text["prompt"], "Ownership is\n\n");
    for (path, body) in [
        ("/tokenize", json!({})),
        ("/tokenize", json!({ "prompt": ["a", "b"] })),
        ("/tokenize", json!({ "prompt": "a", "messages": user("b") })),
        ("/detokenize", json!({ "tokens": "a" })),
        ("/detokenize", json!({ "tokens": [2048] })),
    ] {
        let (status, response) = call(gateway.address, "POST", path, Some(body)).await.unwrap();
        assert_eq!((status, &response["error"]["code"]), (400, &json!("invalid_value")), "{path} {response}");
    }
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_chat_cannot_keep_is_refused_by_name() {
    let gateway = gateway().await;
    let with = |field: &str, value: Value| {
        let mut body = json!({ "messages": user("x") });
        body[field] = value;
        body
    };
    let said = |message: Value| json!({ "messages": [message] });
    let (wrong, not_supported) = ("invalid_value", "unsupported_parameter");
    let image = json!({ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "x" } }] });
    let call_made = json!({ "role": "assistant", "content": null, "tool_calls": [{ "id": "1" }] });
    for (body, code, param) in [
        (json!({}), wrong, "messages"),
        (json!({ "messages": [] }), wrong, "messages"),
        (json!({ "messages": "x" }), wrong, "messages"),
        (json!({ "messages": ["x"] }), wrong, "messages"),
        (said(json!({ "role": "nobody", "content": "x" })), wrong, "messages[0].role"),
        (said(json!({ "content": "x" })), wrong, "messages[0].role"),
        (said(json!({ "role": "user" })), wrong, "messages[0].content"),
        (said(json!({ "role": "user", "content": 7 })), wrong, "messages[0].content"),
        (said(image), not_supported, "messages[0].content"),
        (said(call_made), not_supported, "messages[0].tool_calls"),
        (with("tools", json!([{ "type": "function" }])), not_supported, "tools"),
        (with("tool_choice", json!("required")), not_supported, "tool_choice"),
        (with("functions", json!([{}])), not_supported, "functions"),
        (with("response_format", json!({ "type": "json_object" })), not_supported, "response_format"),
        (with("echo", json!(true)), not_supported, "echo"),
        (with("n", json!(129)), wrong, "n"),
        (with("n", json!(0)), wrong, "n"),
        (with("logprobs", json!(2)), wrong, "logprobs"),
        (with("top_logprobs", json!(2)), wrong, "top_logprobs"),
        (with("max_tokens", json!(1024)), "context_length_exceeded", "messages"),
        (with("messages", user(&"x ".repeat(1 << 20))), "context_length_exceeded", "messages"),
    ] {
        let (status, response) = call(gateway.address, "POST", "/v1/chat/completions", Some(body)).await.unwrap();
        let error = &response["error"];
        assert_eq!(
            (status, error["code"].as_str(), error["param"].as_str()),
            (400, Some(code), Some(param)),
            "{error}"
        );
    }
    let body = json!({ "prompt": vec!["x"; 20], "n": 20 });
    let (status, response) = call(gateway.address, "POST", "/v1/completions", Some(body)).await.unwrap();
    assert_eq!((status, &response["error"]["param"]), (400, &json!("n")), "{response}");
    assert_eq!(gateway.cluster.nodes[0].services().board.living(), 0);
    gateway.cluster.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_every_choice() {
    let gateway = gateway().await;
    let body = json!({ "messages": user("x"), "n": 4, "ignore_eos": true, "stream": true }).to_string();
    let stream = TcpStream::connect(gateway.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let request =
        hyper::Request::post("/v1/chat/completions").header("host", "gateway").body(Full::new(Bytes::from(body)));
    let mut response = sender.send_request(request.unwrap()).await.unwrap().into_body();
    assert!(response.frame().await.unwrap().is_ok());
    let services = gateway.cluster.nodes[0].services();
    assert_eq!(services.board.living(), 4);
    connection.abort();
    drop(response);
    services.board.drained().await;
    assert!(services.journal.open_requests().unwrap().is_empty(), "their ends are in the log");
    let cancelled = r#"butterfly_tasks_total{model="tiny-rust",kind="chat",status="cancelled"} 4"#;
    while !services.telemetry.render(TextFormat::OpenMetrics).lines().any(|line| line == cancelled) {
        tokio::task::yield_now().await;
    }
    gateway.cluster.shutdown().await.unwrap();
}
