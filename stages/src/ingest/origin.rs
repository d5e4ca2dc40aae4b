//! Where an HTTP request comes from, kept beside the work that it causes: its id, and its W3C trace.
//!
//! The origin belongs to the task that handles the request, as a span of the log does; admission reads it there. It is no
//! part of what is asked, so it is in no digest, and an answer does not depend on it.
//!
//! It refuses to know requests.

use std::future::Future;

use axum::http::HeaderMap;
use butterfly_engine::telemetry::TraceContext;
use tracing::Instrument;

tokio::task_local! {
    static ORIGIN: TraceContext;
}

/// The trace that a request belongs to: the one its `traceparent` names, or a new one.
pub(super) fn of(headers: &HeaderMap, request_id: &str) -> TraceContext {
    let given = headers.get("traceparent").and_then(|value| value.to_str().ok());
    given.and_then(|given| TraceContext::parse(given, request_id)).unwrap_or_else(|| {
        let mut entropy = [0; 16];
        // Where the system gives no random bytes the id of the request must do.
        if getrandom::fill(&mut entropy).is_err() {
            entropy.iter_mut().zip(request_id.bytes().rev()).for_each(|(byte, of_id)| *byte = of_id);
        }
        TraceContext::new(entropy, request_id)
    })
}

/// Handles a request as coming from `origin`; its log lines name it.
pub(super) async fn within<F: Future>(origin: TraceContext, handling: F) -> F::Output {
    let span = tracing::error_span!(
        "request",
        request_id = &*origin.request_id,
        trace_id = %hex::encode(origin.trace_id)
    );
    ORIGIN.scope(origin, handling).instrument(span).await
}

/// The origin of what is being handled, if it came over HTTP.
pub(super) fn current() -> Option<TraceContext> {
    ORIGIN.try_with(TraceContext::clone).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_knows_where_it_comes_from_and_other_work_does_not() {
        let mut headers = HeaderMap::new();
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        headers.insert("traceparent", parent.parse().unwrap());
        let origin = of(&headers, "req-1");
        assert_eq!(within(origin.clone(), async { current() }).await, Some(origin));
        assert_eq!(current(), None);
        headers.insert("traceparent", "garbage".parse().unwrap());
        let (one, other) = (of(&headers, "req-2"), of(&headers, "req-2"));
        assert_ne!(one.trace_id, other.trace_id, "a trace of its own for each");
    }
}
