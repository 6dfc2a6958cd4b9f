//! A network device before a gate that holds its frames: nothing leaves early, a full gate stops the guest, and what is
//! released comes out whole and in order.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use checkpoint::Epoch;
use netbuf::{Gate, Port};
use vmm::devices::{DeviceManager, DeviceSpec, NetSpec};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::*;
use crate::stand_ins::{TestDisk, Wires};

const RX: usize = 0;
const TX: usize = 1;

struct Cable {
    sent: Arc<Mutex<VecDeque<u8>>>,
    inbound: Mutex<VecDeque<Vec<u8>>>,
    fd: EventFd,
}

impl Port for Cable {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.sent.lock().unwrap().push_back(frame[12]);
        Ok(())
    }

    fn recv(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let frame = self.inbound.lock().unwrap().pop_front();
        Ok(frame.map(|frame| {
            buf[..frame.len()].copy_from_slice(&frame);
            frame.len()
        }))
    }

    fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A running machine with a network card before `gate`.
fn machine_of(gate: &Arc<Gate>) -> Machine {
    let mut machine = Machine::paused(TestDisk::new(512));
    let spec = DeviceSpec {
        net: vec![NetSpec {
            mac: MAC,
            backend: Box::new(gate.clone()),
        }],
        disks: vec![],
        rng: false,
        serial_out: Box::new(io::sink()),
        serial_in: None,
        on_reset: Box::new(|| {}),
    };
    let wires = Wires::default();
    machine.devices = Arc::new(DeviceManager::new(machine.mem.clone(), &wires, spec).unwrap());
    machine.devices.resume();
    machine
}

#[test]
fn g2_frames_longer_than_the_guests_buffers_are_counted_at_the_gate() {
    let cable = Cable {
        sent: Arc::default(),
        inbound: Mutex::new([vec![1; 2000], vec![2; 9000], vec![3; 100]].into()),
        // Readable: frames wait.
        fd: EventFd::new(EFD_NONBLOCK).unwrap(),
    };
    cable.fd.write(1).unwrap();
    let gate = Gate::new(cable, 400).unwrap();
    let machine = machine_of(&gate);
    let mut driver = machine.driver(NET, EVENT_IDX);
    let at = driver.buffer(&[0; 1526]);
    driver.offer(RX, &[into(at, 1526)]);
    driver.kick(RX);
    assert_eq!(driver.wait_used(RX), (0, 100), "the one that fits");
    let stats = gate.stats();
    assert_eq!((stats.received, stats.dropped_long), (3, 2));
}

#[test]
fn frames_wait_in_the_gate_and_then_in_the_guest() {
    let sent = Arc::new(Mutex::new(VecDeque::new()));
    let cable = Cable {
        sent: sent.clone(),
        inbound: Mutex::default(),
        fd: EventFd::new(EFD_NONBLOCK).unwrap(),
    };
    // Room for a few frames of 72 bytes only.
    let gate = Gate::new(cable, 400).unwrap();
    gate.set_hold(true);
    let machine = machine_of(&gate);
    let mut driver = machine.driver(NET, EVENT_IDX);
    for n in 0..12u8 {
        let at = driver.buffer(&[n; 72]);
        driver.offer(TX, &[out(at, 72)]);
    }
    driver.kick(TX);
    eventually("a full gate", || gate.stats().full > 0);
    assert!(driver.used_idx(TX) < 12, "the gate was never full");
    assert!(
        sent.lock().unwrap().is_empty(),
        "a frame left before its epoch was released"
    );

    let mut epoch = Epoch(1);
    eventually("all twelve", || {
        // An epoch's end: seal while paused, release what is sealed.
        machine.devices.pause();
        gate.seal(epoch).unwrap();
        machine.devices.resume();
        gate.release(epoch).unwrap();
        epoch = epoch.next();
        sent.lock().unwrap().len() == 12
    });
    assert!(
        epoch > Epoch(2),
        "one epoch held everything: nothing was tested"
    );
    assert_eq!(*sent.lock().unwrap(), (0..12).collect::<Vec<_>>());
    eventually("all returned", || driver.used_idx(TX) == 12);
}
