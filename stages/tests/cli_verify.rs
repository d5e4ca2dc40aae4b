//! The built program on receipts: what holds ends with 0; any byte that is changed, in any part, ends with 5 and the name
//! of that part.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use butterfly_verify::{
    Answer, Ballot, Digest, Epoch, EpochParts, Finish, Input, Limits, Member, Mode, NodeIndex, Params, PublicKey,
    Receipt, Request, RequestParts, Signer, SliceCertificate, SliceReplicas, Vote, boundary0,
};
use k256::ecdsa::SigningKey;
use serde_json::{Value, json};

const SLICES: u16 = 2;

/// A small cluster, a request, its answer, and the receipt that n0 and n2 vouch for.
struct Case {
    folder: tempfile::TempDir,
    bundle: Value,
}

impl Case {
    fn new(mode: Mode) -> Self {
        Self::of(request(mode), answer())
    }

    fn of(request: Request, answer: Answer) -> Self {
        let epoch = epoch(1);
        let receipt = receipt(&epoch, &request, &answer);
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("epoch.json"), epoch.to_json()).unwrap();
        fs::write(folder.path().join("other-epoch.json"), self::epoch(2).to_json()).unwrap();
        let bundle = json!({
            "request": request,
            "answer": answer,
            "receipt": receipt,
            "epoch": "of no use here",
        });
        Self { folder, bundle }
    }

    fn write(&self, name: &str, document: &Value) {
        fs::write(self.folder.path().join(name), document.to_string()).unwrap();
    }

    fn verify(&self, arguments: &[&str]) -> Output {
        verify(self.folder.path(), arguments)
    }

    /// Verifies a changed bundle, and says what is told about it.
    fn refused(&self, bundle: &Value) -> String {
        self.write("bundle.json", bundle);
        let output = self.verify(&["bundle.json", "--epoch", "epoch.json"]);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(5), "{message}{bundle:#}");
        assert!(output.stdout.is_empty());
        assert!(message.contains("does not hold"), "{message}");
        message
    }
}

fn verify(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_butterfly")).arg("verify").args(arguments).current_dir(folder).output().unwrap()
}

fn key(index: u16) -> SigningKey {
    SigningKey::from_slice(&[u8::try_from(index).unwrap() + 1; 32]).unwrap()
}

fn epoch(number: u64) -> Epoch {
    let roster = (0..3).map(|index| Member {
        id: format!("n{index}"),
        public_key: PublicKey(key(index).verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap()),
        domain: Some(format!("lab-{index}")),
    });
    let slices = (0..u32::from(SLICES)).map(|slice| SliceReplicas {
        first_layer: 4 * slice,
        last_layer: 4 * (slice + 1),
        replicas: (0..3).map(NodeIndex).collect(),
    });
    Epoch::new(EpochParts {
        cluster: "demo".to_owned(),
        number,
        max_byzantine: 1,
        roster: roster.collect(),
        model: "tiny".to_owned(),
        manifest: Digest([7; 32]),
        profile: "cpu-1".to_owned(),
        profile_digest: Digest([8; 32]),
        slices: slices.collect(),
        limits: Limits::default(),
    })
    .unwrap()
}

fn request(mode: Mode) -> Request {
    Request::new(RequestParts {
        client: "somebody".to_owned(),
        nonce: [9; 32],
        model: "tiny".to_owned(),
        mode,
        input: Input::Text { prompt: "Ownership is".to_owned(), tokens: vec![47, 917, 1797] },
        params: Params {
            max_tokens: 3,
            temperature: 0.5,
            stop: vec!["\n".to_owned()],
            logit_bias: vec![(5, -1.5)],
            ..Params::default()
        },
        now_ms: 1_000,
        expires_ms: 2_000,
    })
    .unwrap()
}

fn answer() -> Answer {
    Answer::Text {
        tokens: vec![266, 774, 351],
        text: b" the same as".to_vec(),
        finish: Finish::Length,
        prompt_tokens: 3,
        choice: 0,
    }
}

/// Signs both slices in one batch, so that every vote has a path.
fn receipt(epoch: &Epoch, request: &Request, answer: &Answer) -> Receipt {
    let (positions, input) = boundary0(request, answer).unwrap();
    let between = Digest([5; 32]);
    let ends = [(input, between), (between, answer.root())];
    let mut slices = vec![SliceCertificate { votes: Vec::new() }, SliceCertificate { votes: Vec::new() }];
    for index in if request.mode == Mode::None { vec![2] } else { vec![0, 2] } {
        let ballots = ends.iter().zip(0..SLICES).map(|((input_root, output_root), slice)| Ballot {
            vote: Vote {
                rd: request.digest(),
                slice,
                positions,
                input_root: *input_root,
                output_root: *output_root,
                tag: Digest([u8::try_from(index).unwrap(); 32]),
            },
            answer: (slice + 1 == SLICES).then(|| answer.clone()),
        });
        let signer = Signer::new(key(index), NodeIndex(index), epoch).unwrap();
        let sealed = signer.seal_ballots(ballots.collect()).unwrap();
        for (slice, ballot) in slices.iter_mut().zip(&sealed.ballots) {
            slice.votes.push(ballot.signed().clone());
        }
    }
    Receipt {
        version: 1,
        epoch: epoch.digest(),
        rd: request.digest(),
        mode: request.mode,
        answer_root: answer.root(),
        slices,
    }
}

/// Every leaf of a document, as JSON pointers.
fn leaves(value: &Value, pointer: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| leaves(value, &format!("{pointer}/{name}"), found))
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(at, value)| leaves(value, &format!("{pointer}/{at}"), found))
        }
        Value::Null => {}
        _ => found.push(pointer.to_owned()),
    }
}

/// One changed leaf: another digit, another letter, another number.
fn change(leaf: &mut Value) {
    *leaf = match leaf.take() {
        Value::String(text) if text.is_empty() => json!("x"),
        Value::String(mut text) => {
            let last = text.pop().unwrap();
            text.push(if last == '0' { '1' } else { '0' });
            json!(text)
        }
        Value::Bool(flag) => json!(!flag),
        Value::Number(number) => match number.as_u64() {
            Some(whole) => json!(whole + 1),
            None => json!(number.as_f64().unwrap() + 1.0),
        },
        other => panic!("{other} is no leaf"),
    };
}

/// What must be said of a change at this place.
fn parts(pointer: &str) -> Vec<String> {
    let steps: Vec<&str> = pointer.split('/').skip(1).collect();
    match steps.as_slice() {
        ["receipt", "slices", slice, "votes", vote, rest @ ..] => {
            let mut parts = vec![format!("slice {slice}")];
            match rest {
                // Which of two neighbours is wrong cannot be said where only their order is.
                ["signer"] => {}
                ["proof", "signature"] => parts.extend([format!("vote {vote}"), "signature".to_owned()]),
                ["proof", "path", ..] => parts.extend([format!("vote {vote}"), "path".to_owned()]),
                _ => parts.push(format!("vote {vote}")),
            }
            parts
        }
        ["receipt", "epoch"] => vec!["epoch".to_owned()],
        ["receipt", "version"] => vec!["version".to_owned()],
        ["receipt", "rd"] => vec!["rd".to_owned()],
        ["receipt", "answer_root"] => vec!["answer_root".to_owned()],
        ["receipt", ..] => vec!["receipt".to_owned()],
        [part, ..] => vec![(*part).to_owned()],
        [] => Vec::new(),
    }
}

#[test]
fn a_bundle_that_holds_says_who_vouches() {
    let case = Case::new(Mode::Full);
    case.write("bundle.json", &case.bundle);
    let output = case.verify(&["bundle.json", "--epoch", "epoch.json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    for expected in
        ["verified", "n0 of lab-0, n2 of lab-2", "Ownership is", " the same as", "slice 0", "slice 1", "cpu-1"]
    {
        assert!(text.contains(expected), "{expected} is missing from:\n{text}");
    }
    let output = case.verify(&["bundle.json", "--epoch", "epoch.json", "--json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["verified"], true);
    assert_eq!(document["slices"][1]["signers"], json!(["n0", "n2"]));
}

#[test]
fn any_changed_value_is_found_and_its_part_named() {
    let case = Case::new(Mode::Full);
    let mut pointers = Vec::new();
    for part in ["request", "answer", "receipt"] {
        leaves(&case.bundle[part], &format!("/{part}"), &mut pointers);
    }
    assert!(pointers.len() > 60, "{pointers:?}");
    for pointer in pointers {
        let mut bundle = case.bundle.clone();
        change(bundle.pointer_mut(&pointer).unwrap());
        let message = case.refused(&bundle);
        for part in parts(&pointer) {
            assert!(message.contains(&part), "{pointer} was changed, but not named as `{part}`: {message}");
        }
    }
}

#[test]
fn digits_that_are_none_are_found_where_they_are() {
    let case = Case::new(Mode::Full);
    for (pointer, part) in [
        ("/receipt/slices/1/votes/0/proof/signature", "slice 1: vote 0: signature"),
        ("/receipt/slices/0/votes/1/proof/path/0", "slice 0: vote 1: path"),
        ("/receipt/slices/0/votes/1/proof/root", "slice 0: vote 1: root"),
        ("/receipt/slices/1/votes/1/vote/tag", "slice 1: vote 1: vote"),
        ("/receipt/answer_root", "receipt"),
        ("/request/nonce", "request"),
    ] {
        let mut bundle = case.bundle.clone();
        let leaf = bundle.pointer_mut(pointer).unwrap();
        *leaf = json!(format!("g{}", &leaf.as_str().unwrap()[1..]));
        let message = case.refused(&bundle);
        assert!(message.contains(part), "{pointer}: {message}");
    }
}

/// What a bundle shows beside the certified answer must be the same, or a reader of the one would be shown the other.
#[test]
fn what_a_bundle_shows_in_a_plainer_form_is_compared() {
    let case = Case::new(Mode::Full);
    let mut bundle = case.bundle.clone();
    let is_length = bundle["answer"]["text"]["finish"] == "length";
    bundle["finish_reason"] = json!(if is_length { "stop" } else { "length" });
    assert!(case.refused(&bundle).contains("finish_reason"));
    let mut bundle = case.bundle.clone();
    bundle["text"] = json!("something else");
    assert!(case.refused(&bundle).contains("text does not hold"));
}

#[test]
fn a_bundle_without_a_part_is_none() {
    let case = Case::new(Mode::Full);
    for part in ["request", "answer"] {
        let mut bundle = case.bundle.clone();
        bundle.as_object_mut().unwrap().remove(part);
        assert!(case.refused(&bundle).contains(&format!("{part} does not hold: missing")));
    }
    for votes in [0, 1] {
        let mut bundle = case.bundle.clone();
        bundle["receipt"]["slices"][1]["votes"].as_array_mut().unwrap().truncate(votes);
        assert!(case.refused(&bundle).contains("slice 1: count"));
    }
    let text = case.bundle.to_string();
    let doubled = text.replacen('{', &format!("{{\"answer\":{},", case.bundle["answer"]), 1);
    fs::write(case.folder.path().join("doubled.json"), doubled).unwrap();
    let output = case.verify(&["doubled.json", "--epoch", "epoch.json"]);
    assert_eq!(output.status.code(), Some(5), "no reader may see another answer than the one that is judged");
    fs::write(case.folder.path().join("cut.json"), &text[..text.len() / 2]).unwrap();
    assert_eq!(case.verify(&["cut.json", "--epoch", "epoch.json"]).status.code(), Some(5));
}

#[test]
fn the_epoch_is_the_readers_and_never_the_bundles() {
    let case = Case::new(Mode::Full);
    let mut bundle = case.bundle.clone();
    bundle["epoch"] = serde_json::from_str(&epoch(1).to_json()).unwrap();
    case.write("bundle.json", &bundle);
    let output = case.verify(&["bundle.json", "--epoch", "other-epoch.json"]);
    assert_eq!(output.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&output.stderr).contains("epoch does not hold"));
    assert_eq!(case.verify(&["bundle.json"]).status.code(), Some(2), "there is no default for whom to trust");
    case.write("broken-epoch.json", &json!({ "cluster": "demo" }));
    assert_eq!(case.verify(&["bundle.json", "--epoch", "broken-epoch.json"]).status.code(), Some(5));
}

#[test]
fn an_embedding_is_compared_with_the_one_whose_receipt_it_is() {
    let values = vec![1.0_f32, -2.0];
    let mut parts = request(Mode::Full).parts().clone();
    parts.params = Params { max_tokens: 0, ..Params::default() };
    let request = Request::new(parts).unwrap();
    let rd = request.digest().to_string();
    let case = Case::of(request, Answer::Vector { values });
    case.write("sent.json", &json!({"model": "tiny", "input": ["another text", "Ownership is"], "user": "me"}));
    let judge = |embedding: Value, ids: Value| {
        let data = json!([{"index": 0, "embedding": [0.5, 0.5]}, {"index": 1, "embedding": embedding}]);
        case.write("received.json", &json!({"model": "tiny", "data": data, "butterfly": {"receipt_ids": ids}}));
        let files = ["bundle.json", "--epoch", "epoch.json", "--request", "sent.json", "--response", "received.json"];
        case.write("bundle.json", &case.bundle);
        let output = case.verify(&files);
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    for right in [json!([1.0, -2.0]), json!("AACAPwAAAMA=")] {
        let (status, text) = judge(right, json!(["other", rd]));
        assert_eq!(status, Some(0), "{text}");
        assert!(text.contains("response.embedding") && text.contains("request.input"), "{text}");
    }
    for wrong in [json!([1.0, -2.5]), json!("AACAPwAAAMB="), json!("AACAPwAAAME="), json!(null)] {
        let (status, text) = judge(wrong.clone(), json!(["other", rd]));
        assert_eq!(status, Some(5), "{wrong}: {text}");
        assert!(text.contains("embedding"), "{text}");
    }
    let (status, text) = judge(json!([1.0, -2.0]), json!(["other", "another"]));
    assert_eq!(status, Some(5), "{text}");
}

#[test]
fn a_receipt_alone_takes_the_request_and_the_answer_from_files() {
    let case = Case::new(Mode::Full);
    case.write("receipt.json", &case.bundle["receipt"]);
    case.write("request.json", &case.bundle["request"]);
    case.write("answer.json", &case.bundle["answer"]);
    let all = ["receipt.json", "--epoch", "epoch.json", "--request", "request.json", "--response", "answer.json"];
    let output = case.verify(&all);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("verified"));

    let output = case.verify(&all[..3]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.starts_with("verified"), "votes alone verify no answer");
    assert!(text.contains("no answer was checked"), "{text}");

    let mut other = case.bundle["answer"].clone();
    other["text"]["tokens"][0] = json!(1);
    case.write("answer.json", &other);
    let output = case.verify(&all);
    assert_eq!(output.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&output.stderr).contains("answer does not hold"));
}

#[test]
fn what_a_client_sent_and_received_is_compared_with_what_was_certified() {
    let case = Case::new(Mode::Full);
    case.write("bundle.json", &case.bundle);
    let sent = json!({
        "model": "tiny", "prompt": "Ownership is", "max_tokens": 3, "temperature": 0.5, "stop": "\n",
        "logit_bias": { "5": -1.5 }, "stream": true, "butterfly": { "verify": "full" },
    });
    let received = json!({
        "id": "cmpl-1",
        "model": "tiny",
        "choices": [{ "index": 0, "text": " the same as", "finish_reason": "length", "token_ids": [266, 774, 351] }],
        "usage": { "prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6 },
    });
    let judge = |sent: &Value, received: &Value| {
        case.write("sent.json", sent);
        case.write("received.json", received);
        let files = ["bundle.json", "--epoch", "epoch.json", "--request", "sent.json", "--response", "received.json"];
        let output = case.verify(&files);
        let all = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(all).unwrap())
    };
    let (status, text) = judge(&sent, &received);
    assert_eq!(status, Some(0), "{text}");
    for field in ["request.prompt", "request.temperature", "response.text", "response.token_ids", "usage.total_tokens"]
    {
        assert!(text.contains(field), "{field} was not compared: {text}");
    }
    assert!(text.contains("not compared: request.stream"), "{text}");

    for (field, value) in [
        ("model", json!("large")),
        ("prompt", json!("Borrowing is")),
        ("max_tokens", json!(4)),
        ("temperature", json!(0.25)),
        ("stop", json!(["\n", "."])),
        ("logit_bias", json!({ "5": 1.5 })),
        ("butterfly", json!({ "verify": "quorum" })),
    ] {
        let mut other = sent.clone();
        other[field] = value;
        let (status, text) = judge(&other, &received);
        assert_eq!(status, Some(5), "{field}: {text}");
        assert!(text.contains(&format!("request: {field} does not hold")), "{text}");
    }
    for (pointer, value, part) in [
        ("/choices/0/text", json!(" not the same"), "response: text"),
        ("/choices/0/finish_reason", json!("stop"), "response: finish_reason"),
        ("/choices/0/token_ids/1", json!(775), "response: token_ids"),
        ("/choices/0/index", json!(1), "response: choices"),
        ("/model", json!("large"), "response: model"),
        ("/usage/completion_tokens", json!(4), "response: usage.completion_tokens"),
    ] {
        let mut other = received.clone();
        *other.pointer_mut(pointer).unwrap() = value;
        let (status, text) = judge(&sent, &other);
        assert_eq!(status, Some(5), "{pointer}: {text}");
        assert!(text.contains(part), "{text}");
    }
    let (status, text) = judge(&sent, &json!({ "error": { "message": "the queue is full" } }));
    assert_eq!(status, Some(5));
    assert!(text.contains("the queue is full"));
    assert_eq!(judge(&sent, &json!({ "id": "cmpl-1" })).0, Some(5), "a response with no answer in it proves nothing");
}

#[test]
fn one_nodes_word_is_never_called_verified() {
    let case = Case::new(Mode::None);
    case.write("bundle.json", &case.bundle);
    let output = case.verify(&["bundle.json", "--epoch", "epoch.json"]);
    assert_eq!(output.status.code(), Some(5));
    assert!(String::from_utf8_lossy(&output.stderr).contains("quorum does not hold"));
    let output = case.verify(&["bundle.json", "--epoch", "epoch.json", "--one-vote"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("one node's word") && !text.contains("verified"), "{text}");
}

#[test]
fn a_chat_is_compared_with_what_was_certified() {
    let mut parts = RequestParts::clone(request(Mode::Full).parts());
    parts.input = Input::Chat {
        messages: r#"[{"role":"system","content":"Be brief."},{"role":"user","content":"What is it?"}]"#.to_owned(),
        tokens: vec![47, 917, 1797],
    };
    parts.params.choice = 1;
    parts.params.logprobs = Some(2);
    let mut answer = answer();
    if let Answer::Text { choice, .. } = &mut answer {
        *choice = 1;
    }
    let case = Case::of(Request::new(parts).unwrap(), answer);
    case.write("bundle.json", &case.bundle);
    let sent = json!({
        "messages": [
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "What is " }, { "type": "text", "text": "it?" }] },
        ],
        "max_completion_tokens": 3, "temperature": 0.5, "n": 2, "logprobs": true, "top_logprobs": 2, "stop": ["\n"],
        "logit_bias": { "5": -1.5 },
    });
    let choice = |index: u64, text: &str| {
        let message = json!({ "role": "assistant", "content": text, "refusal": null });
        json!({ "index": index, "message": message, "finish_reason": "length" })
    };
    let received = json!({ "choices": [choice(0, "another"), choice(1, " the same as")] });
    let judge = |sent: &Value, received: &Value| {
        case.write("sent.json", sent);
        case.write("received.json", received);
        let files = ["bundle.json", "--epoch", "epoch.json", "--request", "sent.json", "--response", "received.json"];
        let output = case.verify(&files);
        let all = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(all).unwrap())
    };
    let (code, text) = judge(&sent, &received);
    assert_eq!(code, Some(0), "{text}");
    for compared in ["request.messages", "request.max_completion_tokens", "request.top_logprobs", "response.message"] {
        assert!(text.contains(compared), "{compared} is missing from {text}");
    }
    for (pointer, changed, part) in [
        ("/messages/0/content", json!("Be long."), "request: messages"),
        ("/messages/1/role", json!("assistant"), "request: messages"),
        ("/messages/1/name", json!("eve"), "request: messages"),
        ("/top_logprobs", json!(3), "logprobs"),
        ("/n", json!(1), "request: n"),
    ] {
        let mut sent = sent.clone();
        if let Some(value) = sent.pointer_mut(pointer) {
            *value = changed;
        } else {
            sent["messages"][1]["name"] = changed;
        }
        let (code, text) = judge(&sent, &received);
        assert_eq!(code, Some(5), "{pointer}");
        assert!(text.contains(part), "{pointer}: {text}");
    }
    let mut other = received.clone();
    other["choices"][1]["message"]["content"] = json!(" another");
    let (code, text) = judge(&sent, &other);
    assert!(code == Some(5) && text.contains("response: message"), "{text}");
}

/// A completion that was asked for with its prompt before it.
#[test]
fn an_echoed_prompt_is_told_from_the_answer() {
    let mut parts = request(Mode::Full).parts().clone();
    let Input::Text { prompt, .. } = &parts.input else { panic!("{:?}", parts.input) };
    let prompt = prompt.clone();
    (parts.params.logprobs, parts.params.prompt_logprobs) = (Some(2), true);
    let case = Case::of(Request::new(parts).unwrap(), answer());
    case.write("bundle.json", &case.bundle);
    let Answer::Text { text, .. } = answer() else { panic!("a text") };
    let text = String::from_utf8(text).unwrap();
    let judge = |echo: bool, text: &str| {
        case.write("sent.json", &json!({ "prompt": prompt, "echo": echo, "logprobs": 2 }));
        case.write("received.json", &json!({ "choices": [{ "index": 0, "text": text, "finish_reason": "length" }] }));
        let files = ["bundle.json", "--epoch", "epoch.json", "--request", "sent.json", "--response", "received.json"];
        case.verify(&files).status.code()
    };
    assert_eq!(judge(true, &format!("{prompt}{text}")), Some(0));
    assert_eq!(judge(true, &format!("{prompt}{text}x")), Some(5));
    assert_eq!(judge(true, &format!("x{prompt}{text}")), Some(5));
    assert_eq!(judge(false, &text), Some(5), "another request");
}
