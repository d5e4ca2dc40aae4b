//! `GET /openapi.json`: what the public listener takes and answers, as a document for programs.
//!
//! The document is written by hand beside this file. Tests hold it to the routes, to the codes of failures, and to what a
//! running gateway answers.
//!
//! It refuses to know how anything it describes is done.

use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

/// The document.
const DOCUMENT: &str = include_str!("openapi.json");
/// Where it is served. It says nothing of this cluster, so no API key is needed.
pub(super) const PATH: &str = "/openapi.json";

/// The handler.
pub(super) async fn show() -> Response {
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (CACHE_CONTROL, HeaderValue::from_static("public, max-age=3600")),
    ];
    (headers, DOCUMENT).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::super::routes::routes;
    use super::*;

    fn document() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    #[test]
    fn the_document_names_every_route_and_no_other() {
        let document = document();
        let paths = document["paths"].as_object().unwrap();
        let described: BTreeSet<(String, String)> = paths
            .iter()
            .flat_map(|(path, methods)| {
                methods.as_object().unwrap().keys().map(|method| (path.clone(), method.clone()))
            })
            .collect();
        let listed: BTreeSet<(String, String)> =
            routes().listed.iter().map(|(method, path)| (path.replace("{*", "{"), (*method).to_owned())).collect();
        assert_eq!(described, listed);
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_part_is_used() {
        let document = document();
        let mut used = BTreeSet::new();
        references(&document, &mut used);
        for reference in &used {
            let pointer = reference.strip_prefix('#').expect("a reference within the document");
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        for (kind, parts) in document["components"].as_object().unwrap() {
            for part in parts.as_object().unwrap().keys().filter(|_| kind != "securitySchemes") {
                assert!(used.contains(&format!("#/components/{kind}/{part}")), "{kind}/{part} is used nowhere");
            }
        }
    }

    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(object) => {
                found.extend(object.get("$ref").and_then(Value::as_str).map(str::to_owned));
                object.values().for_each(|value| references(value, found));
            }
            Value::Array(values) => values.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    /// Codes are written in `errors.rs` as text after a status, or as `unavailable("…")`.
    #[test]
    fn every_code_of_a_failure_is_explained() {
        let source = include_str!("errors.rs").split("#[cfg(test)]").next().unwrap();
        let document = document();
        let responses = document["components"]["responses"].to_string();
        let words = source.split('"').skip(1).step_by(2);
        let is_code =
            |word: &&str| word.contains('_') && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        let codes: BTreeSet<&str> = words.filter(is_code).filter(|word| !word.ends_with("_error")).collect();
        assert!(codes.len() > 15, "{codes:?}");
        for code in codes.iter().filter(|code| **code != "task_id") {
            assert!(responses.contains(&format!("`{code}`")) || *code == "method_not_allowed", "{code}");
        }
    }
}
