//! `understudy inspect`: a look at vCPUs that disturbs neither the guest nor its protection.

use understudy_tests::cluster::VM;
use understudy_tests::{Cluster, Options, VmFile};

use crate::PROGRAM;
use crate::kill::{check_survived, more_answers};

#[test]
fn a_running_guest_is_looked_at_and_goes_on() {
    let cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let vm = VmFile {
        vcpus: 2,
        ..VmFile::default()
    };
    cluster.protect(&vm, &["b"]);
    let client = cluster.client();
    let looks: Vec<_> = (0..20)
        .map(|_| {
            let vcpus = cluster.control("a").inspect(VM).expect("looking");
            more_answers(&client, 5);
            vcpus
        })
        .collect();
    for pair in looks.windows(2) {
        let (earlier, later) = (&pair[0], &pair[1]);
        assert_eq!(
            later.iter().map(|v| v.id).collect::<Vec<_>>(),
            [0, 1],
            "both vCPUs are reported"
        );
        // It answered in between, so at least its first vCPU ran.
        assert!(later[0].exits > earlier[0].exits, "{earlier:?}\n{later:?}");
        assert!(later[0].tsc > earlier[0].tsc, "{earlier:?}\n{later:?}");
    }
    // A standby has not run.
    let standby = cluster.control("b").inspect(VM).expect("looking");
    assert!(standby.iter().all(|v| v.exits <= 1), "{standby:?}");
    let refused = cluster.control("a").inspect("nobody").unwrap_err();
    assert!(
        refused.to_string().contains("no VM named \"nobody\""),
        "{refused}"
    );
    check_survived(&cluster.stop_client(client));
}
