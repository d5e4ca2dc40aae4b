//! Reading a request's body: bounded in bytes, in time, and over all requests together.
//!
//! Invariants: a body is never larger than the limit, whatever its headers say; all bodies being read share one budget,
//! taken as bytes arrive, so that memory stays flat however many clients send; a client that sends too slowly is cut.
//!
//! It refuses to know what is in a body.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::StatusCode;
use butterfly_engine::clock::{Clock, timeout};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::errors::Failure;

/// Bytes of bodies being read at the same time, at least; one body of the largest size always fits.
const BODIES_BYTES: usize = 256 << 20;
/// How long a body may take before its rate counts.
const GRACE: Duration = Duration::from_secs(10);
/// Bytes per second that a client must send after that, on average.
const RATE_MIN: u64 = 16 << 10;
/// Bytes of a refused body that are read and dropped. Many clients send all before they read, and would see a reset
/// connection instead of the refusal.
const DISCARD_BYTES_MAX: usize = 16 << 20;
/// How long they are read.
const DISCARD_WITHIN: Duration = Duration::from_secs(2);
/// The unit in which the budget is counted.
const UNIT: usize = 1 << 10;

/// Reads bodies within the listener's limits.
#[derive(Debug)]
pub(super) struct BodyReader {
    bytes_max: usize,
    room: Arc<Semaphore>,
    clock: Arc<dyn Clock>,
}

/// A body, with its share of the budget.
#[derive(Debug)]
pub(super) struct ReadBody {
    /// The bytes.
    pub bytes: Vec<u8>,
    _room: Vec<OwnedSemaphorePermit>,
}

impl BodyReader {
    /// Bodies of at most `bytes_max` bytes.
    #[must_use]
    pub(super) fn new(bytes_max: usize, clock: Arc<dyn Clock>) -> Self {
        let units = BODIES_BYTES.max(bytes_max).div_ceil(UNIT) + 1;
        Self { bytes_max, room: Arc::new(Semaphore::new(units)), clock }
    }

    /// Reads a body to its end. Safe to cancel: the budget is given back.
    ///
    /// # Errors
    /// When it is too large, too slow, ends early, or when other bodies take all the room.
    pub(super) async fn read(&self, mut body: Body) -> Result<ReadBody, Failure> {
        let result = self.read_within(&mut body).await;
        if result.as_ref().is_err_and(|failure| failure.status != StatusCode::REQUEST_TIMEOUT) {
            self.discard(body).await;
        }
        result
    }

    /// Reads a body that is refused, and keeps nothing: to its end, or as far as patience goes.
    pub(super) async fn discard(&self, mut body: Body) {
        let mut bytes = 0;
        let read = async {
            while bytes <= DISCARD_BYTES_MAX {
                let Some(Ok(frame)) = body.frame().await else { return };
                bytes += frame.data_ref().map_or(0, bytes::Bytes::len);
            }
        };
        // Whether it came to its end makes no difference to the refusal.
        let _ = timeout(&*self.clock, DISCARD_WITHIN, read).await;
    }

    async fn read_within(&self, body: &mut Body) -> Result<ReadBody, Failure> {
        let announced = body.size_hint().lower();
        if usize::try_from(announced).map_or(true, |announced| announced > self.bytes_max) {
            return Err(Failure::request_too_large(self.bytes_max));
        }
        let began = self.clock.now();
        let (mut bytes, mut room, mut units) = (Vec::new(), Vec::new(), 0);
        loop {
            let allowed = GRACE + Duration::from_secs(bytes.len() as u64 / RATE_MIN);
            let left = allowed.saturating_sub(self.clock.now().saturating_sub(began));
            let frame = timeout(&*self.clock, left, body.frame()).await.ok_or_else(Failure::body_too_slow)?;
            let Some(frame) = frame else { return Ok(ReadBody { bytes, _room: room }) };
            let Ok(data) = frame.map_err(|_| Failure::body_incomplete())?.into_data() else { continue };
            if bytes.len() + data.len() > self.bytes_max {
                return Err(Failure::request_too_large(self.bytes_max));
            }
            let needed = (bytes.len() + data.len()).div_ceil(UNIT) - units;
            if needed > 0 {
                let count = u32::try_from(needed).unwrap_or(u32::MAX);
                let permit = Arc::clone(&self.room).try_acquire_many_owned(count);
                room.push(permit.map_err(|_| Failure::bodies_full())?);
                units += needed;
            }
            bytes.extend_from_slice(&data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use butterfly_engine::clock::ManualClock;
    use bytes::Bytes;
    use futures::stream;

    use super::*;

    fn reader(bytes_max: usize) -> (BodyReader, ManualClock) {
        let clock = ManualClock::new(0);
        (BodyReader::new(bytes_max, Arc::new(clock.clone())), clock)
    }

    fn chunks(count: usize, size: usize) -> Body {
        let chunk = Bytes::from(vec![7; size]);
        Body::from_stream(stream::iter((0..count).map(move |_| Ok::<_, Infallible>(chunk.clone()))))
    }

    #[tokio::test]
    async fn a_body_is_read_up_to_the_limit_and_not_beyond() {
        let (reader, _) = reader(1000);
        assert_eq!(reader.read(chunks(10, 100)).await.unwrap().bytes.len(), 1000);
        assert_eq!(reader.read(chunks(11, 100)).await.unwrap_err().status, StatusCode::PAYLOAD_TOO_LARGE);
        let announced = Body::from(vec![0; 1001]);
        assert_eq!(reader.read(announced).await.unwrap_err().status, StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[tokio::test]
    async fn all_bodies_share_a_budget_which_they_give_back() {
        let (reader, _) = reader(200 << 20);
        let one = reader.read(chunks(150, 1 << 20)).await.unwrap();
        let refused = reader.read(chunks(150, 1 << 20)).await.unwrap_err();
        assert_eq!((refused.status, refused.body.code), (StatusCode::TOO_MANY_REQUESTS, "queue_full"));
        drop(one);
        assert!(reader.read(chunks(150, 1 << 20)).await.is_ok());
    }

    #[tokio::test]
    async fn a_client_that_drips_is_cut() {
        let (reader, clock) = reader(1 << 20);
        let body = Body::from_stream(stream::pending::<Result<Bytes, Infallible>>());
        let wait = async {
            clock.sleepers(1).await;
            clock.advance(GRACE);
        };
        let (read, ()) = futures::join!(reader.read(body), wait);
        assert_eq!(read.unwrap_err().status, StatusCode::REQUEST_TIMEOUT);
    }
}
