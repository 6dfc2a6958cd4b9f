//! The smallest VMM that boots the image: one vCPU, one RAM slot, COM1, and if asked for a network card and a disk.
//! Private to these tests, so that the guest is tested whatever state the real VMM is in.
#![allow(dead_code)] // each test uses its part

pub mod virtio;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use virtio::{Kind, Mem, Slot, lock};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BOOT_PARAMS: usize = 0x7000;
const CMDLINE: usize = 0x2_0000;

/// A machine that has been loaded and not yet run.
pub struct Machine {
    vcpu: VcpuFd,
    vm: VmFd,
    mem: Mem,
    slots: [Option<Arc<Mutex<Slot>>>; 8],
    log: String,
    dirty: Vec<u64>,
    may_reset: bool,
    reset: bool,
}

impl Machine {
    /// A machine of `len` bytes of RAM with the image loaded and `cmdline` as its command line.
    pub fn new(len: usize, cmdline: &str) -> Machine {
        let kvm = Kvm::new().expect("this test needs /dev/kvm, readable and writable");
        let vm = kvm.create_vm().expect("KVM_CREATE_VM");
        vm.create_irq_chip().expect("KVM_CREATE_IRQCHIP");
        vm.create_pit2(kvm_pit_config::default())
            .expect("KVM_CREATE_PIT2");
        // SAFETY: a fresh anonymous mapping of `len` bytes; failure is checked.
        let mem = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(mem, libc::MAP_FAILED, "mmap of guest memory");
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: 0,
            memory_size: len as u64,
            userspace_addr: mem as u64,
        };
        // SAFETY: the mapping is `len` bytes and lives as long as the VM (it is never unmapped).
        unsafe { vm.set_user_memory_region(region) }.expect("KVM_SET_USER_MEMORY_REGION");
        let vcpu = vm.create_vcpu(0).expect("KVM_CREATE_VCPU");
        let mut m = Machine {
            vcpu,
            vm,
            mem: Mem {
                at: mem.cast(),
                len,
            },
            slots: Default::default(),
            log: String::new(),
            dirty: Vec::new(),
            may_reset: false,
            reset: false,
        };
        let entry = m.load_elf(guest::IMAGE);
        m.boot_params(cmdline);
        m.enter(&kvm, entry);
        m
    }

    /// Puts a device into virtio-mmio slot `i`.
    pub fn plug(&mut self, i: usize, kind: Kind) -> Arc<Mutex<Slot>> {
        let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
        self.vm
            .register_irqfd(&irq, 16 + i as u32)
            .expect("KVM_IRQFD");
        let slot = Arc::new(Mutex::new(Slot::new(self.mem, kind, irq)));
        self.slots[i] = Some(Arc::clone(&slot));
        slot
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.mem.write(at as u64, bytes);
    }

    fn mmio(slots: &[Option<Arc<Mutex<Slot>>>; 8], addr: u64) -> Option<(&Mutex<Slot>, u64)> {
        let i = usize::try_from(addr.checked_sub(0xd000_0000)? / 0x1000).ok()?;
        Some((slots.get(i)?.as_deref()?, addr % 0x1000))
    }

    fn load_elf(&mut self, elf: &[u8]) -> u64 {
        let u64_at = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("8 bytes"));
        let u16_at =
            |at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().expect("2 bytes")) as usize;
        assert_eq!(&elf[..4], b"\x7fELF");
        let (phoff, phentsize, phnum) = (u64_at(0x20) as usize, u16_at(0x36), u16_at(0x38));
        for i in 0..phnum {
            let p = phoff + i * phentsize;
            if elf[p..p + 4] == [1, 0, 0, 0] {
                let (off, paddr, filesz) = (
                    u64_at(p + 8) as usize,
                    u64_at(p + 24) as usize,
                    u64_at(p + 32) as usize,
                );
                self.put(paddr, &elf[off..off + filesz]);
            }
        }
        u64_at(0x18)
    }

    /// The fields of Linux's boot_params (Documentation/arch/x86/zero-page) that the guest reads.
    fn boot_params(&mut self, cmdline: &str) {
        self.put(CMDLINE, cmdline.as_bytes());
        self.put(BOOT_PARAMS + 0x228, &(CMDLINE as u32).to_le_bytes());
        let map = [
            (0, 0x9fc00_u64),
            (0x10_0000, self.mem.len as u64 - 0x10_0000),
        ];
        self.put(BOOT_PARAMS + 0x1e8, &[map.len() as u8]);
        for (i, (start, len)) in map.iter().enumerate() {
            let at = BOOT_PARAMS + 0x2d0 + i * 20;
            self.put(at, &u64::to_le_bytes(*start));
            self.put(at + 8, &u64::to_le_bytes(*len));
            self.put(at + 16, &1u32.to_le_bytes());
        }
    }

    /// Long mode, 4 GiB identity mapped, as the boot protocol wants it (Documentation/arch/x86/boot, 64-bit).
    fn enter(&mut self, kvm: &Kvm, entry: u64) {
        self.put(0x9000, &0xa003u64.to_le_bytes());
        for g in 0..4u64 {
            self.put(
                0xa000 + 8 * g as usize,
                &(0xb003 + 0x1000 * g).to_le_bytes(),
            );
            for i in 0..512u64 {
                let at = 0xb000 + 0x1000 * g as usize + 8 * i as usize;
                self.put(at, &(g << 30 | i << 21 | 0x83).to_le_bytes());
            }
        }
        for (i, d) in [0, 0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff]
            .iter()
            .enumerate()
        {
            self.put(0x500 + 8 * i, &d.to_le_bytes());
        }
        let cpuid = kvm
            .get_supported_cpuid(256)
            .expect("KVM_GET_SUPPORTED_CPUID");
        self.vcpu.set_cpuid2(&cpuid).expect("KVM_SET_CPUID2");
        let segment = |selector, type_, l, db| kvm_segment {
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            db,
            s: 1,
            l,
            g: 1,
            ..Default::default()
        };
        let mut s = self.vcpu.get_sregs().expect("KVM_GET_SREGS");
        s.cs = segment(0x10, 11, 1, 0);
        let data = segment(0x18, 3, 0, 1);
        (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
        (s.gdt.base, s.gdt.limit, s.idt.limit) = (0x500, 31, 0);
        (s.cr0, s.cr3, s.cr4, s.efer) = (0x8000_0011, 0x9000, 0x20, 0x500);
        self.vcpu.set_sregs(&s).expect("KVM_SET_SREGS");
        let r = kvm_regs {
            rip: entry,
            rsi: BOOT_PARAMS as u64,
            rsp: 0x8ff0,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&r).expect("KVM_SET_REGS");
    }

    /// Runs until a log line holds `text`; fails after 30 s, or when the guest gives up.
    pub fn run_until(&mut self, text: &str) {
        let from = Instant::now();
        while !self.log.contains(text) {
            assert!(
                from.elapsed() < Duration::from_secs(30),
                "no {text:?} within 30 s; the guest said:\n{}",
                self.log
            );
            self.step(Duration::from_millis(100));
        }
    }

    /// Runs for `ms` milliseconds; returns how many of them this thread was on a CPU.
    pub fn run_ms(&mut self, ms: u64) -> u64 {
        let (from, cpu) = (Instant::now(), thread_cpu());
        while from.elapsed() < Duration::from_millis(ms) {
            self.step(Duration::from_millis(ms).saturating_sub(from.elapsed()));
        }
        (thread_cpu() - cpu).as_millis() as u64
    }

    /// Forgets which pages are dirty.
    pub fn clear_dirty(&mut self) {
        self.dirty_pages();
        self.dirty.clear();
    }

    /// How many pages became dirty since [`Machine::clear_dirty`].
    pub fn dirty_pages(&mut self) -> u32 {
        let log = self
            .vm
            .get_dirty_log(0, self.mem.len)
            .expect("KVM_GET_DIRTY_LOG");
        self.dirty.resize(log.len(), 0);
        for (sum, word) in self.dirty.iter_mut().zip(&log) {
            *sum |= word;
        }
        self.dirty.iter().map(|w| w.count_ones()).sum()
    }

    /// Makes the guest go on at `code`, placed in free memory, when it runs next.
    pub fn jump_into(&mut self, code: &[u8]) {
        let at = self.mem.len - 4096;
        self.put(at, code);
        // Until it is in ring 3: not amid an interrupt stub.
        while self.vcpu.get_sregs().expect("KVM_GET_SREGS").cs.dpl != 3 {
            self.step(Duration::from_millis(1));
        }
        let mut r = self.vcpu.get_regs().expect("KVM_GET_REGS");
        r.rip = at as u64;
        self.vcpu.set_regs(&r).expect("KVM_SET_REGS");
    }

    /// Runs until the guest asks for a reset; fails after 30 s.
    pub fn run_until_reset(&mut self) {
        let from = Instant::now();
        self.may_reset = true;
        while !self.reset {
            assert!(
                from.elapsed() < Duration::from_secs(30),
                "no reset within 30 s"
            );
            self.step(Duration::from_millis(100));
        }
    }

    /// One KVM_RUN, interrupted after `at_most` by a one-shot timer's signal.
    fn step(&mut self, at_most: Duration) {
        let _timer = Timer::new(at_most.max(Duration::from_millis(1)));
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(0x3f8, data)) => self.log.push_str(&String::from_utf8_lossy(data)),
            Ok(VcpuExit::IoOut(0x64, [0xfe])) if self.may_reset => self.reset = true,
            Ok(VcpuExit::IoOut(0x64, [0xfe])) => panic!("the guest gave up:\n{}", self.log),
            Ok(VcpuExit::IoOut(..) | VcpuExit::Intr) => {}
            Ok(VcpuExit::IoIn(_, data)) => data.fill(0xff),
            Ok(VcpuExit::MmioRead(addr, data)) => {
                data.fill(0);
                if let Some((slot, offset)) = Machine::mmio(&self.slots, addr) {
                    data.copy_from_slice(&lock(slot).read(offset).to_le_bytes());
                }
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                if let Some((slot, offset)) = Machine::mmio(&self.slots, addr) {
                    lock(slot).write(
                        offset,
                        u32::from_le_bytes(data.try_into().expect("32-bit access")),
                    );
                }
            }
            Ok(other) => panic!("unexpected exit {other:?}; the guest said:\n{}", self.log),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {}
            Err(e) => panic!("KVM_RUN: {e}; the guest said:\n{}", self.log),
        }
    }
}

fn thread_cpu() -> Duration {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is a valid place for the answer.
    let rc = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    assert_eq!(rc, 0);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// SIGALRM for this very thread, again and again until dropped, so that a KVM_RUN entered late ends too.
struct Timer(libc::timer_t);

impl Timer {
    fn new(after: Duration) -> Timer {
        extern "C" fn nothing(_: libc::c_int) {}
        // SAFETY: zeroed is a valid sigaction and sigevent; the handler does nothing and is async-signal-safe; all
        // pointers are to locals that outlive the calls.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            assert_eq!(
                libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut()),
                0
            );
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGALRM;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = std::ptr::null_mut();
            assert_eq!(
                libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer),
                0
            );
            let first = libc::timespec {
                tv_sec: after.as_secs() as _,
                tv_nsec: after.subsec_nanos() as _,
            };
            let again = libc::timespec {
                tv_sec: 0,
                tv_nsec: 10_000_000,
            };
            let when = libc::itimerspec {
                it_interval: again,
                it_value: first,
            };
            assert_eq!(
                libc::timer_settime(timer, 0, &when, std::ptr::null_mut()),
                0
            );
            Timer(timer)
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours and is deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}
