//! The accounts of nodes, read from the text of their metrics.
//!
//! Lines that are no samples, or of other metrics, are passed over: the text is of another program.

use butterfly_engine::telemetry::{Sample, StageState, samples};

use super::{Account, EdgeAccount, StageAccount};

/// Stages and edges at most that one text may bring.
const ENTRIES_MAX: usize = 4096;

/// The accounts that a text of metrics tells about. Edges have no node in their labels: they are those of the node that
/// gave the text, which is the only one whose stages it has.
pub(super) fn accounts(text: &str) -> Vec<Account> {
    let mut account = Account::default();
    for sample in samples(text) {
        if account.stages.len() + account.edges.len() >= ENTRIES_MAX {
            break;
        }
        match sample.name.strip_prefix("butterfly_").unwrap_or_default() {
            "stage_state_seconds_total" => {
                let state = label(&sample, "state");
                let Some(state) = StageState::ALL.iter().position(|known| known.name() == state) else { continue };
                if account.name.is_empty() {
                    account.name = label(&sample, "node");
                }
                account.stage(label(&sample, "stage")).seconds[state] = sample.value;
            }
            "stage_duration_seconds_count" => account.stage(label(&sample, "stage")).items = sample.value as u64,
            "edge_queue_items" => account.edge(&sample).queued = sample.value as u64,
            "edge_queue_capacity_items" => account.edge(&sample).capacity = sample.value as u64,
            "edge_bytes_total" => account.edge(&sample).bytes = sample.value as u64,
            "partition_cache_hit_ratio" => account.hit_ratio = Some(sample.value),
            _ => {}
        }
    }
    if account.stages.is_empty() && account.hit_ratio.is_none() { Vec::new() } else { vec![account] }
}

impl Account {
    fn stage(&mut self, name: String) -> &mut StageAccount {
        let found = self.stages.iter().position(|stage| stage.name == name);
        let place = found.unwrap_or_else(|| {
            self.stages.push(StageAccount { name, ..StageAccount::default() });
            self.stages.len() - 1
        });
        &mut self.stages[place]
    }

    fn edge(&mut self, sample: &Sample) -> &mut EdgeAccount {
        let (from, to) = (label(sample, "from"), label(sample, "to"));
        let found = self.edges.iter().position(|edge| edge.from == from && edge.to == to);
        let place = found.unwrap_or_else(|| {
            self.edges.push(EdgeAccount { from, to, ..EdgeAccount::default() });
            self.edges.len() - 1
        });
        &mut self.edges[place]
    }
}

fn label(sample: &Sample, name: &str) -> String {
    let found = sample.labels.iter().find(|(known, _)| known == name);
    found.map(|(_, value)| value.clone()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use butterfly_engine::clock::ManualClock;
    use butterfly_engine::telemetry::{Telemetry, TextFormat};

    use super::*;

    #[test]
    fn metrics_tell_of_a_node_what_its_accounts_tell() {
        let clock = ManualClock::new(0);
        let telemetry = Telemetry::with_clock("n0".parse().unwrap(), Arc::new(clock.clone()));
        let states = telemetry.open_stage(&"compute".parse().unwrap());
        states.begin();
        clock.advance(Duration::from_secs(3));
        let _starved = states.starved();
        clock.advance(Duration::from_secs(2));
        let read = accounts(&telemetry.render(TextFormat::Classic));
        let own = Account::of(&telemetry);
        assert_eq!(read.len(), 1);
        assert_eq!((read[0].name.as_str(), read[0].stages[0].name.as_str()), ("n0", "compute"));
        assert_eq!(read[0].stages[0].seconds, [3.0, 2.0, 0.0, 0.0]);
        assert_eq!(read[0].stages[0].seconds, own.stages[0].seconds);
        assert_eq!(read[0].hit_ratio, Some(0.0));
    }

    #[test]
    fn edges_are_read_and_nonsense_is_passed_over() {
        let text = "# HELP x\nbutterfly_edge_queue_items{from=\"a.out\",to=\"b.in\"} 3\n\
                    butterfly_edge_queue_capacity_items{from=\"a.out\",to=\"b.in\"} 12\n\
                    butterfly_stage_state_seconds_total{stage=\"b\",node=\"n\",state=\"asleep\"} 1\n\
                    butterfly_stage_state_seconds_total{stage=\"b\",node=\"n\",state=\"busy\"} 1.5\n\
                    butterfly_stage_state_seconds_total{stage\nbroken\n{} 4\n";
        let read = accounts(text);
        let edge = &read[0].edges[0];
        assert_eq!((edge.from.as_str(), edge.to.as_str(), edge.queued, edge.capacity), ("a.out", "b.in", 3, 12));
        assert_eq!(read[0].stages.len(), 1);
        assert!(accounts("other_metric 1\n").is_empty());
    }
}
