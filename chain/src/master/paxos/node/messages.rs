//! A member's messages: which are sent, and which of those that come are taken.

use omnipaxos::ballot_leader_election::Ballot;
use omnipaxos::messages::Message;
use omnipaxos::messages::ballot_leader_election::HeartbeatMsg;
use omnipaxos::messages::sequence_paxos::{Compaction, PaxosMsg};
use omnipaxos::storage::SnapshotType;
use omnipaxos::util::LogSync;

use super::{CONFIGURATION, Entry, INDEX_MAX, LogSnapshot, Node, PeerMessage, Pid};

impl Node {
    pub(super) fn send(&mut self) {
        let mut messages = Vec::new();
        self.omni.take_outgoing_messages(&mut messages);
        for mut message in messages {
            if let Message::SequencePaxos(paxos) = &mut message {
                match &mut paxos.msg {
                    PaxosMsg::Promise(promise) => {
                        if let Some(sync) = &mut promise.log_sync {
                            self.whole(sync);
                        }
                    }
                    PaxosMsg::AcceptSync(sync) => self.whole(&mut sync.log_sync),
                    _ => {}
                }
            }
            self.output.messages.push(message);
        }
    }

    /// A difference becomes the whole state, which is the one of this moment: both are of all that is decided here.
    fn whole(&self, sync: &mut LogSync<Entry>) {
        #[cfg(test)]
        if self.send_differences {
            return;
        }
        if let Some(SnapshotType::Delta(_)) = sync.decided_snapshot {
            if sync.sync_idx as u64 != self.applied_idx {
                let mut kept = self.durable.lock();
                let (is, asked) = (self.applied_idx, sync.sync_idx);
                kept.broken
                    .get_or_insert_with(|| format!("a snapshot of {asked} entries, not of {is}"));
            }
            let snapshot = LogSnapshot::of(self.applied.clone());
            sync.decided_snapshot = Some(SnapshotType::Complete(snapshot));
        }
    }

    /// Whether this member is gathering promises.
    ///
    /// The library forgets who promised, but not what came with the promise, when a member asks anew (`PrepareReq`) or
    /// refuses meanwhile: with others' promises it then takes that member's snapshot over without what it knows to be
    /// decided, and hands out a log with a hole. So it does not hear of either before it has enough promises; they are
    /// durable, and count. Who asked asks again.
    fn preparing(&self) -> bool {
        self.omni.get_current_leader() == Some((self.me, false))
    }

    /// Whether an honest member of this cluster can have said this. What it means is the library's business; what
    /// would make the library index, allocate or change beyond what there is, is not given to it.
    pub(super) fn acceptable(&self, from: Pid, message: &PeerMessage) -> bool {
        #[cfg(test)]
        let differences = self.send_differences;
        #[cfg(not(test))]
        let differences = false;
        let member = |pid: Pid| (1..=self.members as Pid).contains(&pid);
        let ballot = |b: &Ballot| {
            *b == Ballot::default()
                || (member(b.pid) && b.config_id == CONFIGURATION && b.n < u32::MAX / 2)
        };
        let index = |idx: usize| idx < INDEX_MAX;
        let entries = |entries: &[Entry]| entries.iter().all(|e| member(e.id.member));
        let sync = |s: &LogSync<Entry>| {
            index(s.sync_idx)
                && entries(&s.suffix)
                && s.stopsign.is_none()
                && (differences || !matches!(s.decided_snapshot, Some(SnapshotType::Delta(_))))
        };
        if from == self.me
            || !member(from)
            || message.get_sender() != from
            || message.get_receiver() != self.me
        {
            return false;
        }
        match message {
            Message::BLE(heartbeat) => match &heartbeat.msg {
                HeartbeatMsg::Request(_) => true,
                HeartbeatMsg::Reply(reply) => {
                    ballot(&reply.ballot) && ballot(&reply.leader) && reply.ballot.pid == from
                }
            },
            Message::SequencePaxos(paxos) => match &paxos.msg {
                PaxosMsg::PrepareReq(m) => ballot(&m.n) && !self.preparing(),
                PaxosMsg::Prepare(m) => {
                    m.n.pid == from
                        && ballot(&m.n)
                        && ballot(&m.n_accepted)
                        && index(m.decided_idx)
                        && index(m.accepted_idx)
                }
                PaxosMsg::Promise(m) => {
                    ballot(&m.n)
                        && ballot(&m.n_accepted)
                        && index(m.decided_idx)
                        && index(m.accepted_idx)
                        && m.log_sync.as_ref().is_none_or(sync)
                }
                PaxosMsg::AcceptSync(m) => {
                    m.n.pid == from && ballot(&m.n) && index(m.decided_idx) && sync(&m.log_sync)
                }
                PaxosMsg::AcceptDecide(m) => {
                    m.n.pid == from && ballot(&m.n) && index(m.decided_idx) && entries(&m.entries)
                }
                PaxosMsg::Accepted(m) => ballot(&m.n) && index(m.accepted_idx),
                PaxosMsg::NotAccepted(m) => ballot(&m.n) && !self.preparing(),
                PaxosMsg::Decide(m) => m.n.pid == from && ballot(&m.n) && index(m.decided_idx),
                // What is not taken now is proposed again by whom it belongs to; kept, it could take effect too late.
                PaxosMsg::ProposalForward(proposed) => {
                    self.leader() == Some(self.me)
                        && self.has_room()
                        && proposed.iter().all(|e| e.id.member == from)
                }
                PaxosMsg::Compaction(Compaction::Trim(_) | Compaction::Snapshot(_))
                | PaxosMsg::AcceptStopSign(_)
                | PaxosMsg::ForwardStopSign(_) => false,
            },
        }
    }
}
