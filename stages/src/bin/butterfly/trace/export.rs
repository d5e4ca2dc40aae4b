//! Timelines in the forms of other programs: Chrome's trace events and OpenTelemetry's JSON.
//!
//! A node becomes a process (a resource), a mark that took a while a span, any other a point. Times are the calendar times
//! that each node claims.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{is_gateway, marks};
use crate::status::plain;

/// Trace events that Perfetto opens: nestable asynchronous events (`b`, `e`, `n`), because a request's spans cross threads.
pub(super) fn chrome(timelines: &[&Value]) -> Value {
    let mut events = Vec::new();
    for (timeline, pid) in timelines.iter().zip(1_u32..) {
        let began = timeline["began_unix_us"].as_u64().unwrap_or(0);
        let request = plain(&timeline["request"]);
        let name = format!("{}{}", plain(&timeline["node"]), if is_gateway(timeline) { " (gateway)" } else { "" });
        events.push(json!({ "ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": { "name": name } }));
        let mut event = |ph: &str, id: &str, name: &str, ts: u64, args: &Value| {
            let id = format!("{}-{pid}-{id}", request.get(..16).unwrap_or_default());
            events.push(json!({
                "ph": ph, "cat": "request", "id": id, "name": name, "pid": pid, "tid": 0, "ts": ts, "args": args,
            }));
        };
        let whole = json!({
            "request": timeline["request"], "request_id": timeline["request_id"],
            "trace_id": timeline["trace_id"], "times": timeline["times"],
        });
        event("b", "request", "request", began, &whole);
        let mut last = 0;
        for mark in marks(timeline) {
            let (at, took) = times(mark);
            last = last.max(at);
            let name = format!("{} {}", plain(&mark["stage"]), plain(&mark["what"]));
            if took == 0 {
                event("n", "request", &name, began + at, mark);
            } else {
                // Spans of one track nest or do not meet: each stage and slice has its own.
                let track = format!("{}-{}", plain(&mark["stage"]), plain(&mark["slice"]));
                event("b", &track, &name, began + at.saturating_sub(took), mark);
                event("e", &track, &name, began + at, &json!({}));
            }
        }
        event("e", "request", "request", began + last, &json!({}));
    }
    json!({ "displayTimeUnit": "ms", "traceEvents": events })
}

/// An `ExportTraceServiceRequest` in OpenTelemetry's JSON. Ids of spans follow from the request, the node and the place of
/// the mark, so that the same timeline gives the same spans.
pub(super) fn otlp(timelines: &[&Value]) -> Value {
    let gateway = timelines.iter().find(|timeline| is_gateway(timeline)).map(|timeline| root_id(timeline));
    let resources: Vec<Value> = timelines.iter().map(|timeline| resource(timeline, gateway.as_deref())).collect();
    json!({ "resourceSpans": resources })
}

fn resource(timeline: &Value, gateway: Option<&str>) -> Value {
    let began = timeline["began_unix_us"].as_u64().unwrap_or(0);
    let trace_id = match timeline["trace_id"].as_str() {
        Some(trace) => trace.to_owned(),
        None => plain(&timeline["request"]).chars().take(32).collect(),
    };
    let root = root_id(timeline);
    let client = timeline["parent_id"].as_str();
    let parent = if gateway == Some(root.as_str()) { client } else { gateway.or(client) };
    let (mut spans, mut points, mut last) = (Vec::new(), Vec::new(), 0);
    for (mark, index) in marks(timeline).iter().zip(0_usize..) {
        let (at, took) = times(mark);
        last = last.max(at);
        let name = format!("{} {}", plain(&mark["stage"]), plain(&mark["what"]));
        if took == 0 {
            points.push(json!({
                "timeUnixNano": nanos(began + at), "name": name, "attributes": attributes(mark),
            }));
        } else {
            spans.push(json!({
                "traceId": trace_id, "spanId": span_id(timeline, &index.to_string()), "parentSpanId": root,
                "name": name, "kind": 1, "startTimeUnixNano": nanos(began + at.saturating_sub(took)),
                "endTimeUnixNano": nanos(began + at), "attributes": attributes(mark),
            }));
        }
    }
    let mut whole = json!({
        "traceId": trace_id, "spanId": root, "name": "request", "kind": if gateway == Some(root.as_str()) { 2 } else { 1 },
        "startTimeUnixNano": nanos(began), "endTimeUnixNano": nanos(began + last), "events": points,
        "attributes": [
            text("butterfly.request", &plain(&timeline["request"])),
            text("butterfly.request_id", &plain(&timeline["request_id"])),
            text("butterfly.times", &plain(&timeline["times"])),
        ],
    });
    if let Some(parent) = parent {
        whole["parentSpanId"] = json!(parent);
    }
    spans.insert(0, whole);
    json!({
        "resource": { "attributes": [
            text("service.name", "butterfly"),
            text("service.instance.id", &plain(&timeline["node"])),
        ] },
        "scopeSpans": [{ "scope": { "name": "butterfly" }, "spans": spans }],
    })
}

fn attributes(mark: &Value) -> Vec<Value> {
    let keys = ["slice", "peer", "count"].iter().filter(|key| !mark[**key].is_null());
    keys.map(|key| text(&format!("butterfly.{key}"), &plain(&mark[*key]))).collect()
}

fn text(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

fn root_id(timeline: &Value) -> String {
    span_id(timeline, "request")
}

fn span_id(timeline: &Value, what: &str) -> String {
    let named = format!("{}/{}/{what}", plain(&timeline["request"]), plain(&timeline["node"]));
    hex::encode(Sha256::digest(named).get(..8).unwrap_or_default())
}

fn times(mark: &Value) -> (u64, u64) {
    (mark["at_us"].as_u64().unwrap_or(0), mark["took_us"].as_u64().unwrap_or(0))
}

/// A protobuf uint64 is text in JSON.
fn nanos(micros: u64) -> String {
    (u128::from(micros) * 1000).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timelines() -> [Value; 2] {
        let timeline = |node: &str, first: &str| {
            json!({
                "node": node, "request": "ab".repeat(32), "request_id": "req-1", "trace_id": "0a".repeat(16),
                "parent_id": "0b".repeat(8), "began_unix_us": 1_000_000, "times": "claimed",
                "marks": [
                    { "stage": first, "what": "admitted", "at_us": 0 },
                    { "stage": "compute", "what": "pass", "slice": 0, "at_us": 900, "took_us": 700 },
                    { "stage": "consensus", "what": "hop", "peer": "n1", "at_us": 1_000 },
                ],
            })
        };
        [timeline("n0", "ingest"), timeline("n1", "transfer")]
    }

    #[test]
    fn every_begin_of_a_chrome_trace_has_its_end() {
        let [one, other] = timelines();
        let trace = chrome(&[&one, &other]);
        let events = trace["traceEvents"].as_array().unwrap();
        let mut open = std::collections::BTreeMap::new();
        for event in events.iter().filter(|event| event["ph"] != "M") {
            let depth: &mut i32 = open.entry(event["id"].to_string()).or_default();
            match event["ph"].as_str().unwrap() {
                "b" => *depth += 1,
                "e" => *depth -= 1,
                "n" => assert!(*depth > 0, "a point lies in its request: {event}"),
                other => panic!("{other}"),
            }
            assert!((1_000_000..=1_001_000).contains(&event["ts"].as_u64().unwrap()), "{event}");
        }
        assert!(open.len() >= 4 && open.values().all(|depth| *depth == 0), "{open:?}");
    }

    #[test]
    fn spans_of_workers_hang_below_the_gateway_and_the_gateway_below_its_client() {
        let [one, other] = timelines();
        let document = otlp(&[&other, &one]);
        let spans = |resource: usize| document["resourceSpans"][resource]["scopeSpans"][0]["spans"].as_array().unwrap();
        let (worker, gateway) = (&spans(0)[0], &spans(1)[0]);
        assert_eq!(gateway["parentSpanId"], "0b".repeat(8));
        assert_eq!(worker["parentSpanId"], gateway["spanId"]);
        assert_eq!((&worker["traceId"], &gateway["traceId"]), (&json!("0a".repeat(16)), &json!("0a".repeat(16))));
        assert_eq!((spans(0).len(), gateway["events"].as_array().unwrap().len()), (2, 2));
        assert_eq!(spans(0)[1]["startTimeUnixNano"], "1000200000");
        assert_eq!(spans(0)[1]["spanId"].as_str().unwrap().len(), 16);
    }
}
