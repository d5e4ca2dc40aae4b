//! Properties of the stop rule and of the text that is released.

use butterfly_verify::{Input, Mode, Params, RequestParts};
use proptest::prelude::*;

use super::super::manifest::Architecture;
use super::super::tokenizer::tests::bytes_tokenizer;
use super::*;

const EOS: u32 = 257;

fn manifest(context_length: usize) -> Manifest {
    Manifest {
        name: "m".into(),
        architecture: Architecture::Llama,
        layers: 1,
        hidden: 4,
        vocabulary: 300,
        context_length,
        input_width: 0,
        output_width: 0,
        bos: None,
        eos: vec![EOS],
        root: [0; 32],
        layer_costs: vec![],
    }
}

fn request(params: Params) -> Request {
    Request::new(RequestParts {
        client: String::new(),
        nonce: [0; 32],
        model: "m".into(),
        mode: Mode::Full,
        input: Input::Tokens { tokens: vec![1, 2, 3] },
        params,
        now_ms: 0,
        expires_ms: 1,
    })
    .unwrap()
}

fn start(stop: &[&str], max_tokens: u32) -> Generation {
    let stop = stop.iter().map(|stop| (*stop).to_owned()).collect();
    let request = request(Params { max_tokens, stop, ..Params::default() });
    Generation::new(&request, &manifest(1000), Some(&bytes_tokenizer()))
}

/// Feeds one token per byte until the end; gives the released pieces.
fn feed(generation: &mut Generation, bytes: &[u8]) -> Vec<String> {
    let mut pieces = Vec::new();
    for byte in bytes {
        let finish = generation.push(u32::from(*byte));
        pieces.push(generation.take_text());
        if finish.is_some() {
            break;
        }
    }
    pieces
}

fn text(generation: &Generation) -> (Vec<u8>, Finish) {
    match generation.answer().unwrap() {
        Answer::Text { text, finish, tokens, prompt_tokens, choice } => {
            assert_eq!((tokens.as_slice(), prompt_tokens, choice), (generation.tokens(), 3, 0));
            (text, finish)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn length_ends_an_answer_by_tokens_and_by_context() {
    let mut generation = start(&[], 3);
    assert_eq!(feed(&mut generation, b"abcdef"), ["a", "b", "c"]);
    assert_eq!(text(&generation), (b"abc".to_vec(), Finish::Length));
    assert_eq!(generation.push(120), Some(Finish::Length));
    assert_eq!(generation.tokens().len(), 3);

    let request = request(Params { max_tokens: 100, ..Params::default() });
    let mut generation = Generation::new(&request, &manifest(5), Some(&bytes_tokenizer()));
    assert_eq!(feed(&mut generation, b"abcdef").len(), 2);
    assert_eq!(text(&generation).1, Finish::Length);
}

#[test]
fn end_of_sequence_ends_an_answer_unless_it_is_ignored() {
    let mut generation = start(&[], 9);
    assert_eq!((generation.push(97), generation.push(EOS)), (None, Some(Finish::Stop)));
    assert_eq!(text(&generation), (b"a".to_vec(), Finish::Stop));
    assert_eq!(generation.tokens(), [97, EOS]);

    let request = request(Params { max_tokens: 3, ignore_eos: true, ..Params::default() });
    let mut generation = Generation::new(&request, &manifest(1000), Some(&bytes_tokenizer()));
    assert_eq!([97, EOS, 98].map(|token| generation.push(token)), [None, None, Some(Finish::Length)]);
    assert_eq!(text(&generation).0, b"ab");
}

#[test]
fn the_earliest_match_cuts_the_text_even_within_a_token() {
    // Token 256 is `ab`, 258 is `a tool`.
    let mut generation = start(&["ool", "to"], 9);
    assert_eq!((generation.push(120), generation.push(258)), (None, Some(Finish::Stop)));
    assert_eq!(text(&generation), (b"xa ".to_vec(), Finish::Stop));
    assert_eq!(generation.take_text(), "xa ");

    let mut generation = start(&["bab"], 9);
    assert_eq!([256, 97, 256].map(|token| generation.push(token)), [None, None, None]);
    assert_eq!([256].map(|token| generation.push(token)), [Some(Finish::Stop)]);
    assert_eq!(text(&generation).0, b"abaa");
}

#[test]
fn what_may_become_a_stop_string_is_held_back_until_it_cannot() {
    let mut generation = start(&["END"], 9);
    assert_eq!(feed(&mut generation, b"aEENDx"), ["a", "", "E", "", ""]);
    assert_eq!(text(&generation), (b"aE".to_vec(), Finish::Stop));

    let mut generation = start(&["END"], 4);
    assert_eq!(feed(&mut generation, b"xEN!"), ["x", "", "", "EN!"]);
    let mut generation = start(&["END"], 3);
    // The end releases what was held.
    assert_eq!(feed(&mut generation, b"xEN"), ["x", "", "EN"]);
    assert_eq!(text(&generation), (b"xEN".to_vec(), Finish::Length));
}

#[test]
fn a_character_is_released_whole() {
    let mut generation = start(&[], 20);
    let crab = "🦀".as_bytes();
    assert_eq!(feed(&mut generation, crab), ["", "", "", "🦀"]);
    // A character that breaks off is one replacement character, as soon as that is certain.
    assert_eq!(feed(&mut generation, &crab[..2]), ["", ""]);
    assert_eq!(feed(&mut generation, b"a"), ["\u{fffd}a"]);
    assert_eq!(feed(&mut generation, &crab[..3]), ["", "", ""]);
    generation.push(EOS);
    assert_eq!(generation.take_text(), "\u{fffd}");
}

#[test]
fn logits_that_are_not_finite_end_the_answer_as_numeric() {
    let mut generation = start(&[], 9);
    assert_eq!(generation.sample(&mut [0.0, 2.0, 1.0]), Ok(1.into()));
    generation.push(1);
    assert!(generation.answer().is_none());
    assert_eq!(generation.sample(&mut [0.0, f32::NAN, 1.0]), Err(Numeric));
    assert_eq!(generation.push(1), None);
    let answer = generation.answer().unwrap();
    assert_eq!(answer, Answer::Numeric { tokens: vec![1], prompt_tokens: 3, choice: 0 });

    let mut generation = start(&[], 1);
    generation.push(1);
    generation.end_numeric();
    assert!(matches!(generation.answer(), Some(Answer::Text { .. })));
}

#[test]
fn draws_depend_on_seed_choice_and_position_alone() {
    let draw = |seed: u8, choice: u32, generated: &[u32]| {
        let params = Params { temperature: 1.0, seed: [seed; 32], choice, max_tokens: 99, ..Params::default() };
        let mut generation = Generation::new(&request(params), &manifest(1000), None);
        generated.iter().for_each(|token| {
            generation.push(*token);
        });
        (0..8).map(|_| generation.sample(&mut [0.0; 256]).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(draw(1, 0, &[5]), draw(1, 0, &[9]));
    let draws = [draw(1, 0, &[]), draw(2, 0, &[]), draw(1, 1, &[]), draw(1, 0, &[5])];
    assert!((0..4).all(|left| (0..left).all(|right| draws[left] != draws[right])));
}

#[test]
fn without_a_tokenizer_there_are_tokens_and_no_text() {
    let request = request(Params { max_tokens: 2, stop: vec!["a".into()], ..Params::default() });
    let mut generation = Generation::new(&request, &manifest(1000), None);
    assert_eq!((generation.push(97), generation.push(97)), (None, Some(Finish::Length)));
    assert_eq!(text(&generation).0, b"");
}

proptest! {
    /// Released pieces joined are the answer's text, and no piece shows a stop string or a part of one that came true.
    #[test]
    fn released_pieces_join_to_the_text(
        bytes in prop::collection::vec(prop_oneof![
            3 => prop::sample::select(b"abE".to_vec()),
            1 => prop::sample::select("é🦀\u{fffd}".as_bytes().to_vec()),
            1 => any::<u8>(),
        ], 0..40),
        stops in prop::collection::vec("[abEé]{1,4}", 0..4),
        every in 1_usize..4,
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let mut generation = start(&stops, 1000);
        let mut shown = String::new();
        let mut ended = false;
        for (index, byte) in bytes.iter().enumerate() {
            ended = generation.push(u32::from(*byte)).is_some();
            if index % every == 0 {
                shown += &generation.take_text();
                prop_assert!(stops.iter().all(|stop| !shown.contains(stop)));
            }
            if ended {
                break;
            }
        }
        if !ended {
            generation.push(EOS);
        }
        shown += &generation.take_text();
        let (text, _) = text(&generation);
        // The definition: cut the bytes at the first stop string that is complete after the fewest bytes.
        let complete = (0..=bytes.len()).find_map(|end| {
            let starts = stops.iter().filter(|stop| bytes[..end].ends_with(stop.as_bytes())).map(|stop| end - stop.len());
            starts.min()
        });
        prop_assert_eq!(&text[..], &bytes[..complete.unwrap_or(bytes.len())]);
        prop_assert_eq!(shown, String::from_utf8_lossy(&text));
        prop_assert_eq!(generation.take_text(), "");
    }
}
