//! What differs between two configurations of a VM, and when it takes effect.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use toml::Value;

use super::VmConfig;

/// One setting that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Its name with the tables that it is in: `protect.epoch_ms`, `net[0].mac`.
    pub key: String,
    /// What it was, as in the file; none: not set.
    pub from: Option<String>,
    /// What it is to be; none: not set.
    pub to: Option<String>,
    /// When it takes effect.
    pub takes: Takes,
}

/// When a changed setting takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Takes {
    /// At once, also while the VM runs.
    Now,
    /// When the VM is started the next time.
    NextStart,
    /// It can be changed only while the VM is off: its replicas are laid out by it, or the machine that the guest sees is.
    WhileOff,
    /// Not at all: it belongs to the VM for life.
    Never,
}

impl Takes {
    fn of(key: &str) -> Self {
        let first = key.split(['.', '[']).next().unwrap_or(key);
        match (first, key) {
            ("name" | "disk", _) => Self::Never,
            (
                _,
                "protect.backups"
                | "protect.alone"
                | "protect.return_wait_s"
                | "protect.epoch_ms"
                | "protect.min_epoch_ms"
                | "protect.idle_epoch_ms"
                | "protect.pause_percent"
                | "protect.pause_budget_us"
                | "protect.verify_epochs",
            ) => Self::Now,
            (
                "vcpus" | "memory_mib" | "low_memory_end_mib" | "kernel" | "kernel_blake3"
                | "initrd" | "initrd_blake3" | "cmdline" | "net" | "rng",
                _,
            )
            | (_, "protect.durability" | "protect.retain" | "protect.retain_mib") => Self::WhileOff,
            _ => Self::NextStart,
        }
    }
}

/// What is to be changed to come from `old` to `new`, in the order of the keys. A default that is written out is no change.
#[must_use]
pub fn changes(old: &VmConfig, new: &VmConfig) -> Vec<Change> {
    let (old, new) = (leaves(old), leaves(new));
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let differ = keys
        .into_iter()
        .filter(|key| old.get(*key) != new.get(*key));
    differ
        .map(|key| Change {
            key: key.clone(),
            from: old.get(key).cloned(),
            to: new.get(key).cloned(),
            takes: Takes::of(key),
        })
        .collect()
}

/// `new`, but for what can be changed only while the VM is off: that is as in `old`.
#[must_use]
pub fn keeping_layout(old: &VmConfig, new: &VmConfig) -> VmConfig {
    let mut merged = new.clone();
    merged.vcpus = old.vcpus;
    merged.memory_mib = old.memory_mib;
    merged.low_memory_end_mib = old.low_memory_end_mib;
    merged.kernel.clone_from(&old.kernel);
    merged.kernel_blake3 = old.kernel_blake3;
    merged.initrd.clone_from(&old.initrd);
    merged.initrd_blake3 = old.initrd_blake3;
    merged.cmdline.clone_from(&old.cmdline);
    merged.net.clone_from(&old.net);
    merged.rng = old.rng;
    merged.protect.durability = old.protect.durability;
    merged.protect.retain = old.protect.retain;
    merged.protect.retain_mib = old.protect.retain_mib;
    merged
}

/// Every setting by its name, as it is written in a file.
fn leaves(config: &VmConfig) -> BTreeMap<String, String> {
    let mut leaves = BTreeMap::new();
    if let Ok(Value::Table(table)) = Value::try_from(config) {
        for (key, value) in table {
            flatten(key, value, &mut leaves);
        }
    }
    leaves
}

fn flatten(key: String, value: Value, leaves: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                flatten(format!("{key}.{name}"), value, leaves);
            }
        }
        Value::Array(tables) if matches!(key.as_str(), "net" | "disk") => {
            for (i, value) in tables.into_iter().enumerate() {
                flatten(format!("{key}[{i}]"), value, leaves);
            }
        }
        value => drop(leaves.insert(key, value.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(text: &str) -> VmConfig {
        let text = format!("name = \"vm\"\nkernel = \"builtin:probe\"\n{text}");
        VmConfig::from_text(Path::new("vm.toml"), &text).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Everything that can be set, set.
    const FULL: &str = "vcpus = 2
memory_mib = 64
low_memory_end_mib = 32
initrd = \"/i\"
cmdline = \"quiet\"
rng = false
console = \"/c\"
on_reboot = \"stop\"
on_crash = \"restart\"
on_poweroff = \"restart\"
on_disk_error = \"pause\"
disk_timeout_s = 3
[[net]]
mac = \"52:54:00:00:00:01\"
network = \"lan\"
ip = \"10.0.0.1\"
[[disk]]
path = \"/d\"
[protect]
backups = [\"b\"]
epoch_ms = 50
min_epoch_ms = 3
max_in_flight = 5
output_limit_kib = 2048
disk_limit_kib = 4096
durability = \"disk\"
alone = \"freeze\"
return_wait_s = 5
retain = 7
retain_mib = 9
lz4 = false
";

    #[test]
    fn l10_a_default_that_is_written_out_is_no_change() {
        let (short, long) = (
            config("memory_mib = 64"),
            config("memory_mib = 64\nvcpus = 1\n[protect]\nepoch_ms = 25"),
        );
        assert_eq!(changes(&short, &long), []);
    }

    #[test]
    fn l10_each_change_is_named_with_what_it_was_and_when_it_takes_effect() {
        let old = config("memory_mib = 64");
        let new = config(
            "memory_mib = 128\non_crash = \"restart\"\n[[disk]]\npath = \"/d\"\n[protect]\nbackups = [\"b\", \"c\"]",
        );
        let said = |key: &str, from: Option<&str>, to: &str, takes| Change {
            key: key.into(),
            from: from.map(str::to_string),
            to: Some(to.to_string()),
            takes,
        };
        assert_eq!(
            changes(&old, &new),
            [
                said("disk[0].path", None, "\"/d\"", Takes::Never),
                said("memory_mib", Some("64"), "128", Takes::WhileOff),
                said(
                    "on_crash",
                    Some("\"stop\""),
                    "\"restart\"",
                    Takes::NextStart
                ),
                said("protect.backups", Some("[]"), "[\"b\", \"c\"]", Takes::Now),
            ]
        );
    }

    /// A setting that only an off VM may change, and that slipped through, would give a standby another machine than its
    /// owner's.
    #[test]
    fn l10_what_can_be_changed_only_while_it_is_off_is_kept_while_it_runs() {
        let (old, new) = (config("memory_mib = 128"), config(FULL));
        let all = changes(&old, &new);
        let left: Vec<Change> = changes(&old, &keeping_layout(&old, &new));
        for change in &all {
            let kept = !left.contains(change);
            assert_eq!(kept, change.takes == Takes::WhileOff, "{change:?}");
        }
        assert!(all.iter().any(|change| change.takes == Takes::WhileOff));
        assert_eq!(changes(&new, &new), []);
    }
}
