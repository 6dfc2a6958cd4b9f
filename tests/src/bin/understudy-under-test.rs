//! The program as the whole-system tests run it: `understudy`, with one mechanism switched off if `UNDERSTUDY_BREAK`
//! names it (see `agent::fault`).

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(name) = std::env::var_os("UNDERSTUDY_BREAK")
        && let Err(e) = agent::fault::set(&name.to_string_lossy())
    {
        eprintln!("UNDERSTUDY_BREAK: {e}");
        return ExitCode::FAILURE;
    }
    agent::main()
}
