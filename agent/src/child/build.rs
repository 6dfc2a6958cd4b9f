//! From configuration to a machine: backends, [`vmm::VmSpec`], boot.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use checkpoint::CpuFeatures;
use diskbuf::Mirror;
use netbuf::{Cable, Gate, Watcher};
use vmm::backend::{BlockBackend, NetBackend, SendOutcome};
use vmm::devices::NetSpec;
use vmm::{
    BootFile, BootSpec, ConsoleOut, KernelSource, RamFiles, RamLayout, Restart, Vm, VmError,
    VmEvent, VmSpec,
};

use super::disk::{self, Care, LateDisk};
use super::network;
use super::proto::TapSpec;
use crate::busy::once_free;
use crate::config::{OnEnd, VmConfig, parse_mac};
use crate::epoch::owner::Owner;
use crate::epoch::queue::ShipQueue;
use crate::fault::{self, Fault};

/// A guest that has ended has nothing more to say after this long.
const LAST_WORD: Duration = Duration::from_millis(100);

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A tap.
    #[error(transparent)]
    Tap(#[from] netbuf::TapError),
    /// Bridge or link set-up.
    #[error(transparent)]
    Net(#[from] netbuf::netconf::NetconfError),
    /// A disk image.
    #[error("disk {index}: {source}")]
    Disk {
        /// Which.
        index: usize,
        /// Why.
        source: diskbuf::MirrorError,
    },
    /// The virtual machine.
    #[error(transparent)]
    Vm(#[from] vmm::VmError),
    /// The kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] vmm::BootError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] vmm::MemoryError),
    /// The console's file.
    #[error("console {path}: {source}")]
    Console {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The agent gave something that does not fit the configuration.
    #[error("{0}")]
    Mismatch(String),
}

/// A network card's far end: the gate; and the epoch loop is told when something is held.
struct GateBackend {
    gate: Arc<Gate>,
    owner: Arc<OnceLock<Arc<Owner>>>,
}

impl NetBackend for GateBackend {
    fn send(&mut self, frame: &[u8]) -> io::Result<SendOutcome> {
        let outcome = Gate::send(&self.gate, frame)?;
        if let Some(owner) = self.owner.get() {
            owner.output_held();
        }
        Ok(outcome)
    }

    fn recv(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        Gate::recv(&self.gate, buf)
    }

    fn too_long(&self) {
        Gate::too_long(&self.gate);
    }

    fn rx_fd(&self) -> RawFd {
        Gate::rx_fd(&self.gate)
    }

    fn room_fd(&self) -> Option<RawFd> {
        Some(Gate::room_fd(&self.gate))
    }
}

/// A VM and everything outside it that the epoch loop needs.
pub struct Machine {
    /// The VM, paused.
    pub vm: Arc<Vm>,
    /// One gate per network card.
    pub gates: Vec<Arc<Gate>>,
    /// To be set once the epoch loop exists.
    pub owner: Arc<OnceLock<Arc<Owner>>>,
    /// The queue to the shipping thread.
    pub queue: Arc<ShipQueue>,
    disks: Vec<Arc<LateDisk>>,
    care: Arc<Care>,
    mirrors: Vec<Arc<Mirror>>,
    taps: Vec<(TapSpec, [u8; 6], Option<std::net::Ipv4Addr>)>,
    /// Its end writes the guest's last words out.
    _console: ConsoleOut,
    cables: Vec<Cable>,
}

impl Machine {
    /// Builds the VM of `config` around `ram`, with disks of `disk_sizes` still to be attached.
    ///
    /// # Errors
    /// [`BuildError`] naming the part that failed.
    pub fn build(
        config: &VmConfig,
        taps: &[TapSpec],
        ram: Option<Vec<OwnedFd>>,
        disk_sizes: &[u64],
        serial_in: Option<OwnedFd>,
        cpu: CpuFeatures,
    ) -> Result<Self, BuildError> {
        if taps.len() != config.net.len() || disk_sizes.len() != config.disk.len() {
            return Err(BuildError::Mismatch(format!(
                "{} taps and {} disks for a configuration with {} network cards and {} disks",
                taps.len(),
                disk_sizes.len(),
                config.net.len(),
                config.disk.len()
            )));
        }
        let layout = layout_of(config)?;
        let ram = match ram {
            Some(fds) => RamFiles::from_fds(fds)?,
            None => RamFiles::create(&layout)?,
        };
        let owner: Arc<OnceLock<Arc<Owner>>> = Arc::default();
        let queue = Arc::new(ShipQueue::new(config.protect.disk_limit_kib * 1024));
        let (mut gates, mut net, mut tap_list) = (Vec::new(), Vec::new(), Vec::new());
        let mut cables = Vec::new();
        for (spec, card) in taps.iter().zip(&config.net) {
            let mac = parse_mac(&card.mac).map_err(BuildError::Mismatch)?;
            let limit = (config.protect.output_limit_kib * 1024) as usize;
            let (gate, cable) = network::connect(spec, limit)?;
            cables.extend(cable);
            if fault::is(Fault::OutputCommit) {
                gate.break_output_commit(true);
            }
            gates.push(gate.clone());
            net.push(NetSpec {
                mac,
                backend: Box::new(GateBackend {
                    gate,
                    owner: owner.clone(),
                }),
            });
            tap_list.push((spec.clone(), mac, card.ip));
        }
        let patience = match config.disk_timeout_s {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        };
        let care = Care::new(config.on_disk_error, patience, owner.clone());
        let disks: Vec<Arc<LateDisk>> = (0u16..)
            .zip(disk_sizes)
            .map(|(index, size)| LateDisk::new(index, *size, care.clone()))
            .collect();
        let console = console(config)?;
        let spec = VmSpec {
            vcpus: config.vcpus,
            cpu,
            ram: layout,
            net,
            disks: disks
                .iter()
                .map(|d| d.clone() as Arc<dyn BlockBackend>)
                .collect(),
            rng: config.rng,
            serial_out: Box::new(console.writer()),
            serial_in,
        };
        let vm = Arc::new(Vm::new(spec, ram)?);
        vm.restarts(Some(restart(config)));
        Ok(Self {
            vm,
            gates,
            owner,
            queue,
            disks,
            care,
            mirrors: Vec::new(),
            taps: tap_list,
            _console: console,
            cables,
        })
    }

    /// Attaches the disks' images, in order.
    ///
    /// # Errors
    /// [`BuildError::Mismatch`] if one has another size than the VM was built with.
    pub fn attach(&mut self, mirrors: Vec<Arc<Mirror>>) -> Result<(), BuildError> {
        for (index, (late, mirror)) in self.disks.iter().zip(&mirrors).enumerate() {
            if mirror.size() != late.size() {
                return Err(BuildError::Mismatch(format!(
                    "disk {index}: the mirror has {} bytes, the VM's disk {}",
                    mirror.size(),
                    late.size()
                )));
            }
            if !late.attach(mirror.clone(), self.queue.clone()) {
                return Err(BuildError::Mismatch(format!(
                    "disk {index} is attached already"
                )));
            }
        }
        self.mirrors = mirrors;
        Ok(())
    }

    /// The attached images.
    #[must_use]
    pub fn mirrors(&self) -> Vec<Arc<Mirror>> {
        self.mirrors.clone()
    }

    /// The guest is here now: what it sends goes out, what comes is for it, and every switch in the neighbourhood is told
    /// where its MAC addresses are.
    ///
    /// # Errors
    /// [`BuildError::Net`] if a link cannot be set up.
    pub fn go_live(&self, announce: bool) -> Result<(), BuildError> {
        let cards = self.taps.iter().zip(&self.gates);
        let cards = cards.map(|((spec, mac, ip), gate)| (spec, *mac, *ip, gate));
        network::go_live(cards, announce)
    }

    /// Watches that the disks answer, until this process ends; `say` hears of their troubles.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn watch_disks(&self, say: disk::Say) -> io::Result<()> {
        self.care.tell(say);
        disk::watch(self.care.clone(), self.disks.clone())
    }

    /// What watches them.
    pub fn disk_care(&self) -> Arc<Care> {
        self.care.clone()
    }

    /// Watches that the taps stay on their bridges, until what is returned is dropped. What an administrator should know of
    /// them goes to `say`, what is known already at once.
    pub fn watch_network(&self, say: impl Fn(String) + Send + 'static) -> Option<Watcher> {
        network::watch(self.cables.clone(), say)
    }

    /// Waits until the guest ends; `None` if the machine is taken down first. Whatever restarts it does so here, and
    /// `restarted` hears of it.
    ///
    /// # Errors
    /// [`VmError::Stuck`] if it cannot be stopped to be reset.
    pub fn wait_end(vm: &Vm, restarted: impl Fn(&VmEvent)) -> Result<Option<VmEvent>, VmError> {
        loop {
            let event = match vm.events().recv_timeout(Duration::from_secs(3600)) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            };
            if vm.has_ended() {
                // The end itself is what was said last.
                let last = vm.events().recv_timeout(LAST_WORD);
                return Ok(Some(last.unwrap_or(event)));
            }
            // A checkpoint may have done so already.
            vm.reset()?;
            // What it was to boot may not be there any more: that is its end, and what it says next.
            if !vm.has_ended() {
                restarted(&event);
            }
        }
    }

    /// Asks the guest to switch itself off. Then it boots again, or stays off, whatever its configuration says of a guest that
    /// does so by itself.
    pub fn press_power_button(&self, config: &VmConfig, reboot: bool) {
        self.vm.restarts(Some(Restart {
            on_power_off: reboot,
            ..restart(config)
        }));
        self.vm.press_power_button();
    }

    /// Loads kernel and command line.
    ///
    /// # Errors
    /// [`BuildError::Boot`] naming the file and what is wrong with it.
    pub fn boot(&self, config: &VmConfig) -> Result<(), BuildError> {
        Ok(self.vm.boot(&boot_spec(config))?)
    }
}

fn boot_spec(config: &VmConfig) -> BootSpec {
    let file = |path: &Path, digest: Option<chain::FileDigest>| BootFile {
        path: path.into(),
        blake3: digest.map(chain::FileDigest::bytes),
    };
    let kernel = if config.is_probe() {
        KernelSource::Bytes(guest::IMAGE.to_vec())
    } else {
        KernelSource::File(file(&config.kernel, config.kernel_blake3))
    };
    let initrd = config.initrd.as_deref();
    BootSpec {
        kernel,
        initrd: initrd.map(|path| file(path, config.initrd_blake3)),
        cmdline: config.cmdline.clone(),
    }
}

/// What follows when a guest does something to itself, as configured.
///
/// The files are read when the VM is reset, and must have the digests that the configuration names, if it names any.
#[must_use]
pub fn restart(config: &VmConfig) -> Restart {
    Restart {
        spec: boot_spec(config),
        on_reset: config.on_reboot == OnEnd::Restart,
        on_crash: config.on_crash == OnEnd::Restart,
        on_power_off: config.on_poweroff == OnEnd::Restart,
    }
}

/// Opens the images that the configuration names.
///
/// # Errors
/// [`BuildError::Disk`] naming the file and the remedy.
pub fn open_disks(config: &VmConfig) -> Result<Vec<Arc<Mirror>>, BuildError> {
    open_images(config.disk.iter().map(|disk| disk.path.as_path()))
}

/// Opens disk images, in order.
///
/// # Errors
/// [`BuildError::Disk`] naming the file and the remedy.
pub fn open_images<'a>(
    paths: impl Iterator<Item = &'a Path>,
) -> Result<Vec<Arc<Mirror>>, BuildError> {
    paths
        .enumerate()
        .map(|(index, path)| {
            once_free(
                |e| matches!(e, diskbuf::MirrorError::InUse(_)),
                || Mirror::open(path),
            )
            .map(Arc::new)
            .map_err(|source| BuildError::Disk { index, source })
        })
        .collect()
}

fn layout_of(config: &VmConfig) -> Result<RamLayout, BuildError> {
    Ok(RamLayout::new(
        config.memory_mib << 20,
        config.low_memory_end_mib.map(|mib| mib << 20),
    )?)
}

/// The guest's RAM.
///
/// # Errors
/// [`BuildError::Memory`] if the memory layout is impossible.
pub fn ram_of(config: &VmConfig) -> Result<Vec<checkpoint::RamRange>, BuildError> {
    Ok(layout_of(config)?.ranges().to_vec())
}

/// What a replica needs to hold this VM.
///
/// # Errors
/// [`BuildError::Memory`] if the memory layout is impossible, [`BuildError::Vm`] if there is no usable KVM.
pub fn shape_of(
    config: &VmConfig,
    toml: &str,
    disks: &[Arc<Mirror>],
) -> Result<chain::VmShape, BuildError> {
    Ok(chain::VmShape {
        ram: ram_of(config)?,
        vcpus: config.vcpus,
        cpu: vmm::host_cpu()?,
        disks: disks.iter().map(|d| d.size()).collect(),
        config_toml: toml.to_string(),
    })
}

fn console(config: &VmConfig) -> Result<ConsoleOut, BuildError> {
    let (path, out) = match &config.console {
        None => ("standard output".to_owned(), ConsoleOut::stdout()),
        Some(path) => (path.display().to_string(), ConsoleOut::file(path)),
    };
    out.map_err(|source| BuildError::Console { path, source })
}
