# How the workspace's Rust tests are run: here, or inside the emulated KVM host. Sourced after debian.sh by scripts
# whose working directory is the workspace.
# shellcheck shell=bash

# Packages whose tests need neither /dev/kvm nor /dev/net/tun.
NO_KVM_PACKAGES=(checkpoint diskbuf chain)
TIER2_PACKAGE=understudy-tests
TIER2_TEST=tier2

# custom_harness: "PACKAGE TEST" lines of test programs that have a main of their own. They run all their cases by
# themselves and do not speak the protocol that cargo-nextest uses.
custom_harness() {
    local manifest
    for manifest in */Cargo.toml; do
        awk -F'"' '
            /^\[/ { section = $0 }
            section == "[package]" && /^name *=/ { package = $2 }
            section == "[[test]]" && /^name *=/ { test = $2 }
            section == "[[test]]" && /^harness *= *false/ { print package, test }
        ' "$manifest"
    done
}

# run_here [PACKAGE...]: the tests of these packages, or of all, on this machine.
run_here() {
    local selection=() package test filter='none()' wanted status=0
    for package in "$@"; do selection+=(-p "$package"); done
    [ ${#selection[@]} -gt 0 ] || selection=(--workspace)
    if ! cargo nextest --version >/dev/null 2>&1; then
        cargo test "${selection[@]}" --locked --lib --bins --tests --no-fail-fast
        return
    fi
    while read -r package test; do
        filter+=" + binary_id($package::$test)"
    done < <(custom_harness)
    cargo nextest run "${selection[@]}" --locked --no-fail-fast --no-tests=pass -E "not ($filter)" || status=$?
    while read -r package test; do
        wanted=''
        [ $# -gt 0 ] || wanted=1
        [[ " $* " != *" $package "* ]] || wanted=1
        [ -z "$wanted" ] || cargo test --locked -p "$package" --test "$test" || status=$?
    done < <(custom_harness)
    return "$status"
}

# test_programs ARGS...: builds tests without running them; prints "DIRECTORY PROGRAM" per test program, DIRECTORY
# being its package's, where cargo would run it.
test_programs() {
    cargo test --locked --no-run --message-format=json "$@" |
        sed -n 's/.*"manifest_path":"\([^"]*\)\/Cargo.toml".*"profile":{[^}]*"test":true}.*"executable":"\([^"]*\)".*/\1 \2/p'
}

# run_in_kvm_host: the tests that need KVM, one program after the other in one emulated host.
run_in_kvm_host() {
    local package selection=() list script
    for package in $(sed -n 's/^members = \[\(.*\)\]/\1/p' Cargo.toml | tr -d '",'); do
        [[ " ${NO_KVM_PACKAGES[*]} " == *" $package "* ]] || selection+=(-p "$(package_name "$package")")
    done
    list="$(test_programs "${selection[@]}" --lib --bins --tests)"
    [ -n "$list" ] || {
        say "no test programs were built"
        return 1
    }
    script='status=0
while read -r dir program; do
    printf "\n     Running %s\n" "$program"
    cd "$dir" && "$program" --test-threads=1 </dev/null || { status=1; echo "FAILED: $program"; }
done <<END
$1
END
exit $status'
    scripts/kvm-host --timeout 2400 --mem 4096 bash -c "$script" tests "$list"
}

package_name() { awk -F'"' '/^name *=/ { print $2; exit }' "$1/Cargo.toml"; }

# run_tier2: the whole-system tests with stock guests. The test program is built here and run inside the emulated host,
# which is told by variables where the program under test, the guest and its disks are.
run_tier2() {
    local list program VMLINUZ INITRD PG_DISK PG_BIN PG_LIB work status=0
    [ -e "tests/tests/$TIER2_TEST/main.rs" ] || {
        say "there is no tests/tests/$TIER2_TEST/main.rs: tier 2 has nothing to run"
        return 1
    }
    # Optimised: emulation costs enough.
    cargo build --release --locked -p agent
    list="$(test_programs --release -p "$TIER2_PACKAGE" --test "$TIER2_TEST")"
    program="${list#* }"
    [ -x "$program" ] || {
        say "cargo did not say where the test program is"
        return 1
    }
    eval "$(scripts/stock-guest)"
    [ -r "${VMLINUZ:-}" ] && [ -r "${INITRD:-}" ] || {
        say "there is no stock guest"
        return 1
    }
    eval "$(scripts/stock-guest postgres)"
    [ -r "${PG_DISK:-}" ] && [ -d "${PG_BIN:-}" ] || {
        say "there is no disk with PostgreSQL"
        return 1
    }
    work="$(mktemp -d "${TMPDIR:-/tmp}/tier2.XXXXXX")"
    scripts/stock-guest disk "$work/disk.raw" 64M
    # Each case has an emulated host of its own: what one leaves behind cannot be the next one's trouble.
    local case
    for case in $("$program" --list --include-ignored --format terse | sed -n 's/: test$//p'); do
        UNDERSTUDY_BIN="$(target_dir)/release/understudy" \
            UNDERSTUDY_STOCK_VMLINUZ="$VMLINUZ" UNDERSTUDY_STOCK_INITRD="$INITRD" \
            UNDERSTUDY_STOCK_DISK="$work/disk.raw" \
            UNDERSTUDY_PG_DISK="$PG_DISK" UNDERSTUDY_PG_BIN="$PG_BIN" UNDERSTUDY_PG_LIB="$PG_LIB" \
            scripts/kvm-host --cpus 2 --mem 4096 --timeout 900 \
            "$program" --include-ignored --test-threads=1 --exact "$case" || status=1
    done
    rm -rf "$work"
    return "$status"
}

target_dir() {
    cargo metadata --locked --no-deps --format-version 1 | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p'
}
