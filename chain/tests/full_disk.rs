//! A data directory that is full, on a real file system: a small tmpfs, mounted for the test's own threads only (as root).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chain::master::{Begin, Command, LocalMaster, Master, MasterError, PaxosMaster};
use chain::{Life, Mark, Member, VmShape};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

mod commands;
use commands::{host, reconfigure, register, take_over};

const PATIENCE: Duration = Duration::from_secs(60);

/// Mounts `size` bytes at `dir`. Threads that this one starts from now on see it, no other program does.
fn small(dir: &Path, size: usize) {
    let need = "this test mounts a tmpfs of its own: run it as root";
    unshare(CloneFlags::CLONE_NEWNS).expect(need);
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect(need);
    let size = format!("size={size}");
    let none = MsFlags::empty();
    mount(Some("tmpfs"), dir, Some("tmpfs"), none, Some(size.as_str())).expect(need);
}

/// Takes all the room that is left.
fn fill(dir: &Path, name: &str) {
    let mut file = File::create(dir.join(name)).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
}

#[test]
fn h10_a_single_master_refuses_while_its_disk_is_full_and_goes_on_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    small(dir.path(), 1 << 20);
    let master = LocalMaster::open(dir.path(), Begin::New).unwrap();
    let vm = master.propose(&register("one", "a")).unwrap().view.vm;
    fill(dir.path(), "image");
    // What was set aside is enough.
    let record = master
        .propose(&reconfigure(vm, checkpoint::Generation(1), "a", &["b"]))
        .unwrap();
    assert_eq!(master.trouble(), None);
    fs::remove_file(dir.path().join("master.spare")).unwrap();
    fill(dir.path(), "more");
    let change = take_over(vm, checkpoint::Generation(2), "b");
    for _ in 0..3 {
        let said = master.propose(&change).unwrap_err();
        assert!(matches!(said, MasterError::NoRoom { .. }), "{said}");
        assert!(said.to_string().contains("free some space"), "{said}");
        assert_eq!(master.trouble(), Some(said.to_string()));
        let known = master.read().unwrap().records;
        assert_eq!(known, std::slice::from_ref(&record));
    }
    // Started again meanwhile, it has what it had.
    drop(master);
    let master = LocalMaster::open(dir.path(), Begin::Existing).unwrap();
    assert_eq!(master.read().unwrap().records, [record]);
    master.propose(&change).unwrap_err();
    fs::remove_file(dir.path().join("more")).unwrap();
    master.propose(&change).unwrap();
    assert_eq!(master.trouble(), None);
}

fn patiently<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn h10_a_member_stands_still_while_its_disk_is_full_and_comes_back_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let full = dir.path().join("a");
    fs::create_dir(&full).unwrap();
    small(&full, 1 << 20);
    let names = ["a", "b", "c"];
    let held: Vec<_> = names
        .iter()
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    let addresses: Vec<SocketAddr> = held.iter().map(|l| l.local_addr().unwrap()).collect();
    drop(held);
    let members: BTreeMap<_, _> = names.iter().map(|n| host(n)).zip(addresses).collect();
    let open = |name: &str| {
        let dir = dir.path().join(name);
        Arc::new(PaxosMaster::open(&dir, &host(name), &members, Begin::New).unwrap())
    };
    let [a, b, _c] = names.map(open);
    patiently("a decision", || a.propose(&register("one", "h")).ok());
    fill(&full, "image");
    patiently("one on a full disk", || {
        a.propose(&register("two", "h")).ok()
    });
    // Nothing is left of what was set aside either.
    patiently("no room", || {
        let _ = fs::remove_file(full.join("paxos.spare"));
        fill(&full, "more");
        match a.propose(&register("three", "h")) {
            Err(e @ MasterError::NoRoom { .. }) => Some(e),
            _ => {
                let _ = fs::remove_file(full.join("more"));
                None
            }
        }
    });
    let said = a.trouble().expect("status has something to show");
    assert!(said.contains("free some space"), "{said}");
    assert!(!a.leads());
    patiently("the others", || b.propose(&register("four", "h")).ok());
    fs::remove_file(full.join("more")).unwrap();
    fs::remove_file(full.join("image")).unwrap();
    let known = patiently("the member to be back", || a.read().ok());
    assert!(known.records.iter().any(|r| r.view.name == "four"));
    assert_eq!(a.trouble(), None);
}
