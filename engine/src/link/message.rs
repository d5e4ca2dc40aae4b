//! What two ends of a link tell each other beside frames, and its canonical bytes.
//!
//! A message is a tag byte and fields of fixed order, little-endian; on a stream each is preceded by its length in two
//! bytes. `decode(encode(m)) == m`, and whatever decodes encodes to the same bytes.
//!
//! It refuses to know what the messages bring about.

use butterfly_topology::StageName;

use super::Totals;

/// Longest message, in bytes, without its length.
pub const MESSAGE_BYTES_MAX: usize = 128;

const OPEN: u8 = 1;
const CREDIT: u8 = 2;
const BLOCKED: u8 = 3;
const SHUT: u8 = 4;

/// The receiver takes frames of a lane from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The receiver's number for the lane, which the headers of its frames bear.
    pub lane: u16,
    /// The stage whose lane this is.
    pub name: StageName,
    /// The capacity of the receiver's inbox for this peer.
    pub capacity: Totals,
    /// What may be sent at first.
    pub granted: Totals,
}

/// What the receiver has received and grants, in totals since the lane was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credit {
    /// The receiver's number for the lane.
    pub lane: u16,
    /// Acknowledged: received in order.
    pub received: Totals,
    /// The most that may be sent in all.
    pub granted: Totals,
}

/// A message on the control stream of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkMessage {
    /// From the receiver of a lane.
    Open(Open),
    /// From the receiver of a lane.
    Credit(Credit),
    /// From the sender of a lane: it cannot go on before it may have sent `wanted` in all.
    Blocked {
        /// The receiver's number for the lane.
        lane: u16,
        /// What must be granted, or acknowledged but for the last frame.
        wanted: Totals,
    },
    /// From the receiver of a lane: its stage has ended and takes nothing more.
    Shut {
        /// The receiver's number for the lane.
        lane: u16,
    },
}

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The length is zero or beyond [`MESSAGE_BYTES_MAX`].
    #[error("length {bytes} is not in 1..={MESSAGE_BYTES_MAX}")]
    Length {
        /// The length found.
        bytes: usize,
    },
    /// The tag names no message.
    #[error("unknown tag {tag}")]
    Tag {
        /// The tag found.
        tag: u8,
    },
    /// The message ends before its last field, or after it.
    #[error("fields do not fill the message")]
    Fields,
    /// The name of the lane is no stage name.
    #[error("invalid lane name")]
    Name,
}

impl LinkMessage {
    /// Appends the message with its length.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.extend_from_slice(&[0; 2]);
        match self {
            Self::Open(open) => {
                bytes.push(OPEN);
                bytes.extend_from_slice(&open.lane.to_le_bytes());
                put_totals(bytes, open.capacity);
                put_totals(bytes, open.granted);
                bytes.extend_from_slice(open.name.as_ref().as_bytes());
            }
            Self::Credit(credit) => {
                bytes.push(CREDIT);
                bytes.extend_from_slice(&credit.lane.to_le_bytes());
                put_totals(bytes, credit.received);
                put_totals(bytes, credit.granted);
            }
            Self::Blocked { lane, wanted } => {
                bytes.push(BLOCKED);
                bytes.extend_from_slice(&lane.to_le_bytes());
                put_totals(bytes, *wanted);
            }
            Self::Shut { lane } => {
                bytes.push(SHUT);
                bytes.extend_from_slice(&lane.to_le_bytes());
            }
        }
        // Names are short, so every message is far below 64 KiB.
        let length = u16::try_from(bytes.len() - start - 2).unwrap_or(u16::MAX);
        if let Some(space) = bytes.get_mut(start..start + 2) {
            space.copy_from_slice(&length.to_le_bytes());
        }
    }

    /// Reads one message, given without its length. Total on any bytes.
    ///
    /// # Errors
    /// [`MessageError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(MessageError::Length { bytes: bytes.len() });
        }
        let Some((&tag, mut rest)) = bytes.split_first() else {
            return Err(MessageError::Length { bytes: 0 });
        };
        let fields = &mut rest;
        let message = match tag {
            OPEN => {
                let (lane, capacity, granted) = (take_u16(fields)?, take_totals(fields)?, take_totals(fields)?);
                let text = std::str::from_utf8(std::mem::take(fields)).map_err(|_| MessageError::Name)?;
                let name = StageName::parse(text).map_err(|_| MessageError::Name)?;
                Self::Open(Open { lane, name, capacity, granted })
            }
            CREDIT => {
                let (lane, received, granted) = (take_u16(fields)?, take_totals(fields)?, take_totals(fields)?);
                Self::Credit(Credit { lane, received, granted })
            }
            BLOCKED => Self::Blocked { lane: take_u16(fields)?, wanted: take_totals(fields)? },
            SHUT => Self::Shut { lane: take_u16(fields)? },
            tag => return Err(MessageError::Tag { tag }),
        };
        if rest.is_empty() { Ok(message) } else { Err(MessageError::Fields) }
    }

    /// Takes the first whole message off the front of `bytes`; `None` if more bytes are needed.
    ///
    /// # Errors
    /// [`MessageError`], a length beyond the limit included, without waiting for its bytes.
    pub fn split_off(bytes: &mut &[u8]) -> Result<Option<Self>, MessageError> {
        let Some((length, rest)) = bytes.split_first_chunk::<2>() else {
            return Ok(None);
        };
        let length = usize::from(u16::from_le_bytes(*length));
        if length == 0 || length > MESSAGE_BYTES_MAX {
            return Err(MessageError::Length { bytes: length });
        }
        let Some((message, rest)) = rest.split_at_checked(length) else {
            return Ok(None);
        };
        *bytes = rest;
        Self::decode(message).map(Some)
    }
}

fn put_totals(bytes: &mut Vec<u8>, totals: Totals) {
    bytes.extend_from_slice(&totals.items.to_le_bytes());
    bytes.extend_from_slice(&totals.bytes.to_le_bytes());
}

fn take<const N: usize>(fields: &mut &[u8]) -> Result<[u8; N], MessageError> {
    let (value, rest) = fields.split_first_chunk::<N>().ok_or(MessageError::Fields)?;
    *fields = rest;
    Ok(*value)
}

fn take_u16(fields: &mut &[u8]) -> Result<u16, MessageError> {
    take(fields).map(u16::from_le_bytes)
}

fn take_totals(fields: &mut &[u8]) -> Result<Totals, MessageError> {
    let items = u64::from_le_bytes(take(fields)?);
    let bytes = u64::from_le_bytes(take(fields)?);
    Ok(Totals { items, bytes })
}
