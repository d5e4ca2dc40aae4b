//! What the log lets go of: finished requests beyond a number or an age, and what belongs to them.
//!
//! Invariants: what is open stays, and so does whatever a start or the next checkpoint looks at: the last two checkpoints, the
//! receipts of the last and those after it with their requests. A request and everything that names it go together, oldest
//! first. The newest entry stays, so that no number is given twice. One call does a bounded amount of work.
//!
//! It refuses to know the time.

use std::collections::BTreeSet;

use redb::{ReadableTable, ReadableTableMetadata};

use super::{Fault, Tables, read_checkpoint};
use crate::commit::record;

/// Entries that one call looks at.
const PRUNED_AT_ONCE_MAX: usize = 1024;
/// Receipts outside of checkpoints beyond which nothing goes: the checkpoints come first.
const UNCOVERED_MAX: usize = 65_536;

/// What stays. Times are those of acceptance, in milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Finished requests that were accepted before this go.
    pub old_ms: u64,
    /// Finished requests beyond so many go, the oldest first.
    pub records_max: u64,
    /// But none that was accepted after this: it could be sent once more.
    pub young_ms: u64,
}

/// What names an entry of the table of requests.
struct Entry {
    sequence: u64,
    rd: [u8; 32],
    client: String,
    task_id: String,
}

impl Tables<'_> {
    /// Lets go of what is outside the window. Says whether there may be more.
    pub(super) fn prune(&mut self, window: &Window) -> Result<bool, Fault> {
        let Some(uncovered) = self.uncovered()? else { return Ok(false) };
        let newest = self.requests.last()?.map_or(0, |(sequence, _)| sequence.value());
        let finished = self.requests.len()?.saturating_sub(self.open.len()?);
        let mut excess = finished.saturating_sub(window.records_max);
        let (mut gone, mut seen) = (Vec::new(), 0);
        for entry in self.requests.iter()?.take(PRUNED_AT_ONCE_MAX) {
            let (sequence, bytes) = entry?;
            let sequence = sequence.value();
            seen += 1;
            if sequence == newest || self.open.get(sequence)?.is_some() {
                continue;
            }
            let accepted = record::read_accepted(bytes.value())?;
            let is_spare = excess > 0 && accepted.accepted_ms < window.young_ms;
            if accepted.accepted_ms >= window.old_ms && !is_spare {
                break;
            }
            if !uncovered.contains(accepted.rd.as_bytes()) {
                excess = excess.saturating_sub(1);
                let (client, task_id) = (accepted.client, accepted.task_id);
                gone.push(Entry { sequence, rd: *accepted.rd.as_bytes(), client, task_id });
            }
        }
        gone.iter().try_for_each(|entry| self.remove(entry))?;
        self.prune_receipts()?;
        Ok(seen == PRUNED_AT_ONCE_MAX && !gone.is_empty())
    }

    /// Requests whose receipts are in no checkpoint yet; `None` when they are too many to look at.
    fn uncovered(&self) -> Result<Option<BTreeSet<[u8; 32]>>, Fault> {
        let covered = match self.checkpoints.last()? {
            Some((sequence, bytes)) => read_checkpoint(sequence.value(), bytes.value())?.through,
            None => 0,
        };
        let mut uncovered = BTreeSet::new();
        for entry in self.receipts.range(covered.saturating_add(1)..)?.take(UNCOVERED_MAX + 1) {
            uncovered.insert(request_of(entry?.1.value()));
        }
        Ok(Some(uncovered).filter(|uncovered| uncovered.len() <= UNCOVERED_MAX))
    }

    fn remove(&mut self, Entry { sequence, rd, client, task_id }: &Entry) -> Result<(), Fault> {
        self.requests.remove(sequence)?;
        self.outcomes.remove(sequence)?;
        self.ids.remove(rd)?;
        let name = (client.as_str(), task_id.as_str());
        // A task id or a key that was used again names a later request.
        if self.tasks.get(name)?.is_some_and(|named| named.value() == *sequence) {
            self.tasks.remove(name)?;
        }
        let key = self.key_of.remove(sequence)?.map(|key| *key.value());
        if let Some(key) = key
            && self.keys.get(&key)?.is_some_and(|keyed| keyed.value().0 == *sequence)
        {
            self.keys.remove(&key)?;
        }
        Ok(())
    }

    /// Lets go of receipts whose requests have gone, and of checkpoints whose receipts have, but for the last two.
    fn prune_receipts(&mut self) -> Result<(), Fault> {
        let mut last_two = Vec::with_capacity(2);
        for entry in self.checkpoints.iter()?.rev().take(2) {
            let (sequence, bytes) = entry?;
            last_two.push(read_checkpoint(sequence.value(), bytes.value())?);
        }
        let [_, before] = last_two.as_slice() else { return Ok(()) };
        let mut gone = Vec::new();
        for entry in self.receipts.range(..=before.through)?.take(2 * PRUNED_AT_ONCE_MAX) {
            let (number, receipt) = entry?;
            if self.ids.get(&request_of(receipt.value()))?.is_some() {
                break;
            }
            gone.push(number.value());
        }
        for number in gone {
            self.receipts.remove(number)?;
        }
        let first = self.receipts.first()?.map_or(u64::MAX, |(number, _)| number.value());
        let mut empty = Vec::new();
        for entry in self.checkpoints.range(..before.sequence)?.take(PRUNED_AT_ONCE_MAX) {
            let (sequence, bytes) = entry?;
            if read_checkpoint(sequence.value(), bytes.value())?.through >= first {
                break;
            }
            empty.push(sequence.value());
        }
        for sequence in empty {
            self.checkpoints.remove(sequence)?;
        }
        Ok(())
    }
}

/// The request that an entry of the table of receipts begins with.
fn request_of(receipt: &[u8; 64]) -> [u8; 32] {
    let mut rd = [0; 32];
    rd.copy_from_slice(receipt.split_at(32).0);
    rd
}
