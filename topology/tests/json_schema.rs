//! The schema for editors says what the check says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use butterfly_topology::{Catalogue, KeySpec, KindSignature, PortSpec, ValueSpec, WhenFull, json_schema};
use serde_json::json;

const KIND: KindSignature = KindSignature {
    kind: "source",
    doc: "makes items",
    inputs: &[],
    outputs: &[PortSpec { name: "out", item: "Item", required: true }],
    keys: &[
        KeySpec {
            name: "count",
            doc: "how many",
            value: ValueSpec::Integer { min: 1, max: 9 },
            default: Some("3"),
            required: false,
        },
        KeySpec { name: "address", doc: "where", value: ValueSpec::SocketAddress, default: None, required: true },
    ],
    networked: false,
    full: &[WhenFull::Reject, WhenFull::Wait],
};

#[test]
fn keys_bounds_defaults_and_choices_come_from_the_catalogue() {
    let schema = json_schema(&Catalogue::new(vec![KIND]));
    let stage = &schema["properties"]["stage"]["items"]["oneOf"][0];
    assert_eq!(stage["properties"]["kind"]["const"], "source");
    assert_eq!(
        stage["properties"]["count"],
        json!({ "type": "integer", "minimum": 1, "maximum": 9, "default": 3, "description": "how many" })
    );
    assert_eq!(stage["properties"]["full"]["enum"], json!(["reject", "wait"]));
    assert_eq!(stage["required"], json!(["address", "kind"]));
    assert_eq!(stage["additionalProperties"], false);
    let node = &schema["properties"]["node"]["items"];
    assert_eq!(node["required"], json!(["id", "listen_address", "public_key"]));
    assert_eq!(node["properties"]["admin_address"]["type"], "string");
    assert_eq!(schema["properties"]["telemetry"]["properties"]["collector_type"]["default"], "prometheus");
    assert_eq!(schema["properties"]["cluster"]["required"], json!(["name", "model", "max_byzantine"]));
}
