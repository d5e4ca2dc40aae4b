//! What the stages of a node do with their time, and which of them is the bottleneck.
//!
//! The rule: work piles up before the bottleneck, so the stages above it are blocked and it is not; it is the busiest stage
//! below the last blocked one. A stage that took no item in that time bounds nothing. Knows the documents of the admin
//! listener, and no listener.

use serde_json::Value;

/// A stage counts as blocked from this share of its time on.
const BLOCKED_SHARE: f64 = 0.1;
/// A stage counts as a bottleneck from this share of busy time on.
const BUSY_SHARE: f64 = 0.5;

/// Shares of time of one stage, each in `[0, 1]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Activity {
    pub(crate) stage: String,
    pub(crate) busy: f64,
    pub(crate) verifying: f64,
    pub(crate) blocked: f64,
    pub(crate) starved: f64,
    /// Items taken.
    pub(crate) items: u64,
    /// Median service time, in seconds.
    pub(crate) service_p50: f64,
}

/// The stages of one node, upstream first, as they were between two documents; since their start if there is one only.
pub(crate) fn activities(now: &Value, before: Option<&Value>) -> Vec<Activity> {
    let stages = now["stages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let earlier = |name: &str| before.and_then(|before| stage(before, name));
    let activity = |stage: &Value| {
        let name = stage["name"].as_str()?;
        let earlier = earlier(name);
        let grown = |key: &str| {
            let at = |stage: &Value| stage[key].as_f64().unwrap_or(0.0);
            (at(stage) - earlier.map_or(0.0, at)).max(0.0)
        };
        let (busy, verifying, blocked, starved) =
            (grown("busy"), grown("verifying"), grown("blocked"), grown("starved"));
        let total = (busy + verifying + blocked + starved).max(f64::MIN_POSITIVE);
        Some(Activity {
            stage: name.to_owned(),
            busy: busy / total,
            verifying: verifying / total,
            blocked: blocked / total,
            starved: starved / total,
            items: grown("items") as u64,
            service_p50: stage["service"]["p50"].as_f64().unwrap_or(0.0),
        })
    };
    stages.iter().filter_map(activity).collect()
}

fn stage<'a>(document: &'a Value, name: &str) -> Option<&'a Value> {
    document["stages"].as_array()?.iter().find(|stage| stage["name"] == name)
}

/// The stage that bounds the others, if one does.
pub(crate) fn bottleneck(activities: &[Activity]) -> Option<&Activity> {
    let works = |activity: &Activity| activity.busy + activity.verifying;
    let last_blocked = activities.iter().rposition(|activity| activity.blocked >= BLOCKED_SHARE);
    let below = activities.get(last_blocked.map_or(0, |at| at + 1)..).unwrap_or_default();
    // What takes nothing from an edge waits for the world outside, which its account does not know.
    let busiest = below.iter().filter(|activity| activity.items > 0).max_by(|a, b| works(a).total_cmp(&works(b)))?;
    (last_blocked.is_some() || works(busiest) >= BUSY_SHARE).then_some(busiest)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document(stages: &[(&str, f64, f64, f64)]) -> Value {
        let stage = |(name, busy, blocked, starved): &(&str, f64, f64, f64)| {
            json!({ "name": name, "busy": busy, "blocked": blocked, "starved": starved, "verifying": 0.0,
                    "items": 10, "service": { "p50": 0.001 } })
        };
        json!({ "stages": stages.iter().map(stage).collect::<Vec<_>>() })
    }

    #[test]
    fn the_bottleneck_is_the_busiest_stage_below_the_last_blocked_one() {
        let loaded =
            document(&[("a", 9.0, 1.0, 0.0), ("b", 1.0, 9.0, 0.0), ("c", 8.0, 0.0, 2.0), ("d", 1.0, 0.0, 9.0)]);
        assert_eq!(bottleneck(&activities(&loaded, None)).unwrap().stage, "c");
        let idle = document(&[("a", 0.1, 0.0, 9.9), ("b", 1.0, 0.0, 9.0)]);
        assert_eq!(bottleneck(&activities(&idle, None)), None);
        assert_eq!(bottleneck(&[]), None);
    }

    #[test]
    fn shares_are_of_the_time_between_two_looks() {
        let before = document(&[("a", 5.0, 0.0, 95.0)]);
        let now = document(&[("a", 9.0, 0.0, 96.0)]);
        let activity = &activities(&now, Some(&before))[0];
        assert!((activity.busy - 0.8).abs() < 1e-9 && (activity.starved - 0.2).abs() < 1e-9, "{activity:?}");
        assert_eq!(activity.items, 0);
    }
}
