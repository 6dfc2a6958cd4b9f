//! The program as an administrator runs it, with a report as JSON.

use std::process::{Command, Stdio};

use understudy_tests::{require_everything, serial::turn};

use crate::PROGRAM;

/// Runs it alone; whether it succeeded, its report, and what it said besides.
pub fn of(args: &[&str]) -> (bool, serde_json::Value, String) {
    let _turn = turn();
    require_everything();
    let output = Command::new(PROGRAM)
        .args(args)
        .arg("--json")
        .stdin(Stdio::null())
        .output()
        .expect("running the program");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let text = String::from_utf8_lossy(&output.stdout);
    let report = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}\n{errors}"));
    (output.status.success(), report, errors)
}
