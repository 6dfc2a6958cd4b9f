//! A VM moves because somebody wants it to: planned, and as a drill. Either way nothing is lost, and the host it came from
//! backs it up afterwards.

use agent::control::{ControlError, EventKind, Reply, Request, Switched};
use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers, told};

fn switch(cluster: &Cluster, on: &str, request: &Request) -> Result<Switched, ControlError> {
    match cluster.control(on).call(request)? {
        Reply::Switched(switched) => Ok(switched),
        other => panic!("{other:?}"),
    }
}

fn there_and_back(request: &Request) {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    cluster.protect(&VmFile::default(), &["b", "c"]);
    let client = cluster.client();
    let mut order = vec!["a", "b", "c"];
    for _ in 0..3 {
        let from = order.remove(0);
        let told = told(&client);
        let switched = switch(&cluster, from, request).unwrap_or_else(|e| panic!("{from}: {e}"));
        assert_eq!(switched.owner, order[0]);
        cluster.wait_owner(order[0]);
        more_answers(&client, 50);
        let now = crate::kill::told(&client);
        assert!(now > told, "the counter goes on: {told}, {now}");
        order.push(from);
        cluster.wait_protected(order[0], &order[1..]);
        check_disk(&client);
    }
    let events = cluster.events("a");
    assert!(events.iter().any(|e| e.kind == EventKind::HandedOver));
    check_survived(&cluster.stop_client(client));
}

#[test]
fn a_planned_switchover_loses_nothing_and_the_old_owner_backs_it_up() {
    there_and_back(&Request::HandOver { vm: VM.into() });
}

#[test]
fn a_drill_is_a_real_failover() {
    there_and_back(&Request::Drill { vm: VM.into() });
}

#[test]
fn a_host_is_evacuated_by_one_command() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let vm = |number| VmFile {
        number,
        memory_mib: 32,
        ..VmFile::default()
    };
    for number in 1..=3 {
        cluster.start_vm_on("a", vm(number).write(cluster.dir()));
    }
    for number in 1..=2 {
        cluster.protect_vm_of(&vm(number).name(), "a", &["b"]);
    }
    let clients = [1, 2, 3].map(|number| cluster.client_of(vm(number).ip()));
    let evacuate = || {
        let mut command = cluster.command_on("a");
        command.args(["evacuate", "--control"]);
        command.arg(cluster.path("a.sock")).output().expect("ip")
    };
    let said = evacuate();
    let (out, err) = [&said.stdout, &said.stderr]
        .map(|s| String::from_utf8_lossy(s))
        .into();
    assert_eq!(said.status.code(), Some(1), "{out}{err}");
    assert!(
        err.contains("vm3 is not protected") && err.contains("still here: vm3"),
        "{err}"
    );
    for number in 1..=2 {
        let name = vm(number).name();
        assert!(out.contains(&format!("b owns {name}")), "{out}");
        cluster.wait_protected_of(&name, "b", &["a"]);
    }
    let order = Request::Stop { vm: vm(3).name() };
    cluster.control("a").order(&order).unwrap();
    assert!(
        evacuate().status.success(),
        "there is nothing left to be handed over"
    );
    let [one, two, three] = clients;
    drop(three);
    for client in [one, two] {
        more_answers(&client, 50);
        check_disk(&client);
        check_survived(&cluster.stop_client(client));
    }
}

#[test]
fn what_nobody_could_take_over_is_not_given_away() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    cluster
        .control("a")
        .order(&Request::Start {
            toml: VmFile::default().write(cluster.dir()),
            name: "vm.toml".into(),
        })
        .expect("starting the VM");
    let client = cluster.client();
    for request in [
        Request::HandOver { vm: VM.into() },
        Request::Drill { vm: VM.into() },
    ] {
        let error = switch(&cluster, "a", &request).expect_err("nobody is there");
        assert!(error.to_string().contains("not protected"), "{error}");
    }
    more_answers(&client, 20);
    // A head that does not answer: the guest, stopped already, runs on where it is.
    cluster
        .control("a")
        .order(&Request::Protect {
            vm: VM.into(),
            backups: vec!["b".into()],
        })
        .expect("protecting the VM");
    cluster.wait_protected("a", &["b"]);
    cluster.freeze("b");
    let error = switch(&cluster, "a", &Request::HandOver { vm: VM.into() });
    let error = error.expect_err("b stands still");
    assert!(error.to_string().contains("runs on here"), "{error}");
    cluster.thaw("b");
    more_answers(&client, 20);
    check_survived(&cluster.stop_client(client));
}
