//! The commands that tests of the master's engines ask for. The including module brings the types into scope.

use checkpoint::{Epoch, Generation, HostId, VmId};

use super::{Command, Life, Mark, Member, VmShape};

pub fn host(name: &str) -> HostId {
    HostId::new(name).unwrap()
}

/// The same for the same name.
pub fn vm_of(name: &str) -> VmId {
    VmId(name.bytes().fold(1, |n, b| n * 31 + u128::from(b)))
}

pub fn register(name: &str, owner: &str) -> Command {
    Command::Register {
        vm: vm_of(name),
        name: name.into(),
        owner: host(owner),
        life: Life::On,
        shape: VmShape {
            ram: vec![],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: "x".repeat(40),
        },
    }
}

pub fn reconfigure(vm: VmId, expect: Generation, by: &str, chain: &[&str]) -> Command {
    let member = |name: &&str| Member::new(host(name), "127.0.0.1:1".parse().unwrap());
    Command::Reconfigure {
        vm,
        expect,
        by: host(by),
        chain: chain.iter().map(member).collect(),
        joining: None,
        anew: true,
    }
}

pub fn take_over(vm: VmId, expect: Generation, by: &str) -> Command {
    Command::TakeOver {
        vm,
        expect,
        by: host(by),
        at: Mark {
            generation: expect,
            epoch: Epoch(7),
            digest: 0,
            held: true,
        },
    }
}
