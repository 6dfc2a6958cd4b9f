//! Which checkpoints somebody has passed on that those after it have not acknowledged, by name and in order. A replica calls
//! them `Sent`, the owner, who is position -1 of its chain, `Pending`. With them the next one is brought up to date when it is
//! another one, or its connection another one. (The content is the driver's to keep: [`crate::Kept`].)

use std::collections::VecDeque;

use checkpoint::Epoch;

use crate::mark::Mark;

/// Names of checkpoints that follow one another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Sent {
    /// What the first one is applied to.
    base: Option<Mark>,
    marks: VecDeque<Mark>,
}

impl Sent {
    /// Nothing after `base` yet.
    #[must_use]
    pub fn after(base: Mark) -> Self {
        Self {
            base: Some(base),
            marks: VecDeque::new(),
        }
    }

    /// `mark`, which is applied to the last one, has been passed on.
    pub fn push(&mut self, mark: Mark) {
        self.marks.push_back(mark);
    }

    /// First and last.
    #[must_use]
    pub fn range(&self) -> Option<(Epoch, Epoch)> {
        Some((self.marks.front()?.epoch, self.marks.back()?.epoch))
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.marks.len()
    }

    /// Whether everything passed on has been acknowledged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.marks.is_empty()
    }

    /// Forgets everything up to `epoch`; whether that was anything.
    pub fn trim(&mut self, epoch: Epoch) -> bool {
        let before = self.marks.len();
        while let Some(first) = self.marks.front().filter(|mark| mark.epoch <= epoch) {
            self.base = Some(*first);
            self.marks.pop_front();
        }
        self.marks.len() < before
    }

    /// What the next one, which `holds` that, is sent everything after: nothing but what it holds, if that and all that is
    /// between it and `newest` is known here. Otherwise it cannot go on.
    #[must_use]
    pub fn goes_on_from(&self, newest: Option<Mark>, holds: Option<Mark>) -> Option<Mark> {
        holds.filter(|held| {
            newest == Some(*held) || self.base == Some(*held) || self.marks.contains(held)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::Generation;

    fn mark(epoch: u64) -> Mark {
        Mark {
            generation: Generation(2),
            epoch: Epoch(epoch),
            digest: 7,
            held: true,
        }
    }

    #[test]
    fn it_goes_on_from_its_base_to_its_newest_and_is_bounded_by_acks() {
        let mut sent = Sent::after(mark(4));
        (5..=7).for_each(|epoch| sent.push(mark(epoch)));
        let from = |sent: &Sent, epoch| sent.goes_on_from(Some(mark(7)), Some(mark(epoch)));
        for epoch in 4..=7 {
            assert_eq!(from(&sent, epoch), Some(mark(epoch)));
        }
        assert_eq!((from(&sent, 3), from(&sent, 8)), (None, None));
        assert_eq!(sent.goes_on_from(Some(mark(7)), None), None);
        assert!(sent.trim(Epoch(6)) && !sent.trim(Epoch(6)));
        assert_eq!((sent.len(), sent.range()), (1, Some((Epoch(7), Epoch(7)))));
        assert_eq!((from(&sent, 6), from(&sent, 5)), (Some(mark(6)), None));
        assert!(sent.trim(Epoch(9)) && sent.is_empty());
        assert_eq!((from(&sent, 7), from(&sent, 6)), (Some(mark(7)), None));
        let other = Mark {
            digest: 8,
            ..mark(7)
        };
        assert_eq!(sent.goes_on_from(Some(mark(7)), Some(other)), None);
        // Nothing is known of what was before, but the newest needs nothing.
        assert_eq!(from(&Sent::default(), 7), Some(mark(7)));
        assert_eq!(from(&Sent::default(), 6), None);
    }
}
