//! A set of guest frames.

use crate::machine::RamRange;
use crate::page::PAGE_SIZE;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Range {
    first: u64,
    pages: u64,
    words: Vec<u64>,
}

/// A dense bitmap over the pages of a VM's RAM. Frames outside the RAM cannot be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    ranges: Vec<Range>,
}

impl PageBitmap {
    /// An empty set over `ram`.
    #[must_use]
    pub fn new(ram: &[RamRange]) -> Self {
        let ranges = ram
            .iter()
            .map(|r| {
                let pages = r.len / PAGE_SIZE as u64;
                Range {
                    first: r.start / PAGE_SIZE as u64,
                    pages,
                    words: vec![0; pages.div_ceil(64) as usize],
                }
            })
            .collect();
        Self { ranges }
    }

    fn find(&self, gfn: u64) -> Option<(usize, u64)> {
        self.ranges
            .iter()
            .position(|r| gfn >= r.first && gfn - r.first < r.pages)
            .map(|i| (i, gfn - self.ranges[i].first))
    }

    /// Adds a frame. False: it is not RAM.
    pub fn set(&mut self, gfn: u64) -> bool {
        let Some((range, bit)) = self.find(gfn) else {
            return false;
        };
        self.ranges[range].words[(bit / 64) as usize] |= 1 << (bit % 64);
        true
    }

    /// Takes a frame out.
    pub fn unset(&mut self, gfn: u64) {
        if let Some((range, bit)) = self.find(gfn) {
            self.ranges[range].words[(bit / 64) as usize] &= !(1 << (bit % 64));
        }
    }

    /// The bits of range number `range`, as a KVM dirty log has them; none if there is no such range.
    #[must_use]
    pub fn words(&self, range: usize) -> &[u64] {
        self.ranges.get(range).map_or(&[], |range| &range.words)
    }

    /// Whether the frame is in the set.
    #[must_use]
    pub fn test(&self, gfn: u64) -> bool {
        self.find(gfn).is_some_and(|(range, bit)| {
            self.ranges[range].words[(bit / 64) as usize] >> (bit % 64) & 1 == 1
        })
    }

    /// Adds all frames of `other`, a set over the same RAM.
    ///
    /// # Panics
    /// If the two sets are over different RAM: a programming error.
    pub fn or_assign(&mut self, other: &Self) {
        assert_eq!(
            self.ranges.len(),
            other.ranges.len(),
            "bitmaps over different RAM"
        );
        for (mine, theirs) in self.ranges.iter_mut().zip(&other.ranges) {
            assert_eq!(
                (mine.first, mine.pages),
                (theirs.first, theirs.pages),
                "bitmaps over different RAM"
            );
            for (a, b) in mine.words.iter_mut().zip(&theirs.words) {
                *a |= b;
            }
        }
    }

    /// Adds a KVM dirty log: bit n of `words` is page n of range number `range`. Bits beyond the range are ignored.
    pub fn or_words(&mut self, range: usize, words: &[u64]) {
        let Some(range) = self.ranges.get_mut(range) else {
            return;
        };
        for (a, b) in range.words.iter_mut().zip(words) {
            *a |= b;
        }
        if range.pages % 64 != 0
            && let Some(last) = range.words.last_mut()
        {
            *last &= (1 << (range.pages % 64)) - 1;
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        for range in &mut self.ranges {
            range.words.fill(0);
        }
    }

    /// Number of frames.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.ranges
            .iter()
            .flat_map(|r| &r.words)
            .map(|w| u64::from(w.count_ones()))
            .sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.iter().flat_map(|r| &r.words).all(|w| *w == 0)
    }

    /// The frames, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.ranges.iter().flat_map(|r| {
            r.words.iter().enumerate().flat_map(move |(i, &word)| {
                let mut rest = word;
                std::iter::from_fn(move || {
                    (rest != 0).then(|| {
                        let bit = rest.trailing_zeros();
                        rest &= rest - 1;
                        r.first + i as u64 * 64 + u64::from(bit)
                    })
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn ram() -> Vec<RamRange> {
        vec![
            RamRange {
                start: 0,
                len: 100 * 4096,
            },
            RamRange {
                start: 0x10_0000,
                len: 65 * 4096,
            },
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(gfns in proptest::collection::vec(0u64..400, 0..300)) {
            let mut bitmap = PageBitmap::new(&ram());
            let mut model = BTreeSet::new();
            for gfn in gfns {
                let inside = gfn < 100 || (256..256 + 65).contains(&gfn);
                prop_assert_eq!(bitmap.set(gfn), inside);
                if inside { model.insert(gfn); }
                prop_assert_eq!(bitmap.test(gfn), inside);
                if gfn % 3 == 0 {
                    bitmap.unset(gfn);
                    model.remove(&gfn);
                    prop_assert!(!bitmap.test(gfn));
                }
            }
            let bits: u32 = [0, 1, 2].iter().flat_map(|r| bitmap.words(*r)).map(|w| w.count_ones()).sum();
            prop_assert_eq!(bits as usize, model.len());
            prop_assert_eq!(bitmap.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(bitmap.count(), model.len() as u64);
        }
    }

    #[test]
    fn log_bits_beyond_the_range_are_ignored() {
        let mut bitmap = PageBitmap::new(&ram());
        bitmap.or_words(1, &[0, u64::MAX]);
        bitmap.or_words(7, &[1]);
        assert_eq!(bitmap.iter().collect::<Vec<_>>(), [256 + 64]);
    }
}
