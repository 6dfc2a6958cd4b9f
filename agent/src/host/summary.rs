//! What a machine shows of itself, for `status`.

use chain::VmRecord;
use checkpoint::HostId;

use super::Machine;
use super::machine::Part;
use super::owner::Phase;
use crate::control::FailoverReport;

/// This host's part, without what is being done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It runs the VM, or did until the guest ended.
    Owner,
    /// It holds a replica.
    Standby,
    /// The VM is this host's, and runs nowhere.
    Orphan,
    /// The VM is off, and its newest disks are here.
    Off,
    /// It should hold a replica, and cannot.
    Declined,
    /// None.
    Nothing,
}

/// A snapshot of a machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The configuration followed.
    pub record: VmRecord,
    /// The part.
    pub role: Role,
    /// Owner: the first checkpoint of this configuration is committed.
    pub protected: bool,
    /// Owner: why it is less safe than it should be. Orphan: what is being done. Declined: why.
    pub trouble: Option<String>,
    /// Owner: wanted backups that are not in the chain, and why, if that is known.
    pub lacking: Vec<(String, Option<String>)>,
    /// Something is under way that makes the VM safer, or says why it cannot be.
    pub pending: bool,
    /// Owner: the guest has ended, and how.
    pub ended: Option<String>,
    /// Owner: output is held until the backups have what they lacked after a takeover.
    pub bridging: bool,
    /// The last failover to this host.
    pub failover: Option<FailoverReport>,
}

impl Machine {
    /// What it shows of itself.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let mut summary = Summary {
            record: self.record.clone(),
            role: Role::Nothing,
            protected: false,
            trouble: None,
            lacking: Vec::new(),
            pending: false,
            ended: None,
            bridging: false,
            failover: None,
        };
        match &self.part {
            Part::Nothing { declined } => {
                if declined.is_some() {
                    summary.role = Role::Declined;
                }
                summary.trouble = declined.as_ref().map(|declined| declined.why.clone());
            }
            Part::Standby(_) => summary.role = Role::Standby,
            Part::Off(_) => summary.role = Role::Off,
            Part::Orphan(orphan) => {
                summary.role = Role::Orphan;
                summary.trouble = Some(orphan.state.clone());
            }
            Part::Owner(owner) => {
                let view = &self.record.view;
                summary.role = Role::Owner;
                summary.protected =
                    owner.protected == Some(view.generation) && !view.chain.is_empty();
                summary.trouble.clone_from(&owner.trouble);
                summary.bridging = owner.bridge.is_some();
                summary.failover.clone_from(&owner.failover);
                let why = |host: &HostId| match self.peers.contains_key(host) {
                    true => owner.absent.get(host).cloned(),
                    false => Some("it is not among this host's [peers]".into()),
                };
                let lacking = owner.wanted.iter();
                let lacking = lacking.filter(|host| view.position(host).is_none());
                summary.lacking = lacking.map(|host| (host.to_string(), why(host))).collect();
                let unknown = summary.lacking.iter().any(|(_, why)| why.is_none());
                let settling = !view.chain.is_empty() && !summary.protected;
                let moving = view.joining.is_some() || owner.arrange && summary.lacking.is_empty();
                summary.pending = self.ask.is_some() || unknown || settling || moving;
                if let Phase::Ended(how) = &owner.phase {
                    summary.ended = Some(how.clone());
                }
            }
        }
        summary
    }
}
