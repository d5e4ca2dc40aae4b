//! Frames: their bytes are fixed, their payload is aligned and copied once, and no bytes from a peer cause more than an error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fmt::Write as _;

use butterfly_engine::frame::{
    ALIGNMENT, Assembly, CONTROL_BYTES_MAX, Frame, FrameAssembler, FrameBuilder, FrameError, FrameKind, HEADER_BYTES,
    META_BYTES_MAX, PAYLOAD_BYTES_MAX,
};
use bytes::Bytes;
use proptest::prelude::*;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Debug, PartialEq)]
struct Meta {
    request: [u8; 32],
    slice: u16,
    positions: Vec<u32>,
    label: Option<String>,
}

fn meta() -> Meta {
    Meta { request: [7; 32], slice: 3, positions: vec![1, 2, 0x0102_0304], label: Some("rows of the boundary".into()) }
}

fn aligned(bytes: &[u8]) -> AlignedVec<ALIGNMENT> {
    let mut vec = AlignedVec::with_capacity(bytes.len());
    vec.extend_from_slice(bytes);
    vec
}

fn hex_lines(bytes: &[u8]) -> String {
    bytes.chunks(32).fold(String::new(), |mut text, line| {
        line.iter().for_each(|byte| write!(text, "{byte:02x}").unwrap());
        text.push('\n');
        text
    })
}

/// Also shows that no crate of the workspace has switched rkyv to another format, which features would do silently.
#[test]
fn bytes_of_a_frame_are_fixed() {
    let tensor = Frame::tensor(&meta(), b"payload").unwrap();
    insta::assert_snapshot!(hex_lines(tensor.as_bytes()), @"
    62666c7901000200000000005800000007000000000000000000000000000000
    0000000000000000000000000000000000000000000000000000000000000000
    010000000200000004030201726f7773206f662074686520626f756e64617279
    0707070707070707070707070707070707070707070707070707070707070707
    03000000bcffffff030000000100000094000000bcffffff0000000000000000
    0000000000000000000000000000000000000000000000000000000000000000
    7061796c6f6164
    ");
    let control = Frame::control(b"vote").unwrap();
    insta::assert_snapshot!(hex_lines(control.as_bytes()), @"
    62666c7901000100000000000000000004000000000000000000000000000000
    0000000000000000000000000000000000000000000000000000000000000000
    766f7465
    ");
}

#[test]
fn a_tensor_frame_gives_back_what_it_was_made_of() {
    let payload: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    let frame = Frame::tensor(&meta(), &payload).unwrap();
    assert_eq!(frame.kind(), FrameKind::Tensor);
    assert_eq!(frame.payload(), payload);
    assert_eq!(frame.payload().as_ptr() as usize % ALIGNMENT, 0);
    assert_eq!(frame.control_bytes(), None);
    let archived = frame.meta::<Meta>().unwrap();
    assert_eq!(rkyv::deserialize::<Meta, rkyv::rancor::Error>(archived).unwrap(), meta());
    assert_eq!(Frame::parse(aligned(frame.as_bytes())).unwrap(), frame);
}

#[test]
fn a_clone_shares_the_buffer() {
    let frame = Frame::tensor(&meta(), &[1; 4096]).unwrap();
    assert_eq!(frame.clone().payload().as_ptr(), frame.payload().as_ptr());
    assert_eq!(frame.payload_bytes().as_ptr(), frame.payload().as_ptr());
}

#[test]
fn a_payload_written_in_place_is_not_copied_again() {
    let mut builder = FrameBuilder::tensor(&meta(), 1 << 20).unwrap();
    builder.push(&[1; 100]).unwrap();
    let space = builder.payload_mut();
    assert_eq!((space.len(), space[99], space[100]), (1 << 20, 1, 0));
    space[1 << 19] = 9;
    let address = space.as_ptr();
    let frame = builder.finish().unwrap();
    assert_eq!(frame.payload().as_ptr(), address);
    assert_eq!(frame.payload()[1 << 19], 9);
}

#[test]
fn a_builder_insists_on_what_it_announced() {
    let mut builder = FrameBuilder::tensor(&(), 10).unwrap();
    assert_eq!(builder.push(&[0; 11]), Err(FrameError::Payload { found: 11, expected: 10 }));
    builder.push(&[0; 9]).unwrap();
    assert_eq!(builder.push(&[0; 2]), Err(FrameError::Payload { found: 11, expected: 10 }));
    assert_eq!(builder.finish(), Err(FrameError::Payload { found: 9, expected: 10 }));
}

#[test]
fn limits_hold_before_anything_is_allocated() {
    let too_long = |error| matches!(error, FrameError::TooLong { .. });
    assert!(too_long(FrameBuilder::tensor(&(), PAYLOAD_BYTES_MAX + 1).err().unwrap()));
    assert!(too_long(FrameBuilder::tensor(&(), usize::MAX).err().unwrap()));
    assert!(too_long(FrameBuilder::control(CONTROL_BYTES_MAX + 1).err().unwrap()));
    assert!(too_long(Frame::tensor(&vec![0_u8; META_BYTES_MAX], &[]).unwrap_err()));
    for (offset, length) in [(12, 4), (16, 8)] {
        let mut header = Frame::tensor(&meta(), &[]).unwrap().as_bytes()[..HEADER_BYTES].to_vec();
        header[offset..offset + length].fill(0xff);
        let mut stream = Bytes::from(header);
        assert!(too_long(FrameAssembler::new().advance(&mut stream).unwrap_err()));
    }
}

#[test]
fn metadata_of_another_type_or_kind_is_an_error() {
    let control = Frame::control(b"x").unwrap();
    assert_eq!(control.meta::<Meta>().err().unwrap(), FrameError::WrongKind { expected: FrameKind::Tensor });
    let other = Frame::tensor(&5_u8, &[]).unwrap();
    assert!(matches!(other.meta::<Meta>(), Err(FrameError::Meta { .. })));
}

#[test]
fn every_deviation_from_the_layout_is_named() {
    let frame = Frame::tensor(&meta(), b"payload").unwrap();
    let changed = |offset: usize, value: u8| {
        let mut bytes = aligned(frame.as_bytes());
        bytes[offset] = value;
        Frame::parse(bytes).unwrap_err()
    };
    assert_eq!(changed(0, b'B'), FrameError::Magic);
    assert_eq!(changed(4, 2), FrameError::Version { found: 2 });
    assert_eq!(changed(6, 9), FrameError::Kind { found: 9 });
    assert_eq!(changed(6, 1), FrameError::MetaInControl);
    for reserved in [7, 10, 11, 32, 63] {
        assert_eq!(changed(reserved, 1), FrameError::Padding);
    }
    let padding = frame.as_bytes().len() - b"payload".len() - 1;
    assert_eq!(changed(padding, 1), FrameError::Padding);
    let whole = frame.as_bytes();
    for length in 0..whole.len() {
        assert!(matches!(Frame::parse(aligned(&whole[..length])), Err(FrameError::Length { .. })));
    }
    assert!(matches!(Frame::parse(aligned(&[whole, &[0]].concat())), Err(FrameError::Length { .. })));
}

/// Feeds a stream in pieces of the given sizes.
fn assemble(stream: &[u8], sizes: &[usize]) -> Result<Vec<Frame>, FrameError> {
    let (mut assembler, mut frames, mut rest) = (FrameAssembler::new(), Vec::new(), stream);
    for &size in sizes.iter().cycle() {
        let (piece, after) = rest.split_at(size.min(rest.len()));
        rest = after;
        let mut piece = Bytes::copy_from_slice(piece);
        loop {
            match assembler.advance(&mut piece)? {
                Assembly::Incomplete => break,
                Assembly::Announced(_) => {}
                Assembly::Complete(frame) => frames.push(frame),
            }
        }
        if rest.is_empty() {
            break;
        }
    }
    assert!(assembler.is_between_frames());
    Ok(frames)
}

proptest! {
    #[test]
    fn a_stream_cut_anywhere_gives_the_same_frames(
        payloads in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..300)), 1..6),
        sizes in prop::collection::vec(1_usize..200, 1..8),
    ) {
        let frames: Vec<_> = payloads
            .iter()
            .map(|(control, bytes)| if *control { Frame::control(bytes) } else { Frame::tensor(&meta(), bytes) }.unwrap())
            .collect();
        let stream: Vec<u8> = frames.iter().flat_map(|frame| frame.as_bytes()).copied().collect();
        let assembled = assemble(&stream, &sizes).unwrap();
        prop_assert!(assembled.iter().all(|frame| (frame.payload().as_ptr() as usize).is_multiple_of(ALIGNMENT)));
        prop_assert_eq!(assembled, frames);
    }

    #[test]
    fn hostile_bytes_are_refused_or_canonical(
        mut bytes in prop::collection::vec(any::<u8>(), 0..400),
        honest in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        if honest {
            bytes = Frame::tensor(&meta(), &bytes).unwrap().as_bytes().to_vec();
            for (index, value) in changes {
                let index = index.index(bytes.len());
                bytes[index] = value;
            }
        }
        if let Ok(frame) = Frame::parse(aligned(&bytes)) {
            prop_assert_eq!(frame.as_bytes(), &bytes[..]);
            if let Ok(meta) = frame.meta::<Meta>() {
                // A checked archive can be read to its last byte.
                let sum: u64 = meta.positions.iter().map(|position| u64::from(position.to_native())).sum();
                std::hint::black_box((sum, meta.label.as_ref().map(|label| label.len())));
            }
        }
    }
}
