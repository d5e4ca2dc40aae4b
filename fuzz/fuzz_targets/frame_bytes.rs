//! Frames from a peer: no bytes panic, what is accepted is canonical, and a stream gives the same frames however it is cut.
#![no_main]

use butterfly_engine::frame::{ALIGNMENT, Assembly, Frame, FrameAssembler, HEADER_BYTES};
use butterfly_fuzz::Meta;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use rkyv::util::AlignedVec;

fuzz_target!(|data: &[u8]| {
    whole(data);
    if let Some((cut, stream)) = data.split_first() {
        cut_anywhere(stream, usize::from(*cut) + 1);
    }
});

/// One buffer, as a frame.
fn whole(data: &[u8]) {
    let mut bytes = AlignedVec::<ALIGNMENT>::with_capacity(data.len());
    bytes.extend_from_slice(data);
    let Ok(frame) = Frame::parse(bytes) else { return };
    assert_eq!(frame.as_bytes(), data, "an accepted frame is what was sent");
    assert_eq!(frame.payload().as_ptr() as usize % ALIGNMENT, 0, "the payload is aligned");
    if let Some(control) = frame.control_bytes() {
        let again = Frame::control(control).expect("an accepted payload fits");
        assert_eq!(again.payload(), control);
    }
    if let Ok(meta) = frame.meta::<Meta>() {
        // Read everything that a stage would: a checked archive has no wild pointers.
        let sum: u64 = meta.positions.iter().map(|position| u64::from(position.to_native())).sum();
        std::hint::black_box((sum, meta.slice.to_native(), meta.request, meta.label.as_ref().map(|label| label.len())));
    }
}

/// The same bytes as a stream, in chunks of `chunk_bytes`, against the same bytes in one chunk.
fn cut_anywhere(stream: &[u8], chunk_bytes: usize) {
    let at_once = assemble(std::iter::once(stream));
    let in_chunks = assemble(stream.chunks(chunk_bytes));
    assert_eq!(at_once, in_chunks, "frames do not depend on where a stream is cut");
    let framed: usize = at_once.0.iter().map(Vec::len).sum();
    assert!(framed <= stream.len(), "frames are made of the stream's bytes");
}

/// The frames of a stream, and whether it ended in an error. A frame that announces more than the fuzzer could send is
/// refused, as a link with a smaller limit would refuse it.
fn assemble<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> (Vec<Vec<u8>>, bool) {
    const FRAME_BYTES_MAX: usize = 1 << 20;
    let mut assembler = FrameAssembler::new();
    let mut frames = Vec::new();
    for chunk in chunks {
        let mut chunk = Bytes::copy_from_slice(chunk);
        loop {
            match assembler.advance(&mut chunk) {
                Ok(Assembly::Incomplete) => {
                    assert!(chunk.is_empty(), "an incomplete frame has taken every byte");
                    break;
                }
                Ok(Assembly::Announced(header)) => {
                    assert!(header.frame_bytes() >= HEADER_BYTES);
                    if header.frame_bytes() > FRAME_BYTES_MAX {
                        return (frames, true);
                    }
                }
                Ok(Assembly::Complete(frame)) => frames.push(frame.as_bytes().to_vec()),
                Err(_) => return (frames, true),
            }
        }
    }
    (frames, false)
}
