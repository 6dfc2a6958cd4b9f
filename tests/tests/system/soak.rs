//! The soak itself, for a short time: that it passes, and that it can fail.

use crate::report;

#[test]
fn a_short_soak_finds_nothing() {
    let (passed, report, errors) = report::of(&["soak", "--minutes", "0.4"]);
    assert!(passed, "{errors}\n{report:#}");
    assert!(report["acts"].as_u64() > Some(0), "{report:#}");
    assert!(report["answers"].as_u64() > Some(100), "{report:#}");
}

#[test]
fn without_holding_output_the_soak_notices() {
    let (passed, report, _) = report::of(&[
        "soak",
        "--minutes",
        "3",
        "--break",
        "hold",
        "--only",
        "kill,host,crash",
    ]);
    assert!(!passed, "{report:#}");
    let found = report["found"].as_str().unwrap_or_default();
    // An answer that was lost, or a guest that is behind what its client has heard of it.
    let noticed = ["not linearizable", "a connection to", "answers of"];
    assert!(noticed.iter().any(|n| found.contains(n)), "{report:#}");
    let events = report["events"].as_array().map_or(0, Vec::len);
    assert!(events > 0, "the order of events is named: {report:#}");
}
