//! A VM process under an agent: owner from the start, or standby until activated.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chain::View;
use checkpoint::{CpuFeatures, Epoch, Generation, MachineState};
use vmm::VmEvent;

use super::build::{BuildError, Machine, open_disks, open_images, restart};
use super::disk::Care;
use super::monotonic_us;
use super::orphaned::Door;
use super::protector::{self, Protector, Rhythm};
use super::proto::{Activate, FromChild, GuestEnd, Owns, Role, Start, ToChild};
pub use super::reporter::Reporter;
use crate::config::{ConfigError, Epochs, VmConfig};
use crate::control::EventKind;
use crate::epoch::owner::{EpochOptions, Owner, OwnerParts};
use crate::epoch::rhythm::Lengths;
use crate::ipc::{self, IpcError};

/// Between two reports of how an owner is doing.
const FIGURES: Duration = Duration::from_millis(500);

/// How long the head may take to take over from a VM whose agent does not come back.
const TAKE_PATIENCE: Duration = Duration::from_secs(10);

/// Why a VM process ended early; also sent to the agent.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The VM could not be built or booted.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The agent's socket.
    #[error("talking to the agent: {0}")]
    Ipc(#[from] IpcError),
    /// The VM.
    #[error("virtual machine: {0}")]
    Vm(String),
    /// The checkpoint to activate.
    #[error("the checkpoint to resume from: {0}")]
    Machine(String),
    /// A message that does not fit what this process is.
    #[error("the agent asked a {0} to {1}")]
    Order(&'static str, &'static str),
    /// A thread could not be started.
    #[error("starting a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Runs the VM process whose agent's socket is descriptor `fd`. Returns the process's exit code.
#[must_use]
pub fn run_child(fd: RawFd) -> i32 {
    // A panicking thread must not leave a VM running with nobody to hold its output.
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        std::process::abort();
    }));
    // SAFETY: the agent passed this descriptor for this purpose, and nothing else in this process uses it.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let reporter = match socket.try_clone() {
        Ok(clone) => Reporter::new(clone),
        Err(e) => {
            eprintln!("understudy vmm: the agent's socket: {e}");
            return 1;
        }
    };
    match serve(&socket, &reporter) {
        Ok(()) | Err(ChildError::Ipc(IpcError::Closed)) => 0,
        Err(e) => {
            tracing::error!("{e}");
            reporter.send(&FromChild::Fatal(e.to_string()));
            1
        }
    }
}

struct Child {
    config: VmConfig,
    start: Start,
    reporter: Reporter,
}

fn serve(socket: &UnixStream, reporter: &Reporter) -> Result<(), ChildError> {
    let (start, fds) = ipc::recv::<Start>(socket)?;
    let config = VmConfig::from_text(Path::new(&start.config_name), &start.config_toml)?;
    let child = Child {
        config,
        start,
        reporter: reporter.clone(),
    };
    // Not at a takeover, when every moment counts: a standby knows it by then.
    std::thread::Builder::new()
        .name("write-fault".into())
        .spawn(|| match vmm::measure_write_fault() {
            Ok(cost) => tracing::debug!("a write fault costs {cost:?}"),
            // All that is lost is speed.
            Err(e) => tracing::warn!("write faults are not measured, so all are taken: {e}"),
        })?;
    match &child.start.role {
        Role::Boot { disks, cpu } => child.boot(socket, disks.as_deref(), cpu.clone()),
        Role::Standby { disk_sizes } => child.standby(socket, fds, &disk_sizes.clone()),
    }
}

impl Child {
    fn boot(
        &self,
        socket: &UnixStream,
        disks: Option<&[PathBuf]>,
        cpu: CpuFeatures,
    ) -> Result<(), ChildError> {
        let mirrors = match disks {
            Some(paths) => open_images(paths.iter().map(PathBuf::as_path))?,
            None => open_disks(&self.config)?,
        };
        let sizes: Vec<u64> = mirrors.iter().map(|m| m.size()).collect();
        let taps = &self.start.taps;
        let mut machine = Machine::build(&self.config, taps, None, &sizes, None, cpu)?;
        let _watcher = self.watch_network(&machine);
        machine.attach(mirrors)?;
        machine.boot(&self.config)?;
        machine.go_live(true)?;
        let owner = self.start_owner(&machine, Generation::ZERO, Epoch(1))?;
        machine.vm.resume();
        self.reporter.send(&FromChild::Ready);
        let protector = self.protector(&owner);
        self.own(socket, &machine, &owner, protector, None)
    }

    fn standby(
        &self,
        socket: &UnixStream,
        ram: Vec<OwnedFd>,
        sizes: &[u64],
    ) -> Result<(), ChildError> {
        // The machine state that it is resumed from has its features.
        let (taps, cpu) = (&self.start.taps, CpuFeatures::default());
        let mut machine = Machine::build(&self.config, taps, Some(ram), sizes, None, cpu)?;
        let _watcher = self.watch_network(&machine);
        self.reporter.send(&FromChild::Ready);
        loop {
            match ipc::recv::<ToChild>(socket)?.0 {
                ToChild::Activate(activate) => {
                    let (owner, protector) = self.activate(&mut machine, &activate)?;
                    let view = Some(activate.view);
                    return self.own(socket, &machine, &owner, protector, view);
                }
                ToChild::Stop => return Ok(()),
                ToChild::TakeStats => self.reporter.send(&FromChild::Stats(Box::default())),
                ToChild::Inspect => self.inspect(&machine.vm),
                ToChild::HandOver
                | ToChild::RunOn
                | ToChild::Reset
                | ToChild::PowerButton { .. }
                | ToChild::Freeze
                | ToChild::Protect(_)
                | ToChild::HarvestOnly { .. }
                | ToChild::Epochs(_) => {
                    return Err(ChildError::Order("standby", "act as an owner"));
                }
            }
        }
    }

    /// The moment of failover: everything that can be done before it has been done when the standby was built.
    fn activate(
        &self,
        machine: &mut Machine,
        activate: &Activate,
    ) -> Result<(Arc<Owner>, Protector), ChildError> {
        let begun_us = monotonic_us();
        let state = MachineState::decode(&activate.machine)
            .map_err(|e| ChildError::Machine(e.to_string()))?;
        let view = &activate.view;
        if view.in_place() {
            // Before anything is written: the chain holds exactly what memory is now.
            let started = machine.vm.dirty().start();
            started.map_err(|e| ChildError::Vm(e.to_string()))?;
        }
        machine
            .vm
            .restore(&state)
            .map_err(|e| ChildError::Vm(e.to_string()))?;
        let mut mirrors = Vec::new();
        for (index, path) in activate.disks.iter().enumerate() {
            let mirror =
                diskbuf::Mirror::open(path).map_err(|source| BuildError::Disk { index, source })?;
            mirrors.push(Arc::new(mirror));
        }
        machine.attach(mirrors)?;
        let restored_us = monotonic_us();
        let open = activate.mark.epoch.next();
        let owner = self.start_owner(machine, view.generation, open)?;
        let mut protector = self.protector(&owner);
        if view.in_place() {
            protector
                .resume_from(view.vm, view.generation, activate.mark)
                .map_err(ChildError::Vm)?;
        }
        // The guest runs before the taps are announced by a hair: the first frame it sends teaches the switches too.
        machine.go_live(true)?;
        machine.vm.resume();
        let running_us = monotonic_us();
        if view.in_place() {
            owner.begin_held();
        } else {
            protector.protect(view.clone());
        }
        self.reporter.send(&FromChild::Activated {
            begun_us,
            restored_us,
            running_us,
        });
        Ok((owner, protector))
    }

    fn options(&self, epochs: Epochs) -> EpochOptions {
        EpochOptions {
            lengths: Lengths {
                longest: Duration::from_millis(epochs.longest_ms),
                shortest: Duration::from_millis(epochs.shortest_ms),
                idle: Duration::from_millis(epochs.idle_ms),
                pause_percent: epochs.pause_percent,
            },
            pause_budget: Duration::from_micros(epochs.pause_budget_us),
            verify_epochs: epochs.verify_epochs,
            max_in_flight: self.config.protect.max_in_flight as usize,
        }
    }

    fn start_owner(
        &self,
        machine: &Machine,
        generation: Generation,
        open: Epoch,
    ) -> Result<Arc<Owner>, ChildError> {
        let owner = Owner::new(OwnerParts {
            guest: machine.vm.clone(),
            gates: machine.gates.clone(),
            disks: machine.mirrors(),
            queue: machine.queue.clone(),
            generation,
            open,
            max_in_flight: self.config.protect.max_in_flight as usize,
            on_event: protector::report(self.reporter.clone()),
        });
        // The gates' backends learn of the owner here; before, nothing was held.
        let _ = machine.owner.set(owner.clone());
        let (runner, options) = (
            owner.clone(),
            self.options(Epochs::of(&self.config.protect)),
        );
        std::thread::Builder::new()
            .name("epochs".into())
            .spawn(move || runner.run(options))?;
        self.tell_figures(&owner, machine.disk_care())?;
        self.watch_guest(machine)?;
        self.watch_disks(machine)?;
        Ok(owner)
    }

    /// Until the process ends.
    fn tell_figures(&self, owner: &Arc<Owner>, disks: Arc<Care>) -> Result<(), ChildError> {
        let (owner, reporter) = (owner.clone(), self.reporter.clone());
        let tell = move || {
            loop {
                std::thread::sleep(FIGURES);
                reporter.send(&FromChild::Figures {
                    figures: owner.figures(),
                    disks: disks.now(),
                });
            }
        };
        let thread = std::thread::Builder::new().name("figures".into());
        Ok(thread.spawn(tell).map(drop)?)
    }

    fn watch_network(&self, machine: &Machine) -> Option<netbuf::Watcher> {
        let reporter = self.reporter.clone();
        machine.watch_network(move |text| {
            tracing::warn!("{text}");
            let kind = EventKind::Network;
            reporter.send(&FromChild::Said { kind, text });
        })
    }

    fn watch_disks(&self, machine: &Machine) -> Result<(), ChildError> {
        let reporter = self.reporter.clone();
        machine.watch_disks(Box::new(move |text| {
            let kind = EventKind::DiskTrouble;
            reporter.send(&FromChild::Said { kind, text });
        }))?;
        Ok(())
    }

    fn watch_guest(&self, machine: &Machine) -> Result<(), ChildError> {
        let (vm, reporter) = (machine.vm.clone(), self.reporter.clone());
        let config = self.config.clone();
        std::thread::Builder::new()
            .name("guest-events".into())
            .spawn(move || {
                let restarted = |event: &VmEvent| {
                    // What was asked of this boot's guest is no concern of the next one's.
                    vm.restarts(Some(restart(&config)));
                    let how = event.to_string();
                    reporter.send(&FromChild::Rebooted { how });
                };
                let ended = match Machine::wait_end(&vm, restarted) {
                    Ok(ended) => ended,
                    Err(e) => {
                        let why = format!("the guest cannot be reset: {e}");
                        return reporter.send(&FromChild::GiveUp { why });
                    }
                };
                if let Some(event) = ended {
                    let (end, how) = match event {
                        VmEvent::Shutdown => {
                            (GuestEnd::PoweredOff, "the guest has shut down".to_string())
                        }
                        VmEvent::Reset => (
                            GuestEnd::Reset,
                            "the guest has asked for a reset".to_string(),
                        ),
                        VmEvent::Crashed { vcpu, reason } => (
                            GuestEnd::Crashed,
                            format!("vCPU {vcpu} has crashed: {reason}"),
                        ),
                    };
                    reporter.send(&FromChild::GuestEnded { end, how });
                }
            })?;
        Ok(())
    }

    /// Whoever waits for the guest's events does the rest.
    fn press_reset(&self, vm: &vmm::Vm) {
        if !vm.press_reset() {
            self.reporter.send(&FromChild::Said {
                kind: EventKind::Failed,
                text: "its guest has ended, and cannot be reset: start the VM again".into(),
            });
        }
    }

    fn inspect(&self, vm: &vmm::Vm) {
        let reports = vm.inspect().map_err(|e| e.to_string());
        self.reporter.send(&FromChild::Inspected(reports));
    }

    fn protector(&self, owner: &Arc<Owner>) -> Protector {
        Protector::new(
            self.start.host.clone(),
            Rhythm {
                heartbeat: Duration::from_millis(self.start.heartbeat_ms),
                silence: Duration::from_millis(self.start.silence_ms),
            },
            self.config.protect.lz4,
            owner.clone(),
            self.reporter.clone(),
        )
    }

    /// The owner's life: orders from the agent, and from the one after it.
    fn own(
        &self,
        socket: &UnixStream,
        machine: &Machine,
        owner: &Arc<Owner>,
        mut protector: Protector,
        mut view: Option<View>,
    ) -> Result<(), ChildError> {
        let door = self.open_door();
        let mut agent = socket.try_clone()?;
        loop {
            let order = match ipc::recv::<ToChild>(&agent) {
                Ok((order, _)) => order,
                Err(e) => {
                    let Some(door) = &door else {
                        return Err(e.into());
                    };
                    match self.orphaned(door, owner, &protector, view.as_ref())? {
                        Some(next) => agent = next,
                        None => {
                            // Nothing of this VM is this process's any more, and nobody waits for its threads.
                            tracing::warn!("another host has the VM: this process ends");
                            std::process::exit(0);
                        }
                    }
                    continue;
                }
            };
            if let ToChild::Protect(newer) = &order {
                view = Some((**newer).clone());
            }
            if !self.obey(order, machine, owner, &mut protector)? {
                return Ok(());
            }
        }
    }

    /// False: the VM ends.
    fn obey(
        &self,
        order: ToChild,
        machine: &Machine,
        owner: &Arc<Owner>,
        protector: &mut Protector,
    ) -> Result<bool, ChildError> {
        match order {
            ToChild::Protect(view) => protector.protect(*view),
            ToChild::HandOver => protector.hand_over()?,
            ToChild::RunOn => owner.run_on(),
            ToChild::Reset => self.press_reset(&machine.vm),
            ToChild::PowerButton { reboot } => {
                machine.press_power_button(&self.config, reboot);
            }
            ToChild::Freeze => protector.freeze(),
            ToChild::HarvestOnly { ms } => owner.harvest_only(Duration::from_millis(ms)),
            ToChild::Epochs(epochs) => owner.set_options(self.options(epochs)),
            ToChild::TakeStats => self
                .reporter
                .send(&FromChild::Stats(Box::new(owner.take_stats()))),
            ToChild::Inspect => self.inspect(&machine.vm),
            ToChild::Stop => {
                owner.fence();
                return Ok(false);
            }
            ToChild::Activate(_) => return Err(ChildError::Order("running owner", "activate")),
        }
        Ok(true)
    }

    fn open_door(&self) -> Option<Door> {
        let path = self.start.door.as_deref()?;
        match Door::open(path) {
            Ok(door) => Some(door),
            Err(e) => {
                tracing::warn!("{}: {e}: this VM ends with its agent", path.display());
                None
            }
        }
    }

    /// The agent is gone. The VM runs on; if no other agent comes in time, its head is asked to take it over, and asked again
    /// for as long as nobody comes or takes it. `None`: another host has it.
    fn orphaned(
        &self,
        door: &Door,
        owner: &Arc<Owner>,
        protector: &Protector,
        view: Option<&View>,
    ) -> Result<Option<UnixStream>, ChildError> {
        tracing::warn!("the agent is gone: the VM runs on and waits for the next one");
        self.reporter.disconnect();
        let wait = |patience| {
            let until = Instant::now() + patience;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                if let Some(agent) = door.wait(left)?
                    && self.greet(&agent, protector).is_ok()
                {
                    return Ok(Some(agent));
                }
            }
            Ok::<_, ChildError>(None)
        };
        loop {
            let agent = wait(Duration::from_millis(self.start.agent_return_ms))?;
            if agent.is_some() {
                // Whoever had ordered a switchover is gone, and nobody would say that it has come to nothing.
                owner.run_on();
                return Ok(agent);
            }
            if !protector.has_chain() {
                continue;
            }
            tracing::warn!("no agent has come back: the chain's head is asked to take over");
            protector.hand_over()?;
            let agent = wait(TAKE_PATIENCE)?;
            if agent.is_none() && view.is_some_and(|view| self.is_superseded(view)) {
                owner.fence();
                return Ok(None);
            }
            owner.run_on();
            if agent.is_some() {
                return Ok(agent);
            }
        }
    }

    /// Whether a host of the chain follows a newer configuration: with no agent here to ask for one, it is another owner's.
    fn is_superseded(&self, view: &View) -> bool {
        let newer = |member| chain::newer_generation(member, view, &self.start.host);
        view.chain.iter().any(|member| newer(member).is_some())
    }

    /// Tells an agent who this is.
    fn greet(&self, agent: &UnixStream, protector: &Protector) -> Result<(), IpcError> {
        let owns = Owns {
            vm: self.start.vm,
            host: self.start.host.clone(),
            registered: self.start.registered,
            generation: protector.generation(),
            protected: self.reporter.protected(),
            ended: self.reporter.ended(),
            frozen: protector.frozen(),
        };
        let first = FromChild::Owns(Box::new(owns));
        self.reporter.connect(agent.try_clone()?, &first)
    }
}
