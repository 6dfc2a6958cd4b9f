//! Several VMs share their hosts: each host owns one and backs the others up. What happens to a host happens to all of them
//! at once, to each in another part.

use agent::control::Role;
use understudy_tests::{Cluster, Options, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

/// VM 1 on `a`, 2 on `b`, 3 on `c`, each with the other two behind it.
const PLACES: [[&str; 3]; 3] = [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]];

fn vm(number: usize) -> VmFile {
    VmFile {
        number: number as u8 + 1,
        memory_mib: 32,
        pages: 32,
        ..VmFile::default()
    }
}

/// Waits until the VM is protected by the hosts of `order` behind the first, which owns it.
fn settled(cluster: &Cluster, number: usize, order: &[&str]) {
    cluster.wait_protected_of(&vm(number).name(), order[0], &order[1..]);
}

#[test]
fn each_host_owns_one_and_backs_up_the_others() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b", "c"]));
    let mut clients = Vec::new();
    for (number, place) in PLACES.iter().enumerate() {
        let file = vm(number);
        cluster.start_vm_on(place[0], file.write(cluster.dir()));
        cluster.protect_vm_of(&file.name(), place[0], &place[1..]);
        clients.push(cluster.client_of(file.ip()));
    }
    let mut places = PLACES.map(Vec::from);
    for dead in ["a", "c"] {
        cluster.kill(dead);
        for place in &mut places {
            place.retain(|host| *host != dead);
        }
        for (number, place) in places.iter().enumerate() {
            settled(&cluster, number, place);
            more_answers(&clients[number], 50);
        }
        cluster.start_agent(dead, None);
        for (number, place) in places.iter_mut().enumerate() {
            place.push(dead);
            settled(&cluster, number, place);
            more_answers(&clients[number], 50);
        }
    }
    // All of them are with `b` by now, or pass through it; each still has what it had.
    for client in clients {
        check_disk(&client);
        check_survived(&cluster.stop_client(client));
    }
}

/// What is done to one VM does nothing to another one on the same hosts.
#[test]
fn one_is_stopped_and_the_other_goes_on() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let mut clients = Vec::new();
    for number in 0..2 {
        let file = vm(number);
        cluster.start_vm_on("a", file.write(cluster.dir()));
        cluster.protect_vm_of(&file.name(), "a", &["b"]);
        clients.push(cluster.client_of(file.ip()));
    }
    let stay = clients.pop().expect("two");
    let order = agent::control::Request::Stop { vm: vm(0).name() };
    cluster.control("a").order(&order).unwrap();
    wait("the first VM to be off, and gone from its backup", || {
        let off = cluster.status_of(&vm(0).name(), "a")?.role == Role::Off;
        let gone = cluster.status_of(&vm(0).name(), "b").is_none();
        (off && gone).then_some(())
    });
    drop(clients);
    more_answers(&stay, 50);
    cluster.kill("a");
    wait("the second VM to be with b", || {
        let status = cluster.status_of(&vm(1).name(), "b")?;
        (status.role == Role::Owner).then_some(())
    });
    assert!(cluster.status_of(&vm(0).name(), "b").is_none());
    more_answers(&stay, 50);
    check_disk(&stay);
    check_survived(&cluster.stop_client(stay));
}
