//! The routes of the public listener: what is read from a request before anything is asked, and what is answered.
//!
//! Every request passes one gate: it gets an id, its client is known by key or address, and its rate is counted. Every answer
//! that is a failure has the same form, also where there is no route.
//!
//! It refuses to know how answers come about.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HeaderName};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use butterfly_engine::telemetry::{TaskLabels, TaskStatus, TextFormat};

use super::body::{BodyReader, ReadBody};
use super::errors::Failure;
use super::fields::Fields;
use super::gateway::Gateway;
use super::rate::{RateKey, Rates};
use super::settings::Settings;
use super::{completions, health, inference, records};
use crate::commit::TaskKind;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id taken from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Bodies up to this size are read before it is known whether there is room.
const SMALL_BODY_BYTES: u64 = 64 << 10;

/// What the routes share.
pub(super) struct Front {
    /// Where requests go.
    pub gateway: Gateway,
    /// When the stage started, in seconds since 1970.
    pub started_s: u64,
    settings: Settings,
    bodies: BodyReader,
    rates: Option<Rates>,
    /// Request ids are this and a count.
    id_prefix: u64,
    id_count: AtomicU64,
}

/// Who sent the request, as the gate found out.
#[derive(Debug, Clone)]
pub(super) struct Client(pub String);

/// The address that a connection came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub SocketAddr);

impl Front {
    /// The routes' share of a gateway with these settings.
    #[must_use]
    pub(super) fn new(gateway: Gateway, settings: Settings) -> Self {
        let clock = &gateway.services.clock;
        Self {
            started_s: clock.unix_ms() / 1000,
            bodies: BodyReader::new(settings.body_bytes_max, Arc::clone(clock)),
            rates: settings.rate_per_second.map(|per_second| Rates::new(per_second, Arc::clone(clock))),
            // Ids of two runs are unlikely to meet; where there is no randomness the time has to do.
            id_prefix: getrandom::u64().unwrap_or_else(|_| clock.unix_ms()),
            id_count: AtomicU64::new(0),
            settings,
            gateway,
        }
    }

    /// How long a task may stand still.
    #[must_use]
    pub(super) fn request_timeout(&self) -> Duration {
        self.settings.request_timeout
    }

    /// Reads the fields of a body, unless it is known already that nothing can be done with them.
    ///
    /// # Errors
    /// When the node takes no requests, has no room, or the body is not what it should be.
    pub(super) async fn fields(&self, request: Request) -> Result<(ReadBody, Fields), Failure> {
        self.gateway.check_open()?;
        let body = request.into_body();
        let is_large = axum::body::HttpBody::size_hint(&body).upper().is_none_or(|bytes| bytes > SMALL_BODY_BYTES);
        if is_large && let Err(full) = self.gateway.check_room() {
            self.bodies.discard(body).await;
            return Err(full);
        }
        let body = self.bodies.read(body).await?;
        let fields = Fields::parse(&body.bytes)?;
        Ok((body, fields))
    }

    /// Checks the model that a body names.
    ///
    /// # Errors
    /// When it is another than the one served.
    pub(super) fn check_model(&self, fields: &mut Fields) -> Result<(), Failure> {
        let served = &self.gateway.services.model.manifest().name;
        match fields.text("model")? {
            Some(asked) if asked != *served => Err(Failure::model_not_found(&asked, served)),
            _ => Ok(()),
        }
    }

    /// Counts a request that was not admitted.
    pub(super) fn count_rejected(&self, kind: TaskKind) {
        let model = self.gateway.services.model.manifest().name.clone();
        let labels = TaskLabels { model, kind: kind.label(), status: TaskStatus::Rejected };
        self.gateway.services.telemetry.metrics().tasks_total.of(&labels).inc();
    }

    /// Finds out who sends a request, and whether the client may send one more.
    fn admit(&self, request: &Request) -> Result<Client, Failure> {
        let client = self.client(request.headers());
        let path = request.uri().path();
        if path == "/health" {
            return Ok(client.unwrap_or_else(|_| Client(String::new())));
        }
        let client = client?;
        if let Some(rates) = self.rates.as_ref().filter(|_| path != "/metrics") {
            let key = match request.extensions().get::<Peer>() {
                Some(Peer(address)) if client.0.is_empty() => RateKey::address(address.ip()),
                _ => RateKey::Client(client.0.clone()),
            };
            rates.check(key).map_err(|wait| Failure::rate_limited(rates.per_second(), wait))?;
        }
        Ok(client)
    }

    /// The client by its API key; the nameless client where no keys are needed.
    fn client(&self, headers: &HeaderMap) -> Result<Client, Failure> {
        let Some(keys) = &self.settings.keys else { return Ok(Client(String::new())) };
        let header = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some(header) = header else {
            return Err(Failure::invalid_api_key("an API key is needed: send `Authorization: Bearer <key>`"));
        };
        let key = header.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let client = key.and_then(|(_, key)| keys.client(key.trim()));
        client
            .map(|client| Client(client.to_owned()))
            .ok_or_else(|| Failure::invalid_api_key("the API key is not known"))
    }

    /// Whether whoever sends these headers may see more than whether the node is healthy.
    fn is_trusted(&self, headers: &HeaderMap) -> bool {
        self.client(headers).is_ok()
    }

    fn request_id(&self, headers: &HeaderMap) -> HeaderValue {
        let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
        let own = headers
            .get(REQUEST_ID)
            .filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX && id.as_bytes().iter().all(is_plain));
        own.cloned().unwrap_or_else(|| {
            let count = self.id_count.fetch_add(1, Ordering::Relaxed);
            let id = format!("req-{:016x}-{count:x}", self.id_prefix);
            HeaderValue::try_from(id).unwrap_or_else(|_| HeaderValue::from_static("req"))
        })
    }
}

/// The router over all routes.
pub(super) fn router(front: Arc<Front>) -> Router {
    Router::new()
        .route("/inference", post(inference::submit))
        .route("/inference/{id}", get(records::task))
        .route("/v1/completions", post(completions::submit))
        .route("/v1/requests/{id}", delete(records::cancel))
        .route("/v1/receipts/{id}", get(records::receipt))
        .route("/v1/models", get(records::models))
        // A model's name may have slashes in it.
        .route("/v1/models/{*id}", get(records::model))
        .route("/v1/epoch", get(records::epoch))
        .route("/v1/evidence", get(records::evidence))
        .route("/health", get(show_health))
        .route("/metrics", get(show_metrics))
        .fallback(no_route)
        .layer(from_fn_with_state(Arc::clone(&front), gate))
        .with_state(front)
}

/// What every request passes, and every response.
async fn gate(State(front): State<Arc<Front>>, mut request: Request, next: Next) -> Response {
    let id = front.request_id(request.headers());
    let method = request.method().to_string();
    let mut response = match front.admit(&request) {
        Ok(client) => {
            request.extensions_mut().insert(client);
            next.run(request).await
        }
        Err(failure) => failure.into_response(),
    };
    if response.status() == StatusCode::METHOD_NOT_ALLOWED {
        // The router around this adds the header `allow`, to a response that has none.
        response = Failure::no_method(&method).into_response();
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

async fn no_route(method: Method, request: Request) -> Failure {
    Failure::no_route(&format!("{method} {}", request.uri().path()))
}

async fn show_health(State(front): State<Arc<Front>>, headers: HeaderMap) -> Response {
    health::respond(&front.gateway, front.request_timeout(), front.is_trusted(&headers))
}

async fn show_metrics(State(front): State<Arc<Front>>, headers: HeaderMap) -> Response {
    let accept = headers.get(axum::http::header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let format = TextFormat::accepted(accept);
    let form = HeaderValue::from_static(format.content_type());
    ([(axum::http::header::CONTENT_TYPE, form)], front.gateway.services.telemetry.render(format)).into_response()
}
