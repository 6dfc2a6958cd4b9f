//! The gate over a port without a network: output commit and its mutant, wake-ups, a port without room, fencing.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use checkpoint::Epoch;
use netbuf::memory::MemoryPort;
use netbuf::{Gate, NET_HEADER, Port, SendOutcome};

type Frames = Arc<Mutex<Vec<Vec<u8>>>>;

/// Long enough for any machine: a test that waits this long has found a hang.
const LIVENESS: Duration = Duration::from_secs(60);

fn frame(serial: u32) -> Vec<u8> {
    let mut f = vec![0; NET_HEADER + 14];
    f.extend(serial.to_le_bytes());
    f
}

fn serial(f: &[u8]) -> u32 {
    u32::from_le_bytes(f[NET_HEADER + 14..].try_into().expect("four bytes"))
}

fn sent(frames: &Frames) -> Vec<u32> {
    frames
        .lock()
        .expect("lock")
        .iter()
        .map(|f| serial(f))
        .collect()
}

fn gate(limit: usize) -> (Arc<Gate>, Frames) {
    let port = MemoryPort::new(vec![]).expect("eventfd");
    let frames = port.sent.clone();
    (Gate::new(port, limit).expect("eventfd"), frames)
}

/// Waits until `fd` is readable and reads its eight bytes.
fn take_wake(fd: RawFd) -> bool {
    let mut p = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let ms = LIVENESS.as_millis() as libc::c_int;
    // SAFETY: one valid pollfd.
    if unsafe { libc::poll(&raw mut p, 1, ms) } <= 0 {
        return false;
    }
    let mut n = [0u8; 8];
    // SAFETY: eight writable bytes.
    unsafe { libc::read(fd, n.as_mut_ptr().cast(), 8) == 8 }
}

fn is_raised(fd: RawFd) -> bool {
    let mut p = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut p, 1, 0) == 1 }
}

/// Runs epochs with several in flight, and says whether a frame ever left before its epoch was released.
fn output_commit_holds(gate: &Gate, frames: &Frames) -> Result<(), String> {
    const PER_EPOCH: u32 = 3;
    const IN_FLIGHT: u64 = 2;
    gate.set_hold(true);
    for e in 1..=20u64 {
        for i in 0..PER_EPOCH {
            let n = (e as u32 - 1) * PER_EPOCH + i;
            assert_eq!(gate.send(&frame(n)).expect("send"), SendOutcome::Sent);
        }
        gate.seal(Epoch(e)).expect("a newer epoch");
        if e > IN_FLIGHT {
            gate.release(Epoch(e - IN_FLIGHT)).expect("a sealed epoch");
        }
        let committed = e.saturating_sub(IN_FLIGHT) as u32 * PER_EPOCH;
        let got = sent(frames);
        if got != (0..committed).collect::<Vec<_>>() {
            return Err(format!(
                "after epoch {e}: {committed} committed, out: {got:?}"
            ));
        }
    }
    Ok(())
}

#[test]
fn no_frame_leaves_before_its_epoch_is_released() {
    let (gate, frames) = gate(1 << 20);
    output_commit_holds(&gate, &frames).expect("I1");
    assert_eq!(gate.release(Epoch(20)), Ok(6));
    assert_eq!(gate.release(Epoch(20)), Ok(0), "idempotent");
    let s = gate.stats();
    assert_eq!(
        (s.taken, s.sent, s.held_frames, s.held_bytes),
        (60, 60, 0, 0)
    );
    let h = gate.hold_stats();
    assert_eq!(h.frames, 60);
    assert!(h.p50_us <= h.p99_us && h.p99_us <= h.max_us);
    let recent = gate.recent_holds();
    assert_eq!(recent.iter().map(|r| r.frames).sum::<usize>(), 60);
    assert_eq!(
        recent.last().map(|r| (r.epoch, r.frames)),
        Some((Epoch(20), 6))
    );
}

#[test]
fn the_test_of_output_commit_fails_when_it_is_switched_off() {
    let (gate, frames) = gate(1 << 20);
    gate.break_output_commit(true);
    let failed = output_commit_holds(&gate, &frames).expect_err("the mutant went unnoticed");
    assert!(failed.starts_with("after epoch 1:"), "{failed}");
}

#[test]
fn releasing_an_open_epoch_lets_nothing_out() {
    let (gate, frames) = gate(1 << 20);
    gate.set_hold(true);
    gate.send(&frame(0)).expect("send");
    assert!(gate.release(Epoch(1)).is_err());
    gate.seal(Epoch(1)).expect("first");
    gate.send(&frame(1)).expect("send");
    assert!(gate.release(Epoch(2)).is_err());
    assert_eq!(sent(&frames), []);
}

#[test]
fn holding_can_be_switched_while_running() {
    let (gate, frames) = gate(1 << 20);
    gate.send(&frame(0)).expect("send");
    assert_eq!(sent(&frames), [0], "not holding at first");
    gate.set_hold(true);
    gate.send(&frame(1)).expect("send");
    gate.seal(Epoch(1)).expect("first");
    gate.send(&frame(2)).expect("send");
    assert_eq!(sent(&frames), [0]);
    gate.set_hold(false);
    gate.send(&frame(3)).expect("send");
    assert_eq!(sent(&frames), [0, 1, 2, 3], "in order");
    assert_eq!(gate.release(Epoch(1)), Ok(0));
}

#[test]
fn frames_no_device_would_send_are_refused() {
    let (gate, frames) = gate(1 << 20);
    for len in [0, 1, NET_HEADER + 13, netbuf::port::MAX_FRAME + 1] {
        let e = gate.send(&vec![0; len]).expect_err("no frame");
        assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
    }
    assert!(frames.lock().expect("lock").is_empty());
}

#[test]
fn a_full_gate_raises_room_when_a_release_makes_some() {
    let (gate, frames) = gate(500);
    gate.set_hold(true);
    let mut n = 0;
    while gate.send(&frame(n)).expect("send") == SendOutcome::Sent {
        n += 1;
    }
    assert!(n >= 2);
    assert!(gate.stats().held_bytes <= 500);
    gate.seal(Epoch(1)).expect("first");
    assert!(!is_raised(gate.room_fd()), "sealing makes no room");
    gate.release(Epoch(1)).expect("sealed");
    assert!(is_raised(gate.room_fd()));
    assert!(take_wake(gate.room_fd()));
    assert_eq!(gate.send(&frame(n)).expect("send"), SendOutcome::Sent);
    gate.seal(Epoch(2)).expect("next");
    gate.release(Epoch(2)).expect("sealed");
    assert!(!is_raised(gate.room_fd()), "nobody was waiting");
    assert_eq!(sent(&frames), (0..=n).collect::<Vec<_>>());
    assert_eq!(gate.stats().full, 1);
}

/// A sender that sleeps on room_fd whenever it is told Full against a thread that seals and releases without pause. A
/// wake-up lost once would leave it asleep: only the senders' `Full` keeps the other one in step.
#[test]
fn no_wake_up_is_lost() {
    const FRAMES: u32 = 100_000;
    let (gate, frames) = gate(400);
    gate.set_hold(true);
    let done = Arc::new(AtomicBool::new(false));
    let epochs = {
        let (gate, done) = (gate.clone(), done.clone());
        std::thread::spawn(move || {
            for e in 1.. {
                gate.seal(Epoch(e)).expect("newer");
                gate.release(Epoch(e)).expect("sealed");
                if done.load(Ordering::Acquire) {
                    return;
                }
                // Only as many epochs as there is something to release: an idle round would wake nobody, which is
                // what hides a lost wake-up in a test.
                while gate.stats().held_frames == 0 && !done.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
            }
        })
    };
    let mut slept = 0;
    let mut lost = false;
    'frames: for n in 0..FRAMES {
        while gate.send(&frame(n)).expect("send") == SendOutcome::Full {
            slept += 1;
            if !take_wake(gate.room_fd()) {
                lost = true;
                break 'frames;
            }
        }
    }
    done.store(true, Ordering::Release);
    epochs.join().expect("the epoch thread");
    assert!(!lost, "a wake-up was lost after {slept} sleeps");
    assert!(slept > 0, "the gate was never full: nothing was tested");
    gate.set_hold(false);
    assert_eq!(sent(&frames), (0..FRAMES).collect::<Vec<_>>());
}

fn errno(e: libc::c_int) -> io::Error {
    io::Error::from_raw_os_error(e)
}

fn gate_refusing(errors: Vec<io::Error>) -> (Arc<Gate>, Frames, Arc<Mutex<VecDeque<io::Error>>>) {
    let port = MemoryPort::new(vec![]).expect("eventfd");
    let (frames, refuse) = (port.sent.clone(), port.refuse.clone());
    *refuse.lock().expect("lock") = errors.into();
    (Gate::new(port, 1 << 20).expect("eventfd"), frames, refuse)
}

#[test]
fn a_port_without_room_is_tried_again_and_then_the_frame_is_dropped() {
    for e in [libc::EAGAIN, libc::ENOBUFS] {
        let (gate, frames, _) = gate_refusing((0..3).map(|_| errno(e)).collect());
        gate.send(&frame(0)).expect("send");
        assert_eq!(sent(&frames), [0], "room came in time");

        let (gate, frames, _) = gate_refusing((0..4).map(|_| errno(e)).collect());
        gate.send(&frame(0)).expect("send");
        gate.send(&frame(1)).expect("send");
        assert_eq!(sent(&frames), [1]);
        let s = gate.stats();
        assert_eq!((s.taken, s.sent, s.dropped_port), (2, 1, 1));
    }
}

#[test]
fn a_stuck_port_delays_a_batch_only_so_long() {
    let (gate, frames, refuse) = gate_refusing(vec![]);
    gate.set_hold(true);
    for n in 0..1000 {
        gate.send(&frame(n)).expect("send");
    }
    gate.seal(Epoch(1)).expect("first");
    refuse
        .lock()
        .expect("lock")
        .extend((0..10_000).map(|_| errno(libc::EAGAIN)));
    assert_eq!(gate.release(Epoch(1)), Ok(1000), "they were let out");
    assert_eq!(sent(&frames), []);
    assert_eq!(gate.stats().dropped_port, 1000);
    let tries = 10_000 - refuse.lock().expect("lock").len();
    assert!(tries <= 1000 + 16, "{tries} tries for 1000 frames");
}

#[test]
fn a_port_that_is_gone_loses_frames_and_nothing_else() {
    let (gate, frames, _) = gate_refusing(vec![errno(libc::EIO), errno(libc::EBADFD)]);
    for n in 0..3 {
        assert_eq!(gate.send(&frame(n)).expect("send"), SendOutcome::Sent);
    }
    assert_eq!(sent(&frames), [2]);
    assert_eq!(gate.stats().dropped_port, 2);
}

#[test]
fn a_fenced_gate_lets_nothing_out_ever() {
    let (gate, frames) = gate(300);
    gate.set_hold(true);
    let mut n = 0;
    while gate.send(&frame(n)).expect("send") == SendOutcome::Sent {
        n += 1;
    }
    gate.seal(Epoch(1)).expect("first");
    assert_eq!(gate.fence(), n as usize);
    assert!(
        is_raised(gate.room_fd()),
        "a sleeping sender is woken: its frames go nowhere, but go"
    );
    assert_eq!(gate.release(Epoch(1)), Ok(0));
    gate.set_hold(false);
    assert_eq!(gate.send(&frame(n)).expect("send"), SendOutcome::Sent);
    gate.announce(&frame(0)[NET_HEADER..]);
    gate.seal(Epoch(2)).expect("newer");
    assert_eq!(gate.release(Epoch(2)), Ok(0));
    assert_eq!(sent(&frames), []);
    assert_eq!(gate.stats().dropped_fenced, u64::from(n) + 2);
}

/// A port whose sends wait until the test lets them go on.
struct SlowPort {
    entered: Sender<()>,
    go: Mutex<Receiver<()>>,
    sent: Arc<AtomicUsize>,
    fd: MemoryPort,
}

impl Port for SlowPort {
    fn send(&self, _: &[u8]) -> io::Result<()> {
        self.entered.send(()).map_err(io::Error::other)?;
        self.go
            .lock()
            .expect("lock")
            .recv_timeout(LIVENESS)
            .map_err(io::Error::other)?;
        self.sent.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn recv(&self, _: &mut [u8]) -> io::Result<Option<usize>> {
        Ok(None)
    }

    fn fd(&self) -> RawFd {
        self.fd.fd()
    }
}

struct Slow {
    gate: Arc<Gate>,
    entered: Receiver<()>,
    go: Sender<()>,
    sent: Arc<AtomicUsize>,
}

fn slow_gate() -> Slow {
    let (entered, was_entered) = channel();
    let (go, may_go) = channel();
    let sent = Arc::new(AtomicUsize::new(0));
    let port = SlowPort {
        entered,
        go: Mutex::new(may_go),
        sent: sent.clone(),
        fd: MemoryPort::new(vec![]).expect("eventfd"),
    };
    Slow {
        gate: Gate::new(port, 1 << 20).expect("eventfd"),
        entered: was_entered,
        go,
        sent,
    }
}

/// Time for a thread that does not wait, though it should, to be caught. No test fails for its being short.
fn grace() {
    std::thread::sleep(Duration::from_millis(50));
}

#[test]
fn fencing_stops_a_release_in_its_middle() {
    let s = slow_gate();
    s.gate.set_hold(true);
    for n in 0..10 {
        s.gate.send(&frame(n)).expect("send");
    }
    s.gate.seal(Epoch(1)).expect("first");
    let release = {
        let gate = s.gate.clone();
        std::thread::spawn(move || gate.release(Epoch(1)))
    };
    s.entered
        .recv_timeout(LIVENESS)
        .expect("the first frame on its way");
    let fence = {
        let gate = s.gate.clone();
        std::thread::spawn(move || gate.fence())
    };
    while !s.gate.is_fenced() {
        std::thread::yield_now();
    }
    grace();
    assert!(!fence.is_finished(), "a frame is still on its way out");
    // All may go: what stops the other nine is the fence alone.
    for _ in 0..10 {
        s.go.send(()).expect("port");
    }
    fence.join().expect("fence");
    let at_return = s.sent.load(Ordering::SeqCst);
    release.join().expect("release").expect("sealed");
    assert_eq!(at_return, 1);
    assert_eq!(
        s.sent.load(Ordering::SeqCst),
        1,
        "after fence() nothing left"
    );
    assert_eq!(s.gate.stats().dropped_fenced, 9);
}

#[test]
fn sealing_and_sending_never_wait_for_the_port() {
    let s = slow_gate();
    s.gate.set_hold(true);
    s.gate.send(&frame(0)).expect("send");
    s.gate.seal(Epoch(1)).expect("first");
    let release = {
        let gate = s.gate.clone();
        std::thread::spawn(move || gate.release(Epoch(1)))
    };
    s.entered
        .recv_timeout(LIVENESS)
        .expect("the frame on its way");
    // The port is stuck in a write; were a lock held over it, these would hang.
    assert_eq!(s.gate.send(&frame(1)).expect("send"), SendOutcome::Sent);
    s.gate.seal(Epoch(2)).expect("next");
    assert_eq!(s.gate.stats().held_frames, 1);
    assert!(!release.is_finished());
    s.go.send(()).expect("port");
    assert_eq!(release.join().expect("release"), Ok(1));
}

#[test]
fn when_holding_begins_no_frame_is_on_its_way_out() {
    let s = slow_gate();
    let sender = {
        let gate = s.gate.clone();
        std::thread::spawn(move || gate.send(&frame(0)))
    };
    s.entered
        .recv_timeout(LIVENESS)
        .expect("the frame on its way");
    let hold = {
        let gate = s.gate.clone();
        std::thread::spawn(move || gate.set_hold(true))
    };
    grace();
    assert!(!hold.is_finished(), "a frame is still on its way out");
    s.go.send(()).expect("port");
    hold.join().expect("set_hold");
    assert_eq!(
        s.sent.load(Ordering::SeqCst),
        1,
        "it was out when set_hold returned"
    );
    assert_eq!(
        sender.join().expect("sender").expect("send"),
        SendOutcome::Sent
    );
}

/// A sender that decided to send while nothing was held, and holding begins before it gets to the port.
#[test]
fn a_sender_caught_between_decision_and_port_is_held_too() {
    let (gate, frames) = gate(usize::MAX);
    let done = Arc::new(AtomicBool::new(false));
    let turns = Arc::new(AtomicUsize::new(0));
    let sender = {
        let (gate, done, turns) = (gate.clone(), done.clone(), turns.clone());
        std::thread::spawn(move || {
            while !done.load(Ordering::Acquire) {
                gate.send(&frame(0)).expect("send");
                turns.fetch_add(1, Ordering::AcqRel);
            }
        })
    };
    let mut early = None;
    for round in 0..2000 {
        gate.set_hold(true);
        let out = frames.lock().expect("lock").len();
        // Whatever call was under way has returned after two turns.
        let turn = turns.load(Ordering::Acquire);
        while turns.load(Ordering::Acquire) < turn + 2 {
            std::thread::yield_now();
        }
        if frames.lock().expect("lock").len() != out {
            early = Some(round);
            break;
        }
        gate.set_hold(false);
        frames.lock().expect("lock").clear();
    }
    done.store(true, Ordering::Release);
    sender.join().expect("sender");
    assert_eq!(early, None, "a frame left after holding had begun");
}

#[test]
fn inbound_frames_are_not_held() {
    let port = MemoryPort::new(vec![frame(1), frame(2)]).expect("eventfd");
    let gate = Gate::new(port, 100).expect("eventfd");
    gate.set_hold(true);
    let mut buf = [0; 2048];
    let n = gate.recv(&mut buf).expect("recv").expect("a frame");
    assert_eq!(serial(&buf[..n]), 1);
    gate.fence();
    let n = gate.recv(&mut buf).expect("recv").expect("a frame");
    assert_eq!(serial(&buf[..n]), 2);
    assert_eq!(gate.recv(&mut buf).expect("recv"), None);
    assert_eq!(gate.stats().received, 2);
}
