//! A machine: KVM's objects, vCPU threads and devices, and the whole of it paused, captured, restored and resumed.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use checkpoint::CpuFeatures;
use checkpoint::machine::MachineState;
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use crate::backend::BlockBackend;
use crate::boot::{self, BootError, BootSpec};
use crate::bus::Bus;
use crate::control::{self, Control, RunPage};
use crate::devices::{DeviceManager, DeviceSpec, NetSpec};
use crate::dirty::{BitmapTracker, DirtyTracker, set_slots};
use crate::events::{Events, VmEvent};
use crate::inspect::VcpuReport;
use crate::kvm_caps;
use crate::layout::{MAX_VCPUS, SCI_GSI};
use crate::memory::{self, GuestMemory, RamFiles, RamLayout};
use crate::platform::{create_platform, create_vcpus};
use crate::reset::{ResetLine, Restart};
use crate::vcpu::VcpuThread;
use crate::vcpu_state::{TscClock, VcpuState, VcpuTraits};
pub use crate::vm_error::VmError;
use crate::vm_error::create;
use crate::vm_state::VmState;
use crate::{msrs, paging};

/// How long a disk may take to end what it is at when the machine is reset.
const DRAIN: Duration = Duration::from_secs(10);
const DRAIN_POLL: Duration = Duration::from_millis(1);

/// What a machine consists of.
pub struct VmSpec {
    /// vCPUs, 1 to 8.
    pub vcpus: u8,
    /// At most these features of the host's processor; by default all. A machine that is restored has those that it had.
    pub cpu: CpuFeatures,
    /// Where RAM lies.
    pub ram: RamLayout,
    /// Network devices, in bus order.
    pub net: Vec<NetSpec>,
    /// Disks, in bus order.
    pub disks: Vec<Arc<dyn BlockBackend>>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// Where the serial console's output goes.
    pub serial_out: Box<dyn Write + Send>,
    /// Where the serial console's input comes from, if anywhere.
    pub serial_in: Option<OwnedFd>,
}

struct Vcpu {
    fd: Arc<Mutex<VcpuFd>>,
    thread: Option<JoinHandle<()>>,
    exits: Arc<AtomicU64>,
}

impl Vcpu {
    fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the machine is doing; held while it changes, so that pause, capture and resume exclude each other.
#[derive(Debug, PartialEq, Eq)]
enum Life {
    Paused,
    Running,
}

/// A machine. Made paused: nothing runs before the first [`Vm::resume`]. Dropping it stops it.
pub struct Vm {
    // Order matters for the drop: devices and vCPUs end before what they use.
    bus: Arc<Bus>,
    vcpus: Vec<Vcpu>,
    control: Arc<Control>,
    reset: Arc<ResetLine>,
    /// Its state before anything ran; set once it is made. Of the processors' features a reset takes nothing from it: those of
    /// a machine that was restored are another's.
    power_on: Option<MachineState>,
    traits: VcpuTraits,
    dirty: BitmapTracker,
    vm: Arc<VmFd>,
    events: Events,
    life: Mutex<Life>,
    halted: AtomicBool,
    layout: RamLayout,
    ram: RamFiles,
    memory: GuestMemory,
}

impl Vm {
    /// Makes the machine: KVM's objects, devices, and vCPU threads, which wait.
    ///
    /// # Errors
    /// [`VmError`], naming the part and where possible the remedy.
    pub fn new(spec: VmSpec, ram: RamFiles) -> Result<Vm, VmError> {
        if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
            return Err(VmError::VcpuCount(spec.vcpus));
        }
        let kvm = kvm_caps::open()?;
        let memory = memory::map(&spec.ram, &ram)?;
        let vm = Arc::new(
            kvm.create_vm()
                .map_err(create("creating the virtual machine"))?,
        );
        set_slots(&vm, &memory, 0).map_err(|(slot, source)| VmError::Slot { slot, source })?;
        create_platform(&kvm, &vm)?;

        let control = Arc::new(Control::new(usize::from(spec.vcpus)));
        let (sender, events) = Events::channel();
        let reset = Arc::new(ResetLine::new(Arc::clone(&control), sender));
        let on_reset = {
            let reset = Arc::clone(&reset);
            Box::new(move || reset.happened(VmEvent::Reset))
        };
        let devices = DeviceSpec {
            net: spec.net,
            disks: spec.disks,
            rng: spec.rng,
            serial_out: spec.serial_out,
            serial_in: spec.serial_in,
            on_reset,
        };
        let fds = create_vcpus(&kvm, &vm, spec.vcpus, &spec.cpu)?;
        let traits = VcpuTraits {
            msrs: msrs::discover(&kvm, &fds[0])?,
            xsave_bytes: usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0),
            xcrs: kvm.check_extension(Cap::Xcrs),
        };
        let devices = DeviceManager::new(memory.clone(), &*vm, devices)?;
        let bus = Arc::new(Bus::new(Arc::new(devices), sci(Arc::clone(&vm))));
        let mut machine = Vm {
            bus,
            vcpus: Vec::new(),
            control,
            reset,
            power_on: None,
            traits,
            dirty: BitmapTracker::new(Arc::clone(&vm), memory.clone(), spec.ram.ranges().to_vec()),
            vm,
            events,
            life: Mutex::new(Life::Paused),
            halted: AtomicBool::new(false),
            layout: spec.ram,
            ram,
            memory,
        };
        machine.start_threads(fds)?;
        machine.power_on = Some(machine.capture()?);
        Ok(machine)
    }

    fn start_threads(&mut self, fds: Vec<VcpuFd>) -> Result<(), VmError> {
        let refused = |what| move |source| VmError::Create { what, source };
        control::install_handler().map_err(refused("installing the vCPU signal's handler"))?;
        for (id, fd) in (0u8..).zip(fds) {
            let fd = Arc::new(Mutex::new(fd));
            let run = RunPage::new(&fd);
            let exits = Arc::new(AtomicU64::new(0));
            let work = VcpuThread {
                id,
                vcpu: Arc::clone(&fd),
                control: Arc::clone(&self.control),
                bus: Arc::clone(&self.bus),
                reset: Arc::clone(&self.reset),
                exits: Arc::clone(&exits),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(move || work.main())
                .map_err(refused("starting a vCPU's thread"))?;
            self.control.add(run, &thread);
            self.vcpus.push(Vcpu {
                fd,
                thread: Some(thread),
                exits,
            });
        }
        // Wait until all stand still: from here on the machine is what it says it is.
        self.control.pause().map_err(VmError::Stuck)
    }

    /// Loads a kernel, its RAM disk, ACPI tables and boot parameters, and points the first vCPU at it. For a fresh
    /// machine, once.
    ///
    /// # Errors
    /// [`BootError`], naming what is wrong with which file or size.
    pub fn boot(&self, spec: &BootSpec) -> Result<(), BootError> {
        let _life = self.paused().map_err(Box::new)?;
        self.load(spec)
    }

    fn load(&self, spec: &BootSpec) -> Result<(), BootError> {
        let slots = self.bus.devices().mmio_slots();
        let entry = boot::load(
            spec,
            &self.memory,
            &self.layout,
            self.vcpus.len() as u8,
            slots,
        )?;
        for (id, vcpu) in (0u8..).zip(&self.vcpus) {
            paging::prepare(&vcpu.fd(), id, entry).map_err(|source| {
                Box::new(VmError::Create {
                    what: "setting a vCPU's registers",
                    source,
                })
            })?;
        }
        Ok(())
    }

    /// Puts a captured state into this fresh machine, whose RAM already holds the captured memory. On an error the
    /// machine is of no further use.
    ///
    /// # Errors
    /// [`VmError`]: the shapes differ, or KVM or a device refused a part.
    pub fn restore(&self, state: &MachineState) -> Result<(), VmError> {
        let _life = self.paused()?;
        self.put(state, true)
    }

    /// `fresh`: into a machine in which nothing has run.
    fn put(&self, state: &MachineState, fresh: bool) -> Result<(), VmError> {
        if state.ram != self.layout.ranges() {
            return Err(VmError::Shape(format!(
                "memory {:?} instead of {:?}",
                state.ram,
                self.layout.ranges()
            )));
        }
        if state.vcpus.len() != self.vcpus.len() {
            return Err(VmError::Shape(format!(
                "{} vCPUs instead of {}",
                state.vcpus.len(),
                self.vcpus.len()
            )));
        }
        // All decoded before anything is changed.
        let vm_state = VmState::from_blob(&state.vm)?;
        let vcpus: Vec<VcpuState> = (0u8..)
            .zip(&state.vcpus)
            .map(|(id, blob)| {
                VcpuState::from_blob(blob).map_err(|source| VmError::Vcpu { id, source })
            })
            .collect::<Result<_, _>>()?;
        let mut clock = TscClock::default();
        for (id, (vcpu, saved)) in (0u8..).zip(self.vcpus.iter().zip(&vcpus)) {
            saved
                .apply(&vcpu.fd(), &self.traits, &mut clock, fresh)
                .map_err(|source| VmError::Vcpu { id, source })?;
        }
        // After the local APICs: restoring the IOAPIC delivers what is pending in it.
        vm_state.apply(&self.vm)?;
        self.bus.set_pm(vm_state.pm);
        self.bus.devices().restore(&state.devices)?;
        Ok(())
    }

    /// What the machine does from now on instead of ending. Without it a reset ends the guest's run, as anything else does.
    pub fn restarts(&self, restart: Option<Restart>) {
        self.reset.set(restart);
    }

    /// As the guest's own reset, but from outside: what runs in it is lost as by a power cut. Whoever hears
    /// [`VmEvent::Reset`] has to follow with [`Vm::reset`]. False: nothing is known to boot, or the guest has ended.
    pub fn press_reset(&self) -> bool {
        self.reset.press()
    }

    /// Presses the machine's power button: its guest is asked to switch itself off, and may ignore that.
    pub fn press_power_button(&self) {
        // Not while it is captured: registers and interrupt controllers belong together.
        let _life = self.life();
        self.bus.press_power_button();
    }

    /// Whether the guest's run is over.
    pub fn has_ended(&self) -> bool {
        self.control.ended()
    }

    /// Whether the guest waits for [`Vm::reset`].
    pub fn waits_for_reset(&self) -> bool {
        self.control.wants_reset()
    }

    /// Resets the machine if the guest waits for that, and boots it again: processors, interrupt controllers, timers and
    /// devices are as at power-on, memory is as it was but for what is loaded. To be called after an event that
    /// restarts it; a checkpoint that is captured before resets the machine first. If it cannot be booted again that is
    /// [`VmEvent::Crashed`].
    ///
    /// # Errors
    /// [`VmError::Stuck`] if a vCPU does not stop; the machine must then be given up.
    pub fn reset(&self) -> Result<(), VmError> {
        let mut life = self.life();
        if !self.control.wants_reset() {
            return Ok(());
        }
        let ran = *life == Life::Running;
        self.halt(&mut life)?;
        self.reset_now();
        if ran {
            self.go(&mut life);
        }
        Ok(())
    }

    /// The machine is paused and locked.
    fn reset_now(&self) {
        if let Err(why) = self.try_reset() {
            let reason = format!("it cannot be booted again after its reset: {why}");
            self.reset.ends(VmEvent::Crashed { vcpu: 0, reason });
        }
        self.control.reset_done();
    }

    fn try_reset(&self) -> Result<(), BootError> {
        let Some(spec) = self.reset.boots() else {
            return Err(BootError::Nothing);
        };
        // What the guest has asked of a disk must not happen after it has begun anew.
        let deadline = Instant::now() + DRAIN;
        while self.bus.devices().is_busy() {
            if Instant::now() > deadline {
                return Err(BootError::DiskBusy(DRAIN));
            }
            std::thread::sleep(DRAIN_POLL);
        }
        if let Some(state) = &self.power_on {
            self.put(state, false).map_err(Box::new)?;
        }
        self.load(&spec)
    }

    /// Lets the machine run: first the devices, then the vCPUs. No effect if it runs, or if the guest has ended.
    pub fn resume(&self) {
        self.go(&mut self.life());
    }

    fn go(&self, life: &mut Life) {
        if *life == Life::Running || self.control.ended() {
            return;
        }
        self.bus.devices().resume();
        self.control.resume();
        *life = Life::Running;
    }

    /// Stops the machine: on return all vCPUs are out of the guest with their port and memory accesses completed, and
    /// no device thread touches queues or guest memory. Waits for no disk. No effect if it is paused.
    ///
    /// # Errors
    /// [`VmError::Stuck`] if a vCPU does not stop; the machine must then be given up.
    pub fn pause(&self) -> Result<(), VmError> {
        self.halt(&mut self.life())
    }

    fn halt(&self, life: &mut Life) -> Result<(), VmError> {
        if *life == Life::Paused {
            return Ok(());
        }
        self.control.pause().map_err(VmError::Stuck)?;
        self.bus.devices().pause();
        *life = Life::Paused;
        Ok(())
    }

    /// The machine's state without its memory; only while paused. If the guest waits to be reset it is reset first: there is
    /// no checkpoint of a machine that waits for somebody to do so. Harvest dirty pages afterwards: reading vCPU state
    /// lets KVM write guest memory (steal time).
    ///
    /// # Errors
    /// [`VmError`]: not paused, the guest has ended, or KVM or a device refused a part.
    pub fn capture(&self) -> Result<MachineState, VmError> {
        let _life = self.paused()?;
        if self.control.wants_reset() {
            self.reset_now();
        }
        if self.control.ended() {
            return Err(VmError::Ended);
        }
        let mut vcpus = Vec::with_capacity(self.vcpus.len());
        let mut halted = true;
        for (id, vcpu) in (0u8..).zip(&self.vcpus) {
            let state = VcpuState::capture(&vcpu.fd(), &self.traits);
            let state = state.map_err(|source| VmError::Vcpu { id, source })?;
            halted &= state.is_halted();
            let blob = state.to_blob();
            vcpus.push(blob.map_err(|source| VmError::Vcpu { id, source })?);
        }
        self.halted.store(halted, Ordering::Relaxed);
        let devices = self.bus.devices().save()?;
        Ok(MachineState {
            ram: self.layout.ranges().to_vec(),
            vm: VmState::capture(&self.vm, self.bus.pm())?.to_blob()?,
            vcpus,
            devices,
        })
    }

    /// Whether all vCPUs waited for an interrupt when the machine was captured last: it lost nothing by standing still.
    pub fn was_halted(&self) -> bool {
        self.halted.load(Ordering::Relaxed)
    }

    /// What each vCPU is at: a look at a machine that makes no progress. Stops the vCPUs of a running machine for as
    /// long as it takes to read them.
    ///
    /// # Errors
    /// [`VmError`]: the vCPUs do not stop, or KVM refused a part.
    pub fn inspect(&self) -> Result<Vec<VcpuReport>, VmError> {
        let life = self.life();
        self.control.pause().map_err(VmError::Stuck)?;
        let reports = (0u8..)
            .zip(&self.vcpus)
            .map(|(id, vcpu)| {
                VcpuReport::read(id, vcpu.exits.load(Ordering::Relaxed), &vcpu.fd())
                    .map_err(|source| VmError::Vcpu { id, source })
            })
            .collect();
        if *life == Life::Running {
            self.control.resume();
        }
        reports
    }

    /// Which pages change.
    pub fn dirty(&self) -> &dyn DirtyTracker {
        &self.dirty
    }

    /// Guest memory. Reading it while the machine runs gives no consistent picture.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The files that hold guest memory, in the order of the ranges.
    pub fn ram_files(&self) -> &RamFiles {
        &self.ram
    }

    /// The machine's RAM ranges.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// vCPUs of the machine.
    pub fn vcpus(&self) -> u8 {
        self.vcpus.len() as u8
    }

    /// What the guest does to itself.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Ends the machine. What it had not written is gone, as with a power cut.
    pub fn stop(self) {}

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn paused(&self) -> Result<MutexGuard<'_, Life>, VmError> {
        let life = self.life();
        if *life == Life::Paused && self.control.is_paused() {
            Ok(life)
        } else {
            Err(VmError::NotPaused)
        }
    }
}

/// The line of the system control interrupt.
fn sci(vm: Arc<VmFd>) -> impl Fn(bool) + Send + Sync {
    move |level| {
        if let Err(e) = vm.set_irq_line(u32::from(SCI_GSI), level) {
            tracing::warn!("the system control interrupt: {}", std::io::Error::from(e));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.control.exit();
        for vcpu in &mut self.vcpus {
            if let Some(thread) = vcpu.thread.take() {
                // A panic in it has been reported by its own message.
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_shared<T: Send + Sync>() {}

    #[test]
    fn a_machine_may_be_shared_between_threads() {
        is_shared::<Vm>();
    }
}
