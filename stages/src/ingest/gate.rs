//! The gate: what every request passes before its route, and every response after it.
//!
//! A request gets an id; its head is held to a size; a page of a foreign origin is stopped; its client is known by API key or
//! address; its rate is counted. A response gets the id, the one form of failures, and what its page may read.
//!
//! Invariants: a refusal reaches its client: what the client sends meanwhile is read, as far as patience goes, because closing
//! with bytes unread would reset the connection before the refusal is read.
//!
//! It refuses to know what routes do.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, EXPECT, HeaderName, ORIGIN};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::errors::Failure;
use super::rate::RateKey;
use super::retry::{REPLAYED, Retry};
use super::routes::Front;
use super::{openapi, origin};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id taken from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Bytes of a request's path and query at most.
const URI_BYTES_MAX: usize = 8 << 10;
/// Bytes of a request's headers at most, names and values.
const HEADER_BYTES_MAX: usize = 32 << 10;
/// Header lines of a request at most.
const HEADERS_MAX: usize = 64;

/// Who sent the request, as the gate found out.
#[derive(Debug, Clone)]
pub(super) struct Client(pub Caller);

/// A client, and the key under which it may ask again.
#[derive(Debug, Clone, Default)]
pub(super) struct Caller {
    /// The name of its API key; empty where no keys are needed.
    pub name: String,
    /// From the header `Idempotency-Key`.
    pub retry: Option<Arc<Retry>>,
}

/// The address that a connection came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub SocketAddr);

/// The gate, around all routes.
pub(super) async fn gate(State(front): State<Arc<Front>>, request: Request, next: Next) -> Response {
    let id = request_id(&front, request.headers());
    let origin = request.headers().get(ORIGIN).cloned();
    let trace = origin::of(request.headers(), id.to_str().unwrap_or_default());
    let mut response = origin::within(trace, pass(&front, request, next)).await;
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    front.settings.cors.mark(origin.as_ref(), headers);
    response
}

/// Where there is no route.
pub(super) async fn no_route(State(front): State<Arc<Front>>, method: Method, request: Request) -> Failure {
    let failure = Failure::no_route(&format!("{method} {}", request.uri().path()));
    refuse(&front, request, failure).await
}

/// Where there is a route without this method. The router adds the header `allow`.
pub(super) async fn no_method(State(front): State<Arc<Front>>, method: Method, request: Request) -> Response {
    if method == Method::OPTIONS {
        return StatusCode::NO_CONTENT.into_response();
    }
    refuse(&front, request, Failure::no_method(method.as_str())).await.into_response()
}

/// Whether whoever sends these headers may see more than whether the node is healthy.
#[must_use]
pub(super) fn is_trusted(front: &Front, headers: &HeaderMap) -> bool {
    client(front, headers).is_ok()
}

/// Reads away the body of a request that is refused, and gives the refusal.
pub(super) async fn refuse(front: &Front, request: Request, failure: Failure) -> Failure {
    // Who asks before sending a body has sent none yet.
    if !request.headers().contains_key(EXPECT) {
        front.bodies.discard(request.into_body()).await;
    }
    failure
}

async fn pass(front: &Front, mut request: Request, next: Next) -> Response {
    if let Some(answer) = front.settings.cors.preflight(request.method(), request.headers()) {
        return answer;
    }
    match admit(front, &request) {
        Ok(client) => {
            let retry = client.0.retry.clone();
            request.extensions_mut().insert(client);
            let mut response = next.run(request).await;
            if retry.is_some_and(|retry| retry.is_replayed()) {
                response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
            }
            response
        }
        Err(failure) => refuse(front, request, failure).await.into_response(),
    }
}

/// Finds out who sends a request, and whether the client may send one more.
fn admit(front: &Front, request: &Request) -> Result<Client, Failure> {
    check_head(request)?;
    if front.settings.keys.is_none() && !front.settings.cors.admits(request.headers()) {
        return Err(Failure::foreign_origin());
    }
    let client = client(front, request.headers());
    let path = request.uri().path();
    if path == "/health" || path == openapi::PATH {
        return Ok(Client(Caller { name: client.unwrap_or_default(), retry: None }));
    }
    let name = client?;
    if let Some(rates) = front.rates.as_ref().filter(|_| path != "/metrics") {
        let key = match request.extensions().get::<Peer>() {
            Some(Peer(address)) if name.is_empty() => RateKey::address(address.ip()),
            _ => RateKey::Client(name.clone()),
        };
        rates.check(key).map_err(|wait| Failure::rate_limited(rates.per_second(), wait))?;
    }
    let retry = Retry::read(&name, request.method(), request.headers())?.map(Arc::new);
    Ok(Client(Caller { name, retry }))
}

fn check_head(request: &Request) -> Result<(), Failure> {
    let uri = request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    if uri > URI_BYTES_MAX {
        return Err(Failure::uri_too_long(URI_BYTES_MAX));
    }
    let headers = request.headers();
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if headers.len() > HEADERS_MAX || bytes > HEADER_BYTES_MAX {
        return Err(Failure::headers_too_large(HEADERS_MAX, HEADER_BYTES_MAX));
    }
    Ok(())
}

/// The client by its API key; the nameless client where no keys are needed.
fn client(front: &Front, headers: &HeaderMap) -> Result<String, Failure> {
    let Some(keys) = &front.settings.keys else { return Ok(String::new()) };
    let header = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let Some(header) = header else {
        return Err(Failure::invalid_api_key("an API key is needed: send `Authorization: Bearer <key>`"));
    };
    let key = header.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let client = key.and_then(|(_, key)| keys.client(key.trim()));
    client.map(str::to_owned).ok_or_else(|| Failure::invalid_api_key("the API key is not known"))
}

fn request_id(front: &Front, headers: &HeaderMap) -> HeaderValue {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    let own = headers
        .get(REQUEST_ID)
        .filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX && id.as_bytes().iter().all(is_plain));
    own.cloned().unwrap_or_else(|| front.next_id())
}
