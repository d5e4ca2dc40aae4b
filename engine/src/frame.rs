//! One message on a link: a fixed header, metadata, and a raw payload, in one aligned buffer.
//!
//! ```text
//! offset        bytes  field
//! 0             4      magic "bfly"
//! 4             2      version, little-endian like every number here
//! 6             1      kind: 1 control, 2 tensor
//! 7             1      zero
//! 8             2      lane number of the receiver (stamped when sent)
//! 10            2      zero
//! 12            4      m: metadata bytes
//! 16            8      p: payload bytes
//! 24            8      sequence number within the lane (stamped when sent)
//! 32            32     zero
//! 64            m      metadata: an rkyv archive whose root ends exactly here
//! ..            0..63  zero, up to the next multiple of 64
//! payload       p      raw payload
//! ```
//!
//! Invariants: a buffer starts at an address divisible by [`ALIGNMENT`], so the payload does too; every length is
//! checked against its limit before anything is allocated; a [`Frame`] is immutable and shares its buffer when cloned;
//! equal frames have equal bytes, since padding and reserved fields are zero and [`Frame::parse`] insists on it.
//!
//! rkyv pads by at most 32 bytes and does not align the contents of a `Vec<u8>`, which is why the payload lies outside
//! the archive. Archives are not canonical: nothing in a tensor frame is ever signed. A control frame has no metadata;
//! its payload holds bytes whose meaning and canonical form belong to the stage that sent it.
//!
//! It refuses to know what metadata and payload mean, and how frames travel.

mod assembler;

use bytes::Bytes;
use rkyv::api::high::{HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::BoxedError;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Portable, Serialize};

pub use assembler::{Assembly, FrameAssembler};

use crate::channel::Item;

/// Alignment of a frame's buffer and of its payload, in bytes: a cache line, and enough for any vector load.
pub const ALIGNMENT: usize = 64;
/// Length of the fixed header, in bytes.
pub const HEADER_BYTES: usize = 64;
/// Longest metadata archive, in bytes.
pub const META_BYTES_MAX: usize = 256 << 10;
/// Longest payload of a tensor frame, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = 256 << 20;
/// Longest payload of a control frame, in bytes.
pub const CONTROL_BYTES_MAX: usize = 32 << 20;

const MAGIC: [u8; 4] = *b"bfly";
const VERSION: u16 = 1;
/// Room taken at first for header and metadata, so that common metadata needs no second allocation.
const META_BYTES_EXPECTED: usize = 192;
/// Payloads up to this size are allowed for in the first allocation, larger ones once the metadata's size is known.
const PAYLOAD_BYTES_EXPECTED_MAX: usize = 16 << 10;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// Canonical bytes and no metadata.
    Control,
    /// Metadata and a raw aligned payload.
    Tensor,
}

/// Why bytes are not a frame, or a frame not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes do not begin with the magic number of a frame.
    #[error("not a frame: wrong magic number")]
    Magic,
    /// The frame is of a version that this build does not speak.
    #[error("frame version {found}, expected {VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// The kind byte names no kind.
    #[error("unknown frame kind {found}")]
    Kind {
        /// The kind byte found.
        found: u8,
    },
    /// A reserved field or padding is not zero.
    #[error("reserved bytes or padding of a frame are not zero")]
    Padding,
    /// A length exceeds its limit.
    #[error("{part} of {bytes} bytes exceeds the limit of {bytes_max}")]
    TooLong {
        /// Which part of the frame.
        part: &'static str,
        /// The length found, in bytes.
        bytes: u64,
        /// The limit, in bytes.
        bytes_max: u64,
    },
    /// The buffer is shorter or longer than its header says.
    #[error("frame of {found} bytes where its header says {expected}")]
    Length {
        /// Bytes present.
        found: usize,
        /// Bytes that the header announces.
        expected: usize,
    },
    /// A control frame with metadata.
    #[error("a control frame has no metadata")]
    MetaInControl,
    /// A frame of the other kind was expected.
    #[error("expected a {expected:?} frame")]
    WrongKind {
        /// The kind that was asked for.
        expected: FrameKind,
    },
    /// The metadata could not be archived, or is no valid archive of the type asked for.
    #[error("metadata: {reason}")]
    Meta {
        /// What the archive library says.
        reason: String,
    },
    /// A builder was finished before its payload was complete, or given more than it announced.
    #[error("payload of {found} bytes where {expected} were announced")]
    Payload {
        /// Bytes written, or that would have been.
        found: usize,
        /// Bytes announced.
        expected: usize,
    },
}

/// The checked fixed header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    kind: FrameKind,
    lane: u16,
    meta_bytes: usize,
    payload_bytes: usize,
    sequence: u64,
}

impl Header {
    /// Checks a header. Total on any bytes.
    ///
    /// # Errors
    /// Everything that can be wrong before the body is seen, lengths included.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        if field::<4>(bytes, 0) != MAGIC {
            return Err(FrameError::Magic);
        }
        let version = u16::from_le_bytes(field(bytes, 4));
        if version != VERSION {
            return Err(FrameError::Version { found: version });
        }
        let kind = match field::<1>(bytes, 6) {
            [1] => FrameKind::Control,
            [2] => FrameKind::Tensor,
            [found] => return Err(FrameError::Kind { found }),
        };
        let reserved = field::<1>(bytes, 7) == [0] && field::<2>(bytes, 10) == [0; 2] && field(bytes, 32) == [0; 32];
        if !reserved {
            return Err(FrameError::Padding);
        }
        let meta_bytes = u64::from(u32::from_le_bytes(field(bytes, 12)));
        let payload_bytes = u64::from_le_bytes(field(bytes, 16));
        let (meta_bytes, payload_bytes) = checked_lengths(kind, meta_bytes, payload_bytes)?;
        Ok(Self {
            kind,
            lane: u16::from_le_bytes(field(bytes, 8)),
            meta_bytes,
            payload_bytes,
            sequence: u64::from_le_bytes(field(bytes, 24)),
        })
    }

    /// What the frame carries.
    #[must_use]
    pub fn kind(&self) -> FrameKind {
        self.kind
    }

    /// The receiver's number for the lane; 0 in a frame that was not sent.
    #[must_use]
    pub fn lane(&self) -> u16 {
        self.lane
    }

    /// The position within the lane; 0 in a frame that was not sent.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Length of the whole frame in bytes, header included.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        // Both lengths are limited, so the sum cannot overflow.
        self.payload_offset() + self.payload_bytes
    }

    fn payload_offset(&self) -> usize {
        (HEADER_BYTES + self.meta_bytes).next_multiple_of(ALIGNMENT)
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let kind = match self.kind {
            FrameKind::Control => 1_u8,
            FrameKind::Tensor => 2,
        };
        let mut bytes = [0; HEADER_BYTES];
        // The limits keep the metadata length within 32 bits.
        let meta_bytes = u32::try_from(self.meta_bytes).unwrap_or(u32::MAX);
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = kind;
        bytes[8..10].copy_from_slice(&self.lane.to_le_bytes());
        bytes[12..16].copy_from_slice(&meta_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&(self.payload_bytes as u64).to_le_bytes());
        bytes[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        bytes
    }
}

/// An immutable message. Cloning shares the buffer.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    header: Header,
    /// The whole frame, header included, at an aligned address.
    bytes: Bytes,
}

impl Frame {
    /// A frame with `meta` as its metadata and a copy of `payload`. To write the payload in place, use a
    /// [`FrameBuilder`].
    ///
    /// # Errors
    /// [`FrameError::TooLong`] beyond a limit, [`FrameError::Meta`] when the metadata cannot be archived.
    pub fn tensor<M>(meta: &M, payload: &[u8]) -> Result<Self, FrameError>
    where
        M: for<'a> Serialize<HighSerializer<AlignedVec<ALIGNMENT>, ArenaHandle<'a>, BoxedError>>,
    {
        let mut builder = FrameBuilder::tensor(meta, payload.len())?;
        builder.push(payload)?;
        builder.finish()
    }

    /// A frame that carries a copy of canonical `bytes`.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] beyond [`CONTROL_BYTES_MAX`].
    pub fn control(bytes: &[u8]) -> Result<Self, FrameError> {
        let mut builder = FrameBuilder::control(bytes.len())?;
        builder.push(bytes)?;
        builder.finish()
    }

    /// Checks a whole frame. Total on any bytes; the metadata archive is checked later, by [`Frame::meta`].
    ///
    /// # Errors
    /// [`FrameError`] for everything that [`FrameBuilder`] would not have written.
    pub fn parse(bytes: AlignedVec<ALIGNMENT>) -> Result<Self, FrameError> {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(FrameError::Length { found: bytes.len(), expected: HEADER_BYTES });
        };
        let header = Header::parse(header)?;
        if bytes.len() != header.frame_bytes() {
            return Err(FrameError::Length { found: bytes.len(), expected: header.frame_bytes() });
        }
        let padding = bytes.get(HEADER_BYTES + header.meta_bytes..header.payload_offset());
        if padding.is_none_or(|padding| padding.iter().any(|&byte| byte != 0)) {
            return Err(FrameError::Padding);
        }
        Ok(Self { header, bytes: Bytes::from_owner(bytes) })
    }

    /// What the frame carries.
    #[must_use]
    pub fn kind(&self) -> FrameKind {
        self.header.kind
    }

    /// The metadata of a tensor frame, checked and read in place. The check takes time proportional to the metadata,
    /// so keep the reference rather than asking again.
    ///
    /// # Errors
    /// [`FrameError::WrongKind`] for a control frame, [`FrameError::Meta`] if the bytes are no archive of `M`.
    pub fn meta<M>(&self) -> Result<&M::Archived, FrameError>
    where
        M: Archive,
        M::Archived: Portable + for<'a> CheckBytes<HighValidator<'a, BoxedError>>,
    {
        if self.header.kind != FrameKind::Tensor {
            return Err(FrameError::WrongKind { expected: FrameKind::Tensor });
        }
        let meta = self.bytes.get(HEADER_BYTES..HEADER_BYTES + self.header.meta_bytes).unwrap_or_default();
        rkyv::access::<M::Archived, BoxedError>(meta).map_err(|error| FrameError::Meta { reason: error.to_string() })
    }

    /// The payload, at an address divisible by [`ALIGNMENT`].
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.bytes.get(self.header.payload_offset()..).unwrap_or_default()
    }

    /// The payload as a shared slice of this frame's buffer.
    #[must_use]
    pub fn payload_bytes(&self) -> Bytes {
        self.bytes.slice(self.header.payload_offset().min(self.bytes.len())..)
    }

    /// The canonical bytes of a control frame; nothing for a tensor frame.
    #[must_use]
    pub fn control_bytes(&self) -> Option<&[u8]> {
        (self.header.kind == FrameKind::Control).then(|| self.payload())
    }

    /// The whole frame as it stands in memory, header included.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Length of the whole frame in bytes: what it takes from the byte bounds of a lane.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The frame as two chunks for the wire: a header stamped for one receiver, and the shared rest.
    pub(crate) fn stamped(&self, lane: u16, sequence: u64) -> ([u8; HEADER_BYTES], Bytes) {
        let header = Header { lane, sequence, ..self.header };
        (header.encode(), self.bytes.slice(HEADER_BYTES.min(self.bytes.len())..))
    }
}

impl Item for Frame {
    fn size_bytes(&self) -> usize {
        self.bytes.len()
    }
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Frame")
            .field("kind", &self.header.kind)
            .field("meta_bytes", &self.header.meta_bytes)
            .field("payload_bytes", &self.header.payload_bytes)
            .finish_non_exhaustive()
    }
}

/// A frame under construction, whose payload is written in place.
pub struct FrameBuilder {
    header: Header,
    bytes: AlignedVec<ALIGNMENT>,
}

impl FrameBuilder {
    /// Starts a tensor frame: archives `meta` and reserves `payload_bytes`.
    ///
    /// No type inside `M` may be aligned to more than 32 bytes: rkyv cannot pad further.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] beyond a limit, [`FrameError::Meta`] when the metadata cannot be archived.
    pub fn tensor<M>(meta: &M, payload_bytes: usize) -> Result<Self, FrameError>
    where
        M: for<'a> Serialize<HighSerializer<AlignedVec<ALIGNMENT>, ArenaHandle<'a>, BoxedError>>,
    {
        checked_lengths(FrameKind::Tensor, 0, payload_bytes as u64)?;
        let expected = HEADER_BYTES + META_BYTES_EXPECTED + payload_bytes.min(PAYLOAD_BYTES_EXPECTED_MAX);
        let mut bytes = AlignedVec::with_capacity(expected);
        bytes.extend_from_slice(&[0; HEADER_BYTES]);
        let mut bytes = rkyv::api::high::to_bytes_in::<_, BoxedError>(meta, bytes)
            .map_err(|error| FrameError::Meta { reason: error.to_string() })?;
        let meta_bytes = bytes.len().saturating_sub(HEADER_BYTES);
        let (meta_bytes, payload_bytes) = checked_lengths(FrameKind::Tensor, meta_bytes as u64, payload_bytes as u64)?;
        let header = Header { kind: FrameKind::Tensor, lane: 0, meta_bytes, payload_bytes, sequence: 0 };
        bytes.reserve_exact(header.frame_bytes().saturating_sub(bytes.len()));
        bytes.resize(header.payload_offset(), 0);
        Ok(Self::with_header(header, bytes))
    }

    /// Starts a control frame of `payload_bytes`.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] beyond [`CONTROL_BYTES_MAX`].
    pub fn control(payload_bytes: usize) -> Result<Self, FrameError> {
        let (meta_bytes, payload_bytes) = checked_lengths(FrameKind::Control, 0, payload_bytes as u64)?;
        let header = Header { kind: FrameKind::Control, lane: 0, meta_bytes, payload_bytes, sequence: 0 };
        let mut bytes = AlignedVec::with_capacity(header.frame_bytes());
        bytes.extend_from_slice(&[0; HEADER_BYTES]);
        Ok(Self::with_header(header, bytes))
    }

    /// Appends to the payload.
    ///
    /// # Errors
    /// [`FrameError::Payload`] when this would exceed what was announced; nothing is written then.
    pub fn push(&mut self, part: &[u8]) -> Result<(), FrameError> {
        let written = self.bytes.len() - self.header.payload_offset();
        if part.len() > self.header.payload_bytes - written {
            let found = written.saturating_add(part.len());
            return Err(FrameError::Payload { found, expected: self.header.payload_bytes });
        }
        self.bytes.extend_from_slice(part);
        Ok(())
    }

    /// The whole payload, to be written in place: what was not pushed before is zero.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        self.bytes.resize(self.header.frame_bytes(), 0);
        self.bytes.get_mut(self.header.payload_offset()..).unwrap_or_default()
    }

    /// Completes the frame.
    ///
    /// # Errors
    /// [`FrameError::Payload`] when less than the announced payload was written.
    pub fn finish(self) -> Result<Frame, FrameError> {
        if self.bytes.len() != self.header.frame_bytes() {
            let found = self.bytes.len() - self.header.payload_offset();
            return Err(FrameError::Payload { found, expected: self.header.payload_bytes });
        }
        Ok(Frame { header: self.header, bytes: Bytes::from_owner(self.bytes) })
    }

    fn with_header(header: Header, mut bytes: AlignedVec<ALIGNMENT>) -> Self {
        if let Some(space) = bytes.first_chunk_mut::<HEADER_BYTES>() {
            *space = header.encode();
        }
        Self { header, bytes }
    }
}

fn field<const N: usize>(header: &[u8; HEADER_BYTES], offset: usize) -> [u8; N] {
    let mut value = [0; N];
    if let Some(part) = header.get(offset..offset + N) {
        value.copy_from_slice(part);
    }
    value
}

fn checked_lengths(kind: FrameKind, meta_bytes: u64, payload_bytes: u64) -> Result<(usize, usize), FrameError> {
    let (part, payload_max) = match kind {
        FrameKind::Control => ("control payload", CONTROL_BYTES_MAX),
        FrameKind::Tensor => ("tensor payload", PAYLOAD_BYTES_MAX),
    };
    if kind == FrameKind::Control && meta_bytes != 0 {
        return Err(FrameError::MetaInControl);
    }
    let limited = |part, bytes: u64, bytes_max: usize| match usize::try_from(bytes) {
        Ok(length) if length <= bytes_max => Ok(length),
        _ => Err(FrameError::TooLong { part, bytes, bytes_max: bytes_max as u64 }),
    };
    Ok((limited("metadata", meta_bytes, META_BYTES_MAX)?, limited(part, payload_bytes, payload_max)?))
}
