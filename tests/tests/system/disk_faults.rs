//! The owner's storage fails, or does not answer: a backup takes the VM over and does again what was refused (FIELD H4, H5).

use crate::report;

fn survives(fault: &str) {
    let (_, report, errors) = report::of(&["bench", "failover", "--runs", "2", "--fault", fault]);
    let figure = |name: &str| report[name].as_u64();
    assert_eq!(figure("takeovers"), Some(2), "{report:#}\n{errors}");
    assert_eq!(figure("lost"), Some(0), "{report:#}\n{errors}");
    assert_eq!(figure("broken"), Some(0), "{report:#}\n{errors}");
    assert!(figure("acknowledged") > Some(50), "{report:#}");
}

#[test]
fn h4_writes_that_the_owners_disk_refuses_are_done_by_a_backup() {
    survives("disk-error");
}

#[test]
fn h5_a_disk_that_does_not_answer_is_one_that_refuses() {
    survives("disk-hang");
}
