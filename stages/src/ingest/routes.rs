//! The routes of the public listener: what is read from a request before anything is asked, and what is answered.
//!
//! Every request passes the [`gate`] first. Every answer that is a failure has the same form, also where there is no route.
//!
//! It refuses to know how answers come about.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::handler::Handler;
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};
use butterfly_engine::telemetry::{TaskLabels, TaskStatus, TextFormat};

use super::body::{BodyReader, ReadBody};
use super::errors::Failure;
use super::fields::Fields;
use super::gateway::Gateway;
use super::rate::Rates;
use super::settings::Settings;
use super::{chat, completions, embeddings, gate, health, inference, openapi, records, tokens};
use crate::commit::TaskKind;

/// Bodies up to this size are read before it is known whether there is room.
const SMALL_BODY_BYTES: u64 = 64 << 10;

/// What the routes share.
pub(super) struct Front {
    /// Where requests go.
    pub gateway: Gateway,
    /// When the stage started, in seconds since 1970.
    pub started_s: u64,
    /// What the topology file says about the listener.
    pub settings: Settings,
    /// Reads bodies within limits.
    pub bodies: BodyReader,
    /// How many requests each client may send.
    pub rates: Option<Rates>,
    /// Request ids are this and a count.
    id_prefix: u64,
    id_count: AtomicU64,
}

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
        if let Err(closed) = self.gateway.check_open() {
            return Err(gate::refuse(self, request, closed).await);
        }
        let (parts, body) = request.into_parts();
        let is_large = axum::body::HttpBody::size_hint(&body).upper().is_none_or(|bytes| bytes > SMALL_BODY_BYTES);
        if is_large && let Err(full) = self.gateway.check_room() {
            self.bodies.discard(body).await;
            return Err(full);
        }
        let body = self.bodies.read(body).await?;
        if let Some(gate::Client(gate::Caller { retry: Some(retry), .. })) = parts.extensions.get() {
            retry.bind(parts.uri.path(), &body.bytes);
        }
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

    /// The name of a request whose client gave it none.
    pub(super) fn next_id(&self) -> HeaderValue {
        let count = self.id_count.fetch_add(1, Ordering::Relaxed);
        let id = format!("req-{:016x}-{count:x}", self.id_prefix);
        HeaderValue::try_from(id).unwrap_or_else(|_| HeaderValue::from_static("req"))
    }
}

/// Routes, and their list, to which the OpenAPI document is held.
pub(super) struct Routes {
    router: Router<Arc<Front>>,
    /// Methods and paths.
    pub listed: Vec<(&'static str, &'static str)>,
}

impl Routes {
    fn get<H: Handler<T, Arc<Front>>, T: 'static>(self, path: &'static str, handler: H) -> Self {
        self.on("get", path, get(handler))
    }

    fn post<H: Handler<T, Arc<Front>>, T: 'static>(self, path: &'static str, handler: H) -> Self {
        self.on("post", path, post(handler))
    }

    fn delete<H: Handler<T, Arc<Front>>, T: 'static>(self, path: &'static str, handler: H) -> Self {
        self.on("delete", path, delete(handler))
    }

    fn on(mut self, method: &'static str, path: &'static str, route: MethodRouter<Arc<Front>>) -> Self {
        self.listed.push((method, path));
        self.router = self.router.route(path, route);
        self
    }
}

/// All routes.
pub(super) fn routes() -> Routes {
    Routes { router: Router::new(), listed: Vec::new() }
        .post("/inference", inference::submit)
        .get("/inference/{id}", records::task)
        .post("/v1/completions", completions::submit)
        .post("/v1/embeddings", embeddings::submit)
        .post("/v1/chat/completions", chat::submit)
        .post("/tokenize", tokens::tokenize)
        .post("/detokenize", tokens::detokenize)
        .delete("/v1/requests/{id}", records::cancel)
        .get("/v1/receipts/{id}", records::receipt)
        .get("/v1/models", records::models)
        // A model's name may have slashes in it.
        .get("/v1/models/{*id}", records::model)
        .get("/v1/epoch", records::epoch)
        .get("/v1/evidence", records::evidence)
        .get("/health", show_health)
        .get("/metrics", show_metrics)
        .get(openapi::PATH, openapi::show)
}

/// The router over all routes.
pub(super) fn router(front: Arc<Front>) -> Router {
    routes()
        .router
        .fallback(gate::no_route)
        .method_not_allowed_fallback(gate::no_method)
        .layer(from_fn_with_state(Arc::clone(&front), gate::gate))
        .with_state(front)
}

async fn show_health(State(front): State<Arc<Front>>, headers: HeaderMap) -> Response {
    health::respond(&front.gateway, front.request_timeout(), gate::is_trusted(&front, &headers))
}

async fn show_metrics(State(front): State<Arc<Front>>, headers: HeaderMap) -> Response {
    let accept = headers.get(axum::http::header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let format = TextFormat::accepted(accept);
    let form = HeaderValue::from_static(format.content_type());
    ([(axum::http::header::CONTENT_TYPE, form)], front.gateway.services.telemetry.render(format)).into_response()
}
