//! The demo, as anybody would run it.

use std::process::{Command, Stdio};

use understudy_tests::{require_everything, serial::turn};

use crate::PROGRAM;

#[test]
fn the_demo_keeps_the_connection() {
    let _turn = turn();
    require_everything();
    let output = Command::new(PROGRAM)
        .args(["demo", "--json", "--seconds", "1"])
        .stdin(Stdio::null())
        .output()
        .expect("running the demo");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}\n{text}\n{errors}",
        output.status
    );
    let report: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}\n{errors}"));
    assert_eq!(report["connection_survived"], true, "{text}");
    assert_eq!(report["lost"], 0, "{text}");
    assert!(report["acknowledged"].as_u64() > Some(20), "{text}");
}
