//! unshare_userns_netns as root and as a user without any privilege. Each case runs in a child process; the test has no
//! harness, since a process with threads cannot enter a user namespace. Needs root (to become somebody else).

use std::fs;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};

use netbuf::netconf::{self, NsError, unshare_userns_netns};
use netbuf::{NET_HEADER, Port, Tap, TapError};

const NOBODY: libc::uid_t = 65534;

type Case = (&'static str, fn() -> Result<(), String>);

const CASES: &[Case] = &[
    ("root needs no user namespace", as_root),
    ("nobody gets a namespace with taps and a bridge", as_nobody),
    ("a closed /dev/net/tun is named", tun_closed),
    ("a missing /dev/net/tun is named", tun_missing),
    ("a limit that is used up is named", limit),
];

fn main() {
    // Listing is what some test runners ask for first.
    if std::env::args().any(|a| a == "--list") {
        for (name, _) in CASES {
            println!("{name}: test");
        }
        return;
    }
    let mut failed = 0;
    for (name, case) in CASES {
        let ok = in_child(*case);
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        failed += u32::from(!ok);
    }
    if failed > 0 {
        std::process::exit(1);
    }
}

fn in_child(case: fn() -> Result<(), String>) -> bool {
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => {
            eprintln!("fork: {}", io::Error::last_os_error());
            false
        }
        0 => {
            let code = match case() {
                Ok(()) => 0,
                Err(e) => {
                    eprintln!("  {e}");
                    1
                }
            };
            std::process::exit(code)
        }
        child => {
            let mut status = 0;
            // SAFETY: `status` is a writable int; `child` is our own.
            let got = unsafe { libc::waitpid(child, &raw mut status, 0) };
            got == child && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

fn check(ok: bool, what: &str) -> Result<(), String> {
    if ok { Ok(()) } else { Err(what.to_owned()) }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn call(rc: libc::c_int, what: &str) -> Result<(), String> {
    if rc == 0 {
        return Ok(());
    }
    Err(format!(
        "{what}: {} (run as root)",
        io::Error::last_os_error()
    ))
}

fn become_nobody() -> Result<(), String> {
    // SAFETY: none of these keeps a pointer; the empty group list has length 0.
    unsafe {
        call(libc::setgroups(0, std::ptr::null()), "setgroups")?;
        call(libc::setresgid(NOBODY, NOBODY, NOBODY), "setresgid")?;
        call(libc::setresuid(NOBODY, NOBODY, NOBODY), "setresuid")?;
        // Changing the user makes /proc/self root's; a program started by the user would not have that.
        call(libc::prctl(libc::PR_SET_DUMPABLE, 1), "prctl")
    }
}

/// In a mount namespace of this process's own: /dev/net holds only a tun node of this mode, or none.
fn own_tun_node(mode: Option<libc::mode_t>) -> Result<(), String> {
    let tmpfs = c"tmpfs".as_ptr();
    // SAFETY: all strings are NUL-terminated literals, and null is allowed where it is given.
    unsafe {
        call(libc::unshare(libc::CLONE_NEWNS), "unshare")?;
        let (root, net) = (c"/".as_ptr(), c"/dev/net".as_ptr());
        let private = libc::MS_REC | libc::MS_PRIVATE;
        let none = std::ptr::null();
        call(
            libc::mount(none, root, none, private, std::ptr::null()),
            "mount --make-rprivate",
        )?;
        call(
            libc::mount(tmpfs, net, tmpfs, 0, std::ptr::null()),
            "mount /dev/net",
        )?;
        if let Some(mode) = mode {
            libc::umask(0);
            let tun = c"/dev/net/tun".as_ptr();
            call(
                libc::mknod(tun, libc::S_IFCHR | mode, libc::makedev(10, 200)),
                "mknod",
            )?;
        }
    }
    Ok(())
}

fn uid_map() -> Result<Vec<u64>, String> {
    let map = fs::read_to_string("/proc/self/uid_map").map_err(text)?;
    map.split_whitespace()
        .map(|n| n.parse().map_err(text))
        .collect()
}

/// A bridge with two taps works here, and so does loopback.
fn network_works() -> Result<(), String> {
    netconf::create_bridge("br0").map_err(text)?;
    netconf::set_addr_v4("br0", Ipv4Addr::new(10, 1, 1, 1), 24).map_err(text)?;
    netconf::set_link("br0", true).map_err(text)?;
    let tap = |name| -> Result<Tap, String> {
        let t = Tap::open(name, true).map_err(text)?;
        netconf::add_to_bridge("br0", name).map_err(text)?;
        t.set_up().map_err(text)?;
        Ok(t)
    };
    let (a, b) = (tap("a")?, tap("b")?);
    let mut frame = vec![0; NET_HEADER];
    frame.extend([0xff; 6]);
    frame.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    frame.extend([7; 50]);
    a.send(&frame).map_err(text)?;
    let mut buf = [0; 2048];
    loop {
        if b.recv(&mut buf).map_err(text)?.is_none() {
            let mut p = libc::pollfd {
                fd: b.fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid pollfd.
            let ready = unsafe { libc::poll(&raw mut p, 1, 60_000) };
            check(ready == 1, "no frame came")?;
        } else if buf[NET_HEADER + 12..NET_HEADER + 14] == [0x88, 0xb5] {
            break;
        }
    }
    let near = UdpSocket::bind("127.0.0.1:0").map_err(text)?;
    let to = near.local_addr().map_err(text)?;
    near.send_to(b"x", to)
        .map_err(|e| format!("loopback: {e}"))?;
    Ok(())
}

fn as_root() -> Result<(), String> {
    let (before, map) = (netns()?, uid_map()?);
    unshare_userns_netns().map_err(text)?;
    check(netns()? != before, "still in the old network namespace")?;
    check(uid_map()? == map, "a user namespace was made")?;
    network_works()
}

fn netns() -> Result<std::path::PathBuf, String> {
    fs::read_link("/proc/self/ns/net").map_err(text)
}

fn as_nobody() -> Result<(), String> {
    own_tun_node(Some(0o666))?;
    become_nobody()?;
    let before = netns()?;
    unshare_userns_netns().map_err(text)?;
    check(netns()? != before, "still in the old network namespace")?;
    check(uid_map()? == [0, u64::from(NOBODY), 1], "the user map")?;
    network_works()
}

fn tun_closed() -> Result<(), String> {
    own_tun_node(Some(0o600))?;
    become_nobody()?;
    unshare_userns_netns().map_err(text)?;
    match Tap::open("a", true) {
        Err(e @ TapError::NotAllowed(_)) => check(e.to_string().contains("chmod 666"), "no remedy"),
        other => Err(format!("{other:?}")),
    }
}

fn tun_missing() -> Result<(), String> {
    own_tun_node(None)?;
    match Tap::open("a", true) {
        Err(e @ TapError::NoTun(_)) => check(e.to_string().contains("modprobe tun"), "no remedy"),
        other => Err(format!("{other:?}")),
    }
}

fn limit() -> Result<(), String> {
    // The limits are counted per user namespace: these are of one made here, and nobody else's.
    become_nobody()?;
    unshare_userns_netns().map_err(text)?;
    fs::write("/proc/sys/user/max_net_namespaces", "0").map_err(text)?;
    match unshare_userns_netns() {
        Err(e @ NsError::NoNetNs { .. }) => check(
            e.to_string()
                .contains("/proc/sys/user/max_net_namespaces is 0"),
            &text(e),
        ),
        other => Err(format!("{other:?}")),
    }
}
