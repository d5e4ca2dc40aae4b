//! Requests and answers have one encoding each, and hostile bytes and JSON are refused, never worse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use butterfly_verify::{
    Answer, BoundaryRoot, Epoch, EpochParts, Evidence, Finish, Input, Limits, Member, Mode, NodeIndex, Params,
    PublicKey, Receipt, Request, RequestParts, SliceReplicas, boundary0,
};
use k256::ecdsa::SigningKey;
use proptest::prelude::*;

fn finite() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |value| value.is_finite())
}

fn tokens() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(any::<u32>(), 1..40)
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        (".{0,30}", tokens()).prop_map(|(prompt, tokens)| Input::Text { prompt, tokens }),
        (".{0,30}", tokens()).prop_map(|(messages, tokens)| Input::Chat { messages, tokens }),
        tokens().prop_map(|tokens| Input::Tokens { tokens }),
        proptest::collection::vec(finite(), 1..40).prop_map(|values| Input::Vector { values }),
    ]
}

prop_compose! {
    fn params()(
        max_tokens in 1..1000_u32,
        temperature in finite(),
        top_k in any::<u32>(),
        top_p in 0.0..=1.0_f32,
        penalties in (finite(), finite()),
        bias in proptest::collection::btree_map(any::<u32>(), finite(), 0..8),
        seed in any::<[u8; 32]>(),
        stop in proptest::collection::vec(".{1,10}", 0..4),
        ignore_eos in any::<bool>(),
        choice in any::<u32>(),
        logprobs in proptest::option::of(0..=20_u8),
        prompt_logprobs in any::<bool>(),
    ) -> Params {
        Params {
            max_tokens,
            temperature: temperature.abs(),
            top_k,
            top_p,
            presence_penalty: penalties.0,
            frequency_penalty: penalties.1,
            logit_bias: bias.into_iter().collect(),
            seed,
            stop,
            ignore_eos,
            choice,
            logprobs,
            prompt_logprobs: prompt_logprobs && logprobs.is_some(),
        }
    }
}

prop_compose! {
    fn request()(
        client in ".{0,20}",
        nonce in any::<[u8; 32]>(),
        model in ".{0,20}",
        mode in prop_oneof![Just(Mode::None), Just(Mode::Quorum), Just(Mode::Full)],
        input in input(),
        params in params(),
        now_ms in 0..u64::MAX - 600_000,
        ahead in 0..=600_000_u64,
    ) -> Request {
        let expires_ms = now_ms + ahead;
        Request::new(RequestParts { client, nonce, model, mode, input, params, now_ms, expires_ms }).unwrap()
    }
}

fn answer() -> impl Strategy<Value = Answer> {
    let text = (
        tokens(),
        proptest::collection::vec(any::<u8>(), 0..60),
        prop_oneof![Just(Finish::Stop), Just(Finish::Length)],
        any::<u32>(),
        any::<u32>(),
    );
    prop_oneof![
        text.prop_map(|(tokens, text, finish, prompt_tokens, choice)| Answer::Text {
            tokens,
            text,
            finish,
            prompt_tokens,
            choice
        }),
        proptest::collection::vec(finite(), 0..40).prop_map(|values| Answer::Vector { values }),
        (tokens(), any::<u32>(), any::<u32>()).prop_map(|(tokens, prompt_tokens, choice)| Answer::Numeric {
            tokens,
            prompt_tokens,
            choice
        }),
    ]
}

fn epoch() -> Epoch {
    let key = |node: u8| SigningKey::from_slice(&[node + 1; 32]).unwrap();
    let roster = (0..3).map(|node| Member {
        id: format!("n{node}"),
        public_key: PublicKey(key(node).verifying_key().to_sec1_point(true).as_bytes().try_into().unwrap()),
        domain: None,
    });
    Epoch::new(EpochParts {
        cluster: "test".to_owned(),
        number: 1,
        max_byzantine: 1,
        roster: roster.collect(),
        model: "test".to_owned(),
        manifest: [1; 32].into(),
        profile: "cpu-1".to_owned(),
        profile_digest: [2; 32].into(),
        slices: vec![SliceReplicas { first_layer: 0, last_layer: 2, replicas: (0..3).map(NodeIndex).collect() }],
        limits: Limits::default(),
    })
    .unwrap()
}

/// A header that gets hostile bytes past the first checks.
fn batch_like(purpose: u8, rest: Vec<u8>) -> Vec<u8> {
    [vec![1, purpose, 0, 0], rest].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_return_from_bytes_and_json(request in request()) {
        let bytes = request.encode();
        let decoded = Request::decode(&bytes).unwrap();
        prop_assert_eq!(decoded.parts(), request.parts());
        prop_assert_eq!(decoded.digest(), request.digest());
        prop_assert_eq!(decoded.encode(), bytes);
        let parsed = Request::from_json(&request.to_json()).unwrap();
        prop_assert_eq!(parsed.digest(), request.digest());
    }

    #[test]
    fn answers_return_from_bytes_and_json(answer in answer()) {
        let bytes = answer.encode();
        let decoded = Answer::decode(&bytes).unwrap();
        prop_assert_eq!(decoded.encode(), bytes);
        prop_assert_eq!(decoded.root(), answer.root());
        prop_assert_eq!(Answer::from_json(&answer.to_json()).unwrap().root(), answer.root());
    }

    #[test]
    fn changed_bytes_decode_to_themselves_or_not_at_all(
        request in request(),
        answer in answer(),
        at in any::<usize>(),
        byte in any::<u8>(),
        cut in any::<usize>(),
    ) {
        for mut bytes in [request.encode(), answer.encode()] {
            let at = at % bytes.len();
            bytes[at] = byte;
            if cut % 4 == 0 {
                bytes.truncate(cut % (bytes.len() + 1));
            }
            if let Ok(decoded) = Request::decode(&bytes) {
                prop_assert_eq!(decoded.encode(), bytes.clone());
            }
            if let Ok(decoded) = Answer::decode(&bytes) {
                prop_assert_eq!(decoded.encode(), bytes.clone());
            }
            bytes.push(byte);
            prop_assert!(Request::decode(&bytes).is_err() || Answer::decode(&bytes).is_err());
        }
    }

    #[test]
    fn noise_is_refused(noise in proptest::collection::vec(any::<u8>(), 0..400), sender in 0..5_u16) {
        let epoch = epoch();
        let sender = NodeIndex(sender);
        for bytes in [noise.clone(), batch_like(16, noise.clone()), batch_like(17, noise.clone())] {
            prop_assert!(epoch.open_ballots(&bytes, sender).is_err());
            prop_assert!(epoch.open_pre_prepares(&bytes, sender).is_err());
        }
        if let Ok(request) = Request::decode(&noise) {
            prop_assert_eq!(request.encode(), noise.clone());
        }
        let text = String::from_utf8_lossy(&noise);
        prop_assert!(Receipt::from_json(&text).is_err());
        prop_assert!(Evidence::from_json(&text).is_err());
        prop_assert!(Epoch::from_json(&text).is_err());
        prop_assert!(Request::from_json(&text).is_err());
        prop_assert!(Answer::from_json(&text).is_err());
    }
}

#[test]
fn rules_of_a_request_hold_in_every_form() {
    let base = || RequestParts {
        client: String::new(),
        nonce: [0; 32],
        model: "m".to_owned(),
        mode: Mode::Full,
        input: Input::Tokens { tokens: vec![1] },
        params: Params::default(),
        now_ms: 5,
        expires_ms: 10,
    };
    let refused: [fn(&mut RequestParts); 14] = [
        |parts| parts.client = "x".repeat(257),
        |parts| parts.input = Input::Tokens { tokens: vec![] },
        |parts| parts.input = Input::Vector { values: vec![] },
        |parts| parts.input = Input::Vector { values: vec![f32::NAN] },
        |parts| parts.params.max_tokens = u32::MAX,
        |parts| parts.params.temperature = -1.0,
        |parts| parts.params.top_p = f32::NAN,
        |parts| parts.params.presence_penalty = f32::INFINITY,
        |parts| parts.params.logit_bias = vec![(2, 0.0), (1, 0.0)],
        |parts| parts.params.logit_bias = vec![(1, 0.0), (1, 0.0)],
        |parts| parts.params.stop = vec![String::new()],
        |parts| parts.params.prompt_logprobs = true,
        |parts| parts.expires_ms = 4,
        |parts| parts.expires_ms = 5 + 600_001,
    ];
    assert!(Request::new(base()).is_ok());
    for (rule, break_it) in refused.iter().enumerate() {
        let mut parts = base();
        break_it(&mut parts);
        assert!(Request::new(parts).is_err(), "rule {rule}");
    }
    // Nothing is generated: the answer is the embedding of the tokens, or that it has none.
    let embedding = RequestParts { params: Params { max_tokens: 0, ..Params::default() }, ..base() };
    let embedding = Request::new(embedding).unwrap();
    let vector = Answer::Vector { values: vec![0.5] };
    let numeric = |tokens: Vec<u32>, prompt_tokens| Answer::Numeric { tokens, prompt_tokens, choice: 0 };
    let text = Answer::Text { tokens: vec![], text: vec![], finish: Finish::Length, prompt_tokens: 1, choice: 0 };
    let generating = Request::new(base()).unwrap();
    let scoring = Params { max_tokens: 0, logprobs: Some(0), prompt_logprobs: true, ..Params::default() };
    let scoring = Request::new(RequestParts { params: scoring, ..base() }).unwrap();
    let one = Answer::Text { tokens: vec![4], text: vec![], finish: Finish::Length, prompt_tokens: 1, choice: 0 };
    for (request, answer, fits) in [
        (&embedding, &vector, true),
        (&embedding, &numeric(vec![], 1), true),
        (&embedding, &numeric(vec![], 0), false),
        (&embedding, &numeric(vec![4], 1), false),
        (&embedding, &text, false),
        (&generating, &vector, false),
        (&generating, &text, false),
        (&scoring, &text, true),
        (&scoring, &one, false),
        (&scoring, &vector, false),
    ] {
        assert_eq!(answer.fits(request).is_ok(), fits, "{answer:?}");
    }
    let mut prompt = BoundaryRoot::new();
    prompt.push_token(1);
    assert_eq!(boundary0(&embedding, &vector).unwrap(), (1, prompt.root()));
    assert_eq!(boundary0(&scoring, &text).unwrap(), (1, prompt.root()));
    let vector = RequestParts {
        input: Input::Vector { values: vec![-0.0] },
        params: Params { max_tokens: 0, ..Params::default() },
        ..base()
    };
    let vector = Request::new(vector).unwrap();
    assert_eq!(Request::from_json(&vector.to_json()).unwrap().digest(), vector.digest(), "minus zero stays itself");
}
