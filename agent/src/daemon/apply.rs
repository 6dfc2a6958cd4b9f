//! `understudy apply`: a VM comes to be configured as its file says.

use std::path::Path;

use chain::master::Command;
use chain::{Life, VmRecord, VmShape};
use checkpoint::VmId;

use super::control::Service;
use super::process::{config_of, taps};
use crate::child::{open_disks, ram_of, shape_of};
use crate::config::{Change, Takes, VmConfig, changes, keeping_layout};
use crate::control::Applied;
use crate::host::Order;

impl Service {
    /// Defines a VM, or changes one that is this host's. Everything that can be checked is checked before anything is done.
    pub(super) fn apply(&self, toml: &str, file: &str, dry_run: bool) -> Result<Applied, String> {
        let config = VmConfig::from_text(Path::new(file), toml).map_err(|e| e.to_string())?;
        match self.known(&config.name)? {
            None => {
                let (config, toml) = self.resolved(config, toml, None)?;
                self.define(&config, &toml, dry_run)
            }
            Some(record) if record.view.owner != self.env.host => {
                Err(self.elsewhere(&record.view.name))
            }
            Some(record) => {
                let old = config_of(&record)?;
                let (config, toml) = self.resolved(config, toml, Some(&old))?;
                self.change(&record, &old, config, &toml, dry_run)
            }
        }
    }

    /// The configuration with the files that it means, and its text.
    pub(super) fn resolved(
        &self,
        mut config: VmConfig,
        toml: &str,
        before: Option<&VmConfig>,
    ) -> Result<(VmConfig, String), String> {
        let written = config.clone();
        let resolved = self.env.boot_files.resolve(&mut config, before);
        resolved.map_err(|e| e.to_string())?;
        let text = match changes(&written, &config).is_empty() {
            true => toml.to_string(),
            false => toml::to_string(&config).map_err(|e| e.to_string())?,
        };
        Ok((config, text))
    }

    /// What enters a new VM of this host at the master, once everything has been checked that can be.
    pub(super) fn registration(
        &self,
        config: &VmConfig,
        toml: &str,
        life: Life,
    ) -> Result<Command, String> {
        let shape = {
            let disks = open_disks(config).map_err(|e| e.to_string())?;
            shape_of(config, toml, &disks).map_err(|e| e.to_string())?
        };
        taps(&self.env, config, VmId::NIL)?;
        Ok(Command::Register {
            vm: VmId::random(),
            life,
            name: config.name.clone(),
            owner: self.env.host.clone(),
            shape,
        })
    }

    /// It runs nowhere until it is started, here: its disks are.
    fn define(&self, config: &VmConfig, toml: &str, dry_run: bool) -> Result<Applied, String> {
        let register = self.registration(config, toml, Life::Off)?;
        let applied = Applied {
            vm: config.name.clone(),
            defined: true,
            runs: false,
            changes: Vec::new(),
        };
        if dry_run {
            return Ok(applied);
        }
        self.known_to_master()?;
        let record = self.env.master.propose(&register);
        // Whoever starts it next finds it here.
        self.table.decided(record.map_err(|e| e.to_string())?);
        Ok(applied)
    }

    fn change(
        &self,
        record: &VmRecord,
        old: &VmConfig,
        config: VmConfig,
        toml: &str,
        dry_run: bool,
    ) -> Result<Applied, String> {
        let name = &record.view.name;
        let applied = Applied {
            vm: name.clone(),
            defined: false,
            runs: record.life == Life::On,
            changes: changes(old, &config),
        };
        if let Some(never) = applied.changes.iter().find(|c| c.takes == Takes::Never) {
            return Err(format!(
                "{name}: {} belongs to the VM for life, nothing was changed. A VM that exists has its disks where it ran last, whatever image its file names; another set of disks is another VM: apply it under another name",
                never.key
            ));
        }
        let left: Vec<&Change> = applied.left().collect();
        if dry_run || applied.changes.len() == left.len() {
            return Ok(applied);
        }
        let (config, text) = match left.is_empty() {
            true => (config, toml.to_string()),
            false => {
                let merged = keeping_layout(old, &config);
                let text = toml::to_string(&merged).map_err(|e| e.to_string())?;
                (merged, text)
            }
        };
        taps(&self.env, &config, record.view.vm)?;
        let shape = VmShape {
            ram: ram_of(&config).map_err(|e| e.to_string())?,
            vcpus: config.vcpus,
            config_toml: text,
            ..record.shape.clone()
        };
        let shape = Box::new(shape);
        self.order(name, Order::Apply { shape })?;
        Ok(applied)
    }
}
