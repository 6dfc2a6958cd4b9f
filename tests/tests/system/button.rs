//! A guest that heeds its power button is shut down and rebooted by it; whoever presses that of one that does not is told so
//! (FIELD L5).

use std::path::Path;

use agent::control::{Request, VmStatus};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_survived, more_answers};

// Enables the button's event, says `r`, waits for the button, takes note of it, says `o`, and switches itself off.
std::arch::global_asm!(
    ".pushsection .rodata",
    ".global heeds_start",
    "heeds_start:",
    "movl $0x602, %edx",
    "movl $0x100, %eax",
    "outw %ax, %dx",
    "movl $0x3f8, %edx",
    "movl $0x72, %eax",
    "outb %al, %dx",
    "2: movl $0x600, %edx",
    "xorl %eax, %eax",
    "inw %dx, %ax",
    "testl $0x100, %eax",
    "jz 2b",
    "outw %ax, %dx",
    "movl $0x3f8, %edx",
    "movl $0x6f, %eax",
    "outb %al, %dx",
    "movl $0x604, %edx",
    "movl $0x3400, %eax",
    "outw %ax, %dx",
    "3: jmp 3b",
    ".global heeds_end",
    "heeds_end:",
    ".popsection",
    options(att_syntax)
);

/// That guest as a kernel: an ELF file of one segment, entered where it is loaded.
fn kernel() -> Vec<u8> {
    unsafe extern "C" {
        static heeds_start: u8;
        static heeds_end: u8;
    }
    // SAFETY: both are labels of the block above: one piece of initialised, read-only, static data.
    let code = unsafe {
        let start = &raw const heeds_start;
        std::slice::from_raw_parts(start, (&raw const heeds_end).offset_from_unsigned(start))
    };
    const AT: u64 = 1 << 20;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([AT, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    let halves = [64u16, 56, 1, 0, 0, 0];
    file.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
    file.extend([1u32, 7].iter().flat_map(|word| word.to_le_bytes()));
    let size = code.len() as u64;
    let words = [120, AT, AT, size, size, 4096];
    file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    file.extend(code);
    file
}

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
    std::fs::write(&image, kernel()).expect("the kernel is written");
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
    assert!(after.protected, "{}", after.state);
    assert_eq!(before.pid, after.pid);
    let shut_down = Request::ShutDown {
        vm: VM.into(),
        timeout_s: 60,
    };
    order(&cluster, "a", &shut_down).expect("it is shut down");
    assert_eq!(said(&console), "rororo");
    assert_eq!(status(&cluster, "a").role, "off");
    // And no backup has taken its end for a loss.
    order(&cluster, "a", &Request::StartAgain { vm: VM.into() }).expect("it starts again");
    until_said(&console, "rororor");
    assert_eq!(status(&cluster, "a").role, "owner");
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
