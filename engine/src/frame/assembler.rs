//! Frames out of a stream of chunks.
//!
//! Invariants: each byte is copied once, into the frame's own buffer; nothing is allocated for a frame before its header
//! has been checked and shown.
//!
//! It refuses to know where chunks come from, and whether a frame is welcome.

use bytes::{Buf, Bytes};
use rkyv::util::AlignedVec;

use super::{ALIGNMENT, Frame, FrameError, HEADER_BYTES, Header};

/// Turns a stream of chunks, cut anywhere, into frames. Each byte is copied once, into the frame's own buffer.
#[derive(Default)]
pub struct FrameAssembler {
    header: HeaderSpace,
    body: Option<(Header, AlignedVec<ALIGNMENT>)>,
}

/// What [`FrameAssembler::advance`] came to.
#[derive(Debug)]
pub enum Assembly {
    /// The chunk is used up in the middle of a frame, or between two.
    Incomplete,
    /// A header is complete. Nothing has been allocated for its frame; to refuse it, stop here.
    Announced(Header),
    /// A frame is complete, and equal to the one sent: its lane and sequence number were in the header announced.
    Complete(Frame),
}

struct HeaderSpace {
    bytes: [u8; HEADER_BYTES],
    filled: usize,
}

impl Default for HeaderSpace {
    fn default() -> Self {
        Self { bytes: [0; HEADER_BYTES], filled: 0 }
    }
}

impl FrameAssembler {
    /// An assembler at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes off the front of `chunk` up to the next event. Call again until [`Assembly::Incomplete`].
    ///
    /// # Errors
    /// [`FrameError`] when the stream is not made of frames; it is of no use afterwards.
    pub fn advance(&mut self, chunk: &mut Bytes) -> Result<Assembly, FrameError> {
        let Some((header, bytes)) = &mut self.body else {
            let wanted = HEADER_BYTES - self.header.filled;
            let taken = wanted.min(chunk.len());
            if let (Some(space), Some(part)) =
                (self.header.bytes.get_mut(self.header.filled..self.header.filled + taken), chunk.get(..taken))
            {
                space.copy_from_slice(part);
            }
            chunk.advance(taken);
            self.header.filled += taken;
            if self.header.filled < HEADER_BYTES {
                return Ok(Assembly::Incomplete);
            }
            let header = Header::parse(&self.header.bytes)?;
            self.header.filled = 0;
            // No allocation before the caller has seen the header: an empty vector owns nothing.
            self.body = Some((header, AlignedVec::new()));
            return Ok(Assembly::Announced(header));
        };
        if bytes.is_empty() {
            bytes.reserve_exact(header.frame_bytes());
            // Lane and sequence number belong to the way here: without them the frame is equal to the one sent.
            bytes.extend_from_slice(&Header { lane: 0, sequence: 0, ..*header }.encode());
        }
        let taken = (header.frame_bytes() - bytes.len()).min(chunk.len());
        bytes.extend_from_slice(chunk.get(..taken).unwrap_or_default());
        chunk.advance(taken);
        if bytes.len() < header.frame_bytes() {
            return Ok(Assembly::Incomplete);
        }
        match self.body.take() {
            Some((_, bytes)) => Ok(Assembly::Complete(Frame::parse(bytes)?)),
            None => Ok(Assembly::Incomplete),
        }
    }

    /// Whether the stream may end here: nothing of a frame is pending.
    #[must_use]
    pub fn is_between_frames(&self) -> bool {
        self.body.is_none() && self.header.filled == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_assembled_where_it_stays() {
        let sent = Frame::tensor(&7_u64, &vec![3; 1 << 20]).unwrap();
        let mut assembler = FrameAssembler::new();
        let mut places = std::collections::BTreeSet::new();
        for piece in sent.as_bytes().chunks(1200) {
            let mut piece = Bytes::copy_from_slice(piece);
            loop {
                match assembler.advance(&mut piece).unwrap() {
                    Assembly::Incomplete => break,
                    Assembly::Announced(_) => assert_eq!(assembler.body.as_ref().unwrap().1.capacity(), 0),
                    Assembly::Complete(frame) => {
                        assert_eq!(frame, sent);
                        places.insert(frame.as_bytes().as_ptr());
                        // One place from the first byte to the last: nothing was moved after it was copied off the wire.
                        assert_eq!(places.len(), 1);
                        return;
                    }
                }
            }
            places.extend(
                assembler.body.as_ref().filter(|(_, bytes)| !bytes.is_empty()).map(|(_, bytes)| bytes.as_ptr()),
            );
        }
        panic!("the frame is not complete");
    }
}
