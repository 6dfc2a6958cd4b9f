//! Tier 2: stock Debian guests protected by agents on three hosts (network namespaces), on an emulated KVM host.
//! `tests/stock/README.md` says how this program is run and what it is given; a plain `cargo test` leaves it out.

mod pgbench;
mod postgres;
mod redis;
mod unpacked;

/// What a variable says, or `default`.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|e| panic!("{name}={text:?}: {e}"))
    })
}
