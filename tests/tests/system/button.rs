//! A guest that heeds its power button is shut down and rebooted by it; whoever presses that of one that does not is told so
//! (FIELD L5).

use std::path::Path;

use agent::control::{Request, Role, VmStatus};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_survived, more_answers};

#[path = "../../../vmm/tests/core_support/guests.rs"]
mod guests;

/// What has been said on the console.
fn said(console: &Path) -> String {
    std::fs::read_to_string(console).unwrap_or_default()
}

fn until_said(console: &Path, all: &str) {
    wait(&format!("the guest to have said {all:?}"), || {
        (said(console) == all).then_some(())
    });
}

fn order(cluster: &Cluster, host: &str, request: &Request) -> Result<(), String> {
    let done = cluster.control(host).order(request);
    done.map_err(|e| e.to_string())
}

fn status(cluster: &Cluster, host: &str) -> VmStatus {
    cluster.status(host).expect("it is known")
}

#[test]
fn l5_a_guest_is_shut_down_and_rebooted_by_its_power_button() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let (image, console) = (cluster.path("kernel"), cluster.path("said"));
    std::fs::write(&image, guests::elf(guests::heeds_its_power_button()))
        .expect("the kernel is written");
    let toml = format!(
        "name = \"{VM}\"\nmemory_mib = 64\nkernel = {image:?}\nconsole = {console:?}\nrng = false\n"
    );
    cluster.start_vm_on("a", toml);
    cluster.protect_vm_of(VM, "a", &["b"]);
    until_said(&console, "r");
    let before = status(&cluster, "a");
    let timeout_s = Some(60);
    let reboot = Request::Reboot {
        vm: VM.into(),
        timeout_s,
    };
    for n in 1..=2 {
        order(&cluster, "a", &reboot).expect("it reboots");
        until_said(&console, &("ro".repeat(n) + "r"));
    }
    let after = status(&cluster, "a");
    assert!(after.protected, "{}", after.state());
    assert_eq!(before.pid, after.pid);
    let shut_down = Request::ShutDown {
        vm: VM.into(),
        timeout_s: 60,
    };
    order(&cluster, "a", &shut_down).expect("it is shut down");
    assert_eq!(said(&console), "rororo");
    assert_eq!(status(&cluster, "a").role, Role::Off);
    // And no backup has taken its end for a loss.
    order(&cluster, "a", &Request::StartAgain { vm: VM.into() }).expect("it starts again");
    until_said(&console, "rororor");
    assert_eq!(status(&cluster, "a").role, Role::Owner);
}

#[test]
fn l5_a_guest_that_does_not_heed_its_power_button_runs_on_and_that_is_said() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    cluster.protect(&VmFile::default(), &["b"]);
    let client = cluster.client();
    more_answers(&client, 20);
    let request = Request::ShutDown {
        vm: VM.into(),
        timeout_s: 1,
    };
    let refused = order(&cluster, "a", &request).expect_err("the guest knows of no button");
    assert!(
        refused.contains("1 s") && refused.contains("--now"),
        "{refused}"
    );
    more_answers(&client, 20);
    assert!(status(&cluster, "a").protected);
    check_survived(&cluster.stop_client(client));
}
