//! The soak itself, for a short time: that it passes, and that it can fail.

use std::process::{Command, Stdio};

use understudy_tests::{require_everything, serial::turn};

use crate::PROGRAM;

fn soak(args: &[&str]) -> (bool, serde_json::Value, String) {
    let _turn = turn();
    require_everything();
    let output = Command::new(PROGRAM)
        .args(["soak", "--json"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("running the soak");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let text = String::from_utf8_lossy(&output.stdout);
    let report = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}\n{errors}"));
    (output.status.success(), report, errors)
}

#[test]
fn a_short_soak_finds_nothing() {
    let (passed, report, errors) = soak(&["--minutes", "0.4"]);
    assert!(passed, "{errors}\n{report:#}");
    assert!(report["acts"].as_u64() > Some(0), "{report:#}");
    assert!(report["answers"].as_u64() > Some(100), "{report:#}");
}

#[test]
fn without_holding_output_the_soak_notices() {
    let only = ["--only", "kill,host,crash"];
    let (passed, report, _) = soak(&["--minutes", "3", "--break", "hold", only[0], only[1]]);
    assert!(!passed, "{report:#}");
    let found = report["found"].as_str().unwrap_or_default();
    // An answer that was lost, or a guest that is behind what its client has heard of it.
    let noticed = ["not linearizable", "a connection to", "answers of"];
    assert!(noticed.iter().any(|n| found.contains(n)), "{report:#}");
    let events = report["events"].as_array().map_or(0, Vec::len);
    assert!(events > 0, "the order of events is named: {report:#}");
}
