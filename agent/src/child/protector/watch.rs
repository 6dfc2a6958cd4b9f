//! What an owner reports of a chain that does not move, and how often. Plain: the caller says what time it is.

use std::time::Duration;

use checkpoint::HostId;

use super::Trouble;

/// A commit that takes longer makes the agent look whether all replicas still answer; or than the silence after which a host is
/// suspected, if that is more.
const COMMIT_PATIENCE: Duration = Duration::from_millis(150);
/// The same while a chain begins, of anything that it takes or says.
const BEGIN_PATIENCE: Duration = Duration::from_secs(3);
/// A chain that neither takes nor acknowledges anything for this long is not slow but stuck.
const STUCK_PATIENCE: Duration = Duration::from_secs(45);
/// Reports of the same come at growing distances, up to this one.
const LONGEST: Duration = Duration::from_secs(8);

/// What can be seen of a chain.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// It is not complete yet.
    pub begins: bool,
    /// How long the oldest checkpoint under way has been waiting.
    pub waiting: Option<Duration>,
    /// How long it has neither taken nor acknowledged anything, if it should.
    pub stuck: Option<Duration>,
}

/// Watches one connection.
#[derive(Debug)]
pub(super) struct Watch {
    head: Option<HostId>,
    backups: usize,
    patience: Duration,
    /// The next report is not due before, and the distance to the one after it.
    next: Duration,
    distance: Duration,
}

impl Watch {
    /// Of a chain of so many replicas; hosts are suspected after `silence`.
    pub(super) fn new(head: Option<HostId>, backups: usize, silence: Duration) -> Self {
        let patience = COMMIT_PATIENCE.max(silence);
        Self {
            head,
            backups,
            patience,
            next: Duration::ZERO,
            distance: patience,
        }
    }

    /// What is to be reported at `now`, counted from any moment.
    pub(super) fn look(&mut self, now: Duration, seen: &Seen) -> Option<Trouble> {
        let trouble = self.trouble(seen);
        if trouble.is_none() {
            self.distance = self.patience;
            return None;
        }
        if now < self.next {
            return None;
        }
        self.next = now + self.distance;
        self.distance = LONGEST.min(self.distance * 2);
        trouble
    }

    fn trouble(&self, seen: &Seen) -> Option<Trouble> {
        let stuck = seen.stuck.filter(|stuck| *stuck >= STUCK_PATIENCE);
        if let Some(stuck) = stuck
            && (seen.begins || self.backups == 1)
        {
            return Some(Trouble {
                host: self.head.clone(),
                why: format!(
                    "small frames arrive, large ones do not: the connection stands, but nothing was taken or acknowledged \
                     for {} s (does the path carry frames as large as its MTU says? does the backup's disk answer?)",
                    stuck.as_secs()
                ),
                unfit: false,
            });
        }
        if let Some(still) = seen
            .stuck
            .filter(|still| seen.begins && *still > BEGIN_PATIENCE)
        {
            return Some(
                format!(
                    "nothing was taken or acknowledged for {} s",
                    still.as_secs()
                )
                .into(),
            );
        }
        // A backup that lost power closes no connection: only the missing commits show it.
        let waiting = seen.waiting.filter(|waiting| *waiting > self.patience)?;
        Some(format!("no commit for {} ms", waiting.as_millis()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(backups: usize) -> Watch {
        Watch::new(Some(HostId::new("b").unwrap()), backups, Duration::ZERO)
    }

    fn s(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn h16_a_chain_that_begins_and_does_not_move_is_reported_with_its_head_and_the_reason() {
        let mut watch = watch(2);
        let mut seen = Seen {
            begins: true,
            waiting: None,
            stuck: Some(s(2)),
        };
        assert!(watch.look(s(2), &seen).is_none());
        seen.stuck = Some(s(44));
        let nobody = watch.look(s(44), &seen).unwrap();
        assert!(nobody.host.is_none(), "whoever answers is only slow");
        seen.stuck = Some(s(45));
        let trouble = watch.look(s(45), &seen).unwrap();
        assert_eq!(trouble.host.unwrap().as_str(), "b");
        assert!(
            trouble.why.starts_with("small frames arrive"),
            "{}",
            trouble.why
        );
        assert!(!trouble.unfit);
        seen.stuck = Some(s(1));
        assert!(watch.look(s(90), &seen).is_none(), "slow is not stuck");
    }

    #[test]
    fn a_complete_chain_of_several_names_nobody_but_a_single_backup_is_the_culprit() {
        let seen = Seen {
            begins: false,
            waiting: Some(s(46)),
            stuck: Some(s(46)),
        };
        assert!(watch(2).look(s(46), &seen).unwrap().host.is_none());
        assert!(watch(1).look(s(46), &seen).unwrap().host.is_some());
    }

    #[test]
    fn h18_reports_of_the_same_grow_rare() {
        let mut watch = watch(1);
        let seen = Seen {
            begins: false,
            waiting: Some(s(1)),
            stuck: None,
        };
        let reports = |watch: &mut Watch, from: u64| {
            let times = (from..from + 1800).map(|tenth| Duration::from_millis(tenth * 100));
            times.filter(|at| watch.look(*at, &seen).is_some()).count()
        };
        let first = reports(&mut watch, 0);
        assert!((20..30).contains(&first), "{first} reports in 180 s");
        assert!(watch.look(s(181), &Seen::default()).is_none());
        assert!(watch.look(s(190), &seen).is_some());
    }
}
