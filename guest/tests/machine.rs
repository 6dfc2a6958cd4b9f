//! The guest in a machine of the real VMM: memory in two slots, a tap, a disk; and its life going on in another
//! machine. Needs /dev/kvm, /dev/net/tun, and root or user namespaces; no test harness, for the namespace's sake.

mod client;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use checkpoint::bitmap::PageBitmap;
use checkpoint::ids::Epoch;
use client::{Client, GUEST, PATIENCE};
use guest::proto::*;
use netbuf::{Gate, Tap, netconf};
use vm_memory::{Bytes, GuestAddress};
use vmm::backend::NetBackend;
use vmm::devices::NetSpec;
use vmm::devices::block::file::FileDisk;
use vmm::devices::net::tap_backend::TapBackend;
use vmm::{BootSpec, GuestMemory, KernelSource, RamFiles, RamLayout, Vm, VmSpec};

const MAC: [u8; 6] = [2, 0x77, 0, 0, 0, 2];
const RAM: u64 = 64 << 20;
/// End of the first slot: the rest of RAM lies above 4 GiB.
const LOW_END: u64 = 24 << 20;

/// What the guest wrote to its console.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("not poisoned").extend_from_slice(b);
        Ok(b.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Console {
    fn wait_for(&self, text: &str) {
        let from = Instant::now();
        loop {
            let said = String::from_utf8_lossy(&self.0.lock().expect("not poisoned")).into_owned();
            if said.contains(text) {
                return;
            }
            assert!(
                from.elapsed() < PATIENCE,
                "no {text:?}; the guest said:\n{said}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn tap() -> Tap {
    Tap::open("probe0", true).expect("these tests need /dev/net/tun")
}

fn machine(disk: &Path, ram: RamFiles, console: &Console) -> Vm {
    machine_on(Box::new(TapBackend::new(tap())), disk, ram, console)
}

fn machine_on(backend: Box<dyn NetBackend>, disk: &Path, ram: RamFiles, console: &Console) -> Vm {
    let layout = RamLayout::new(RAM, Some(LOW_END)).expect("layout");
    let spec = VmSpec {
        cpu: Default::default(),
        vcpus: 1,
        ram: layout,
        net: vec![NetSpec { mac: MAC, backend }],
        disks: vec![Arc::new(FileDisk::open(disk).expect("disk"))],
        rng: true,
        serial_out: Box::new(console.clone()),
        serial_in: None,
    };
    Vm::new(spec, ram).expect("a machine; these tests need /dev/kvm")
}

fn new_ram() -> RamFiles {
    RamFiles::create(&RamLayout::new(RAM, Some(LOW_END)).expect("layout")).expect("memory")
}

fn boot(vm: &Vm, cmdline: &str) {
    vm.boot(&BootSpec {
        kernel: KernelSource::Bytes(guest::IMAGE.to_vec()),
        initrd: None,
        cmdline: format!("ip={GUEST}/24 gw=10.77.0.1 {cmdline}"),
    })
    .expect("boot");
    vm.resume();
}

fn main() {
    netconf::unshare_userns_netns().expect("these tests need a network namespace of their own");
    let keep = Tap::open("probe0", true).expect("these tests need /dev/net/tun");
    keep.set_persistent(true).expect("a persistent tap");
    drop(keep);
    netconf::set_addr_v4("probe0", Ipv4Addr::new(10, 77, 0, 1), 24).expect("address");
    netconf::set_link("probe0", true).expect("link up");
    let dir = tempfile::tempdir().expect("a directory");
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, vec![0; 1 << 20]).expect("disk");

    type Test = (&'static str, fn(&Path));
    let tests: [Test; 4] = [
        (
            "the_load_dirties_both_slots_and_nothing_much_else",
            the_load_dirties_both_slots_and_nothing_much_else,
        ),
        (
            "a_connection_goes_on_in_another_machine",
            a_connection_goes_on_in_another_machine,
        ),
        (
            "an_answer_that_never_left_is_sent_again",
            an_answer_that_never_left_is_sent_again,
        ),
        (
            "a_host_that_takes_no_frames_is_waited_for",
            a_host_that_takes_no_frames_is_waited_for,
        ),
    ];
    let only = std::env::args().nth(1).filter(|a| !a.starts_with('-'));
    for (name, test) in tests {
        if only.as_ref().is_none_or(|o| name.contains(o)) {
            std::fs::write(&disk, vec![0; 1 << 20]).expect("disk");
            println!("test {name} ...");
            test(&disk);
            println!("test {name} ok");
        }
    }
}

fn the_load_dirties_both_slots_and_nothing_much_else(disk: &Path) {
    const PAGES: u64 = 9000;
    let console = Console::default();
    let vm = machine(disk, new_ram(), &console);
    boot(&vm, &format!("pages={PAGES} work=0"));
    console.wait_for("ready");
    vm.dirty().start().expect("dirty log");
    // However long a pass takes here: harvest until all its pages have shown up, then a few passes more.
    let mut dirty = PageBitmap::new(vm.layout().ranges());
    let (from, mut more) = (Instant::now(), 0);
    while more < 20 {
        std::thread::sleep(Duration::from_millis(50));
        vm.dirty().harvest(&mut dirty).expect("harvest");
        more += u32::from(dirty.count() >= PAGES);
        let n = dirty.count();
        assert!(from.elapsed() < PATIENCE, "{n} pages dirty of {PAGES}");
    }
    vm.pause().expect("pause");
    let n = dirty.count();
    assert!(n < PAGES + 100, "{n} pages dirty of {PAGES}");
    let high = dirty.iter().filter(|g| *g >= 1 << 20).count();
    assert!(high > 1000, "only {high} pages above 4 GiB");
    vm.stop();
}

/// Copies all guest memory: the second machine shares nothing with the first.
fn copy(old: &GuestMemory, new: &Vm) {
    for r in new.layout().ranges() {
        let mut bytes = vec![0; r.len as usize];
        old.read_slice(&mut bytes, GuestAddress(r.start))
            .expect("read memory");
        new.memory()
            .write_slice(&bytes, GuestAddress(r.start))
            .expect("write memory");
    }
}

fn a_connection_goes_on_in_another_machine(disk: &Path) {
    let console = Console::default();
    let mut vm = machine(disk, new_ram(), &console);
    boot(&vm, "pages=500 work=100");
    let mut c = Client::connect();
    let (mut n, mut last_us) = (0, 0);
    for life in 0..5 {
        for _ in 0..50 {
            n += 1;
            let a = c.op(Op::Incr);
            assert_eq!(
                (a.counter, a.disk_counter, a.status),
                (n, n, Status::Ok as u16),
                "life {life}"
            );
            assert!(
                a.uptime_us >= last_us,
                "time ran backwards: {} after {last_us}",
                a.uptime_us
            );
            last_us = a.uptime_us;
        }
        // Requests on their way while the machine moves.
        for _ in 0..16 {
            c.send(Request::new(Op::Incr, 0));
        }
        vm.pause().expect("pause");
        let state = vm.capture().expect("capture");
        let (ram, old) = (new_ram(), vm.memory().clone());
        // No two machines on the tap, or one disk, at the same time.
        vm.stop();
        let next_console = Console::default();
        let next = machine(disk, ram, &next_console);
        copy(&old, &next);
        next.restore(&state).expect("restore");
        next.resume();
        vm = next;
        for _ in 0..16 {
            n += 1;
            assert_eq!(c.receive().counter, n, "life {life}");
        }
    }
    assert_eq!(c.op(Op::ReadDisk).disk_counter, n);
    // And asleep: restored in `hlt`, it wakes for the next frame.
    c.ask(Request::set_load(0, 0, 0));
    std::thread::sleep(Duration::from_millis(100));
    vm.pause().expect("pause");
    let state = vm.capture().expect("capture");
    let mut file = vm.ram_files().try_clone().expect("the same memory");
    vm.stop();
    let vm = machine(disk, std::mem::replace(&mut file, new_ram()), &console);
    vm.restore(&state).expect("restore");
    vm.resume();
    assert_eq!(c.op(Op::Incr).counter, n + 1);
    vm.stop();
    assert_eq!(disk_counter(disk), Some(n + 1));
}

/// The case of a failover: at the checkpoint the guest has answered, but its host died holding the answer back.
fn an_answer_that_never_left_is_sent_again(disk: &Path) {
    let console = Console::default();
    let gate = Gate::new(tap(), 1 << 20).expect("a gate");
    let vm = machine_on(Box::new(Arc::clone(&gate)), disk, new_ram(), &console);
    boot(&vm, "");
    let mut c = Client::connect();
    assert_eq!(c.op(Op::Incr).counter, 1);
    gate.set_hold(true);
    c.send(Request::new(Op::Incr, 0));
    let from = Instant::now();
    while disk_counter(disk) != Some(2) || gate.stats().held_bytes == 0 {
        assert!(from.elapsed() < PATIENCE, "the guest has not answered");
        std::thread::sleep(Duration::from_millis(1));
    }
    vm.pause().expect("pause");
    let (state, old) = (vm.capture().expect("capture"), vm.memory().clone());
    assert!(gate.fence() > 0, "the answer was to be lost");
    vm.stop();
    drop(gate);
    let vm = machine(disk, new_ram(), &console);
    copy(&old, &vm);
    vm.restore(&state).expect("restore");
    let from = Instant::now();
    vm.resume();
    assert_eq!(c.receive().counter, 2);
    println!("  after {} ms", from.elapsed().as_millis());
    assert_eq!(c.op(Op::Incr).counter, 3);
    vm.stop();
}

/// Output held back until nothing more is taken: the guest waits, loses no connection, and goes on.
fn a_host_that_takes_no_frames_is_waited_for(disk: &Path) {
    let console = Console::default();
    let gate = Gate::new(tap(), 64 << 10).expect("a gate");
    let vm = machine_on(Box::new(Arc::clone(&gate)), disk, new_ram(), &console);
    boot(&vm, "");
    let mut c = Client::connect();
    assert_eq!(c.op(Op::Incr).counter, 1);
    gate.set_hold(true);
    // More than the gate holds and the guest's transmit ring of 128 besides.
    let udp = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    for _ in 0..600 {
        udp.send_to(&[7; 1400], (GUEST, ECHO_PORT)).expect("send");
        std::thread::sleep(Duration::from_micros(200));
    }
    c.send(Request::new(Op::Incr, 0));
    std::thread::sleep(Duration::from_millis(300));
    for e in 1..200 {
        gate.seal(Epoch(e)).expect("seal");
        gate.release(Epoch(e)).expect("release");
        std::thread::sleep(Duration::from_millis(2));
    }
    gate.set_hold(false);
    assert_eq!(c.receive().counter, 2);
    assert_eq!(c.op(Op::Incr).counter, 3);
    vm.stop();
}

fn disk_counter(disk: &Path) -> Option<u64> {
    let mut block = [0; DISK_BLOCK];
    std::fs::File::open(disk)
        .expect("disk")
        .read_exact(&mut block)
        .expect("the block");
    parse_disk_block(&block)
}
