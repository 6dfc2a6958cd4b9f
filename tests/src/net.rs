//! The network of a test: namespaces, the two bridges between them, and cables that can be pulled.

use std::fs::File;
use std::net::Ipv4Addr;
use std::process::Command;

use nix::sched::{CloneFlags, setns};

/// The client's address on the guest LAN.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The client's interface.
pub const CLIENT_PORT: &str = "lan";
/// The bridge that each host's taps are put on.
pub const HOST_BRIDGE: &str = "br0";

/// Namespaces named `us<pid>-<number>-<host>`; they go when this is dropped.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    namespaces: Vec<String>,
}

fn ip(args: &str) {
    let output = Command::new("ip")
        .args(args.split(' '))
        .output()
        .unwrap_or_else(|e| panic!("ip {args}: {e}"));
    assert!(
        output.status.success(),
        "ip {args}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
}

impl Network {
    /// The two bridges, the client, and `hosts`, whose addresses on the replication network are 10.78.0.1, .2, ...
    ///
    /// # Panics
    /// Naming the `ip` command that failed.
    #[must_use]
    pub fn build(hosts: &[&str]) -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        sweep();
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut network = Self {
            prefix: format!("us{}-{number}", std::process::id()),
            namespaces: Vec::new(),
        };
        let switch = network.add("switch");
        for (i, bridge) in ["lan0", "repl0"].into_iter().enumerate() {
            // An address of its own: without one a bridge takes a port's and changes it when that port goes.
            ip(&format!(
                "-n {switch} link add {bridge} address 52:54:00:75:70:0{i} type bridge forward_delay 0"
            ));
            ip(&format!("-n {switch} link set {bridge} up"));
        }
        let client = network.add("client");
        network.cable("lan", "client", CLIENT_PORT);
        ip(&format!(
            "-n {client} addr add {CLIENT}/24 dev {CLIENT_PORT}"
        ));
        for (i, host) in hosts.iter().enumerate() {
            let ns = network.add(host);
            ip(&format!(
                "-n {ns} link add {HOST_BRIDGE} address 52:54:00:75:71:{i:02x} type bridge forward_delay 0"
            ));
            network.cable("lan", host, "lan");
            ip(&format!("-n {ns} link set lan master {HOST_BRIDGE}"));
            ip(&format!("-n {ns} link set {HOST_BRIDGE} up"));
            network.cable("repl", host, "repl");
            ip(&format!("-n {ns} addr add {}/24 dev repl", repl_addr(i)));
        }
        network
    }

    fn add(&mut self, host: &str) -> String {
        let name = self.namespace(host);
        ip(&format!("netns add {name}"));
        self.namespaces.push(name.clone());
        ip(&format!("-n {name} link set lo up"));
        name
    }

    /// A veth from the bridge `<net>0` (port `<net>-<host>`) to `host`'s interface `port`.
    fn cable(&self, net: &str, host: &str, port: &str) {
        let (switch, ns) = (self.namespace("switch"), self.namespace(host));
        ip(&format!(
            "-n {switch} link add {net}-{host} type veth peer name {port} netns {ns}"
        ));
        ip(&format!("-n {switch} link set {net}-{host} master {net}0"));
        ip(&format!("-n {switch} link set {net}-{host} up"));
        ip(&format!("-n {ns} link set {port} up"));
    }

    /// The namespace of `host`, of `client` or of `switch`.
    #[must_use]
    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// Pulls or plugs `host`'s cable to the replication network; its link to the guest LAN stays.
    pub fn plug(&self, host: &str, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        ip(&format!(
            "-n {} link set repl-{host} {state}",
            self.namespace("switch")
        ));
    }

    /// Runs `f` on a thread inside `host`'s namespace. Threads and sockets it makes stay there.
    ///
    /// # Panics
    /// If the namespace cannot be entered, or as `f` does.
    pub fn within<T: Send>(&self, host: &str, f: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.namespace(host));
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let ns = File::open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
                    setns(&ns, CloneFlags::CLONE_NEWNET).unwrap_or_else(|e| panic!("{path}: {e}"));
                    f()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Host number `i`'s address on the replication network.
#[must_use]
pub fn repl_addr(i: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 78, 0, 1 + i as u8)
}

fn delete(namespace: &str) {
    let _ = Command::new("ip")
        .args(["netns", "del", namespace])
        .output();
}

/// Namespaces of test processes that were killed before they could clean up.
fn sweep() {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix("us")
            .and_then(|rest| rest.split_once('-'))
            .and_then(|(pid, _)| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()) {
            delete(&name);
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.namespaces {
            delete(name);
        }
    }
}
