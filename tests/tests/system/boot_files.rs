//! What a VM boots from travels with it: the paths in its file are those of the host that it was configured on, and of no
//! other (FIELD L6).

use std::path::{Path, PathBuf};

use agent::control::{EventKind, Health, Request, Role};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_survived, more_answers};

/// A VM whose kernel is a file, which is gone once the VM is configured: as on every other host from the start.
fn started(cluster: &Cluster) -> PathBuf {
    let kernel = cluster.path("vmlinux");
    std::fs::write(&kernel, guest::IMAGE).expect("the kernel is written");
    let toml = VmFile::default().write(cluster.dir());
    let toml = toml.replace("builtin:probe", &kernel.display().to_string());
    cluster.start_vm_on("a", toml);
    std::fs::remove_file(&kernel).expect("it is removed");
    kernel
}

fn kept(cluster: &Cluster, host: &str) -> Vec<PathBuf> {
    let dir = std::fs::read_dir(cluster.path(&format!("{host}/boot")));
    let dir = dir.expect("a directory for boot files");
    dir.map(|entry| entry.expect("an entry").path()).collect()
}

fn is_the_kernel(path: &Path) -> bool {
    std::fs::read(path).is_ok_and(|content| content == guest::IMAGE)
}

#[test]
fn l6_a_guest_reboots_on_a_host_that_never_had_its_kernel() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    started(&cluster);
    cluster.protect_vm_of(VM, "a", &["b"]);
    // It was fetched before the backup promised anything.
    let there = kept(&cluster, "b");
    assert!(there.len() == 1 && is_the_kernel(&there[0]), "{there:?}");
    let client = cluster.client();
    more_answers(&client, 20);
    cluster.strike("a");
    cluster.wait_owner("b");
    more_answers(&client, 20);
    check_survived(&cluster.stop_client(client));
    let reboot = Request::Reboot {
        vm: VM.into(),
        timeout_s: None,
    };
    cluster.control("b").order(&reboot).expect("it reboots");
    let client = cluster.client();
    more_answers(&client, 20);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn l6_after_the_loss_of_the_first_host_another_boots_it_from_its_disks() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    started(&cluster);
    cluster.protect_vm_of(VM, "a", &["b"]);
    let generation = cluster.status("a").unwrap().generation;
    for host in ["a", "b"] {
        cluster.strike(host);
    }
    for host in ["a", "b"] {
        cluster.kill(host);
    }
    // Without the file it is refused before anything is decided, and says what is missing.
    let [kernel] = &kept(&cluster, "b")[..] else {
        panic!("one file")
    };
    let aside = cluster.path("aside");
    std::fs::rename(kernel, &aside).unwrap();
    cluster.start_agent("b", None);
    let recover = Request::Recover { vm: VM.into() };
    let refused = wait("b to have asked around for it", || {
        // It answers, and knows the VM.
        cluster.status("b")?;
        let refused = cluster.control("b").order(&recover).err()?.to_string();
        refused.contains("cannot stand by").then_some(refused)
    });
    assert!(
        refused.contains("vmlinux") && refused.contains("a: "),
        "{refused}"
    );
    assert_eq!(cluster.status("b").unwrap().generation, generation);
    std::fs::rename(&aside, kernel).unwrap();
    wait("b to boot it", || cluster.control("b").order(&recover).ok());
    let client = cluster.client();
    more_answers(&client, 20);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn l6_a_backup_that_cannot_have_the_kernel_declines_and_says_so() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    let path = started(&cluster);
    let [kernel] = &kept(&cluster, "a")[..] else {
        panic!("one file")
    };
    // The owner has lost it since: its guest runs on, and nobody promises what he could not keep.
    let aside = cluster.path("aside");
    std::fs::rename(kernel, &aside).unwrap();
    let protect = Request::Protect {
        vm: VM.into(),
        backups: vec!["b".into()],
    };
    cluster.control("a").order(&protect).expect("it is tried");
    let why = wait("b to decline", || {
        let status = cluster.status("b")?;
        match status.health {
            Health::Declined { why } if status.role == Role::None => Some(why),
            _ => None,
        }
    });
    let named = path.display().to_string();
    assert!(why.contains(&named) && why.contains("Copy it"), "{why}");
    // As it says.
    std::fs::rename(&aside, &path).unwrap();
    cluster.wait_protected("a", &["b"]);
    assert!(is_the_kernel(&kept(&cluster, "b")[0]));
    assert!(
        cluster
            .events("b")
            .iter()
            .all(|e| e.kind != EventKind::Activated)
    );
}

/// Changes a byte that nobody would miss.
fn rot(kernel: &Path) {
    let mut content = std::fs::read(kernel).expect("it is there");
    *content.last_mut().expect("it has content") ^= 1;
    std::fs::write(kernel, content).expect("it is written");
}

#[test]
fn a_kept_kernel_that_has_rotted_is_put_right_and_is_not_booted() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    started(&cluster);
    cluster.protect_vm_of(VM, "a", &["b"]);
    rot(&kept(&cluster, "b")[0]);
    cluster.kill("b");
    cluster.start_agent("b", None);
    // (The owner may not have noticed yet that its backup was away.)
    wait("b to have the kernel again", || {
        let put_right = kept(&cluster, "b").iter().any(|path| is_the_kernel(path));
        put_right.then_some(())
    });
    cluster.wait_protected("a", &["b"]);
    // Where it is needed and cannot be put right any more, nothing else is booted in its place.
    rot(&kept(&cluster, "a")[0]);
    let reboot = Request::Reboot {
        vm: VM.into(),
        timeout_s: None,
    };
    let refused = cluster.control("a").order(&reboot).expect_err("it rotted");
    assert!(refused.to_string().contains("BLAKE3"), "{refused}");
}
