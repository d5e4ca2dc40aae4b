//! The JSON Schema of a topology file, for editors: made from the same lists of keys that the check reads, so that it
//! cannot say anything else.
//!
//! It refuses to know what spans tables (ports, cycles, quorums): that is for the check.

use serde_json::{Map, Value, json};

use crate::catalogue::{COMMON_KEYS, Catalogue, KeySpec, KindSignature, ValueSpec};
use crate::schema::stage::{CAPACITY, CAPACITY_BYTES, FULL, INPUT_KEYS, INPUTS_MAX};
use crate::schema::{CLUSTER_KEYS, NODE_KEYS, TELEMETRY_KEYS};

/// The schema (draft 2020-12) of a topology whose stages are of these kinds.
#[must_use]
pub fn json_schema(catalogue: &Catalogue) -> Value {
    let kinds: Vec<Value> = catalogue.kinds().map(stage).collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Butterfly topology",
        "type": "object",
        "required": ["cluster", "node", "stage"],
        "additionalProperties": false,
        "properties": {
            "cluster": table("what runs, and how many may lie", CLUSTER_KEYS),
            "node": {
                "description": "who takes part",
                "type": "array",
                "minItems": 1,
                "items": table("one node", NODE_KEYS),
            },
            "stage": {
                "description": "what happens to a request",
                "type": "array",
                "minItems": 1,
                "items": { "type": "object", "required": ["kind"], "oneOf": kinds },
            },
            "telemetry": table("where metrics go", TELEMETRY_KEYS),
        },
    })
}

fn table(doc: &str, keys: &[KeySpec]) -> Value {
    let required: Vec<&str> = keys.iter().filter(|key| key.required).map(|key| key.name).collect();
    json!({
        "description": doc,
        "type": "object",
        "required": required,
        "additionalProperties": false,
        "properties": properties(keys),
    })
}

fn properties(keys: &[KeySpec]) -> Map<String, Value> {
    let property = |key: &KeySpec| {
        let mut schema = value(&key.value);
        schema["description"] = json!(key.doc);
        if let Some(default) = key.default {
            schema["default"] = match &key.value {
                ValueSpec::Integer { .. } | ValueSpec::Number { .. } | ValueSpec::Flag => {
                    serde_json::from_str(default).unwrap_or_else(|_| json!(default))
                }
                _ => json!(default),
            };
        }
        (key.name.to_owned(), schema)
    };
    keys.iter().map(property).collect()
}

fn stage(signature: &KindSignature) -> Value {
    let mut schema = table(signature.doc, signature.keys);
    let words: Vec<&str> = match signature.full {
        [] => FULL.iter().take(1).copied().collect(),
        full => full.iter().map(|full| full.as_str()).collect(),
    };
    for (name, doc) in COMMON_KEYS {
        let mut common = match *name {
            "kind" => json!({ "const": signature.kind }),
            "input" => input(),
            "on" => json!({ "type": "array", "minItems": 1, "items": { "type": "string" } }),
            "capacity" => value(&CAPACITY),
            "capacity_bytes" => value(&CAPACITY_BYTES),
            "full" => json!({ "enum": words }),
            _ => value(&ValueSpec::Text),
        };
        common["description"] = json!(doc);
        schema["properties"][*name] = common;
    }
    if let Some(required) = schema["required"].as_array_mut() {
        required.push(json!("kind"));
    }
    schema
}

fn input() -> Value {
    let one = json!({ "anyOf": [{ "type": "string" }, table("an edge", INPUT_KEYS)] });
    json!({ "anyOf": [one.clone(), { "type": "array", "maxItems": INPUTS_MAX, "items": one }] })
}

fn value(spec: &ValueSpec) -> Value {
    match spec {
        ValueSpec::Text | ValueSpec::Path => json!({ "type": "string" }),
        ValueSpec::SocketAddress => {
            json!({ "type": "string", "pattern": "^(\\[[0-9A-Fa-f:.%]+\\]|[0-9.]+):[0-9]{1,5}$" })
        }
        ValueSpec::Integer { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        ValueSpec::Number { min, max } => json!({ "type": "number", "minimum": min, "maximum": max }),
        ValueSpec::Flag => json!({ "type": "boolean" }),
        ValueSpec::Choice(words) => json!({ "enum": words }),
        ValueSpec::Bytes { min, max } => json!({
            "anyOf": [
                { "type": "integer", "minimum": min, "maximum": max },
                { "type": "string", "pattern": "^ *[0-9]" },
            ],
        }),
    }
}
