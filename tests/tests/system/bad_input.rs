//! Mistakes that people make, through the real program: each is named, with a status other than 0 and without a panic,
//! and harms nothing that runs.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, PATIENCE, VmFile, require_everything, serial};

use crate::PROGRAM;
use crate::kill::{check_survived, more_answers};

/// Runs `command`, which has to fail by itself and to say all of `names`.
#[track_caller]
fn refused(command: &mut Command, names: &[&str]) {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().expect("waiting for it").is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            let output = child.wait_with_output().expect("its output");
            panic!(
                "{command:?} does not end: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().expect("its output");
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let code = output.status.code();
    assert!(
        code.is_some_and(|c| c != 0),
        "{command:?}: {code:?}\n{said}"
    );
    assert!(!said.contains("panicked"), "{command:?}\n{said}");
    for name in names {
        assert!(
            said.contains(name),
            "{command:?} should name {name:?}; it says:\n{said}"
        );
    }
}

/// Files for one test, which any user may read.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("systest-understudy-")
            .tempdir()
            .expect("a temporary directory");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("its mode");
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("writing a file");
        path
    }
}

/// `vm.toml` without devices.
fn vm_toml(kernel: &str, more: &str) -> String {
    format!(
        "name = \"vm\"\nmemory_mib = 64\nkernel = \"{kernel}\"\nconsole = \"/dev/null\"\n{more}"
    )
}

fn plain(config: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["vmm", "--config"]).arg(config);
    command
}

#[test]
fn a_vm_that_cannot_boot_names_the_file() {
    let _turn = serial::turn();
    require_everything();
    let files = Files::new();
    let missing = files.write("missing.toml", &vm_toml("/nowhere/vmlinuz", ""));
    refused(&mut plain(&missing), &["/nowhere/vmlinuz"]);

    let text = files.write("kernel.txt", "This is not a kernel.\n");
    let text = text.display().to_string();
    let wrong = files.write("wrong.toml", &vm_toml(&text, ""));
    refused(&mut plain(&wrong), &[&text]);

    let empty = files.write("kernel.empty", "").display().to_string();
    let wrong = files.write("empty.toml", &vm_toml(&empty, ""));
    refused(&mut plain(&wrong), &[&empty]);

    let initrd = "initrd = \"/nowhere/initrd\"\n";
    let initrd = files.write("initrd.toml", &vm_toml("builtin:probe", initrd));
    refused(&mut plain(&initrd), &["/nowhere/initrd"]);
}

#[test]
fn a_disk_that_cannot_be_one_is_named() {
    let _turn = serial::turn();
    require_everything();
    let files = Files::new();
    let odd = files.path("odd.img");
    let image = File::create(&odd).expect("an image");
    image.set_len(1_000_001).expect("its size");
    for (disk, names) in [
        (odd.display().to_string(), "512"),
        ("/nowhere/disk.img".into(), "disk"),
        (files.0.path().display().to_string(), "disk"),
    ] {
        let more = format!("[[disk]]\npath = \"{disk}\"\n");
        let config = files.write("vm.toml", &vm_toml("builtin:probe", &more));
        refused(&mut plain(&config), &[&disk, names]);
    }
}

#[test]
fn a_typo_is_named_with_line_and_column() {
    let files = Files::new();
    let vm = files.write("vm.toml", &vm_toml("builtin:probe", "vcpu = 2\n"));
    refused(&mut plain(&vm), &["vm.toml", "line 5, column 1", "vcpu"]);
    let mut start = Command::new(PROGRAM);
    start.arg("start").arg(&vm);
    refused(&mut start, &["vm.toml", "line 5, column 1", "vcpu"]);

    let host = files.write("host.toml", "host = \"a\"\nlisten = 7700\n");
    let mut agent = Command::new(PROGRAM);
    agent.args(["agent", "--config"]).arg(&host);
    refused(&mut agent, &["host.toml", "line 2, column 10"]);

    let mut agent = Command::new(PROGRAM);
    agent.args(["agent", "--config", "/nowhere/host.toml"]);
    refused(&mut agent, &["/nowhere/host.toml"]);
}

#[test]
fn commands_without_an_agent_say_so() {
    let files = Files::new();
    let socket = files.path("none.sock").display().to_string();
    for command in [
        vec!["status"],
        vec!["events"],
        vec!["protect", "vm"],
        vec!["stop", "vm"],
        vec!["failover", "vm"],
    ] {
        let mut run = Command::new(PROGRAM);
        run.args(command).args(["--control", &socket]);
        refused(&mut run, &[&socket, "understudy agent"]);
    }
}

/// As user nobody, with a copy of the program that nobody can reach.
#[test]
fn devices_without_permission_are_named() {
    let _turn = serial::turn();
    require_everything();
    let files = Files::new();
    let program = files.path("understudy");
    fs::copy(PROGRAM, &program).expect("a copy of the program");
    for (more, device) in [
        ("", "/dev/kvm"),
        (
            "[[net]]\nmac = \"52:54:00:75:73:01\"\ntap = \"tap9\"\n",
            "/dev/net/tun",
        ),
    ] {
        let config = files.write("vm.toml", &vm_toml("builtin:probe", more));
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&program)
            .args(["vmm", "--config"])
            .arg(&config);
        refused(&mut command, &[device]);
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .arg("demo");
    refused(&mut command, &["/dev/kvm"]);
}

/// Orders that cannot be carried out, to an agent with a running VM, which runs on undisturbed.
#[test]
fn bad_orders_harm_no_running_vm() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b"]);
    let client = cluster.client();
    let before = cluster.status("a").expect("the VM");
    cluster.kill("c");
    let socket = cluster.path("a.sock").display().to_string();
    let order = |args: &[&str]| {
        let mut command = cluster.command_on("a");
        command.args(args).args(["--control", &socket]);
        command
    };
    refused(
        &mut order(&["protect", VM, "--backups", "c"]),
        &["backup c", "10.78.0.3:7700"],
    );
    refused(
        &mut order(&["protect", VM, "--backups", "b,zed"]),
        &["\"zed\""],
    );
    refused(&mut order(&["protect", VM, "--backups", "b,b"]), &["b"]);
    refused(&mut order(&["protect", VM, "--backups", "a"]), &["\"a\""]);
    refused(
        &mut order(&["protect", "novm", "--backups", "b"]),
        &["novm"],
    );
    refused(&mut order(&["stop", "novm"]), &["novm"]);
    refused(&mut order(&["failover", VM]), &[VM, "already"]);
    refused(&mut order(&["failover", "novm"]), &["novm"]);

    let write = |name: &str, text: &str| {
        let path = cluster.path(name);
        fs::write(&path, text).expect("writing a file");
        path.display().to_string()
    };
    let net = "[[net]]\nmac = \"52:54:00:75:73:09\"\nnetwork = \"wan\"\n";
    let other = |kernel: &str, more: &str| vm_toml(kernel, more).replace("\"vm\"", "\"other\"");
    for (text, names) in [
        (vm_toml("builtin:probe", ""), "\"vm\""),
        (other("/nowhere/vmlinuz", ""), "/nowhere/vmlinuz"),
        (other("builtin:probe", net), "wan"),
    ] {
        let file = write("bad.toml", &text);
        refused(&mut order(&["start", &file]), &[names]);
    }

    // Another agent, with one thing that this one has.
    let host = fs::read_to_string(cluster.path("a.toml")).expect("a's configuration");
    let port = host.replace("/a\"", "/x\"").replace("a.sock", "x.sock");
    let port = write("port.toml", &port);
    let mut agent = cluster.command_on("a");
    agent.args(["agent", "--config", &port]);
    refused(&mut agent, &["10.78.0.1:7700"]);
    let control = host
        .replace("/a\"", "/y\"")
        .replace(":7700\"\n\n[master]", ":7701\"\n\n[master]");
    let control = write("control.toml", &control);
    let mut agent = cluster.command_on("a");
    agent.args(["agent", "--config", &control]);
    refused(&mut agent, &[&socket]);

    more_answers(&client, 100);
    let after = cluster.status("a").expect("the VM");
    assert_eq!(
        (after.pid, after.generation, after.protected),
        (before.pid, before.generation, true),
        "{after:?}"
    );
    check_survived(&cluster.stop_client(client));
}
