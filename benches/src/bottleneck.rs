//! Which stage holds the others up.
//!
//! A stage that has too much to do fills its input, and whoever sends to it waits: it is *blocked*. So are the stages
//! before that one. The last blocked stage therefore sends to the slow one, which itself is busy.
//!
//! When none is blocked the cluster keeps up, and the busiest stage is named as no more than that. A stage that no edge leads
//! to takes its work from outside, and its account does not tell waiting for clients from work: it is never the busiest.
//!
//! It refuses to know what a stage does.

use serde::{Deserialize, Serialize};

use crate::observe::{Node, Stage};

/// A stage that is blocked for less than this share of its time is not held up.
const BLOCKED_MIN: f64 = 0.05;
/// A stage that works for at least this share of its time has no room left, blocked senders or not.
const SATURATED_MIN: f64 = 0.9;

/// What limits the cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Bottleneck {
    pub(crate) node: String,
    pub(crate) stage: String,
    /// Whether it holds others up, or has no time left; else it is only the busiest.
    pub(crate) is_limit: bool,
    /// For people.
    pub(crate) sentence: String,
}

/// Finds the bottleneck. `None` if no stage did anything.
pub(crate) fn find(nodes: &[Node]) -> Option<Bottleneck> {
    let held_up = nodes.iter().filter_map(|node| below_blocked(node).map(|(above, stage)| (node, above, stage)));
    if let Some((node, above, stage)) = held_up.max_by(|one, other| one.2.working().total_cmp(&other.2.working())) {
        let sentence = format!(
            "`{}` on {} is the bottleneck: it works {} of the time, and `{}` before it is blocked {} of the time.",
            stage.name,
            node.name,
            percent(stage.working()),
            above.name,
            percent(above.shares()[2]),
        );
        return Some(Bottleneck { node: node.name.clone(), stage: stage.name.clone(), is_limit: true, sentence });
    }
    let stages = nodes.iter().flat_map(|node| node.stages.iter().map(move |stage| (node, stage)));
    let (node, stage) = stages
        .filter(|(node, stage)| stage.working() > 0.0 && node.accounts_for(stage))
        .max_by(|(_, one), (_, other)| one.working().total_cmp(&other.working()))?;
    let is_limit = stage.working() >= SATURATED_MIN;
    let says = if is_limit { "is the bottleneck: it has no time left" } else { "is the busiest, and holds nobody up" };
    let sentence =
        format!("`{}` on {} {says}; it works {} of the time.", stage.name, node.name, percent(stage.working()));
    Some(Bottleneck { node: node.name.clone(), stage: stage.name.clone(), is_limit, sentence })
}

/// The last blocked stage of a node and the busiest of those it sends to. Edges that lead back do not count: a loop is no
/// reason to look above.
fn below_blocked(node: &Node) -> Option<(&Stage, &Stage)> {
    let place = |name: &str| node.stages.iter().position(|stage| stage.name == name);
    let (last, above) = node.stages.iter().enumerate().rfind(|(_, stage)| stage.shares()[2] >= BLOCKED_MIN)?;
    let below = node.edges.iter().filter(|edge| edge.start_stage() == above.name);
    let below = below.filter_map(|edge| place(edge.end_stage()).filter(|place| *place > last));
    let below = below.map(|place| &node.stages[place]);
    Some((above, below.max_by(|one, other| one.working().total_cmp(&other.working()))?))
}

pub(crate) fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent < 9.95 { format!("{percent:.1} %") } else { format!("{percent:.0} %") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::Edge;

    fn node(stages: &[(&str, [f64; 4])], edges: &[(&str, &str)]) -> Node {
        let stages = stages.iter().map(|(name, [busy, starved, blocked, verifying])| Stage {
            name: (*name).into(),
            busy_s: *busy,
            starved_s: *starved,
            blocked_s: *blocked,
            verifying_s: *verifying,
            items: 1,
            service_ms: None,
        });
        let edges = edges.iter().map(|(from, to)| Edge {
            from: format!("{from}.out"),
            to: format!("{to}.in"),
            items: None,
            bytes: 0,
            capacity_items: 4,
            fill_mean: 0.0,
            fill_max: 0.0,
            queue_ms: None,
            send_ms: None,
        });
        Node { name: "n0".into(), stages: stages.collect(), edges: edges.collect(), partition_cache_hit_ratio: None }
    }

    const LINE: [(&str, &str); 4] = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "b")];

    #[test]
    fn the_busy_stage_below_the_last_blocked_one_is_named() {
        let node = node(
            &[
                ("a", [1.0, 1.0, 8.0, 0.0]),
                ("b", [3.0, 0.0, 7.0, 0.0]),
                ("c", [9.0, 1.0, 0.0, 0.0]),
                ("d", [9.5, 0.5, 0.0, 0.0]),
            ],
            &LINE,
        );
        let found = find(&[node]).unwrap();
        assert_eq!((found.stage.as_str(), found.is_limit), ("c", true), "{}", found.sentence);
        assert!(found.sentence.contains("`b` before it is blocked 70 %"), "{}", found.sentence);
    }

    #[test]
    fn a_loop_back_does_not_hide_the_stage() {
        // `d` is blocked by the loop it closes; that names nobody below it.
        let node = node(
            &[
                ("a", [1.0, 9.0, 0.0, 0.0]),
                ("b", [2.0, 8.0, 0.0, 0.0]),
                ("c", [9.2, 0.8, 0.0, 0.0]),
                ("d", [1.0, 8.0, 1.0, 0.0]),
            ],
            &LINE,
        );
        let found = find(&[node]).unwrap();
        assert_eq!((found.stage.as_str(), found.is_limit), ("c", true), "{}", found.sentence);
    }

    #[test]
    fn when_nobody_waits_the_busiest_is_named_as_no_more_than_that() {
        let quiet = node(&[("a", [9.9, 0.1, 0.0, 0.0]), ("b", [1.0, 5.0, 0.1, 4.0])], &[("a", "b")]);
        let found = find(&[quiet]).unwrap();
        assert_eq!((found.stage.as_str(), found.is_limit), ("b", false));
        assert!(find(&[node(&[("a", [9.0, 1.0, 0.0, 0.0]), ("b", [0.0, 9.0, 0.0, 0.0])], &[("a", "b")])]).is_none());
        assert!(find(&[]).is_none());
    }
}
