//! `understudy vmm --config vm.toml`: a VM without protection, as a plain VMM.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sys::termios::{self, SetArg, Termios};
use vmm::VmEvent;

use super::build::{BuildError, Machine, open_disks};
use super::proto::TapSpec;
use crate::config::{ConfigError, VmConfig};

/// Why a plain VM did not run.
#[derive(Debug, thiserror::Error)]
pub enum PlainError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The VM could not be built or booted.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The VM.
    #[error("virtual machine: {0}")]
    Vm(String),
    /// Networks are resolved by an agent's configuration.
    #[error(
        "net[{0}]: `network` needs an agent's configuration; for a plain VM give `tap = \"name\"`"
    )]
    Network(usize),
    /// Standard input.
    #[error("standard input: {0}")]
    Input(#[from] io::Error),
    /// The guest crashed.
    #[error("vCPU {vcpu} has crashed: {reason}")]
    Crashed {
        /// Which.
        vcpu: u8,
        /// Why.
        reason: String,
    },
}

/// Restores the terminal when the VM ends.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> Self {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Self(None);
        }
        let Ok(old) = termios::tcgetattr(stdin.as_fd()) else {
            return Self(None);
        };
        let mut raw = old.clone();
        termios::cfmakeraw(&mut raw);
        // Ctrl-C still ends the VM, and output still gets its carriage returns.
        raw.local_flags.insert(termios::LocalFlags::ISIG);
        raw.output_flags.insert(termios::OutputFlags::OPOST);
        if termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).is_err() {
            return Self(None);
        }
        Self(Some(old))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(old) = &self.0 {
            let _ = termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, old);
        }
    }
}

/// Runs the VM that `path` describes until the guest ends.
///
/// # Errors
/// [`PlainError`] naming the part that failed.
pub fn run_plain(path: &Path) -> Result<(), PlainError> {
    let (config, _) = VmConfig::load(path)?;
    let taps = config
        .net
        .iter()
        .enumerate()
        .map(|(i, n)| {
            n.tap
                .clone()
                .map(|name| TapSpec { name, bridge: None })
                .ok_or(PlainError::Network(i))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mirrors = open_disks(&config)?;
    let sizes: Vec<u64> = mirrors.iter().map(|m| m.size()).collect();
    let serial_in: Option<OwnedFd> = if config.console.is_none() {
        Some(io::stdin().as_fd().try_clone_to_owned()?)
    } else {
        None
    };
    let mut machine = Machine::build(&config, &taps, None, &sizes, serial_in, Default::default())?;
    machine.attach(mirrors)?;
    machine.boot(&config)?;
    machine.go_live(true)?;
    let _terminal = if config.console.is_none() {
        RawTerminal::enter()
    } else {
        RawTerminal(None)
    };
    machine.vm.resume();
    let said = |event: &VmEvent| tracing::info!("{event}: it boots again");
    let ended = Machine::wait_end(&machine.vm, said).map_err(BuildError::from)?;
    match ended {
        Some(VmEvent::Shutdown | VmEvent::Reset) | None => Ok(()),
        Some(VmEvent::Crashed { vcpu, reason }) => Err(PlainError::Crashed { vcpu, reason }),
    }
}
