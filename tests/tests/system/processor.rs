//! A VM goes on with the processor that it booted with. A host whose processor cannot do all of that is no backup: it is
//! found out before anything depends on it, and said.
//!
//! `UNDERSTUDY_BREAK=processor` takes the features of CPUID leaf 7 from a host.

use agent::control::{Request, Role};
use understudy_tests::{Cluster, Options, VM, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

#[test]
fn a_host_with_a_lesser_processor_is_no_backup_and_says_why() {
    let mut cluster = Cluster::launch(
        PROGRAM,
        Options {
            broken: &[("b", "processor")],
            ..Options::of(&["a", "b", "c"])
        },
    );
    cluster.start_vm(VmFile::default().write(cluster.dir()));
    let client = cluster.client();
    let order = Request::Protect {
        vm: VM.into(),
        backups: vec!["b".into(), "c".into()],
    };
    cluster.control("a").order(&order).unwrap();
    // The other one backs it up alone.
    cluster.wait_protected("a", &["c"]);
    for host in ["a", "b"] {
        wait(&format!("{host} to say why"), || {
            let events = cluster.events(host);
            let said = |text: &str| {
                text.contains("its processor lacks ") && text.contains("start the VM on the host")
            };
            events.iter().any(|e| said(&e.text)).then_some(())
        });
    }
    assert!(cluster.status("b").is_none_or(|s| s.role != Role::Replica));
    more_answers(&client, 50);
    cluster.kill("a");
    cluster.wait_owner("c");
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
}
