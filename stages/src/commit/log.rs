//! The tables of the durable log, and what one transaction does to them.
//!
//! Every accepted request has a sequence number; bulk is stored under it, so that new entries land side by side, and the
//! two indices (by request id, by client and task id) stay small.
//!
//! Invariants: a transaction is whole or absent, whatever kills the process; a request is settled at most once, and the first
//! settlement stays; what is open is exactly what was accepted and not settled.
//!
//! It refuses to know threads, and what the stored bytes mean, but for the root of an answer.

mod window;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use butterfly_verify::Answer;
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition, TableError,
    WriteTransaction,
};
use sha2::{Digest as _, Sha256};

pub use self::window::Window;
use super::record::{self, Accepted, Open, Outcome, Record, RetryKey, Settled};
use crate::items::RequestId;

/// Version of the layout below. A log of another version is refused.
const VERSION: u64 = 3;
/// Files up to this size are checked as a whole when they are opened.
const WHOLE_BYTES_MAX: u64 = 1 << 30;
/// Memory for cached pages, in bytes.
const CACHE_BYTES: usize = 32 << 20;
/// Longest task id, in bytes.
pub const TASK_ID_BYTES_MAX: usize = 256;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("butterfly");
const IDS: TableDefinition<'_, &[u8; 32], u64> = TableDefinition::new("ids");
const TASKS: TableDefinition<'_, (&str, &str), u64> = TableDefinition::new("tasks");
const REQUESTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("requests");
const OUTCOMES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outcomes");
/// Open requests, with the number of times each was started.
const OPEN: TableDefinition<'_, u64, u32> = TableDefinition::new("open");
/// The latest request under a client's key for retries, and what else that key was used with.
const KEYS: TableDefinition<'_, &[u8; 32], (u64, &[u8; 32])> = TableDefinition::new("keys");
/// The key of a request that has one.
const KEY_OF: TableDefinition<'_, u64, &[u8; 32]> = TableDefinition::new("key_of");
/// Whose log it is, under `node`.
const OWNER: TableDefinition<'_, &str, &str> = TableDefinition::new("owner");
/// Certified requests in the order of their receipts, from 1: request id and root of the answer.
const RECEIPTS: TableDefinition<'_, u64, &[u8; 64]> = TableDefinition::new("receipts");
/// Checkpoints by their number: the number of the last receipt (8 bytes), then the certificate.
const CHECKPOINTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("checkpoints");
/// Evidence by its digest, so that the same piece is kept once.
const EVIDENCE: TableDefinition<'_, &[u8; 32], &[u8]> = TableDefinition::new("evidence");

/// What the log could not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Another process has the log open.
    #[error("{}: the log is open in another process; stop that process, or give this node another data directory", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The log was written in another layout.
    #[error("{}: the log has version {found}, and this program reads version {VERSION}; \
             use the program that wrote it, or move the file away to begin a new log", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// The file holds something else.
    #[error("{}: this is not a log of this program ({reason}); name another file, or move this one away", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What shows it.
        reason: String,
    },
    /// The log of another node.
    #[error("{}: the log belongs to {found}, and this node is {node}; give each node a data directory of its own", path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Who opens it.
        node: String,
    },
    /// The file was changed or cut from outside.
    #[error("{}: the log is damaged ({reason}); restore it from a copy, or move it away to begin a new log: \
             receipts in it are lost to this node, and requests that were open are not resumed", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What shows it.
        reason: String,
    },
    /// The file cannot be read or written.
    #[error("{}: {reason}", path.display())]
    Storage {
        /// The file.
        path: PathBuf,
        /// What the storage said.
        reason: String,
    },
    /// The request is in the log already.
    #[error("request {0} is in the log already")]
    Known(RequestId),
    /// The log was closed, or its thread ended after an error.
    #[error("the log is closed")]
    Closed,
}

/// A checkpoint as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpointed {
    /// Its number.
    pub sequence: u64,
    /// The number of its last receipt.
    pub through: u64,
    /// The certificate, as JSON.
    pub certificate: Vec<u8>,
}

/// One change.
#[derive(Debug)]
pub(super) enum Change {
    /// A request was accepted.
    Accept(Accepted),
    /// An accepted request may be asked for again under a key.
    Key(RequestId, RetryKey),
    /// A request was settled.
    Settle(Settled),
    /// An open request is started once more.
    Restart(RequestId),
    /// A node was caught.
    Evidence(Vec<u8>),
    /// Receipts up to a number are in a checkpoint.
    Checkpoint(Checkpointed),
    /// What is outside a window goes, a bounded number of entries at a time. It has an effect while there may be more.
    Prune(Window),
}

impl Change {
    /// Roughly the memory it keeps.
    pub(super) fn size_bytes(&self) -> usize {
        size_of::<Self>()
            + match self {
                Self::Accept(accepted) => accepted.size_bytes(),
                Self::Settle(settled) => settled.outcome.size_bytes(),
                Self::Restart(_) | Self::Key(..) | Self::Prune(_) => 0,
                Self::Evidence(bytes) => bytes.len(),
                Self::Checkpoint(checkpointed) => checkpointed.certificate.len(),
            }
    }
}

/// The open log.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    database: Database,
    /// Whether the file is too large to be read as a whole at every start.
    is_large: bool,
    receipts: AtomicU64,
    covered: AtomicU64,
}

impl Log {
    /// Opens the log, or begins one where there is no file.
    ///
    /// The integrity of a log of up to [`WHOLE_BYTES_MAX`] is checked whenever it is opened, which reads all of it. Of a larger
    /// one what is open, the last checkpoint and the receipts after it are checked at a start, and every other record when it
    /// is read. Its commits save what a recovery needs, so that not even a crash makes the next start read everything.
    pub(super) fn open(path: &Path) -> Result<Self, JournalError> {
        Self::open_whole_up_to(path, WHOLE_BYTES_MAX)
    }

    pub(super) fn open_whole_up_to(path: &Path, whole_bytes_max: u64) -> Result<Self, JournalError> {
        let exists = path.try_exists().map_err(|error| storage(path, &error))?;
        if !exists {
            return Self::begin(path);
        }
        let mut builder = Database::builder();
        let is_large = fs::metadata(path).map_err(|error| storage(path, &error))?.len() > whole_bytes_max;
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(!is_large);
        let database = builder.open(path).map_err(|error| opening(path, error))?;
        let log = Self::new(path, database, is_large);
        log.check_version()?;
        log.count()?;
        // Another link to this file, if a process was killed between naming it and this.
        let _ = fs::remove_file(unfinished(path));
        Ok(log)
    }

    /// Begins a log under another name and gives it its own when it is whole: a process killed here leaves no file that
    /// looks like a damaged log. The second name is made as a link, which never replaces what another process began.
    fn begin(path: &Path) -> Result<Self, JournalError> {
        let unfinished = unfinished(path);
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        let database = match builder.create(&unfinished) {
            Ok(database) => database,
            Err(DatabaseError::DatabaseAlreadyOpen) => return Err(JournalError::Locked { path: path.to_owned() }),
            Err(_) if unfinished.exists() => {
                // Left by a process that was killed before the file had its name: nothing was promised in it.
                fs::remove_file(&unfinished).map_err(|error| storage(&unfinished, &error))?;
                builder.create(&unfinished).map_err(|error| opening(path, error))?
            }
            Err(error) => return Err(opening(path, error)),
        };
        failpoint("created");
        let log = Self::new(path, database, false);
        log.write(|transaction| {
            transaction.open_table(META)?.insert("version", VERSION)?;
            Tables::open(transaction).map(drop)
        })?;
        let named = fs::hard_link(&unfinished, path).and_then(|()| {
            failpoint("linked");
            fs::remove_file(&unfinished)
        });
        failpoint("named");
        named.and_then(|()| sync_directory(path)).map_err(|error| storage(path, &error))?;
        Ok(log)
    }

    /// Makes the log that of a node; `node` names it and its cluster.
    ///
    /// # Errors
    /// When it is another's.
    pub(super) fn claim(&self, node: &str) -> Result<(), JournalError> {
        let found = self.write(|transaction| {
            let mut owner = transaction.open_table(OWNER)?;
            let found = owner.get("node")?.map(|found| found.value().to_owned());
            if found.is_none() {
                owner.insert("node", node)?;
            }
            Ok(found)
        })?;
        match found {
            Some(found) if found != node => {
                Err(JournalError::Owner { path: self.path.clone(), found, node: node.to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// A log over storage that a test controls.
    #[cfg(test)]
    pub(super) fn over(path: &Path, storage: impl redb::StorageBackend) -> Result<Self, JournalError> {
        let database = Database::builder().create_with_backend(storage).map_err(|error| opening(path, error))?;
        Ok(Self::new(path, database, false))
    }

    fn new(path: &Path, database: Database, is_large: bool) -> Self {
        let (receipts, covered) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { path: path.to_owned(), database, is_large, receipts, covered }
    }

    /// Reads how many receipts there are, and how many of them are in checkpoints.
    fn count(&self) -> Result<(), JournalError> {
        let (receipts, covered) = self.read(|transaction| {
            let last = transaction.open_table(RECEIPTS)?.last()?.map_or(0, |(number, _)| number.value());
            let covered = match transaction.open_table(CHECKPOINTS)?.last()? {
                Some((sequence, bytes)) => read_checkpoint(sequence.value(), bytes.value())?.through,
                None => 0,
            };
            Ok((last, covered))
        })?;
        self.receipts.store(receipts, Ordering::Relaxed);
        self.covered.store(covered, Ordering::Relaxed);
        Ok(())
    }

    /// Receipts in the log, and those of them that are in checkpoints.
    pub(super) fn receipts(&self) -> (u64, u64) {
        let covered = self.covered.load(Ordering::Relaxed);
        (self.receipts.load(Ordering::Relaxed).max(covered), covered)
    }

    /// The last checkpoint, if there is one.
    pub(super) fn last_checkpoint(&self) -> Result<Option<Checkpointed>, JournalError> {
        self.checkpoint_before(u64::MAX)
    }

    /// The last checkpoint whose number is below another.
    pub(super) fn checkpoint_before(&self, sequence: u64) -> Result<Option<Checkpointed>, JournalError> {
        self.read(|transaction| {
            let table = transaction.open_table(CHECKPOINTS)?;
            let last = table.range(..sequence)?.next_back().transpose()?;
            last.map(|(sequence, bytes)| read_checkpoint(sequence.value(), bytes.value())).transpose()
        })
    }

    /// Receipts after a number, at most so many: request ids and roots of answers.
    pub(super) fn receipts_after(&self, number: u64, max: usize) -> Result<Vec<[u8; 64]>, JournalError> {
        self.read(|transaction| {
            let table = transaction.open_table(RECEIPTS)?;
            table.range(number.saturating_add(1)..)?.take(max).map(|entry| Ok(*entry?.1.value())).collect()
        })
    }

    /// Makes every change in one durable transaction. For each it says whether it had an effect: false for a request that is
    /// known or settled already, and for one that is not known.
    pub(super) fn apply<'a>(&self, changes: impl Iterator<Item = &'a Change>) -> Result<Vec<bool>, JournalError> {
        let (effects, receipts, covered) = self.write(|transaction| {
            let mut tables = Tables::open(transaction)?;
            let effects = changes.map(|change| tables.apply(change)).collect::<Result<_, _>>()?;
            let receipts = tables.receipts.last()?.map_or(0, |(number, _)| number.value());
            Ok((effects, receipts, tables.covered))
        })?;
        self.receipts.store(receipts, Ordering::Relaxed);
        if let Some(covered) = covered {
            self.covered.store(covered, Ordering::Relaxed);
        }
        Ok(effects)
    }

    /// The record of a request.
    pub(super) fn record(&self, rd: &RequestId) -> Result<Option<Record>, JournalError> {
        self.find(|transaction| {
            let found = transaction.open_table(IDS)?.get(rd.as_bytes())?;
            Ok(found.map(|sequence| sequence.value()))
        })
    }

    /// The record of the latest request of a client under a task id.
    pub(super) fn task(&self, client: &str, task_id: &str) -> Result<Option<Record>, JournalError> {
        self.find(|transaction| {
            let found = transaction.open_table(TASKS)?.get((client, task_id))?;
            Ok(found.map(|sequence| sequence.value()))
        })
    }

    /// The record of the latest request under a key, and the fingerprint that came with it.
    pub(super) fn keyed(&self, key: &[u8; 32]) -> Result<Option<([u8; 32], Record)>, JournalError> {
        let mut fingerprint = [0; 32];
        let record = self.find(|transaction| {
            let table = transaction.open_table(KEYS)?;
            let Some(entry) = table.get(key)? else { return Ok(None) };
            let (sequence, found) = entry.value();
            fingerprint = *found;
            Ok(Some(sequence))
        })?;
        Ok(record.map(|record| (fingerprint, record)))
    }

    /// Every request that was accepted and not settled, in the order of acceptance.
    pub(super) fn open_requests(&self) -> Result<Vec<Open>, JournalError> {
        self.read(|transaction| {
            let requests = transaction.open_table(REQUESTS)?;
            let mut open = Vec::new();
            for entry in transaction.open_table(OPEN)?.iter()? {
                let (sequence, starts) = entry?;
                let bytes = requests.get(sequence.value())?.ok_or_else(|| missing("requests", sequence.value()))?;
                open.push(Open { accepted: record::read_accepted(bytes.value())?, starts: starts.value() });
            }
            Ok(open)
        })
    }

    /// Pieces of evidence, by digest, at most so many.
    pub(super) fn evidence(&self, max: usize) -> Result<Vec<Vec<u8>>, JournalError> {
        self.read(|transaction| {
            let table = transaction.open_table(EVIDENCE)?;
            table.iter()?.take(max).map(|entry| Ok(entry?.1.value().to_vec())).collect()
        })
    }

    /// The newest requests that have a receipt, with the receipt, at most so many.
    pub(super) fn newest_receipts(&self, max: usize) -> Result<Vec<(Accepted, Vec<u8>)>, JournalError> {
        self.read(|transaction| {
            let requests = transaction.open_table(REQUESTS)?;
            let mut newest = Vec::new();
            for entry in transaction.open_table(OUTCOMES)?.iter()?.rev() {
                if newest.len() >= max {
                    break;
                }
                let (sequence, outcome) = entry?;
                let Outcome::Certified { receipt, .. } = record::read_outcome(outcome.value())? else { continue };
                let bytes = requests.get(sequence.value())?.ok_or_else(|| missing("requests", sequence.value()))?;
                newest.push((record::read_accepted(bytes.value())?, receipt));
            }
            Ok(newest)
        })
    }

    fn check_version(&self) -> Result<(), JournalError> {
        let found = self.read(|transaction| match transaction.open_table(META) {
            Ok(table) => Ok(table.get("version")?.map(|version| version.value())),
            Err(TableError::Storage(error)) => Err(error.into()),
            Err(_) => Ok(None),
        })?;
        match found {
            Some(VERSION) => Ok(()),
            Some(found) => Err(JournalError::Version { path: self.path.clone(), found }),
            None => Err(JournalError::Foreign {
                path: self.path.clone(),
                reason: "a database without the version of a log".to_owned(),
            }),
        }
    }

    fn find(
        &self,
        sequence: impl FnOnce(&redb::ReadTransaction) -> Result<Option<u64>, Fault>,
    ) -> Result<Option<Record>, JournalError> {
        self.read(|transaction| {
            let Some(sequence) = sequence(transaction)? else { return Ok(None) };
            let requests = transaction.open_table(REQUESTS)?;
            let bytes = requests.get(sequence)?.ok_or_else(|| missing("requests", sequence))?;
            let accepted = record::read_accepted(bytes.value())?;
            let outcomes = transaction.open_table(OUTCOMES)?;
            let outcome = outcomes.get(sequence)?.map(|bytes| record::read_outcome(bytes.value())).transpose()?;
            Ok(Some(Record { accepted, outcome }))
        })
    }

    fn read<T>(&self, reader: impl FnOnce(&redb::ReadTransaction) -> Result<T, Fault>) -> Result<T, JournalError> {
        let result = self.database.begin_read().map_err(Fault::from).and_then(|transaction| reader(&transaction));
        result.map_err(|fault| fault.at(&self.path))
    }

    fn write<T>(&self, writer: impl FnOnce(&WriteTransaction) -> Result<T, Fault>) -> Result<T, JournalError> {
        let attempt = || {
            let mut transaction = self.database.begin_write()?;
            transaction.set_quick_repair(self.is_large);
            // An error drops the transaction, which takes every change back.
            let result = writer(&transaction)?;
            failpoint("applied");
            transaction.commit()?;
            failpoint("committed");
            Ok(result)
        };
        attempt().map_err(|fault: Fault| fault.at(&self.path))
    }
}

/// The tables of one write transaction.
struct Tables<'t> {
    ids: redb::Table<'t, &'static [u8; 32], u64>,
    tasks: redb::Table<'t, (&'static str, &'static str), u64>,
    requests: redb::Table<'t, u64, &'static [u8]>,
    outcomes: redb::Table<'t, u64, &'static [u8]>,
    open: redb::Table<'t, u64, u32>,
    keys: redb::Table<'t, &'static [u8; 32], (u64, &'static [u8; 32])>,
    key_of: redb::Table<'t, u64, &'static [u8; 32]>,
    evidence: redb::Table<'t, &'static [u8; 32], &'static [u8]>,
    receipts: redb::Table<'t, u64, &'static [u8; 64]>,
    checkpoints: redb::Table<'t, u64, &'static [u8]>,
    /// Receipts in checkpoints, if this transaction makes one.
    covered: Option<u64>,
}

impl<'t> Tables<'t> {
    fn open(transaction: &'t WriteTransaction) -> Result<Self, Fault> {
        Ok(Self {
            ids: transaction.open_table(IDS)?,
            tasks: transaction.open_table(TASKS)?,
            requests: transaction.open_table(REQUESTS)?,
            outcomes: transaction.open_table(OUTCOMES)?,
            open: transaction.open_table(OPEN)?,
            keys: transaction.open_table(KEYS)?,
            key_of: transaction.open_table(KEY_OF)?,
            evidence: transaction.open_table(EVIDENCE)?,
            receipts: transaction.open_table(RECEIPTS)?,
            checkpoints: transaction.open_table(CHECKPOINTS)?,
            covered: None,
        })
    }

    fn apply(&mut self, change: &Change) -> Result<bool, Fault> {
        match change {
            Change::Accept(accepted) => self.accept(accepted),
            Change::Key(rd, key) => self.key(rd, key),
            Change::Settle(settled) => self.settle(settled),
            Change::Restart(rd) => self.restart(rd),
            Change::Prune(window) => self.prune(window),
            Change::Evidence(bytes) => {
                let digest: [u8; 32] = Sha256::digest(bytes).into();
                Ok(self.evidence.insert(&digest, bytes.as_slice())?.is_none())
            }
            Change::Checkpoint(Checkpointed { sequence, through, certificate }) => {
                let bytes = [&through.to_le_bytes()[..], certificate].concat();
                self.covered = Some(*through);
                Ok(self.checkpoints.insert(*sequence, bytes.as_slice())?.is_none())
            }
        }
    }

    fn accept(&mut self, accepted: &Accepted) -> Result<bool, Fault> {
        if self.ids.get(accepted.rd.as_bytes())?.is_some() {
            return Ok(false);
        }
        let last = self.requests.last()?.map_or(0, |(sequence, _)| sequence.value());
        let sequence = last + 1;
        self.ids.insert(accepted.rd.as_bytes(), sequence)?;
        self.tasks.insert((accepted.client.as_str(), accepted.task_id.as_str()), sequence)?;
        self.requests.insert(sequence, record::write_accepted(accepted).as_slice())?;
        self.open.insert(sequence, 1)?;
        Ok(true)
    }

    fn key(&mut self, rd: &RequestId, key: &RetryKey) -> Result<bool, Fault> {
        let Some(sequence) = self.sequence(rd)? else { return Ok(false) };
        self.keys.insert(&key.key, (sequence, &key.fingerprint))?;
        self.key_of.insert(sequence, &key.key)?;
        Ok(true)
    }

    fn settle(&mut self, settled: &Settled) -> Result<bool, Fault> {
        let Some(sequence) = self.sequence(&settled.rd)? else { return Ok(false) };
        if self.open.remove(sequence)?.is_none() {
            return Ok(false);
        }
        self.outcomes.insert(sequence, record::write_outcome(&settled.outcome).as_slice())?;
        if let Outcome::Certified { answer, .. } = &settled.outcome {
            let number = self.receipts.last()?.map_or(0, |(number, _)| number.value()).saturating_add(1);
            let mut receipt = [0; 64];
            let (rd, answer_root) = receipt.split_at_mut(32);
            rd.copy_from_slice(settled.rd.as_bytes());
            answer_root.copy_from_slice(Answer::root_of(answer).as_bytes());
            self.receipts.insert(number, &receipt)?;
        }
        Ok(true)
    }

    fn restart(&mut self, rd: &RequestId) -> Result<bool, Fault> {
        let Some(sequence) = self.sequence(rd)? else { return Ok(false) };
        let Some(starts) = self.open.get(sequence)?.map(|starts| starts.value()) else { return Ok(false) };
        self.open.insert(sequence, starts.saturating_add(1))?;
        Ok(true)
    }

    fn sequence(&self, rd: &RequestId) -> Result<Option<u64>, Fault> {
        Ok(self.ids.get(rd.as_bytes())?.map(|sequence| sequence.value()))
    }
}

/// What went wrong inside a transaction, before the file is named.
enum Fault {
    Storage(redb::Error),
    Damaged(String),
}

impl Fault {
    fn at(self, path: &Path) -> JournalError {
        match self {
            Self::Storage(redb::Error::Corrupted(reason)) | Self::Damaged(reason) => {
                JournalError::Damaged { path: path.to_owned(), reason }
            }
            Self::Storage(error) => storage(path, &error),
        }
    }
}

impl<E: Into<redb::Error>> From<E> for Fault {
    fn from(error: E) -> Self {
        Self::Storage(error.into())
    }
}

impl From<record::Malformed> for Fault {
    fn from(malformed: record::Malformed) -> Self {
        Self::Damaged(malformed.to_string())
    }
}

fn read_checkpoint(sequence: u64, bytes: &[u8]) -> Result<Checkpointed, Fault> {
    let (through, certificate) =
        bytes.split_first_chunk::<8>().ok_or_else(|| Fault::Damaged(format!("checkpoint {sequence} is malformed")))?;
    Ok(Checkpointed { sequence, through: u64::from_le_bytes(*through), certificate: certificate.to_vec() })
}

fn missing(table: &str, sequence: u64) -> Fault {
    Fault::Damaged(format!("entry {sequence} is missing in table {table}"))
}

fn storage(path: &Path, reason: &dyn std::fmt::Display) -> JournalError {
    JournalError::Storage { path: path.to_owned(), reason: reason.to_string() }
}

fn opening(path: &Path, error: DatabaseError) -> JournalError {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen => JournalError::Locked { path },
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
            JournalError::Foreign { path, reason: error.to_string() }
        }
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            JournalError::Damaged { path, reason: error.to_string() }
        }
        DatabaseError::Storage(StorageError::Corrupted(reason)) => JournalError::Damaged { path, reason },
        DatabaseError::UpgradeRequired(version) => {
            JournalError::Foreign { path, reason: format!("database format {version}") }
        }
        error => storage(&path, &error),
    }
}

/// A step at which a test may end the process, as a power cut would.
#[cfg(test)]
fn failpoint(step: &str) {
    use std::sync::atomic::{AtomicU32, Ordering};

    static HITS: AtomicU32 = AtomicU32::new(0);
    let is_asked = |name: &str, value: &str| std::env::var(name).is_ok_and(|asked| asked == value);
    if is_asked("BUTTERFLY_TEST_FAILPOINT", step) {
        let hit = HITS.fetch_add(1, Ordering::Relaxed);
        if is_asked("BUTTERFLY_TEST_HITS", &hit.to_string()) {
            std::process::abort();
        }
    }
}

#[cfg(not(test))]
fn failpoint(_: &str) {}

/// The name of a log that is being begun.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// Makes a new file's name durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}
