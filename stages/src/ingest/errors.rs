//! What a client is told when something fails: status, code, message, and whether to try again.
//!
//! This is the one place that knows HTTP statuses of errors. Every failure has the same JSON form,
//! `{"error": {"message", "type", "param", "code"}}`, whatever route or layer it comes from.
//!
//! Invariants: `Retry-After` is 1 to 120 seconds, because clients ignore 0 and give up above 120; a failure that a retry
//! does not help says `x-should-retry: false` where clients would retry by themselves.
//!
//! It refuses to know requests and tasks.

use std::time::Duration;

use axum::Json;
use axum::http::header::{CONNECTION, HeaderName, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::error::{
    ApiError, ButterflyError, CoordinationError, NetworkError, PartitionError, SchedulingError, TaskError,
};

/// Seconds that `Retry-After` may say.
const RETRY_AFTER_SECONDS: std::ops::RangeInclusive<u64> = 1..=120;
/// When to try again, where nothing better is known.
const RETRY_SOON: Duration = Duration::from_secs(1);
/// When to try again while this node stops or starts.
const RETRY_LATER: Duration = Duration::from_secs(5);

const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// A failure as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The status.
    pub status: StatusCode,
    /// What is in the body.
    pub body: FailureBody,
    retry: Retry,
    extra: Option<Extra>,
}

/// The inner object of the error's JSON form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FailureBody {
    /// For people.
    pub message: String,
    /// The class of error, as the common clients know them.
    #[serde(rename = "type")]
    pub class: &'static str,
    /// The field at fault.
    pub param: Option<String>,
    /// For programs.
    pub code: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// After a while.
    After(Duration),
    /// The client decides by the status.
    Unsaid,
    /// Not, although the status suggests it.
    Never,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extra {
    /// The challenge of a 401.
    Authenticate,
    /// The rest of the request is not read.
    Close,
}

impl Failure {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let class = match status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::INTERNAL_SERVER_ERROR => "server_error",
            StatusCode::BAD_GATEWAY => "verification_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            StatusCode::GATEWAY_TIMEOUT => "timeout_error",
            _ => "invalid_request_error",
        };
        let body = FailureBody { message: message.into(), class, param: None, code };
        Self { status, body, retry: Retry::Unsaid, extra: None }
    }

    fn about(mut self, param: impl Into<String>) -> Self {
        self.body.param = Some(param.into());
        self
    }

    fn after(mut self, wait: Duration) -> Self {
        self.retry = Retry::After(wait);
        self
    }

    fn never(mut self) -> Self {
        self.retry = Retry::Never;
        self
    }

    fn with(mut self, extra: Extra) -> Self {
        self.extra = Some(extra);
        self
    }

    /// The body is no JSON, or not of the form that the route takes.
    pub fn invalid_json(message: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_json", format!("the body is not a valid request: {message}"))
    }

    /// A field has a value that it cannot have.
    pub fn invalid_value(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message).about(param)
    }

    /// A field that is known and not supported has another value than its default.
    pub fn unsupported_parameter(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "unsupported_parameter", message).about(param)
    }

    /// Prompt and answer together are longer than the model takes.
    pub fn context_length_exceeded(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message).about(param)
    }

    /// No key, or none that is known.
    pub fn invalid_api_key(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message).with(Extra::Authenticate)
    }

    /// A key for retries was used for another request.
    pub fn idempotency_key_reused() -> Self {
        let message = "this Idempotency-Key came with another request before; use a new key for a new request";
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused", message).about("idempotency-key")
    }

    /// A page that is not known asks where no API key is needed.
    pub fn foreign_origin() -> Self {
        let message = "pages of this origin may not ask; name it in `cors_origins` of the ingest stage";
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    /// Path and query are too long.
    pub fn uri_too_long(bytes_max: usize) -> Self {
        let message = format!("the path is longer than the {bytes_max} bytes that this node takes");
        Self::new(StatusCode::URI_TOO_LONG, "uri_too_long", message)
    }

    /// The headers are too many or too long.
    pub fn headers_too_large(count_max: usize, bytes_max: usize) -> Self {
        let message = format!("this node takes at most {count_max} headers of {bytes_max} bytes together");
        Self::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", message)
    }

    /// No such route.
    pub fn no_route(path: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", format!("there is no route {path}"))
    }

    /// The route has no such method.
    pub fn no_method(method: &str) -> Self {
        let message = format!("this route does not take {method}; the header `allow` says what it takes");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    /// No such model.
    pub fn model_not_found(asked: &str, served: &str) -> Self {
        let message = format!("there is no model '{}'; this cluster serves '{served}'", shortened(asked));
        Self::new(StatusCode::NOT_FOUND, "model_not_found", message).about("model")
    }

    /// No such receipt.
    pub fn receipt_not_found(id: &str) -> Self {
        let id = shortened(id);
        let message = format!("there is no receipt '{id}' here: it never existed, or it is no longer kept");
        Self::new(StatusCode::NOT_FOUND, "receipt_not_found", message)
    }

    /// No such task.
    pub fn task_not_found(id: &str) -> Self {
        Self::from(&TaskError::from(ApiError::TaskNotFound(shortened(id).to_owned())))
    }

    /// The body is larger than allowed.
    pub fn request_too_large(bytes_max: usize) -> Self {
        let message = format!("the body is larger than the {bytes_max} bytes that this node takes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message).with(Extra::Close)
    }

    /// The body does not come fast enough.
    pub fn body_too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", "the body came too slowly").never().with(Extra::Close)
    }

    /// The body did not come to its end.
    pub fn body_incomplete() -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_json", "the body ended early").with(Extra::Close)
    }

    /// This client sends too many requests.
    pub fn rate_limited(per_second: u32, wait: Duration) -> Self {
        let message = format!("more than the {per_second} requests per second that one client may send");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", message).after(wait)
    }

    /// The bodies being read take all the memory there is for them.
    pub fn bodies_full() -> Self {
        let message = "too many large requests are being read; try again";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message).after(RETRY_SOON).with(Extra::Close)
    }

    /// Every place for a connection is taken.
    pub fn too_many_connections() -> Self {
        let message = "too many connections are open; try again";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message).after(RETRY_SOON).with(Extra::Close)
    }

    /// The stages are still starting.
    pub fn loading(pending: &str) -> Self {
        let message = format!("this node is starting; stages that are not ready: {pending}");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "model_loading", message).after(RETRY_LATER)
    }

    /// The failure that the log keeps in this form, if asking again would not end better.
    #[must_use]
    pub(super) fn recall(json: &[u8]) -> Option<Self> {
        #[derive(serde::Deserialize)]
        struct Kept {
            message: String,
            code: String,
        }
        let Kept { message, code } = serde_json::from_slice(json).ok()?;
        let (status, code) = match code.as_str() {
            "verification_failed" => (StatusCode::BAD_GATEWAY, "verification_failed"),
            "deadline_exceeded" => (StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded"),
            "internal_error" => (StatusCode::INTERNAL_SERVER_ERROR, "internal_error"),
            _ => return None,
        };
        Some(Self::new(status, code, message).never())
    }

    /// The inner object of the JSON form, as it is kept in the log.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.body).unwrap_or_default()
    }

    /// The whole JSON form, as a stream carries it.
    #[must_use]
    pub fn envelope(&self) -> Vec<u8> {
        serde_json::to_vec(&Envelope { error: &self.body }).unwrap_or_default()
    }
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: &'a FailureBody,
}

impl From<&TaskError> for Failure {
    fn from(error: &TaskError) -> Self {
        let new = |status, code| Self::new(status, code, error.to_string());
        let unavailable = |code| new(StatusCode::SERVICE_UNAVAILABLE, code).after(RETRY_SOON);
        let internal = || new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error").never();
        match error {
            ButterflyError::Api(ApiError::InvalidRequest(_)) => new(StatusCode::BAD_REQUEST, "invalid_value"),
            ButterflyError::Api(ApiError::TaskNotFound(_)) => new(StatusCode::NOT_FOUND, "task_not_found"),
            ButterflyError::Api(ApiError::ServiceUnavailable(_)) => unavailable("service_unavailable"),
            ButterflyError::Scheduling(SchedulingError::QueueFull { retry_after, .. }) => {
                new(StatusCode::TOO_MANY_REQUESTS, "queue_full").after(*retry_after)
            }
            ButterflyError::Scheduling(SchedulingError::TaskAlreadyExists(_)) => {
                new(StatusCode::CONFLICT, "task_already_exists").about("task_id").never()
            }
            ButterflyError::Scheduling(SchedulingError::CoordinationUnavailable { .. })
            | ButterflyError::Partition(PartitionError::NoNodesAvailable(_))
            | ButterflyError::Coordination(CoordinationError::InsufficientNodes { .. })
            | ButterflyError::Network(
                NetworkError::ConnectionFailed { .. } | NetworkError::SendTimeout(_) | NetworkError::Unreachable(_),
            ) => unavailable("no_quorum"),
            ButterflyError::Partition(PartitionError::InsufficientResources(_)) => {
                unavailable("insufficient_resources")
            }
            ButterflyError::Coordination(CoordinationError::ByzantineViolation { .. }) => {
                new(StatusCode::BAD_GATEWAY, "verification_failed").never()
            }
            ButterflyError::Coordination(CoordinationError::ConsensusTimeout { .. })
            | ButterflyError::DeadlineExceeded(_)
            | ButterflyError::NoProgress(_) => new(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded").never(),
            ButterflyError::Numeric => new(StatusCode::UNPROCESSABLE_ENTITY, "numeric_failure"),
            // What nginx answers to a client that has gone; seen by whoever waits for a task that another one cancelled.
            ButterflyError::Cancelled => {
                let status = StatusCode::from_u16(499).unwrap_or(StatusCode::CONFLICT);
                new(status, "cancelled").never()
            }
            ButterflyError::Draining => new(StatusCode::SERVICE_UNAVAILABLE, "draining").after(RETRY_LATER),
            ButterflyError::Partition(PartitionError::InvalidConfiguration(_)) | ButterflyError::Internal(_) => {
                internal()
            }
        }
    }
}

impl From<TaskError> for Failure {
    fn from(error: TaskError) -> Self {
        Self::from(&error)
    }
}

impl From<SchedulingError> for Failure {
    fn from(error: SchedulingError) -> Self {
        Self::from(TaskError::from(error))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(Envelope { error: &self.body })).into_response();
        let headers = response.headers_mut();
        match self.retry {
            Retry::After(wait) => {
                let seconds = (wait.as_secs() + u64::from(wait.subsec_nanos() > 0))
                    .clamp(*RETRY_AFTER_SECONDS.start(), *RETRY_AFTER_SECONDS.end());
                headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
            }
            Retry::Never => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            Retry::Unsaid => {}
        }
        match self.extra {
            Some(Extra::Authenticate) => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"butterfly\""));
            }
            Some(Extra::Close) => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            None => {}
        }
        response
    }
}

/// What a client sent, cut to what is worth repeating to it.
fn shortened(text: &str) -> &str {
    text.get(..text.floor_char_boundary(128)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(failure: Failure, name: &str) -> Option<String> {
        let response = failure.into_response();
        response.headers().get(name).map(|value| value.to_str().unwrap().to_owned())
    }

    #[test]
    fn every_error_of_a_task_has_its_status_and_code() {
        let node: butterfly_topology::NodeId = "n1".parse().unwrap();
        let retry_after = Duration::from_secs(3);
        let cases: Vec<(TaskError, u16, &str)> = vec![
            (ApiError::InvalidRequest("x".into()).into(), 400, "invalid_value"),
            (ApiError::TaskNotFound("x".into()).into(), 404, "task_not_found"),
            (SchedulingError::TaskAlreadyExists("x".into()).into(), 409, "task_already_exists"),
            (SchedulingError::QueueFull { limit: 1, retry_after }.into(), 429, "queue_full"),
            (SchedulingError::CoordinationUnavailable { slice: 0, live: 1, needed: 2 }.into(), 503, "no_quorum"),
            (TaskError::from(PartitionError::NoNodesAvailable("x".into())), 503, "no_quorum"),
            (CoordinationError::ByzantineViolation { slice: 0 }.into(), 502, "verification_failed"),
            (CoordinationError::InsufficientNodes { slice: 0 }.into(), 503, "no_quorum"),
            (CoordinationError::ConsensusTimeout { missing: 1 }.into(), 504, "deadline_exceeded"),
            (TaskError::Network(NetworkError::Unreachable(node)), 503, "no_quorum"),
            (TaskError::DeadlineExceeded(Duration::from_secs(30)), 504, "deadline_exceeded"),
            (TaskError::Draining, 503, "draining"),
            (TaskError::Cancelled, 499, "cancelled"),
            (TaskError::Numeric, 422, "numeric_failure"),
            (TaskError::Internal("x".into()), 500, "internal_error"),
        ];
        for (error, status, code) in cases {
            let failure = Failure::from(&error);
            assert_eq!((failure.status.as_u16(), failure.body.code), (status, code), "{error}");
            let retries_help = matches!(status, 429 | 503);
            assert_eq!(header(failure.clone(), "retry-after").is_some(), retries_help, "{error}");
            if matches!(status, 409 | 500 | 502 | 504) {
                assert_eq!(header(failure, "x-should-retry").as_deref(), Some("false"), "{error}");
            }
        }
    }

    #[test]
    fn retry_after_stays_in_what_clients_heed() {
        let after = |wait| header(Failure::rate_limited(1, wait), "retry-after").unwrap();
        assert_eq!(after(Duration::ZERO), "1");
        assert_eq!(after(Duration::from_millis(1001)), "2");
        assert_eq!(after(Duration::from_secs(999)), "120");
    }

    #[test]
    fn what_is_kept_of_a_failure_comes_back_only_where_asking_again_does_not_help() {
        for error in [
            CoordinationError::ByzantineViolation { slice: 0 }.into(),
            TaskError::DeadlineExceeded(Duration::from_secs(1)),
            TaskError::Internal("x".into()),
        ] {
            let failure = Failure::from(&error);
            assert_eq!(Failure::recall(&failure.to_json()), Some(failure));
        }
        for error in
            [TaskError::Cancelled, TaskError::Draining, CoordinationError::InsufficientNodes { slice: 0 }.into()]
        {
            assert_eq!(Failure::recall(&Failure::from(&error).to_json()), None, "{error}");
        }
        assert_eq!(Failure::recall(b"{"), None);
    }

    #[test]
    fn challenges_are_named() {
        assert!(header(Failure::invalid_api_key("no"), "www-authenticate").unwrap().starts_with("Bearer"));
        let json = String::from_utf8(Failure::no_route("/x").envelope()).unwrap();
        assert_eq!(
            json,
            r#"{"error":{"message":"there is no route /x","type":"invalid_request_error","param":null,"code":"not_found"}}"#
        );
    }
}
