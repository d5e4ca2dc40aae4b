//! What the transfer stages of two nodes say to each other.
//!
//! Requests and cancels are control messages in a canonical form, one byte of kind first. Boundary values are tensor
//! frames: [`BoundaryMeta`] as rkyv metadata, the values as payload. Everything read here comes from a peer: it is
//! checked, and what does not hold is an error that the stage counts, never a panic.

use butterfly_engine::frame::{Frame, FrameBuilder, FrameError};
use butterfly_verify::Digest;
use bytes::Bytes;

use crate::items::{Boundary, BoundaryValues, RequestId};

/// Cancels that one message may carry.
pub const CANCELS_MAX: usize = 1024;
/// Rows of one boundary frame.
const ROWS_MAX: u32 = 4096;
/// Elements of one row.
const WIDTH_MAX: u32 = 1 << 20;

const KIND_REQUESTS: u8 = 1;
const KIND_CANCELS: u8 = 2;

/// Metadata of a boundary frame.
#[derive(Debug, Clone, PartialEq, Eq, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
pub struct BoundaryMeta {
    /// The request.
    pub rd: [u8; 32],
    /// The attempt the values belong to.
    pub attempt: u32,
    /// Position of the first row.
    pub position: u32,
    /// Rows, or tokens.
    pub rows: u32,
    /// Elements of a row; 1 for tokens, 0 where there are no values.
    pub width: u32,
    /// The slice that takes them.
    pub slice: u16,
    /// 0 rows (f32), 1 tokens (u32), 2 the end, 3 a row that is not finite.
    pub content: u8,
}

const CONTENT_ROWS: u8 = 0;
const CONTENT_TOKENS: u8 = 1;
const CONTENT_END: u8 = 2;
const CONTENT_NUMERIC: u8 = 3;

/// A message from another transfer stage.
#[derive(Debug)]
pub enum Message {
    /// Signed requests, to be opened by `Epoch::open_pre_prepares`.
    Requests(Bytes),
    /// Requests nobody waits for.
    Cancels(Vec<RequestId>),
    /// Values for a slice.
    Boundary(Boundary),
}

/// Why a peer's message makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The frame itself.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A control message of no known kind, or cut short.
    #[error("malformed control message")]
    Control,
    /// Metadata and payload do not fit each other.
    #[error("boundary frame of {rows} rows of {width} elements has a payload of {bytes} bytes")]
    Shape {
        /// Rows claimed.
        rows: u32,
        /// Width claimed.
        width: u32,
        /// Payload bytes.
        bytes: usize,
    },
}

/// Wraps a signed batch of requests.
///
/// # Errors
/// When the batch exceeds what a frame may carry.
pub fn requests(batch: &[u8]) -> Result<Frame, FrameError> {
    let mut frame = FrameBuilder::control(1 + batch.len())?;
    frame.push(&[KIND_REQUESTS])?;
    frame.push(batch)?;
    frame.finish()
}

/// Names at most [`CANCELS_MAX`] requests that nobody waits for.
///
/// # Errors
/// When a frame cannot be made.
pub fn cancels(requests: &[RequestId]) -> Result<Frame, FrameError> {
    let requests = requests.get(..CANCELS_MAX).unwrap_or(requests);
    let mut frame = FrameBuilder::control(1 + 32 * requests.len())?;
    frame.push(&[KIND_CANCELS])?;
    for rd in requests {
        frame.push(&rd.0)?;
    }
    frame.finish()
}

/// Wraps boundary values.
///
/// # Errors
/// When the values exceed what a frame may carry.
pub fn boundary(boundary: &Boundary) -> Result<Frame, FrameError> {
    let (rows, width, content, payload): (usize, u32, u8, &[u8]) = match &boundary.values {
        BoundaryValues::Rows { width, rows } => {
            (rows.len() / (*width).max(1) as usize, *width, CONTENT_ROWS, bytemuck::cast_slice(rows))
        }
        BoundaryValues::Tokens(tokens) => (tokens.len(), 1, CONTENT_TOKENS, bytemuck::cast_slice(tokens)),
        BoundaryValues::End => (0, 0, CONTENT_END, &[]),
        BoundaryValues::Numeric => (0, 0, CONTENT_NUMERIC, &[]),
    };
    let meta = BoundaryMeta {
        rd: boundary.rd.0,
        attempt: boundary.attempt,
        position: boundary.position,
        rows: rows as u32,
        width,
        slice: boundary.slice,
        content,
    };
    Frame::tensor(&meta, payload)
}

/// Reads a frame.
///
/// # Errors
/// When it is none that [`requests`], [`cancels`] or [`boundary`] make.
pub fn read(frame: &Frame) -> Result<Message, WireError> {
    let Some(control) = frame.control_bytes() else { return read_boundary(frame) };
    match control.split_first() {
        Some((&KIND_REQUESTS, batch)) => Ok(Message::Requests(Bytes::copy_from_slice(batch))),
        Some((&KIND_CANCELS, digests)) if digests.len() % 32 == 0 && digests.len() / 32 <= CANCELS_MAX => {
            let (chunks, _) = digests.as_chunks::<32>();
            Ok(Message::Cancels(chunks.iter().map(|bytes| Digest(*bytes)).collect()))
        }
        _ => Err(WireError::Control),
    }
}

fn read_boundary(frame: &Frame) -> Result<Message, WireError> {
    let meta = frame.meta::<BoundaryMeta>()?;
    let (rows, width) = (meta.rows.to_native(), meta.width.to_native());
    let payload = frame.payload();
    let malformed = || WireError::Shape { rows, width, bytes: payload.len() };
    let elements = u64::from(rows) * u64::from(width);
    if rows > ROWS_MAX || width > WIDTH_MAX || elements * 4 != payload.len() as u64 {
        return Err(malformed());
    }
    let values = match meta.content {
        CONTENT_ROWS if width > 0 => {
            let rows: &[f32] = bytemuck::try_cast_slice(payload).map_err(|_| malformed())?;
            BoundaryValues::Rows { width, rows: rows.into() }
        }
        CONTENT_TOKENS if width == 1 => {
            let tokens: &[u32] = bytemuck::try_cast_slice(payload).map_err(|_| malformed())?;
            BoundaryValues::Tokens(tokens.to_vec())
        }
        CONTENT_END if elements == 0 => BoundaryValues::End,
        CONTENT_NUMERIC if elements == 0 => BoundaryValues::Numeric,
        _ => return Err(malformed()),
    };
    Ok(Message::Boundary(Boundary {
        rd: Digest(meta.rd),
        attempt: meta.attempt.to_native(),
        slice: meta.slice.to_native(),
        position: meta.position.to_native(),
        values,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(values: BoundaryValues) -> BoundaryValues {
        let sent = Boundary { rd: Digest([7; 32]), attempt: 3, slice: 1, position: 9, values };
        let Message::Boundary(got) = read(&boundary(&sent).unwrap()).unwrap() else { panic!("a boundary") };
        assert_eq!((got.rd, got.attempt, got.slice, got.position), (sent.rd, 3, 1, 9));
        got.values
    }

    #[test]
    fn boundary_values_survive_the_wire() {
        let rows: Vec<f32> = (0..12).map(|i| i as f32 * 0.5 - 1.0).collect();
        let BoundaryValues::Rows { width: 4, rows: got } =
            round_trip(BoundaryValues::Rows { width: 4, rows: rows.clone().into() })
        else {
            panic!("rows of width 4")
        };
        assert_eq!(&got[..], &rows[..]);
        assert!(matches!(round_trip(BoundaryValues::Tokens(vec![1, 2])), BoundaryValues::Tokens(t) if t == [1, 2]));
        assert!(matches!(round_trip(BoundaryValues::End), BoundaryValues::End));
        assert!(matches!(round_trip(BoundaryValues::Numeric), BoundaryValues::Numeric));
    }

    #[test]
    fn a_shape_that_does_not_fit_its_payload_is_refused() {
        for (rows, width, content) in
            [(3, 4, CONTENT_ROWS), (2, 0, CONTENT_ROWS), (u32::MAX, 1, CONTENT_TOKENS), (2, 4, 9)]
        {
            let meta = BoundaryMeta { rd: [0; 32], attempt: 0, position: 0, rows, width, slice: 0, content };
            let frame = Frame::tensor(&meta, &[0; 32]).unwrap();
            assert!(matches!(read(&frame), Err(WireError::Shape { .. })), "{rows} x {width}, content {content}");
        }
    }

    #[test]
    fn control_messages_survive_and_garbage_does_not() {
        let digests = vec![Digest([1; 32]), Digest([2; 32])];
        assert!(matches!(read(&cancels(&digests).unwrap()).unwrap(), Message::Cancels(got) if got == digests));
        assert!(matches!(read(&requests(b"abc").unwrap()).unwrap(), Message::Requests(got) if &got[..] == b"abc"));
        for garbage in [&b""[..], b"\x02abc", b"\x09"] {
            assert!(matches!(read(&Frame::control(garbage).unwrap()), Err(WireError::Control)));
        }
    }
}
