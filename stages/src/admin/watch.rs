//! What happens on a node while it does, as streams of server-sent events: its events, and items that pass a stage.
//!
//! Invariants: a caller that does not keep up loses something and never holds anybody up; every loss is counted, of events by
//! the bus, of items in the next one.
//!
//! It refuses to know what events and items mean.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use butterfly_engine::clock::{Clock, timeout};
use butterfly_engine::telemetry::{SUBSCRIBERS_MAX, Subscriber, TAPS_MAX, TapError, TapRequest, TapStream};
use bytes::Bytes;
use futures::{StreamExt, stream};

use super::routes::Console;
use crate::error::SchedulingError;
use crate::ingest::Failure;

/// A comment is sent when nothing happens for so long, so that a caller knows that the node is there.
const COMMENT_EVERY: Duration = Duration::from_secs(10);

/// Streams events until the caller goes away, or has had as many as it wants.
pub(super) fn events(console: &Console, limit: Option<usize>) -> Result<Response, Failure> {
    let subscriber = console.services.telemetry.events().subscribe().map_err(|_| full(SUBSCRIBERS_MAX))?;
    Ok(stream_of(Source::Events(subscriber, limit), &console.services.clock))
}

/// Streams items that pass a stage, until the caller goes away or has had as many as it asked for.
pub(super) fn tap(console: &Console, stage: &str, request: TapRequest) -> Result<Response, Failure> {
    let items = console.services.telemetry.tap(stage, request).map_err(|error| match error {
        TapError::NoEdge(_) => Failure::invalid_value("stage", error.to_string()),
        TapError::TooMany => full(TAPS_MAX),
    })?;
    Ok(stream_of(Source::Items(items), &console.services.clock))
}

fn full(limit: usize) -> Failure {
    Failure::from(SchedulingError::QueueFull { limit, retry_after: Duration::from_secs(5) })
}

/// What a stream is fed by.
enum Source {
    /// Events, and how many are still wanted.
    Events(Subscriber, Option<usize>),
    Items(TapStream),
}

impl Source {
    /// The next entry as JSON; `None` at the end. Safe to cancel.
    async fn next(&mut self) -> Option<String> {
        match self {
            Self::Events(_, Some(0)) => None,
            Self::Events(subscriber, left) => {
                let event = subscriber.recv().await?;
                *left = left.map(|left| left - 1);
                serde_json::to_string(&*event).ok()
            }
            Self::Items(items) => serde_json::to_string(&items.recv().await?).ok(),
        }
    }
}

fn stream_of(source: Source, clock: &Arc<dyn Clock>) -> Response {
    // The head goes out with the first bytes, so that a caller knows at once that it listens.
    let hello = stream::iter([Ok::<_, Infallible>(Bytes::from_static(b": listening\n\n"))]);
    let entries = stream::unfold((source, Arc::clone(clock)), |(mut source, clock)| async move {
        let bytes = match timeout(&*clock, COMMENT_EVERY, source.next()).await {
            Some(entry) => Bytes::from(format!("data: {}\n\n", entry?)),
            None => Bytes::from_static(b": nothing new\n\n"),
        };
        Some((Ok(bytes), (source, clock)))
    });
    ([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(hello.chain(entries))).into_response()
}
