//! The program `understudy`.

use std::process::ExitCode;

fn main() -> ExitCode {
    agent::main()
}
