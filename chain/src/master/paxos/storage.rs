//! What a member must not forget, and its record on disk.
//!
//! ```text
//! 0           8             12           16           20
//! | "UMPAXOS1" | version u32 | length u32 | CRC32C u32 | bincode Record       all little endian
//! ```
//!
//! The checksum covers the 16 bytes before it and the body.
//!
//! omnipaxos writes here as if every write were durable at once; in truth [`super::node::Node`] hands out nothing (no
//! message, no answer) before the whole record with everything written so far is on disk. So all writes of one step are
//! one atomic change, and a failed write has nothing to roll back: the member has said nothing that depends on it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use checkpoint::{ClusterId, codec};
use omnipaxos::ballot_leader_election::Ballot;
use omnipaxos::storage::{StopSign, Storage, StorageOp, StorageResult};
use serde::{Deserialize, Serialize};

use super::entry::{Applied, Entry, LogSnapshot, Pid};

const MAGIC: &[u8; 8] = b"UMPAXOS1";
const VERSION: u32 = 3;
const HEADER: usize = 20;
/// Longest record in bytes.
pub const RECORD_LIMIT: usize = 112 << 20;

/// Who a record belongs to. One that was written in another place must not be used: its promises are another member's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// All members' host names, sorted; a member's number is its place, from 1 on.
    pub members: Vec<String>,
    /// This one.
    pub me: Pid,
}

/// Everything that a member must not forget.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Whose it is.
    pub identity: Identity,
    /// The cluster that it would begin, if the members had none yet.
    pub proposal: ClusterId,
    /// Raised at every start.
    pub incarnation: u64,
    /// The round that was promised.
    pub promise: Ballot,
    /// The newest round in which something was accepted.
    pub accepted: Ballot,
    /// Entries decided, from the log's beginning on.
    pub decided: u64,
    /// Entries that `snapshot` stands for.
    pub compacted: u64,
    /// Their effect.
    pub snapshot: Applied,
    /// The entries after them.
    pub log: Vec<Entry>,
}

impl Record {
    /// Of a member that has not taken part yet.
    #[must_use]
    pub fn new(identity: Identity, proposal: ClusterId) -> Self {
        Self {
            identity,
            proposal,
            incarnation: 0,
            promise: Ballot::default(),
            accepted: Ballot::default(),
            decided: 0,
            compacted: 0,
            snapshot: Applied::default(),
            log: Vec::new(),
        }
    }

    /// As it is written.
    ///
    /// # Errors
    /// Text: it is too long.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let body = codec::to_bytes(self, RECORD_LIMIT).map_err(|e| e.to_string())?;
        let mut out = Vec::with_capacity(HEADER + body.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out), &body);
        out.extend_from_slice(&crc.to_le_bytes());
        out.extend_from_slice(&body);
        Ok(out)
    }

    /// Reads one.
    ///
    /// # Errors
    /// Text: what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        Self::parse_with(bytes, true)
    }

    pub(super) fn parse_with(bytes: &[u8], checked: bool) -> Result<Self, String> {
        let (header, body) = bytes.split_at_checked(HEADER).ok_or("it is cut off")?;
        if &header[..8] != MAGIC {
            return Err("it is not the record of a master's member".into());
        }
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..16]), body);
        if checked && (word(12) as usize != body.len() || word(16) != crc) {
            return Err("it is damaged (its checksum is wrong)".into());
        }
        if word(8) != VERSION {
            return Err(format!(
                "it has version {}, this program writes version {VERSION}: run the understudy that wrote it, or stop all VMs and set the master up anew, with `understudy init`",
                word(8)
            ));
        }
        let record: Self = codec::from_bytes(body, RECORD_LIMIT).map_err(|e| e.to_string())?;
        let end = record.compacted.checked_add(record.log.len() as u64);
        if record.compacted > record.decided || end.is_none_or(|end| record.decided > end) {
            return Err(format!(
                "it contradicts itself: {} entries folded, {} decided, {} kept",
                record.compacted,
                record.decided,
                record.log.len()
            ));
        }
        Ok(record)
    }
}

/// The record in memory, with what is to be known about it.
#[derive(Debug)]
pub struct Kept {
    /// The record.
    pub record: Record,
    /// Bytes of each entry of `record.log`.
    sizes: Vec<usize>,
    /// Something changed that others may be told about.
    pub changed: bool,
    /// omnipaxos asked for what cannot be: a peer or this program is broken.
    pub broken: Option<String>,
}

impl Kept {
    /// Bytes of the entries from `from` (an index of the whole log) on.
    #[must_use]
    pub fn bytes_from(&self, from: u64) -> usize {
        let skip = from.saturating_sub(self.record.compacted) as usize;
        self.sizes.iter().skip(skip).sum()
    }

    fn offset(&self, idx: usize) -> Option<usize> {
        idx.checked_sub(self.record.compacted as usize)
            .filter(|at| *at <= self.record.log.len())
    }

    fn push(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            let size = codec::to_bytes(&entry, usize::MAX).map_or(0, |b| b.len());
            self.sizes.push(size);
            self.record.log.push(entry);
        }
        self.changed = true;
    }

    fn complain(&mut self, why: String) {
        self.broken.get_or_insert(why);
    }

    fn append_on_prefix(&mut self, from: usize, entries: Vec<Entry>) {
        let Some(at) = self.offset(from) else {
            let (first, len) = (self.record.compacted, self.record.log.len());
            self.complain(format!(
                "entries for place {from} of a log of {len} from {first} on"
            ));
            return;
        };
        self.record.log.truncate(at);
        self.sizes.truncate(at);
        self.push(entries);
    }

    fn trim(&mut self, idx: usize) {
        let count = idx.saturating_sub(self.record.compacted as usize);
        let count = count.min(self.record.log.len());
        self.record.log.drain(..count);
        self.sizes.drain(..count);
        self.changed = true;
    }

    fn entries(&self, from: usize, to: usize) -> Vec<Entry> {
        let range = self.offset(from).zip(self.offset(to));
        let found = range.and_then(|(from, to)| self.record.log.get(from..to));
        found.map_or_else(Vec::new, <[Entry]>::to_vec)
    }

    fn write(&mut self, op: StorageOp<Entry>) {
        match op {
            StorageOp::AppendEntry(entry) => self.push(vec![entry]),
            StorageOp::AppendEntries(entries) => self.push(entries),
            StorageOp::AppendOnPrefix(from, entries) => self.append_on_prefix(from, entries),
            StorageOp::SetPromise(ballot) => {
                self.changed |= self.record.promise != ballot;
                self.record.promise = ballot;
            }
            // What has been decided can be found out again from what a majority has accepted, so this alone is no
            // reason to write: it goes with the next change.
            StorageOp::SetDecidedIndex(idx) => self.record.decided = idx as u64,
            StorageOp::SetAcceptedRound(ballot) => {
                self.changed |= self.record.accepted != ballot;
                self.record.accepted = ballot;
            }
            StorageOp::SetCompactedIdx(idx) => {
                self.record.compacted = idx as u64;
                self.changed = true;
            }
            StorageOp::Trim(idx) => self.trim(idx),
            StorageOp::SetStopsign(None) => {}
            StorageOp::SetStopsign(Some(_)) => self.complain("a change of membership".into()),
            StorageOp::SetSnapshot(snapshot) => {
                self.record.snapshot = snapshot.unwrap_or_default().folded();
                self.changed = true;
            }
        }
    }
}

/// What omnipaxos writes to; clones share it.
#[derive(Clone, Debug)]
pub struct Durable(Arc<Mutex<Kept>>);

impl Durable {
    /// Of a record.
    #[must_use]
    pub fn new(record: Record) -> Self {
        let mut kept = Kept {
            record,
            sizes: Vec::new(),
            changed: true,
            broken: None,
        };
        let log = std::mem::take(&mut kept.record.log);
        kept.push(log);
        Self(Arc::new(Mutex::new(kept)))
    }

    /// To look at it.
    pub fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&mut self, op: StorageOp<Entry>) -> StorageResult<()> {
        self.lock().write(op);
        Ok(())
    }
}

impl Storage<Entry> for Durable {
    fn write_atomically(&mut self, ops: Vec<StorageOp<Entry>>) -> StorageResult<()> {
        let mut kept = self.lock();
        ops.into_iter().for_each(|op| kept.write(op));
        Ok(())
    }

    fn append_entry(&mut self, entry: Entry) -> StorageResult<()> {
        self.write(StorageOp::AppendEntry(entry))
    }

    fn append_entries(&mut self, entries: Vec<Entry>) -> StorageResult<()> {
        self.write(StorageOp::AppendEntries(entries))
    }

    fn append_on_prefix(&mut self, from_idx: usize, entries: Vec<Entry>) -> StorageResult<()> {
        self.write(StorageOp::AppendOnPrefix(from_idx, entries))
    }

    fn set_promise(&mut self, n_prom: Ballot) -> StorageResult<()> {
        self.write(StorageOp::SetPromise(n_prom))
    }

    fn set_decided_idx(&mut self, ld: usize) -> StorageResult<()> {
        self.write(StorageOp::SetDecidedIndex(ld))
    }

    fn get_decided_idx(&self) -> StorageResult<usize> {
        Ok(self.lock().record.decided as usize)
    }

    fn set_accepted_round(&mut self, na: Ballot) -> StorageResult<()> {
        self.write(StorageOp::SetAcceptedRound(na))
    }

    fn get_accepted_round(&self) -> StorageResult<Option<Ballot>> {
        let round = self.lock().record.accepted;
        Ok((round != Ballot::default()).then_some(round))
    }

    fn get_entries(&self, from: usize, to: usize) -> StorageResult<Vec<Entry>> {
        Ok(self.lock().entries(from, to))
    }

    fn get_log_len(&self) -> StorageResult<usize> {
        Ok(self.lock().record.log.len())
    }

    fn get_suffix(&self, from: usize) -> StorageResult<Vec<Entry>> {
        let kept = self.lock();
        let end = kept.record.compacted as usize + kept.record.log.len();
        Ok(kept.entries(from, end))
    }

    fn get_promise(&self) -> StorageResult<Option<Ballot>> {
        let promise = self.lock().record.promise;
        Ok((promise != Ballot::default()).then_some(promise))
    }

    fn set_stopsign(&mut self, stopsign: Option<StopSign>) -> StorageResult<()> {
        self.write(StorageOp::SetStopsign(stopsign))
    }

    fn get_stopsign(&self) -> StorageResult<Option<StopSign>> {
        Ok(None)
    }

    fn trim(&mut self, idx: usize) -> StorageResult<()> {
        self.write(StorageOp::Trim(idx))
    }

    fn set_compacted_idx(&mut self, idx: usize) -> StorageResult<()> {
        self.write(StorageOp::SetCompactedIdx(idx))
    }

    fn get_compacted_idx(&self) -> StorageResult<usize> {
        Ok(self.lock().record.compacted as usize)
    }

    fn set_snapshot(&mut self, snapshot: Option<LogSnapshot>) -> StorageResult<()> {
        self.write(StorageOp::SetSnapshot(snapshot))
    }

    fn get_snapshot(&self) -> StorageResult<Option<LogSnapshot>> {
        let kept = self.lock();
        Ok((kept.record.compacted > 0).then(|| LogSnapshot::of(kept.record.snapshot.clone())))
    }
}
