//! The loop, the queue, the shipping thread and the gates together, over a guest and a chain that tests hold in their hands.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{OnceLock, Weak};
use std::thread::JoinHandle;

use chain::image::Image;
use checkpoint::{MachineState, PageBitmap};
use netbuf::memory::MemoryPort;
use vm_memory::{Bytes, GuestAddress};
use vmm::{DirtyError, DirtyTracker, GuestMemory, RamFiles, RamLayout};

use super::*;
use crate::epoch::queue::Blocks;
use crate::epoch::ship::{Link, ShipError, Shipper};
use crate::epoch::staging::Shadow;

const MIB: u64 = 1 << 20;
/// Where the guest counts what it has done.
const COUNTER: GuestAddress = GuestAddress(0x5000);
/// No test waits longer for what has to come.
const LIVENESS: Duration = Duration::from_secs(60);

fn eventually(what: &str, until: impl Fn() -> bool) {
    let deadline = Instant::now() + LIVENESS;
    while !until() {
        assert!(Instant::now() < deadline, "{what} never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[derive(Default)]
struct Log(Mutex<Option<PageBitmap>>);

impl DirtyTracker for Log {
    fn start(&self) -> Result<(), DirtyError> {
        Ok(())
    }
    fn harvest(&self, out: &mut PageBitmap) -> Result<(), DirtyError> {
        if let Some(pages) = &mut *lock(&self.0) {
            out.or_assign(pages);
            pages.clear();
        }
        Ok(())
    }
    fn merge_back(&self, pages: &PageBitmap) {
        if let Some(log) = &mut *lock(&self.0) {
            log.or_assign(pages);
        }
    }
    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// A guest whose test says what it does.
struct FakeGuest {
    memory: GuestMemory,
    files: RamFiles,
    log: Log,
    runs: Mutex<bool>,
    broken: AtomicBool,
    ended: AtomicBool,
}

impl Guest for FakeGuest {
    fn pause(&self) -> Result<(), String> {
        *lock(&self.runs) = false;
        Ok(())
    }
    fn resume(&self) {
        *lock(&self.runs) = true;
    }
    fn capture(&self) -> Result<MachineState, CaptureError> {
        if self.ended.load(Ordering::Acquire) {
            return Err(CaptureError::Ended);
        }
        match self.broken.load(Ordering::Acquire) {
            true => Err(CaptureError::Failed("no state to be had".into())),
            false => Ok(MachineState::default()),
        }
    }
    fn dirty(&self) -> &dyn DirtyTracker {
        &self.log
    }
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}

impl FakeGuest {
    fn new(bytes: u64) -> Arc<Self> {
        let layout = RamLayout::new(bytes, None).unwrap();
        let files = RamFiles::create(&layout).unwrap();
        let memory = vmm::memory::map(&layout, &files).unwrap();
        let log = Log(Mutex::new(Some(PageBitmap::new(layout.ranges()))));
        Arc::new(Self {
            memory,
            files,
            log,
            runs: Mutex::new(true),
            broken: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        })
    }

    fn runs(&self) -> bool {
        *lock(&self.runs)
    }

    /// Waits until it runs, writes a page, and answers with the lock that keeps a pause waiting.
    fn write(&self, at: GuestAddress, data: &[u8]) -> MutexGuard<'_, bool> {
        let deadline = Instant::now() + LIVENESS;
        loop {
            let runs = lock(&self.runs);
            if *runs {
                self.memory.write_slice(data, at).unwrap();
                lock(&self.log.0).as_mut().unwrap().set(at.0 / 4096);
                return runs;
            }
            drop(runs);
            assert!(Instant::now() < deadline, "the guest never runs");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Begun {
    epoch: Epoch,
    full: bool,
    held: bool,
}

/// A chain that takes as many bytes as it is told to, and acknowledges nothing by itself.
struct FakeLink {
    image: Mutex<Image>,
    begun: Mutex<Vec<Begun>>,
    ended: Mutex<VecDeque<Epoch>>,
    /// Bytes that it takes still.
    takes: Mutex<u64>,
    room: Condvar,
    owner: OnceLock<Weak<Owner>>,
}

impl FakeLink {
    fn new(guest: &FakeGuest) -> Arc<Self> {
        let view = RamView::new(&guest.memory);
        Arc::new(Self {
            image: Mutex::new(Image::new(&view.ranges()).unwrap()),
            begun: Mutex::default(),
            ended: Mutex::default(),
            takes: Mutex::new(u64::MAX),
            room: Condvar::new(),
            owner: OnceLock::new(),
        })
    }

    fn take(&self, bytes: u64) {
        *lock(&self.takes) = bytes;
        self.room.notify_all();
    }

    fn counter(&self) -> u64 {
        let image = lock(&self.image);
        let page = image.page(COUNTER.0 / 4096).unwrap();
        u64::from_le_bytes(page[..8].try_into().unwrap())
    }

    fn last_ended(&self) -> Option<Epoch> {
        lock(&self.ended).back().copied()
    }
}

impl Link for FakeLink {
    fn begin(&self, epoch: Epoch, full: bool, held: bool) -> Result<(), String> {
        lock(&self.begun).push(Begun { epoch, full, held });
        Ok(())
    }
    fn compare(&self, epoch: Epoch, blocks: &Blocks) -> Result<(), String> {
        let answer = chain::blocks::Answer {
            disk: blocks.disk,
            first: blocks.first,
            equal: vec![false; blocks.digests.len()],
        };
        let owner = self.owner.get().and_then(Weak::upgrade).unwrap();
        let generation = lock(&owner.pipeline).generation();
        owner.compared(generation, epoch, answer);
        Ok(())
    }
    fn pages(&self, _: Epoch, records: &[u8]) -> Result<(), String> {
        let mut takes = lock(&self.takes);
        while *takes < records.len() as u64 {
            takes = self.room.wait(takes).unwrap();
        }
        if *takes != u64::MAX {
            *takes -= records.len() as u64;
        }
        drop(takes);
        let full = lock(&self.begun).last().is_some_and(|begun| begun.full);
        let mut image = lock(&self.image);
        let taken = match full {
            true => image.write(records),
            false => image.stage(records),
        };
        taken.map_err(|e| e.to_string())
    }
    fn disk(&self, _: Epoch, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn machine(&self, _: Epoch, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn end(&self, epoch: Epoch) -> Result<(), String> {
        lock(&self.image).apply();
        lock(&self.ended).push_back(epoch);
        Ok(())
    }
}

/// All of it, running.
struct Rig {
    guest: Arc<FakeGuest>,
    owner: Arc<Owner>,
    gate: Arc<Gate>,
    port: Arc<Mutex<Vec<Vec<u8>>>>,
    events: Mutex<Receiver<OwnerEvent>>,
    running: JoinHandle<()>,
}

const OPTIONS: EpochOptions = EpochOptions {
    lengths: Lengths {
        longest: Duration::from_millis(5),
        shortest: Duration::from_millis(1),
        idle: Duration::from_millis(5),
        pause_percent: 100,
    },
    pause_budget: Duration::from_millis(2),
    verify_epochs: 3,
    max_in_flight: 2,
};

impl Rig {
    fn new(guest: Arc<FakeGuest>, disks: Vec<Arc<diskbuf::Mirror>>) -> Self {
        let port = MemoryPort::new(Vec::new()).unwrap();
        let sent = port.sent.clone();
        let gate = Gate::new(port, 1 << 20).unwrap();
        let (say, events) = channel();
        let say = Mutex::new(say);
        let owner = Owner::new(OwnerParts {
            guest: guest.clone(),
            gates: vec![gate.clone()],
            disks,
            queue: Arc::new(ShipQueue::new(1 << 20)),
            generation: Generation::ZERO,
            open: Epoch(10),
            max_in_flight: OPTIONS.max_in_flight,
            on_event: Box::new(move |event| {
                let _ = lock(&say).send(event);
            }),
        });
        let runner = owner.clone();
        Self {
            guest,
            owner,
            gate,
            port: sent,
            events: Mutex::new(events),
            running: std::thread::spawn(move || runner.run(OPTIONS)),
        }
    }

    /// Of a small guest without disks, protected in generation 1 by a link that is sent to.
    fn protected() -> (Self, JoinHandle<Result<(), ShipError>>) {
        let rig = Self::new(FakeGuest::new(8 * MIB), Vec::new());
        let link = FakeLink::new(&rig.guest);
        let shipping = rig.begin(1, &link);
        rig.protect(1, &link);
        (rig, shipping)
    }

    /// A chain begins in `generation`.
    fn begin(&self, generation: u64, link: &Arc<FakeLink>) -> JoinHandle<Result<(), ShipError>> {
        let _ = link.owner.set(Arc::downgrade(&self.owner));
        let queue = self.owner.queue();
        let session = queue.new_session();
        let shadow = Shadow::new(&RamView::new(&self.guest.memory)).unwrap();
        let (link, measures) = (link.clone(), self.owner.measures());
        let mut shipper = Shipper::new(queue, link, shadow, false, true, measures);
        let shipping = std::thread::spawn(move || shipper.run(session));
        self.owner.begin(Generation(generation), session);
        shipping
    }

    /// The guest counts and sends what it has counted, in one step that no pause divides.
    fn count(&self, counter: u64) {
        let running = self.guest.write(COUNTER, &counter.to_le_bytes());
        let mut frame = vec![0; netbuf::NET_HEADER + 14];
        frame.extend(counter.to_le_bytes());
        assert_eq!(self.gate.send(&frame).unwrap(), netbuf::SendOutcome::Sent);
        self.owner.output_held();
        drop(running);
    }

    /// What the guest has been heard to have counted.
    fn heard(&self) -> Vec<u64> {
        let frames = lock(&self.port);
        let counters = frames
            .iter()
            .map(|f| u64::from_le_bytes(f[f.len() - 8..].try_into().unwrap()));
        counters.collect()
    }

    fn event(&self) -> OwnerEvent {
        lock(&self.events).recv_timeout(LIVENESS).unwrap()
    }

    fn mode(&self) -> Mode {
        lock(&self.owner.pipeline).mode()
    }

    /// Acknowledges whatever ends, until the VM is protected.
    fn protect(&self, generation: u64, link: &FakeLink) -> Epoch {
        let protected = std::cell::Cell::new(None);
        eventually("protection", || {
            if let Some(epoch) = link.last_ended() {
                self.owner.ack(Generation(generation), epoch).unwrap();
            }
            if let Ok(OwnerEvent::Protected { epoch, .. }) = lock(&self.events).try_recv() {
                protected.set(Some(epoch));
            }
            protected.get().is_some()
        });
        protected.get().unwrap()
    }

    fn stop(self) {
        self.owner.stop();
        self.running.join().unwrap();
        self.owner.queue().close();
    }
}

#[test]
fn h16_output_flows_until_a_full_checkpoint_is_committed_and_the_next_but_one_holds_it() {
    let rig = Rig::new(FakeGuest::new(8 * MIB), Vec::new());
    let link = FakeLink::new(&rig.guest);
    let shipping = rig.begin(1, &link);
    let ended = |count: usize| lock(&link.ended).len() >= count;
    let mut counter = 0;
    let mut count = |until: &dyn Fn() -> bool| {
        let deadline = Instant::now() + LIVENESS;
        while !until() {
            assert!(Instant::now() < deadline, "never");
            counter += 1;
            rig.count(counter);
            std::thread::sleep(Duration::from_micros(200));
        }
        counter
    };
    // The full one and a later one are whole, and nobody acknowledges them: an MTU black hole.
    let counted = count(&|| ended(2));
    assert_eq!(rig.heard(), (1..=counted).collect::<Vec<_>>());
    assert_eq!(rig.mode(), Mode::Syncing);
    assert!(rig.owner.stuck_for().is_some() && rig.owner.figures().sync.is_some());
    rig.owner.ack(Generation(1), Epoch(10)).unwrap();
    let first = || {
        let begun = lock(&link.begun);
        begun.iter().copied().find(|begun| begun.held)
    };
    // Of those that are sent with output held nothing is acknowledged.
    let ack_flowing = || {
        let held = first().map_or(Epoch(u64::MAX), |first| first.epoch);
        if let Some(epoch) = link.last_ended().filter(|epoch| *epoch < held) {
            rig.owner.ack(Generation(1), epoch).unwrap();
        }
    };
    count(&|| {
        ack_flowing();
        rig.gate.is_holding()
    });
    let counted = count(&|| {
        ack_flowing();
        first().is_some_and(|first| link.last_ended() >= Some(first.epoch))
    });
    let k = first().unwrap();
    assert!(!k.full);
    let heard = rig.heard();
    let resumed = link.counter();
    assert!(
        heard.iter().all(|heard| *heard <= resumed),
        "heard {:?}, but {resumed} is what would be resumed",
        heard.last()
    );
    assert!(counted >= resumed);
    assert_eq!(rig.mode(), Mode::Holding);
    assert!(lock(&rig.events).try_recv().is_err(), "not protected yet");
    rig.owner.ack(Generation(1), k.epoch).unwrap();
    let OwnerEvent::Protected { epoch, .. } = rig.event() else {
        panic!("something else happened");
    };
    assert_eq!(epoch, k.epoch);
    let begun = lock(&link.begun).clone();
    assert_eq!(begun.iter().filter(|begun| begun.full).count(), 1);
    for begun in &begun {
        assert_eq!(begun.held, begun.epoch >= k.epoch, "{begun:?}");
    }
    rig.stop();
    shipping.join().unwrap().unwrap();
}

/// A guest that rewrites all of its memory with what does not compress, until told to stop.
fn rewrite(rig: &Rig, stop: &AtomicBool) -> u64 {
    let pages = RamView::new(&rig.guest.memory).bytes() as u64 / 4096;
    let (mut noise, mut counter) = (0x9e37_79b9_7f4a_7c15_u64, 0);
    let mut page = [0u8; 4096];
    while !stop.load(Ordering::Acquire) {
        for gfn in (0..pages).filter(|gfn| *gfn != COUNTER.0 / 4096) {
            for word in page.chunks_exact_mut(8) {
                noise ^= noise << 13;
                noise ^= noise >> 7;
                noise ^= noise << 17;
                word.copy_from_slice(&noise.to_le_bytes());
            }
            drop(rig.guest.write(GuestAddress(gfn * 4096), &page));
            if stop.load(Ordering::Acquire) {
                break;
            }
        }
        counter += 1;
        rig.count(counter);
    }
    counter
}

struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn c8_a_slow_chain_throttles_the_guest_and_nothing_leaves_without_an_ack() {
    let rig = Rig::new(FakeGuest::new(32 * MIB), Vec::new());
    let limit = 8 * MIB;
    rig.owner.queue().limit_pages(limit);
    let link = FakeLink::new(&rig.guest);
    let shipping = rig.begin(1, &link);
    rig.protect(1, &link);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // However this ends, the guest does too.
        let _stopping = Stopping(&stop);
        link.take(0);
        let dirtier = scope.spawn(|| rewrite(&rig, &stop));
        // What was under way may still end; from then on the chain takes nothing.
        eventually("a throttled owner", || {
            rig.owner.figures().throttled.is_some()
        });
        assert!(rig.owner.queue().page_bytes() <= limit);
        let silent = rig.heard();
        let committed = rig.owner.committed();
        // Now it takes a little at a time, and acknowledges what it has.
        let mut vcpus_waited = 0;
        for _ in 0..6 {
            let before = rig.owner.committed();
            eventually("a checkpoint", || {
                link.take(512 << 10);
                let figures = rig.owner.figures();
                assert!(rig.owner.queue().page_bytes() <= limit, "{figures:?}");
                link.last_ended().is_some_and(|ended| ended > before)
            });
            vcpus_waited += rig.owner.figures().throttled.map_or(0, |t| t.vcpus_ms);
            let heard = rig.heard();
            let ended = link.last_ended().unwrap();
            rig.owner.ack(Generation(1), ended).unwrap();
            let (after, resumed) = (rig.heard(), link.counter());
            assert!(after.starts_with(&heard));
            assert!(after.iter().all(|heard| *heard <= resumed));
        }
        assert!(rig.owner.committed().0 >= committed.0 + 6);
        assert!(rig.heard().len() > silent.len(), "acks let it out");
        assert!(vcpus_waited > 0, "more than the bound was written");
        // Without another ack, nothing more.
        let heard = rig.heard();
        eventually("more checkpoints", || {
            link.take(512 << 10);
            link.last_ended() > Some(rig.owner.committed())
        });
        assert_eq!(rig.heard(), heard);
        assert_eq!(rig.mode(), Mode::Protected);
        assert!(rig.gate.is_holding() && !rig.owner.gave_up());
        assert!(lock(&rig.events).try_recv().is_err(), "nothing to report");
        link.take(u64::MAX);
        stop.store(true, Ordering::Release);
        dirtier.join().unwrap();
    });
    rig.stop();
    shipping.join().unwrap().unwrap();
}

#[test]
fn h3_an_unreadable_disk_ends_the_attempt_and_the_guest_runs_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, vec![7; MIB as usize]).unwrap();
    let mirror = Arc::new(diskbuf::Mirror::open(&path).unwrap());
    // What lies behind the end of the file cannot be read.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(300 << 10).unwrap();
    let rig = Rig::new(FakeGuest::new(8 * MIB), vec![mirror]);
    let link = FakeLink::new(&rig.guest);
    let shipping = rig.begin(1, &link);
    let failed = rig.event();
    let OwnerEvent::AttemptFailed { generation, error } = failed else {
        panic!("{failed:?}");
    };
    assert_eq!(generation, Generation(1));
    let text = error.to_string();
    assert!(
        text.starts_with("disk 0 cannot be read at byte 307200 "),
        "{text}"
    );
    rig.count(1);
    assert_eq!(rig.heard(), [1], "it is heard at once");
    assert!(rig.guest.runs() && rig.mode() == Mode::Unprotected);
    // Once it can be read again, so it is tried again.
    file.set_len(MIB).unwrap();
    let link = FakeLink::new(&rig.guest);
    let again = rig.begin(2, &link);
    shipping.join().unwrap().unwrap();
    rig.protect(2, &link);
    rig.stop();
    again.join().unwrap().unwrap();
}

#[test]
fn i6_memory_that_changes_unnoticed_is_found() {
    let (rig, shipping) = Rig::protected();
    let go_on = |until: &dyn Fn() -> bool| {
        eventually("what is waited for", || {
            let newest = rig.owner.figures().open_epoch - 1;
            rig.owner.ack(Generation(1), Epoch(newest)).unwrap();
            until()
        });
    };
    // What the log knows of is no reason to complain.
    let epoch = rig.owner.committed().0;
    rig.count(1);
    go_on(&|| rig.owner.committed().0 > epoch + 3 * OPTIONS.verify_epochs);
    assert!(!shipping.is_finished());
    let unlogged = GuestAddress(0x7008);
    rig.guest.memory.write_slice(&[1], unlogged).unwrap();
    go_on(&|| shipping.is_finished());
    let error = shipping.join().unwrap().expect_err("a write was lost");
    assert!(matches!(error, ShipError::Unnoticed(7)), "{error}");
    rig.stop();
}

#[test]
fn h1_an_owner_that_cannot_go_on_gives_the_vm_up_and_its_output_stays_held() {
    let (rig, shipping) = Rig::protected();
    assert!(!rig.owner.gave_up());
    let heard = rig.heard();
    rig.guest.broken.store(true, Ordering::Release);
    let said = rig.event();
    assert!(
        matches!(&said, OwnerEvent::GaveUp { why } if why.contains("no state to be had")),
        "{said:?}"
    );
    assert!(rig.owner.gave_up(), "heartbeats end");
    eventually("a guest that stands still", || !rig.guest.runs());
    assert!(rig.gate.is_holding());
    assert_eq!(rig.heard(), heard);
    // The master decides otherwise: nobody can take it over.
    rig.owner.unprotect(Generation(2));
    eventually("a guest that runs on", || rig.guest.runs());
    assert!(!rig.gate.is_holding() && !rig.owner.gave_up());
    rig.stop();
    shipping.join().unwrap().unwrap();
}

#[test]
fn a_guest_that_has_ended_is_not_given_up() {
    let (rig, shipping) = Rig::protected();
    rig.guest.ended.store(true, Ordering::Release);
    eventually("a guest that stands still", || !rig.guest.runs());
    // Whoever decides what follows has all the time there is: heartbeats go on, and nothing is reported.
    rig.owner.set_options(OPTIONS);
    eventually("an order obeyed", || lock(&rig.owner.orders).is_empty());
    assert!(!rig.owner.gave_up() && rig.gate.is_holding());
    assert!(lock(&rig.events).try_recv().is_err());
    rig.stop();
    shipping.join().unwrap().unwrap();
}

#[test]
fn a_chain_that_cannot_be_captured_for_is_an_attempt_that_failed() {
    let rig = Rig::new(FakeGuest::new(8 * MIB), Vec::new());
    rig.guest.broken.store(true, Ordering::Release);
    let link = FakeLink::new(&rig.guest);
    let shipping = rig.begin(1, &link);
    let failed = rig.event();
    assert!(
        matches!(failed, OwnerEvent::AttemptFailed { .. }),
        "{failed:?}"
    );
    assert!(rig.guest.runs() && !rig.gate.is_holding() && !rig.owner.gave_up());
    rig.stop();
    shipping.join().unwrap().unwrap();
}

#[test]
fn a_frozen_guest_runs_again_with_its_output_held_once_another_chain_has_it() {
    let (rig, shipping) = Rig::protected();
    rig.count(1);
    rig.owner.freeze();
    eventually("a guest that stands still", || !rig.guest.runs());
    let heard = rig.heard();
    let other = FakeLink::new(&rig.guest);
    let again = rig.begin(2, &other);
    shipping.join().unwrap().unwrap();
    eventually("a guest that runs", || rig.guest.runs());
    eventually("the second checkpoint", || lock(&other.ended).len() >= 2);
    let full = lock(&other.begun)[0];
    assert!(full.full && !full.held && lock(&other.begun)[1].held);
    rig.owner.ack(Generation(2), full.epoch).unwrap();
    assert_eq!(
        rig.heard(),
        heard,
        "nobody could resume from the full one alone"
    );
    rig.protect(2, &other);
    assert_eq!(rig.heard(), [1]);
    rig.stop();
    again.join().unwrap().unwrap();
}

#[test]
fn a_frozen_guest_runs_on_with_a_chain_that_goes_on_in_place_and_one_that_is_given_up_does_not() {
    let (rig, shipping) = Rig::protected();
    rig.owner.freeze();
    eventually("a guest that stands still", || !rig.guest.runs());
    rig.owner.go_on(Generation(2));
    rig.owner.thaw();
    eventually("a guest that runs", || rig.guest.runs());
    rig.owner.give_up("a disk".into());
    rig.owner.freeze();
    rig.owner.thaw();
    let (sender, stopped) = std::sync::mpsc::channel();
    rig.owner.quiesce(sender);
    // The order after them has been looked at, and dropped.
    assert!(stopped.recv().is_err());
    assert!(!rig.guest.runs());
    rig.stop();
    shipping.join().unwrap().unwrap();
}

/// Kibibytes of this process's memory that are resident.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4
}

#[test]
fn c6_memory_that_the_guest_never_touched_costs_nothing() {
    use std::os::unix::fs::MetadataExt;
    let rig = Rig::new(FakeGuest::new(1024 * MIB), Vec::new());
    for page in 0..200u64 {
        drop(rig.guest.write(GuestAddress(page * 5 * MIB), &[7; 4096]));
    }
    let allocated = || -> u64 {
        let files = rig.guest.files.files().iter();
        files.map(|f| f.metadata().unwrap().blocks() * 512).sum()
    };
    let (before, resident_before) = (allocated(), resident());
    assert!(before < 64 * MIB, "{before}");
    let link = FakeLink::new(&rig.guest);
    let shipping = rig.begin(1, &link);
    rig.protect(1, &link);
    let figures = rig.owner.progress.read();
    assert_eq!(figures.memory_done, figures.memory_total);
    assert_eq!(
        allocated(),
        before,
        "only looked at where there is something"
    );
    let grown = resident().saturating_sub(resident_before);
    assert!(grown < 64 << 10, "the process has grown by {grown} KiB");
    for page in 0..200u64 {
        let image = lock(&link.image);
        assert_eq!(image.page(page * 5 * MIB / 4096).unwrap()[0], 7);
    }
    rig.stop();
    shipping.join().unwrap().unwrap();
}
