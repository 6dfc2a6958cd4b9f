//! When the open epoch ends. Plain: the caller says what time it is, counted from any moment.
//!
//! With output waiting an epoch ends as soon as it may: what it waits for is its commit. Without, it lasts as long as it may,
//! and an idle guest's epochs become longer and longer, because each costs its host and its backups something.

use std::collections::VecDeque;
use std::time::Duration;

/// An epoch without output, disk writes and more changed pages than this is idle.
const IDLE_PAGES: u64 = 64;
/// The share of pauses is that of so much time.
const WINDOW: Duration = Duration::from_millis(100);

/// How long epochs may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// At most, unless the guest is idle.
    pub longest: Duration,
    /// At least, with output waiting.
    pub shortest: Duration,
    /// At most, if it is; no shorter than `longest`.
    pub idle: Duration,
    /// Output ends an epoch early only if the guest stands still for no more than this share of the time, in percent.
    pub pause_percent: u32,
}

impl Lengths {
    fn idle(&self) -> Duration {
        self.idle.max(self.longest)
    }
}

/// What the open epoch has come to, for [`Rhythm::due`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Open {
    /// Output waits for its commit.
    pub output: bool,
    /// A checkpoint before it is not committed yet.
    pub in_flight: bool,
    /// The chain is not complete yet, and needs checkpoints to become so.
    pub begins: bool,
}

/// Decides it for one VM.
#[derive(Clone, Debug)]
pub struct Rhythm {
    lengths: Lengths,
    /// When the last epoch ended.
    last: Duration,
    /// How long the open one may be.
    length: Duration,
    /// When the changed pages of an idle guest are counted next, to see whether it still is.
    look: Duration,
    /// Ends and lengths of the pauses within the window.
    pauses: VecDeque<(Duration, Duration)>,
}

impl Rhythm {
    /// An epoch begins now.
    #[must_use]
    pub fn new(lengths: Lengths, now: Duration) -> Self {
        let mut rhythm = Self {
            lengths,
            last: now,
            length: lengths.longest,
            look: now,
            pauses: VecDeque::new(),
        };
        rhythm.begin(now);
        rhythm
    }

    /// When the last epoch ended.
    #[must_use]
    pub fn last(&self) -> Duration {
        self.last
    }

    /// Other lengths from now on.
    pub fn set(&mut self, lengths: Lengths) {
        self.lengths = lengths;
        self.stir();
    }

    /// An epoch begins, and nothing is known of the guest.
    pub fn begin(&mut self, now: Duration) {
        self.last = now;
        self.stir();
    }

    /// The guest, or its chain, is not idle any more.
    pub fn stir(&mut self) {
        self.length = self.lengths.longest;
        self.look = self.last + self.length;
    }

    /// An epoch has ended: how long the guest stood still and would have run, how many pages it had changed, and whether there
    /// was output or a disk write.
    pub fn ended(&mut self, now: Duration, pause: Duration, pages: u64, active: bool) {
        self.last = now;
        let idle = !active && pages <= IDLE_PAGES;
        self.length = match idle {
            true => (self.length * 2).min(self.lengths.idle()),
            false => self.lengths.longest,
        };
        self.look = now + self.lengths.longest;
        self.pauses.push_back((now, pause));
        while self
            .pauses
            .front()
            .is_some_and(|(end, _)| *end + WINDOW <= now)
        {
            self.pauses.pop_front();
        }
    }

    /// When the open epoch is to end.
    #[must_use]
    pub fn due(&self, open: Open) -> Duration {
        let longest = self.last + self.lengths.longest;
        match open {
            Open {
                output: true,
                in_flight: false,
                ..
            } => self.earliest().min(longest),
            Open { output: true, .. } | Open { begins: true, .. } => longest,
            _ => self.last + self.length,
        }
    }

    /// When the changed pages are to be counted: only during an epoch that is longer than others.
    #[must_use]
    pub fn look(&self) -> Option<Duration> {
        (self.look < self.last + self.length).then_some(self.look)
    }

    /// They have been counted.
    pub fn looked(&mut self, pages: u64) {
        if pages > IDLE_PAGES {
            self.stir();
        } else {
            // Each look costs as much as it finds out about: twice as far as the one before.
            self.look = self.last + (self.look - self.last) * 2;
        }
    }

    /// When another pause, as long as the last one, keeps to the share of time that pauses may take: at once after a time with
    /// few of them, and else after as long as this share asks for.
    fn earliest(&self) -> Duration {
        let percent = self.lengths.pause_percent;
        let next = self.pauses.back().map_or(Duration::ZERO, |(_, len)| *len);
        let recent = self.pauses.iter().map(|(_, len)| *len).sum::<Duration>();
        let wait = match (recent + next) * 200 <= WINDOW * percent {
            true => Duration::ZERO,
            false => next * 100u32.saturating_sub(percent) / percent.max(1),
        };
        self.last + wait.max(self.lengths.shortest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    const LENGTHS: Lengths = Lengths {
        longest: ms(25),
        shortest: Duration::ZERO,
        idle: ms(250),
        pause_percent: 10,
    };
    const QUIET: Open = Open {
        output: false,
        in_flight: false,
        begins: false,
    };
    const OUTPUT: Open = Open {
        output: true,
        ..QUIET
    };

    fn rhythm() -> Rhythm {
        Rhythm::new(LENGTHS, ms(1000))
    }

    #[test]
    fn epochs_of_an_idle_guest_lengthen_and_output_ends_them_at_once() {
        let mut rhythm = rhythm();
        let mut now = ms(1000);
        let mut lengths = Vec::new();
        for _ in 0..6 {
            let due = rhythm.due(QUIET);
            lengths.push((due - now).as_millis());
            now = due;
            rhythm.ended(now, ms(1), 3, false);
        }
        assert_eq!(lengths, [25, 50, 100, 200, 250, 250]);
        assert_eq!(rhythm.due(OUTPUT), now);
        rhythm.ended(now, ms(1), 3, true);
        assert_eq!(rhythm.due(QUIET), now + ms(25), "short again");
    }

    #[test]
    fn changed_pages_disk_writes_and_a_chain_that_begins_keep_epochs_short() {
        let mut rhythm = rhythm();
        for (pages, active) in [(IDLE_PAGES + 1, false), (0, true)] {
            rhythm.ended(ms(2000), ms(1), 0, false);
            assert_eq!(rhythm.due(QUIET), ms(2050));
            let begins = Open {
                begins: true,
                ..QUIET
            };
            assert_eq!(rhythm.due(begins), ms(2025));
            rhythm.ended(ms(2000), ms(1), pages, active);
            assert_eq!(rhythm.due(QUIET), ms(2025));
        }
        rhythm.ended(ms(3000), ms(1), 0, false);
        rhythm.stir();
        assert_eq!(rhythm.due(QUIET), ms(3025));
    }

    #[test]
    fn a_guest_that_wakes_in_a_long_epoch_is_noticed() {
        let mut rhythm = rhythm();
        assert_eq!(rhythm.look(), None, "no longer than any epoch");
        let mut now = ms(1000);
        for _ in 0..4 {
            now = rhythm.due(QUIET);
            rhythm.ended(now, ms(1), 0, false);
        }
        let mut looks = Vec::new();
        while let Some(at) = rhythm.look() {
            looks.push((at - now).as_millis());
            rhythm.looked(IDLE_PAGES);
        }
        assert_eq!(looks, [25, 50, 100, 200]);
        rhythm.ended(now, ms(1), 0, false);
        rhythm.looked(IDLE_PAGES + 1);
        assert_eq!(rhythm.due(QUIET), now + ms(25));
    }

    #[test]
    fn output_waits_while_a_checkpoint_is_under_way_but_not_for_a_long_epoch() {
        let mut rhythm = rhythm();
        rhythm.ended(ms(2000), ms(1), 0, false);
        let under_way = Open {
            in_flight: true,
            ..OUTPUT
        };
        assert_eq!(rhythm.due(QUIET), ms(2050));
        assert_eq!(rhythm.due(under_way), ms(2025));
    }

    #[test]
    fn output_does_not_make_the_guest_stand_still_for_more_than_its_share() {
        let mut rhythm = rhythm();
        let (mut now, mut paused, mut ends, mut longest) =
            (ms(1000), Duration::ZERO, 0, Duration::ZERO);
        while now < ms(2000) {
            let due = rhythm.due(OUTPUT).max(now);
            longest = longest.max(due - now);
            now = due + ms(1);
            rhythm.ended(now, ms(1), 0, true);
            paused += ms(1);
            ends += 1;
        }
        assert!(paused <= ms(1000) * 11 / 100, "{paused:?}");
        assert!(ends >= 95 && longest <= ms(9), "{ends} {longest:?}");
        // Long pauses do not make epochs longer than the longest.
        rhythm.ended(ms(3000), ms(20), 0, true);
        assert_eq!(rhythm.due(OUTPUT), ms(3025));
        let mut slow = Rhythm::new(
            Lengths {
                shortest: ms(5),
                ..LENGTHS
            },
            ms(0),
        );
        slow.ended(ms(10), Duration::ZERO, 0, true);
        assert_eq!(slow.due(OUTPUT), ms(15));
    }
}
