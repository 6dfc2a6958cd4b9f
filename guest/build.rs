//! Builds the probe guest's freestanding image (`image/`, a package of its own) with the cargo at hand and leaves its
//! ELF in OUT_DIR for `include_bytes!`.

use std::env;
use std::path::PathBuf;
use std::process::{Command, exit};

fn main() {
    let manifest = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(var("OUT_DIR"));
    let image = manifest.join("image");
    for input in [
        "image/src",
        "image/Cargo.toml",
        "image/Cargo.lock",
        "image/image.ld",
        "src/proto.rs",
        "build.rs",
    ] {
        println!("cargo::rerun-if-changed={}", manifest.join(input).display());
    }

    // The guest is x86-64 whatever the host is; rust-std of this very target is what every x86-64 toolchain has.
    let target = "x86_64-unknown-linux-gnu";
    let flags = [
        "-Crelocation-model=static".to_owned(),
        "-Ctarget-cpu=x86-64".to_owned(),
        "-Cforce-unwind-tables=no".to_owned(),
        "-Clink-arg=-nostartfiles".to_owned(),
        "-Clink-arg=-nostdlib".to_owned(),
        "-Clink-arg=-static".to_owned(),
        "-Clink-arg=-no-pie".to_owned(),
        "-Clink-arg=-Wl,--build-id=none".to_owned(),
        "-Clink-arg=-Wl,-z,noexecstack".to_owned(),
        format!("-Clink-arg=-Wl,-T,{}", image.join("image.ld").display()),
    ];
    let target_dir = out.join("image");
    let mut cargo = Command::new(var("CARGO"));
    cargo
        .current_dir(&image)
        .args([
            "build",
            "--release",
            "--locked",
            "--target",
            target,
            "--target-dir",
        ])
        .arg(&target_dir);
    // The outer build's settings (flags, profiles, clippy's or a coverage tool's wrappers, smoltcp's sizes) are not
    // meant for the guest. What says where to find crates and how to link (CARGO_HOME, CARGO_NET_*, *_LINKER) stays.
    for (name, _) in env::vars_os() {
        let n = name.to_string_lossy();
        let ours = n == "RUSTFLAGS"
            || n == "RUSTDOCFLAGS"
            || n == "RUSTC_WRAPPER"
            || n == "RUSTC_WORKSPACE_WRAPPER"
            || n == "CLIPPY_ARGS"
            || n == "CLIPPY_CONF_DIR"
            || n == "CARGO_TARGET_DIR"
            || n == "CARGO_INCREMENTAL"
            || n == "CARGO_ENCODED_RUSTFLAGS"
            || n.starts_with("CARGO_BUILD_")
            || n.starts_with("CARGO_PROFILE_")
            || n.starts_with("CARGO_CFG_")
            || n.starts_with("CARGO_FEATURE_")
            || n.starts_with("SMOLTCP_")
            || (n.starts_with("CARGO_TARGET_") && n.ends_with("_RUSTFLAGS"));
        if ours {
            cargo.env_remove(&name);
        }
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    match cargo.status() {
        Ok(s) if s.success() => {}
        Ok(s) => fail(&format!(
            "building the probe guest's image failed ({s}); its messages are above"
        )),
        Err(e) => fail(&format!(
            "cannot start cargo for the probe guest's image: {e}"
        )),
    }
    let elf = target_dir.join(target).join("release").join("probe-image");
    println!("cargo::rustc-env=PROBE_IMAGE={}", elf.display());
}

fn var(name: &str) -> String {
    env::var(name).unwrap_or_else(|e| fail(&format!("{name}: {e}")))
}

fn fail(why: &str) -> ! {
    println!("cargo::error={why}");
    exit(1);
}
