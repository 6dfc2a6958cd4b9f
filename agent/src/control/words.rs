//! What a VM's state is called, for people.

use std::fmt;

use super::status::{Health, ReplicaHealth, Role, VmStatus, Warning};

impl VmStatus {
    /// Its state in one line, as docs/admin.md lists it.
    #[must_use]
    pub fn state(&self) -> String {
        match &self.health {
            Health::Protected => "Protected".into(),
            Health::Joining => {
                let joining = self.joining.as_deref().unwrap_or("a backup");
                format!("Protected; {joining} is joining")
            }
            Health::Slow(throttled) => format!("Protected, {}", throttled.text()),
            Health::Degraded { backups, wanted } => format!(
                "Degraded: protected by {backups} of {wanted} backups; {}",
                self.missing()
            ),
            Health::OutputHeld => "Output held: the backups are being brought up to date".into(),
            Health::Synchronising => match &self.sync {
                Some(sync) => format!("Not protected: {}", sync.text()),
                None => "Not protected: the first checkpoint is on its way".into(),
            },
            Health::Unprotected => "Not protected: no backups".into(),
            Health::Alone => format!("Not protected: {}", self.missing()),
            Health::Troubled { why } => format!("Not protected: {why}"),
            Health::Ended { how } => format!("Not running: {how}"),
            Health::NotRunning { why } => format!("Not running: {why}"),
            Health::Off => "Off; its newest disks are here".into(),
            Health::Declined { why } => format!("Cannot stand by: {why}"),
            Health::Replica(replica) => replica.text(),
            Health::Clone { of, epoch, ended } => {
                let from = format!("clone of {of} at checkpoint {epoch}, not protected");
                match ended {
                    Some(how) => format!("Ended: {how}; {from}"),
                    None => from,
                }
            }
            Health::Unknown => "Unknown".into(),
        }
    }

    /// Who is missing, and why.
    fn missing(&self) -> String {
        let each = self.lacking.iter().map(|(host, why)| match why {
            Some(why) => format!("{host} is missing: {why}"),
            None => format!("{host} is being asked"),
        });
        each.collect::<Vec<_>>().join("; ")
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Owner => "owner",
            Self::Replica => "replica",
            Self::Off => "off",
            Self::Clone => "clone",
            Self::None => "none",
        })
    }
}

impl ReplicaHealth {
    /// In words.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::StandingBy => "Standing by".into(),
            Self::Filling {
                pages_sent,
                blocks_sent,
                blocks_equal,
                left_bytes,
            } => format!(
                "Standing by; fills a joining replica: {pages_sent} pages and {blocks_sent} disk blocks sent, {blocks_equal} it had, {} MiB left",
                left_bytes >> 20
            ),
            Self::Joining => "Joining".into(),
            Self::Synchronising => "Synchronising".into(),
            Self::Frozen => "Frozen for a takeover".into(),
            Self::Failed { why } => format!("Replica failed: {why}"),
            Self::Absent => "No replica".into(),
        }
    }
}

impl Warning {
    /// In words, with the remedy.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Disk { why } => why.clone(),
            Self::MasterInChain { host } => format!(
                "{host} has the cluster's only master and a part in this VM: if it dies, output is held until it is back. Give the master three members ([master] members), or keep {host} out of the chain"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_names_who_is_missing_and_why() {
        let status = VmStatus {
            health: Health::Degraded {
                backups: 1,
                wanted: 3,
            },
            lacking: vec![("b".into(), Some("no route".into())), ("c".into(), None)],
            ..VmStatus::default()
        };
        assert_eq!(
            status.state(),
            "Degraded: protected by 1 of 3 backups; b is missing: no route; c is being asked"
        );
    }

    /// What scripts read: names that do not change with the words.
    #[test]
    fn health_is_data_in_json() {
        let json = |health: &Health| serde_json::to_string(health).unwrap();
        assert_eq!(json(&Health::OutputHeld), "\"output-held\"");
        assert_eq!(
            json(&Health::Degraded {
                backups: 1,
                wanted: 2
            }),
            "{\"degraded\":{\"backups\":1,\"wanted\":2}}"
        );
        assert_eq!(
            json(&Health::Replica(ReplicaHealth::StandingBy)),
            "{\"replica\":\"standing-by\"}"
        );
    }
}
