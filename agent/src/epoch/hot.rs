//! Which pages are left writable unnoticed, because the guest would write them again anyway. Plain: no KVM, clock or lock.
//!
//! A page that the dirty log protects costs its guest a write fault in each epoch in which it is written. One that is left
//! writable, a *hot* page, costs none, but has to be copied and compared in each epoch, whether it was written or not. Each is
//! the cheaper one for some pages; which ones depends on what a fault and a copy cost on this host.
//!
//! No write can be lost by a wrong choice: a hot page is reported by every harvest, and copied, until one in which it is not
//! hot any more; that one reports it, too, and protects it ([`vmm::DirtyTracker::harvest_but`]).

use std::time::Duration;

use checkpoint::{PAGE_SIZE, PageBitmap, RamRange};

/// A page's epochs without a write are counted up to this.
const PATIENCE_MAX: u32 = 64;
/// Copies of fewer pages say nothing about what one costs.
const SAMPLE: u64 = 128;
/// A page's copy, until it has been measured.
const COPY: Duration = Duration::from_nanos(600);

/// The pages of one VM.
#[derive(Clone, Debug)]
pub struct HotSet {
    hot: PageBitmap,
    count: u64,
    /// What the last harvest reported.
    reported: PageBitmap,
    /// When each page was last seen to be written, in epochs counted from 1; 0: never.
    written: PerPage<u32>,
    /// Epochs since, if it is hot.
    unwritten: PerPage<u8>,
    epoch: u32,
    /// A write fault, if that is known.
    fault: Option<Duration>,
    /// A page's copy, in nanoseconds.
    copy_ns: u64,
    budget: Duration,
}

impl HotSet {
    /// None is hot. What a pause may cost because of hot pages is `budget`.
    #[must_use]
    pub fn new(ram: &[RamRange], budget: Duration) -> Self {
        Self {
            hot: PageBitmap::new(ram),
            count: 0,
            reported: PageBitmap::new(ram),
            written: PerPage::new(ram),
            unwritten: PerPage::new(ram),
            epoch: 0,
            fault: None,
            copy_ns: COPY.as_nanos() as u64,
            budget,
        }
    }

    /// A write fault costs this much.
    pub fn learn_fault(&mut self, fault: Option<Duration>) {
        self.fault = fault;
    }

    /// The copies of so many pages took `time` in a pause.
    pub fn learn_copies(&mut self, pages: u64, time: Duration) {
        if pages >= SAMPLE {
            let sample = (time.as_nanos() as u64 / pages).max(1);
            self.copy_ns = (self.copy_ns * 7 + sample) / 8;
        }
    }

    /// Those that the next harvest leaves as they are.
    #[must_use]
    pub fn pages(&self) -> &PageBitmap {
        &self.hot
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// None is hot any more, and nothing is known.
    pub fn clear(&mut self) {
        self.hot.clear();
        self.count = 0;
        self.written.0.iter_mut().for_each(|(_, all)| all.fill(0));
    }

    /// Epochs for which copying a page costs as much as one fault. A hot page that was not written for longer would have been
    /// better off in the log; one in the log that was written twice within this time is better off hot.
    fn patience(&self) -> u32 {
        // In the pause it is copied, and afterwards compared.
        let page = u128::from(self.copy_ns) * 2;
        let fault = self.fault.unwrap_or_default().as_nanos();
        u32::try_from(fault / page.max(1)).map_or(PATIENCE_MAX, |p| p.min(PATIENCE_MAX))
    }

    /// As many as the budget allows.
    fn most(&self) -> u64 {
        self.budget.as_nanos() as u64 / self.copy_ns.max(1)
    }

    /// A harvest has reported `dirty`, with [`HotSet::pages`] as they are.
    pub fn harvested(&mut self, dirty: &PageBitmap) {
        self.epoch = self.epoch.saturating_add(1);
        let (patience, most) = (self.patience(), self.most());
        self.reported.clear();
        self.reported.or_assign(dirty);
        // One that was not written since it became hot is still protected: it costs nothing, but takes another's place.
        let unwritten = self.hot.iter().filter(|gfn| !dirty.test(*gfn));
        let unwritten: Vec<u64> = unwritten.collect();
        for gfn in unwritten {
            self.unwritten_once_more(gfn, patience);
        }
        for gfn in dirty.iter() {
            if self.hot.test(gfn) {
                continue;
            }
            let before = std::mem::replace(self.written.at(gfn), self.epoch);
            let again = before > 0 && self.epoch - before <= patience;
            if again && self.count < most && self.hot.set(gfn) {
                self.count += 1;
                *self.unwritten.at(gfn) = 0;
            }
        }
    }

    /// Of what one harvest reported, these pages, ascending, turned out not to have been changed.
    pub fn unchanged(&mut self, unchanged: &[u64]) {
        let (patience, most) = (self.patience(), self.most());
        let mut unchanged = unchanged.iter().copied().peekable();
        let mut still = Vec::new();
        for gfn in self.hot.iter() {
            while unchanged.next_if(|page| *page < gfn).is_some() {}
            if unchanged.next_if_eq(&gfn).is_some() {
                still.push(gfn);
            } else if self.reported.test(gfn) {
                *self.unwritten.at(gfn) = 0;
                *self.written.at(gfn) = self.epoch;
            }
        }
        for gfn in still {
            self.unwritten_once_more(gfn, patience);
        }
        // What a page costs may have grown meanwhile.
        let over = self.count.saturating_sub(most);
        let over: Vec<u64> = self.hot.iter().take(over as usize).collect();
        for gfn in over {
            self.leave(gfn);
        }
    }

    /// A hot page was not written in another epoch.
    fn unwritten_once_more(&mut self, gfn: u64, patience: u32) {
        let epochs = self.unwritten.at(gfn);
        *epochs = epochs.saturating_add(1);
        if u32::from(*epochs) > patience {
            self.leave(gfn);
        }
    }

    fn leave(&mut self, gfn: u64) {
        self.hot.unset(gfn);
        self.count -= 1;
    }
}

/// One value for each page of RAM, by range: the first frame, and the values.
#[derive(Clone, Debug)]
struct PerPage<T>(Vec<(u64, Vec<T>)>);

impl<T: Copy + Default> PerPage<T> {
    fn new(ram: &[RamRange]) -> Self {
        let page = PAGE_SIZE as u64;
        let of = |r: &RamRange| (r.start / page, vec![T::default(); (r.len / page) as usize]);
        Self(ram.iter().map(of).collect())
    }

    /// Of a frame that is in a bitmap of the same RAM.
    fn at(&mut self, gfn: u64) -> &mut T {
        let range = self.0.iter_mut().rev().find(|(first, _)| *first <= gfn);
        let (first, values) = range.expect("the first range begins at frame 0");
        &mut values[(gfn - *first) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 64;
    const US: Duration = Duration::from_micros(1);

    fn ram() -> Vec<RamRange> {
        let page = PAGE_SIZE as u64;
        let range = |first: u64, pages: u64| RamRange {
            start: first * page,
            len: pages * page,
        };
        vec![range(0, PAGES / 2), range(0x10_0000, PAGES / 2)]
    }

    fn frame(page: usize) -> u64 {
        let page = page as u64;
        if page < PAGES / 2 {
            page
        } else {
            0x10_0000 + page - PAGES / 2
        }
    }

    /// KVM with its log, a guest's memory, and the replicas' image of it.
    struct World {
        set: HotSet,
        memory: Vec<u32>,
        image: Vec<u32>,
        /// In the log: written since it was protected.
        logged: Vec<bool>,
        faults: u64,
        copies: u64,
        /// Mutant: what leaves the set is protected without being reported.
        forgets_what_leaves: bool,
        was_hot: PageBitmap,
    }

    impl World {
        fn new(fault: Duration) -> Self {
            let mut set = HotSet::new(&ram(), Duration::from_millis(1));
            set.learn_fault(Some(fault));
            set.copy_ns = 500;
            let all = PAGES as usize;
            Self {
                was_hot: PageBitmap::new(&ram()),
                set,
                memory: vec![0; all],
                image: vec![0; all],
                logged: vec![false; all],
                faults: 0,
                copies: 0,
                forgets_what_leaves: false,
            }
        }

        fn write(&mut self, page: usize) {
            self.memory[page] += 1;
            self.faults += u64::from(!std::mem::replace(&mut self.logged[page], true));
        }

        /// Ends an epoch; the pages that had not changed.
        fn epoch(&mut self) -> Vec<u64> {
            let mut dirty = PageBitmap::new(&ram());
            for page in 0..PAGES as usize {
                let gfn = frame(page);
                let hot = self.set.pages().test(gfn);
                let forgotten = self.forgets_what_leaves && self.was_hot.test(gfn) && !hot;
                if self.logged[page] && !forgotten {
                    dirty.set(gfn);
                }
                self.logged[page] &= hot;
            }
            self.was_hot = self.set.pages().clone();
            let mut unchanged = Vec::new();
            for page in 0..PAGES as usize {
                if dirty.test(frame(page)) {
                    self.copies += 1;
                    if self.image[page] == self.memory[page] {
                        unchanged.push(frame(page));
                    }
                    self.image[page] = self.memory[page];
                }
            }
            self.set.harvested(&dirty);
            unchanged
        }

        /// What all of it cost, in copies.
        fn cost(&self, fault: Duration) -> u64 {
            self.faults * (fault.as_nanos() / 1000) as u64 + self.copies
        }
    }

    /// Runs a guest that writes `writes` in each epoch; the answer of the shipping thread comes `late` epochs later.
    fn run(world: &mut World, epochs: &[Vec<usize>], late: usize) -> Result<(), String> {
        let mut told = std::collections::VecDeque::new();
        for (number, writes) in epochs.iter().enumerate() {
            writes.iter().for_each(|page| world.write(*page));
            told.push_back(world.epoch());
            if told.len() > late {
                world.set.unchanged(&told.pop_front().unwrap());
            }
            if world.image != world.memory {
                return Err(format!("a write was lost in epoch {number}"));
            }
            if world.set.count() != world.set.pages().count() {
                return Err("miscounted".into());
            }
        }
        Ok(())
    }

    fn writes() -> impl Strategy<Value = Vec<Vec<usize>>> {
        let epoch = proptest::collection::vec(0..PAGES as usize, 0..40);
        proptest::collection::vec(epoch, 1..80)
    }

    proptest! {
        #[test]
        fn i6_no_write_is_lost_whatever_the_guest_does(
            epochs in writes(), late in 0usize..4, fault in 0u32..100,
        ) {
            let mut world = World::new(US * fault);
            prop_assert_eq!(run(&mut world, &epochs, late), Ok(()));
        }
    }

    /// Written in every epoch, then only now and then.
    fn busy_then_quiet() -> Vec<Vec<usize>> {
        let busy = (0..10).map(|_| (0..20).collect());
        let quiet = (0..40).map(|n| if n % 13 == 0 { vec![3, 7] } else { vec![] });
        busy.chain(quiet).collect()
    }

    #[test]
    fn i6_a_page_that_leaves_unreported_is_a_lost_write() {
        // Each page is written once more, at another distance: one of them as it leaves.
        let again = (0..20).map(|page| vec![page]);
        let epochs: Vec<Vec<usize>> = (0..10).map(|_| (0..20).collect()).chain(again).collect();
        let lost = |forgets| {
            let mut world = World::new(US * 5);
            world.forgets_what_leaves = forgets;
            run(&mut world, &epochs, 1).is_err()
        };
        assert!(!lost(false));
        let lost = lost(true);
        assert!(lost, "the check does not see it");
    }

    #[test]
    fn pages_written_in_every_epoch_become_hot_and_leave_when_they_are_not() {
        let mut world = World::new(US * 5);
        run(&mut world, &busy_then_quiet()[..10], 1).unwrap();
        assert_eq!(world.set.count(), 20);
        assert_eq!(
            world.faults,
            20 * 3,
            "twice to become hot, once more as it does"
        );
        run(&mut world, &vec![Vec::new(); 8], 1).unwrap();
        assert_eq!(world.set.count(), 0);
    }

    #[test]
    fn a_page_that_is_not_written_again_once_it_is_hot_leaves_too() {
        let mut world = World::new(US * 5);
        let twice = [vec![1, 2], vec![1, 2], vec![], vec![]];
        run(&mut world, &twice, 1).unwrap();
        assert_eq!(world.set.count(), 2);
        run(&mut world, &vec![Vec::new(); 8], 1).unwrap();
        assert_eq!(world.set.count(), 0);
    }

    #[test]
    fn a_scan_makes_nothing_hot_and_neither_does_a_host_whose_faults_are_cheap() {
        let mut world = World::new(US * 20);
        let scan: Vec<Vec<usize>> = (0..60).map(|n| vec![n]).collect();
        run(&mut world, &scan, 1).unwrap();
        assert_eq!((world.set.count(), world.copies), (0, 60));
        for fault in [None, Some(Duration::from_nanos(900))] {
            let mut world = World::new(US);
            world.set.learn_fault(fault);
            run(&mut world, &busy_then_quiet(), 1).unwrap();
            assert_eq!(world.set.count(), 0, "{fault:?}");
        }
    }

    #[test]
    fn hot_pages_cost_no_more_than_the_budget() {
        let mut world = World::new(US * 20);
        world.set.budget = Duration::from_micros(5);
        run(&mut world, &vec![(0..20).collect(); 10], 1).unwrap();
        assert_eq!(world.set.count(), 10);
        // Copies turn out to cost twice as much.
        for _ in 0..100 {
            world.set.learn_copies(1000, Duration::from_millis(1));
        }
        run(&mut world, &vec![(0..20).collect(); 3], 1).unwrap();
        assert!(
            (5..=6).contains(&world.set.count()),
            "{}",
            world.set.count()
        );
        world.set.learn_copies(SAMPLE - 1, Duration::from_secs(1));
        assert!(world.set.copy_ns < 1100, "too few to say anything");
    }

    #[test]
    fn it_costs_little_more_than_the_best_fixed_choice() {
        let fault = US * 10;
        let alternating = (0..200).map(|n| {
            let first = if (n / 20) % 2 == 0 { 0 } else { 20 };
            (first..first + 20).collect()
        });
        let skewed = (0..200usize).map(|n| {
            (0..PAGES as usize)
                .filter(|page| n % (page / 2 + 1) == 0)
                .collect()
        });
        let guests: [Vec<Vec<usize>>; 2] = [alternating.collect(), skewed.collect()];
        for epochs in guests {
            let mut world = World::new(fault);
            run(&mut world, &epochs, 1).unwrap();
            let written: u64 = epochs.iter().map(|e| e.len() as u64).sum();
            let ever: std::collections::BTreeSet<usize> =
                epochs.iter().flatten().copied().collect();
            let none_hot = written * 10 + written;
            let all_hot = ever.len() as u64 * (10 + epochs.len() as u64);
            let best = none_hot.min(all_hot);
            assert!(
                world.cost(fault) * 10 <= best * 14,
                "{} against {best}",
                world.cost(fault)
            );
        }
    }
}
