//! Pages of other origins: which of them a browser may let read answers, and which of them may ask at all.
//!
//! Origins are compared whole, as browsers write them. A gateway that needs no API keys answers whoever reaches it, and any
//! page in a browser on this machine does; so there a page of an origin that is not named is refused before anything is done
//! for it.
//!
//! Invariants: without `cors_origins` no header of this kind is ever sent.
//!
//! It refuses to know clients and routes.

use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, HOST, ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};

/// Headers of answers that a page may read besides those it always may.
const EXPOSED: &str = "x-request-id, retry-after, x-should-retry, etag, location, idempotent-replayed";
const METHODS: &str = "GET, POST, DELETE, OPTIONS";
/// Seconds for which a browser need not ask again.
const MAX_AGE: &str = "600";

/// The origins that are let in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cors {
    any: bool,
    origins: Vec<String>,
}

impl Cors {
    /// Reads origins with spaces between them; `*` stands for all.
    ///
    /// # Errors
    /// Names what is no origin.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut cors = Self::default();
        for word in text.split_whitespace() {
            if word == "*" {
                cors.any = true;
                continue;
            }
            let host = word.split_once("://").filter(|(scheme, _)| matches!(*scheme, "http" | "https"));
            let is_origin = host.is_some_and(|(_, host)| !host.is_empty() && !host.contains(['/', '?', '#', '@']));
            if !is_origin || word.chars().any(|char| char.is_ascii_uppercase() || !char.is_ascii_graphic()) {
                return Err(format!(
                    "'{word}' is no origin: write it as browsers do, like https://app.example:8443, or * for all"
                ));
            }
            cors.origins.push(word.to_owned());
        }
        Ok(cors)
    }

    /// Whether a page may ask where no API key is needed: it is named, or it came from this very listener, or the request
    /// comes from no page at all.
    #[must_use]
    pub(super) fn admits(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = headers.get(ORIGIN) else { return true };
        let own = headers.get(HOST).and_then(|host| host.to_str().ok());
        let is_own = || {
            let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
            origin.is_some_and(|(_, host)| Some(host) == own)
        };
        self.allows(origin) || is_own()
    }

    /// The answer to a browser that asks before it asks.
    #[must_use]
    pub(super) fn preflight(&self, method: &Method, headers: &HeaderMap) -> Option<Response> {
        let origin = headers.get(ORIGIN)?;
        if *method != Method::OPTIONS || !headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD) || !self.allows(origin) {
            return None;
        }
        let mut response = StatusCode::NO_CONTENT.into_response();
        let answer = response.headers_mut();
        answer.insert(ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
        answer.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
        // Clients send headers of their own; none of them does anything that a page may not.
        if let Some(asked) = headers.get(ACCESS_CONTROL_REQUEST_HEADERS) {
            answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        }
        Some(response)
    }

    /// Lets the page that asked read an answer.
    pub(super) fn mark(&self, origin: Option<&HeaderValue>, answer: &mut HeaderMap) {
        if !self.any && !self.origins.is_empty() {
            // Also where the origin is not allowed: the answer to one that is would be another.
            answer.append(VARY, HeaderValue::from_static("origin"));
        }
        let Some(origin) = origin.filter(|origin| self.allows(origin)) else { return };
        let allowed = if self.any { HeaderValue::from_static("*") } else { origin.clone() };
        answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        self.any || self.origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (axum::http::HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn origins_are_what_browsers_write() {
        assert!(Cors::parse("https://app.example http://localhost:3000").is_ok());
        for wrong in ["app.example", "https://", "https://app.example/", "ftp://x", "https://App.example", "null"] {
            assert!(Cors::parse(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_page_that_is_not_named_is_answered_nothing_it_can_read() {
        let cors = Cors::parse("https://app.example").unwrap();
        let ask = |origin| headers(&[("origin", origin), ("access-control-request-method", "POST"), ("host", "h:1")]);
        let allowed = ask("https://app.example");
        assert_eq!(cors.preflight(&Method::OPTIONS, &allowed).unwrap().status(), StatusCode::NO_CONTENT);
        assert!(cors.preflight(&Method::POST, &allowed).is_none());
        for foreign in ["https://app.example.evil", "https://evil", "null"] {
            let foreign = ask(foreign);
            assert!(cors.preflight(&Method::OPTIONS, &foreign).is_none());
            assert!(!cors.admits(&foreign));
            let mut answer = HeaderMap::new();
            cors.mark(foreign.get(ORIGIN), &mut answer);
            assert_eq!((answer.len(), answer.contains_key(VARY)), (1, true));
        }
        assert!(cors.admits(&ask("http://h:1")) && cors.admits(&HeaderMap::new()));
        assert!(!Cors::default().admits(&allowed));
        let mut answer = HeaderMap::new();
        Cors::default().mark(allowed.get(ORIGIN), &mut answer);
        assert!(answer.is_empty());
    }
}
