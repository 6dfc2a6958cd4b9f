//! A clone of a VM from a checkpoint of the past, while the VM goes on.

use agent::control::{Point, Reply, Request};
use agent::probe::{ProbeClient, ProbeConn};
use guest::proto::{Op, PORT, Request as Ask, Response, Status};
use understudy_tests::{Cluster, GUEST, Options, PATIENCE, VM, VmFile, wait};

use crate::PROGRAM;
use crate::first;
use crate::kill::{check_disk, check_survived, more_answers, told};

fn newest(cluster: &Cluster) -> Point {
    match cluster
        .control("b")
        .call(&Request::Points { vm: VM.into() })
    {
        Ok(Reply::Points(points)) => *points.last().expect("at least one"),
        other => panic!("{other:?}"),
    }
}

fn rewind(cluster: &Cluster, host: &str, epoch: u64, clone: &str) -> Result<(), String> {
    let request = Request::Rewind {
        vm: VM.into(),
        epoch,
        clone: clone.into(),
        network: None,
    };
    let mut control = cluster.control(host);
    control.order(&request).map_err(|e| e.to_string())
}

/// Asks the clone over its card, which is connected to nothing: its host gives itself an address there.
fn ask(cluster: &Cluster, tap: &str, op: Op) -> Response {
    cluster.network().within("b", || {
        for args in [
            format!("addr replace 10.77.0.77/32 dev {tap}"),
            format!("route replace 10.77.0.2/32 dev {tap} src 10.77.0.77"),
        ] {
            let mut command = std::process::Command::new("ip");
            let status = command.args(args.split(' ')).status();
            assert!(status.expect("ip").success(), "{args}");
        }
        ProbeConn::connect((GUEST, PORT).into(), PATIENCE)
            .and_then(|mut guest| guest.call(Ask::new(op, 0)))
            .unwrap_or_else(|e| panic!("asking the clone for {op:?}: {e}"))
    })
}

/// A moment in the VM's life: its newest checkpoint, and between which counters it is.
fn moment(cluster: &Cluster, client: &ProbeClient) -> (u64, std::ops::RangeInclusive<u64>) {
    more_answers(client, 20);
    let least = told(client);
    let epoch = newest(cluster).epoch;
    let most = client.stats(PATIENCE).expect("the counter").counter;
    (epoch, least..=most)
}

fn clones_of(durability: &'static str) {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let vm = VmFile {
        retain: 4000,
        durability,
        ..VmFile::default()
    };
    cluster.protect(&vm, &["b"]);
    let client = cluster.client();
    let moments = [moment(&cluster, &client), moment(&cluster, &client)];
    more_answers(&client, 20);
    // The later one first: the clones do not get into each other's way.
    for (n, (epoch, counters)) in moments.iter().rev().enumerate() {
        let clone = format!("clone{n}");
        rewind(&cluster, "b", *epoch, &clone).unwrap();
        let tap = format!("usc{}n0", n + 1);
        let memory = ask(&cluster, &tap, Op::Read).counter;
        assert!(counters.contains(&memory), "{memory}, not {counters:?}");
        // A write that was on its way at the checkpoint is done by now; whatever was acknowledged is there.
        let disk = ask(&cluster, &tap, Op::ReadDisk);
        assert_eq!(disk.status, Status::Ok as u16, "{disk:?}");
        assert!(
            (*counters.start()..=memory).contains(&disk.disk_counter),
            "{disk:?}, not {counters:?}"
        );
        // It lives: its own life, of which the VM knows nothing.
        let more = ask(&cluster, &tap, Op::Incr).counter;
        assert_eq!(more, memory + 1);
        let status = cluster.control("b").status().unwrap();
        let there = status.iter().find(|s| s.name == clone).expect("its status");
        assert!(there.state().contains("clone of vm"), "{there:?}");
        more_answers(&client, 20);
    }
    let taken = rewind(&cluster, "b", moments[0].0, "clone0").unwrap_err();
    assert!(taken.contains("clone0"), "{taken}");
    let stop = |name: &str| {
        cluster
            .control("b")
            .order(&Request::Stop { vm: name.into() })
    };
    for n in 0..2 {
        stop(&format!("clone{n}")).unwrap();
    }
    wait("no clone to be left", || {
        let status = cluster.control("b").status().ok()?;
        (status.len() == 1).then_some(())
    });
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn clones_of_a_past_that_is_kept_in_memory() {
    clones_of("memory");
}

#[test]
fn clones_of_a_past_that_is_kept_on_the_disk() {
    clones_of("disk");
}

/// While it is copied, checkpoints are taken and output is let out as ever, and nobody takes the busy replica for dead.
#[test]
fn the_vm_goes_on_while_a_large_disk_is_copied_for_a_clone() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let vm = VmFile {
        retain: 4000,
        disk_bytes: first::DISK,
        ..VmFile::default()
    };
    let toml = vm.write(cluster.dir());
    first::fill(&cluster.path("vm.img"));
    cluster.start_vm(toml);
    // By the command line: it waits, however long that takes.
    let mut protect = cluster.command_on("a");
    protect.args(["protect", VM, "--backups", "b", "--control"]);
    let said = protect.arg(cluster.path("a.sock")).output().expect("ip");
    let out = String::from_utf8_lossy(&said.stdout);
    assert!(
        said.status.success(),
        "{out}{}",
        String::from_utf8_lossy(&said.stderr)
    );
    assert!(out.contains("vm is protected by b"), "{out}");
    let client = cluster.client();
    more_answers(&client, 20);
    let (epoch, generation) = (
        newest(&cluster).epoch,
        cluster.status("a").unwrap().generation,
    );
    let (acked, answered) = std::thread::scope(|scope| {
        let copying = scope.spawn(|| rewind(&cluster, "b", epoch, "clone"));
        let before = client.progress().acked;
        // Whatever is answered from here on, but for the first few, was held by a checkpoint taken after the copy began.
        while !copying.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let during = client.progress().acked - before;
        (during, copying.join().unwrap())
    });
    answered.unwrap();
    assert!(acked > 5, "{acked} answers while the clone was made");
    let status = cluster.status("a").unwrap();
    assert!(status.protected, "{status:?}");
    assert_eq!(
        status.generation, generation,
        "nobody was left out: {status:?}"
    );
    let disk = ask(&cluster, "usc1n0", Op::ReadDisk);
    assert_eq!(disk.status, Status::Ok as u16, "{disk:?}");
    let clone = cluster.path("b/clones/clone/disk0.img");
    first::check_same_data(&cluster.path("vm.img"), &clone);
    assert!(first::allocated(&clone) < first::allocated(&cluster.path("vm.img")) + (64 << 20));
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}

#[test]
fn what_cannot_be_rewound_to_is_said_and_leaves_nothing_behind() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    cluster.protect(&VmFile::default(), &["b"]);
    let client = cluster.client();
    let epoch = newest(&cluster).epoch;
    let owner = rewind(&cluster, "a", epoch, "clone").unwrap_err();
    assert!(owner.contains("give the order on b"), "{owner}");
    let future = rewind(&cluster, "b", epoch + 1_000_000, "clone").unwrap_err();
    assert!(
        future.contains("not kept") && future.contains("points"),
        "{future}"
    );
    let name = rewind(&cluster, "b", epoch, "../clone").unwrap_err();
    assert!(name.contains("../clone"), "{name}");
    let clones = cluster.path("b/clones");
    let left = std::fs::read_dir(&clones).map_or(0, Iterator::count);
    assert_eq!(left, 0, "{}", clones.display());
    more_answers(&client, 20);
    check_survived(&cluster.stop_client(client));
}
