//! What the transfer stages of two nodes say to each other.
//!
//! Requests and cancels are control messages in a canonical form, one byte of kind first. Beside the signed batch of requests
//! go their origins, outside of every digest: they are for people who follow a request, and decide nothing. Boundary values are tensor
//! frames: [`BoundaryMeta`] as rkyv metadata, the values as payload. Everything read here comes from a peer: it is
//! checked, and what does not hold is an error that the stage counts, never a panic.

use butterfly_engine::frame::{Frame, FrameBuilder, FrameError};
use butterfly_engine::telemetry::{REQUEST_ID_BYTES_MAX, TraceContext};
use butterfly_verify::{Digest, NodeIndex};
use bytes::Bytes;

use crate::items::{Boundary, BoundaryValues, RequestId};

/// Cancels that one message may carry.
pub const CANCELS_MAX: usize = 1024;
/// Origins that one message may carry.
pub const ORIGINS_MAX: usize = 256;
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
    /// The gateway's place in the roster.
    pub gateway: u16,
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
    /// Signed requests, to be opened by `Epoch::open_pre_prepares`, and where they come from as far as it is known.
    Requests {
        /// The signed batch.
        batch: Bytes,
        /// Origins by request; a name that is not in the batch means nothing.
        origins: Vec<(RequestId, TraceContext)>,
    },
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

/// Wraps a signed batch of requests with their origins, of which the first [`ORIGINS_MAX`] are sent.
///
/// Layout behind the kind: number of origins (2 bytes), origins, batch. An origin is the request's digest (32), its trace (16),
/// the client's span (8), flags (1), and the HTTP request's id (length 1, bytes).
///
/// # Errors
/// When the batch exceeds what a frame may carry.
pub fn requests(batch: &[u8], origins: &[(RequestId, TraceContext)]) -> Result<Frame, FrameError> {
    let origins = origins.get(..ORIGINS_MAX).unwrap_or(origins);
    let mut head = vec![KIND_REQUESTS];
    head.extend_from_slice(&(origins.len() as u16).to_le_bytes());
    for (rd, origin) in origins {
        let id = &origin.request_id[..origin.request_id.floor_char_boundary(REQUEST_ID_BYTES_MAX)];
        head.extend_from_slice(&rd.0);
        head.extend_from_slice(&origin.trace_id);
        head.extend_from_slice(&origin.parent_id);
        head.extend_from_slice(&[origin.flags, id.len() as u8]);
        head.extend_from_slice(id.as_bytes());
    }
    let mut frame = FrameBuilder::control(head.len() + batch.len())?;
    frame.push(&head)?;
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
        gateway: boundary.gateway.0,
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
        Some((&KIND_REQUESTS, rest)) => read_requests(rest).ok_or(WireError::Control),
        Some((&KIND_CANCELS, digests)) if digests.len() % 32 == 0 && digests.len() / 32 <= CANCELS_MAX => {
            let (chunks, _) = digests.as_chunks::<32>();
            Ok(Message::Cancels(chunks.iter().map(|bytes| Digest(*bytes)).collect()))
        }
        _ => Err(WireError::Control),
    }
}

fn read_requests(rest: &[u8]) -> Option<Message> {
    let (count, mut rest) = rest.split_first_chunk::<2>()?;
    let count = usize::from(u16::from_le_bytes(*count));
    if count > ORIGINS_MAX {
        return None;
    }
    let origins = (0..count).map(|_| read_origin(&mut rest)).collect::<Option<_>>()?;
    Some(Message::Requests { batch: Bytes::copy_from_slice(rest), origins })
}

fn read_origin(rest: &mut &[u8]) -> Option<(RequestId, TraceContext)> {
    let (rd, tail) = rest.split_first_chunk::<32>()?;
    let (trace_id, tail) = tail.split_first_chunk::<16>()?;
    let (parent_id, tail) = tail.split_first_chunk::<8>()?;
    let ([flags, length], tail) = tail.split_first_chunk::<2>()?;
    let (id, tail) = tail.split_at_checked(usize::from(*length))?;
    // What a peer sends ends up in log lines, so it is held to what the HTTP edge takes.
    let is_plain = id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte));
    let request_id = std::str::from_utf8(id).ok().filter(|_| is_plain && id.len() <= REQUEST_ID_BYTES_MAX)?.into();
    *rest = tail;
    Some((Digest(*rd), TraceContext { trace_id: *trace_id, parent_id: *parent_id, flags: *flags, request_id }))
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
        gateway: NodeIndex(meta.gateway.to_native()),
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
        let sent = Boundary { rd: Digest([7; 32]), gateway: NodeIndex(2), attempt: 3, slice: 1, position: 9, values };
        let Message::Boundary(got) = read(&boundary(&sent).unwrap()).unwrap() else { panic!("a boundary") };
        assert_eq!((got.rd, got.gateway, got.attempt, got.slice, got.position), (sent.rd, NodeIndex(2), 3, 1, 9));
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
            let meta =
                BoundaryMeta { rd: [0; 32], attempt: 0, position: 0, rows, width, slice: 0, gateway: 0, content };
            let frame = Frame::tensor(&meta, &[0; 32]).unwrap();
            assert!(matches!(read(&frame), Err(WireError::Shape { .. })), "{rows} x {width}, content {content}");
        }
    }

    #[test]
    fn origins_travel_beside_the_requests_and_a_hostile_id_does_not() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let origin = TraceContext::parse(parent, "req-1").unwrap();
        let sent = vec![(Digest([1; 32]), origin.clone()), (Digest([2; 32]), TraceContext::new([7; 16], ""))];
        let frame = requests(b"abc", &sent).unwrap();
        let Message::Requests { batch, origins } = read(&frame).unwrap() else { panic!("requests") };
        assert_eq!((&batch[..], origins), (&b"abc"[..], sent));
        let bytes = frame.control_bytes().unwrap();
        for cut in 1..bytes.len() - 3 {
            let whole = read(&Frame::control(&bytes[..cut]).unwrap()).is_ok();
            assert!(!whole, "cut at {cut}");
        }
        let hostile = TraceContext { request_id: "\x1b[2J".into(), ..origin };
        let frame = requests(b"abc", &[(Digest([1; 32]), hostile)]).unwrap();
        assert!(matches!(read(&frame), Err(WireError::Control)));
    }

    #[test]
    fn control_messages_survive_and_garbage_does_not() {
        let digests = vec![Digest([1; 32]), Digest([2; 32])];
        assert!(matches!(read(&cancels(&digests).unwrap()).unwrap(), Message::Cancels(got) if got == digests));
        for garbage in [&b""[..], b"\x02abc", b"\x09", b"\x01", b"\x01\x01\x00abc", b"\x01\x01\x01"] {
            assert!(matches!(read(&Frame::control(garbage).unwrap()), Err(WireError::Control)));
        }
    }
}
