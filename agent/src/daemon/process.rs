//! What a VM's process is started with.

use std::path::Path;

use chain::{Retention, StoreOptions, VmRecord, VmShape};
use checkpoint::{ClusterId, VmId};

use super::env::{Env, lock};
use crate::child::proto::{Registered, Role, Start, TapSpec};
use crate::config::{Durability, VmConfig};
use crate::fault::{self, Fault};

/// The configuration in a VM's record.
pub(super) fn config_of(record: &VmRecord) -> Result<VmConfig, String> {
    let name = Path::new(&record.view.name);
    VmConfig::from_text(name, &record.shape.config_toml).map_err(|e| e.to_string())
}

/// The taps of a VM's cards on this host.
pub(super) fn taps(env: &Env, config: &VmConfig, vm: VmId) -> Result<Vec<TapSpec>, String> {
    config
        .net
        .iter()
        .enumerate()
        .map(|(i, card)| {
            if let Some(name) = &card.tap {
                return Ok(TapSpec { name: name.clone(), bridge: None });
            }
            let wanted = card.network.clone().unwrap_or_default();
            let network = env.config.networks.get(&wanted).ok_or_else(|| {
                format!("{}: net[{i}]: network {wanted:?} is not in host {}'s configuration: add [networks.{wanted}]", config.name, env.host)
            })?;
            Ok(TapSpec { name: format!("{}{:08x}n{i}", network.tap_prefix, vm.short()), bridge: network.bridge.clone() })
        })
        .collect()
}

/// The first message to a VM's process.
pub(super) fn start_message(
    env: &Env,
    config: &VmConfig,
    record: &VmRecord,
    role: Role,
) -> Result<Start, String> {
    let vm = record.view.vm;
    let here = env.boot_files.localised(config);
    Ok(Start {
        config_toml: toml::to_string(&here).map_err(|e| e.to_string())?,
        config_name: format!("{}.toml", config.name),
        taps: taps(env, config, vm)?,
        role,
        heartbeat_ms: env.config.detection.heartbeat_ms,
        silence_ms: env.config.detection.silence().as_millis() as u64,
        host: env.host.clone(),
        vm,
        registered: Registered {
            // Before this host belongs to a cluster it runs nothing.
            cluster: lock(&env.identity).cluster().unwrap_or(ClusterId::NIL),
            revision: record.revision,
        },
        door: Some(env.run_dir().join(format!("{:08x}.sock", vm.short()))),
        agent_return_ms: env.config.agent_return_s * 1000,
    })
}

/// A VM goes on with the processor that it booted with, wherever that is.
pub(super) fn can_run(shape: &VmShape) -> Result<(), String> {
    let mut here = vmm::host_cpu().map_err(|e| e.to_string())?;
    if fault::is(Fault::Processor) {
        here.words.retain(|word| word.function != 7);
    }
    match shape.cpu.lacking(&here) {
        None => Ok(()),
        Some(what) => Err(format!(
            "{what}; the VM may use it, so this host cannot resume it. Name other backups, or start the VM on the host with the \
             lesser processor: hosts with a better one of the same make can back it up"
        )),
    }
}

/// How replicas of that VM keep it.
pub(super) fn store_options(config: &VmConfig) -> StoreOptions {
    let durability = match config.protect.durability {
        Durability::Memory => diskbuf::Durability::Memory,
        Durability::Disk => diskbuf::Durability::Disk,
    };
    let retention = Retention {
        checkpoints: usize::try_from(config.protect.retain).unwrap_or(usize::MAX),
        bytes: config.protect.retain_mib << 20,
    };
    StoreOptions {
        durability,
        retention,
    }
}
