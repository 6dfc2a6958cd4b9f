//! The master's engine for several hosts: Paxos among three or five members, each with its own record.
//!
//! Decides as long as a majority of the members answers each other, whichever they are; without one it refuses, saying
//! so. The consensus is omnipaxos; ours are its storage ([`storage`], [`super::record`]), what is agreed on ([`entry`]), the
//! member as a state machine around it ([`node`]) and the connections ([`transport`]).
//!
//! Reads are linearizable because they have a place in the log: a marker is proposed after the read came, and the state
//! at the marker answers it. Reads that come while a marker is under way share the next one.

mod driver;
mod entry;
mod node;
#[cfg(test)]
mod node_tests;
#[cfg(test)]
mod record_tests;
#[cfg(test)]
mod sim;
mod storage;
mod transport;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use checkpoint::{ClusterId, HostId};

use super::record::{OsFiles, RecordFile, StoreError};
use super::{Begin, Master, MasterError, Reply, Request, Snapshot, Wanted, local};
use driver::{Driver, Question};
use node::{Answer, Node, Refusal};
use storage::{Identity, Record};

const NAME: &str = "paxos.record";

/// One member, taking part.
#[derive(Debug)]
pub struct PaxosMaster {
    driver: Driver,
    known: Option<ClusterId>,
}

impl PaxosMaster {
    /// The record's name in its directory.
    pub const RECORD: &str = NAME;

    /// Takes part as `me`, one of `members` (names and addresses of all, the same on all hosts), with the record
    /// `paxos.record` in `dir`; where there is none, `begin` says whether one may be begun. Returns at once; decisions
    /// come when a majority takes part.
    ///
    /// # Errors
    /// [`MasterError::NotBegun`] if there is no record and none may be begun.
    /// [`MasterError::Membership`] for anything but three or five members of which this is one, or a record of another
    /// membership. [`MasterError::Storage`] if the record is damaged or cannot be written: a member that forgot its
    /// promises could undo decisions, so it does not start. [`MasterError::InUse`] if another process uses it,
    /// [`MasterError::Bind`] if its address cannot be used.
    pub fn open(
        dir: &Path,
        me: &HostId,
        members: &BTreeMap<HostId, SocketAddr>,
        begin: Begin,
    ) -> Result<Self, MasterError> {
        check_members(me, members)?;
        let lock = local::lock_dir(dir, &dir.join(NAME))?;
        let single = dir.join(local::RECORD);
        if single.exists() {
            return Err(MasterError::Storage {
                path: single,
                why: "it is a single master's: its decisions would be forgotten; remove it only if no VM of this cluster runs".into(),
            });
        }
        let mut file = RecordFile::new(Box::new(OsFiles), dir, NAME);
        let fail = |why: String| MasterError::Storage {
            path: dir.join(NAME),
            why,
        };
        let identity = Identity {
            members: members.keys().map(ToString::to_string).collect(),
            me: members.keys().take_while(|name| *name != me).count() as u64 + 1,
        };
        let record = match file.load().map_err(|e| fail(e.to_string()))? {
            Some(bytes) => Record::parse(&bytes).map_err(|why| {
                fail(format!("{why}; this member must not take part without it, it has promised what it does not know any more: the others decide as long as they are a majority, and this host goes on as a backup. To have all members again, stop all VMs, move `paxos.record` and `identity`, and nothing else, away from the data_dir of each member (the VMs' disks are there too), and begin a new cluster"))
            })?,
            None if begin == Begin::New => Record::new(identity.clone(), ClusterId::random()),
            None => {
                let place = dir.join(NAME).display().to_string();
                return Err(MasterError::NotBegun { place });
            }
        };
        if record.identity != identity {
            let was = &record.identity;
            let name = was.members.get(was.me as usize - 1);
            return Err(MasterError::Membership(format!(
                "{} was written by member {} of {}; it cannot be used by {me} of {}: the members' names must stay the same",
                dir.join(NAME).display(),
                name.map_or("?", String::as_str),
                was.members.join(", "),
                identity.members.join(", ")
            )));
        }
        let known = record.snapshot.state.cluster();
        let mut node = Node::new(record).map_err(MasterError::Membership)?;
        // Its incarnation must not be used again; and a disk that cannot be written shows now.
        let mut output = node.take();
        if let Some(first) = output.record.take() {
            match file.store(&first) {
                Ok(()) => {}
                // It stands still until there is.
                Err(StoreError::NoRoom(_)) => output.record = Some(first),
                Err(e) => return Err(fail(e.to_string())),
            }
        }
        let list: Vec<(String, SocketAddr)> = members
            .iter()
            .map(|(name, addr)| (name.to_string(), *addr))
            .collect();
        let driver = Driver::start(node, output, file, lock, &list)?;
        let known = (known != ClusterId::NIL).then_some(known);
        Ok(Self { driver, known })
    }

    /// Whose decisions these are, if its record said so when it was opened.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterId> {
        self.known
    }

    /// Ends this member's part: it answers nothing any more, and its record and address are free.
    pub fn stop(&self) {
        self.driver.stop();
    }

    fn ask(&self, question: Question, wanted: &Wanted) -> Result<Answer, MasterError> {
        match self.driver.ask(question, wanted)? {
            Answer::Refused(Refusal::Rejected(rejection)) => Err(rejection.into()),
            Answer::Refused(Refusal::Undecided { answering, members }) => {
                Err(MasterError::NoDecision { answering, members })
            }
            Answer::Refused(Refusal::AnswerLost) => Err(MasterError::Stopped(
                "the change was decided, but later ones hide what was answered; ask for the VM's record".into(),
            )),
            Answer::Refused(Refusal::TooLarge(why) | Refusal::Stopped(why)) => {
                Err(MasterError::Stopped(why))
            }
            answer => Ok(answer),
        }
    }
}

fn check_members(me: &HostId, members: &BTreeMap<HostId, SocketAddr>) -> Result<(), MasterError> {
    let fail = |why: String| Err(MasterError::Membership(why));
    if members.len() != 3 && members.len() != 5 {
        return fail(format!(
            "{} members are named; name 3 or 5 (a single master has none)",
            members.len()
        ));
    }
    if !members.contains_key(me) {
        let names: Vec<String> = members.keys().map(ToString::to_string).collect();
        return fail(format!(
            "{me} is not among the members {}",
            names.join(", ")
        ));
    }
    for (name, addr) in members {
        if let Some((other, _)) = members.iter().find(|(n, a)| *a == addr && *n != name) {
            return fail(format!("{name} and {other} have the same address {addr}"));
        }
    }
    Ok(())
}

impl Master for PaxosMaster {
    fn leads(&self) -> bool {
        self.driver.leads()
    }

    fn trouble(&self) -> Option<String> {
        self.driver.trouble()
    }

    fn request(&self, request: &Request, wanted: &Wanted) -> Result<Reply, MasterError> {
        match self.ask(Question::Propose(Box::new(request.clone())), wanted)? {
            Answer::Reply(reply) => Ok(reply),
            other => Err(MasterError::Stopped(format!("unexpected answer {other:?}"))),
        }
    }

    fn watch(&self, since: u64, timeout: Duration) -> Result<Snapshot, MasterError> {
        let deadline = Instant::now() + timeout;
        loop {
            // What is known here may be old, but if it is new enough for the asker, so is what the read will find.
            self.driver.wait_revision(since, deadline);
            match self.ask(Question::Read, &Wanted::always())? {
                Answer::Snapshot(snapshot)
                    if snapshot.revision > since || Instant::now() >= deadline =>
                {
                    return Ok(snapshot);
                }
                Answer::Snapshot(_) => {}
                other => return Err(MasterError::Stopped(format!("unexpected answer {other:?}"))),
            }
        }
    }
}
