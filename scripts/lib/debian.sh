# Debian packages for the scripts: what a script needs installed, and what it only unpacks into its cache.
# Sourced by bash, after `set -euo pipefail`. $me is the script's name for messages.
# shellcheck shell=bash

# Non-root users' PATH often lacks these, and mke2fs or ip live there.
PATH="$PATH:/usr/sbin:/sbin"

say() { printf '%s: %s\n' "$me" "$*" >&2; }

# Where everything that is built or unpacked is kept. Entries are named after package versions and content, appear by
# rename and never change afterwards, so that concurrent runs can share them without locks.
cache_root() { printf '%s/understudy' "${XDG_CACHE_HOME:-${HOME:?HOME is not set, and neither is XDG_CACHE_HOME}/.cache}"; }

# with_lock NAME COMMAND...: one builder of the same thing at a time.
with_lock() {
    local lock
    lock="$(cache_root)/$1.lock"
    shift
    mkdir -p "${lock%/*}"
    (
        flock 9
        "$@" 9>&-
    ) 9>"$lock"
}

# apt ARGS...: apt-get without questions; waits for another apt instead of failing.
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=600 -o APT::Sandbox::User=root \
        -o Acquire::Retries=2 "$@" </dev/null
}

# apt_update: fetches the package lists, once per run of the script and its children.
apt_update() {
    [ -z "${UNDERSTUDY_APT_UPDATED:-}" ] || return 0
    say "fetching the package lists"
    apt update >&2 || apt update >&2
    export UNDERSTUDY_APT_UPDATED=1
}

# require_packages PACKAGE:COMMAND...: sees to it that each command is there. Installs the packages when root,
# otherwise says which are missing.
require_packages() {
    local entry missing=()
    for entry in "$@"; do
        command -v "${entry#*:}" >/dev/null 2>&1 || missing+=("${entry%%:*}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "missing programs; install the Debian packages: ${missing[*]}"
        say "  sudo apt-get install --no-install-recommends ${missing[*]}"
        return 1
    fi
    say "installing ${missing[*]}"
    with_lock apt install_packages "${missing[@]}" || {
        say "cannot install ${missing[*]}"
        return 1
    }
    for entry in "$@"; do
        command -v "${entry#*:}" >/dev/null 2>&1 || {
            say "package ${entry%%:*} is installed, but there is no ${entry#*:}"
            return 1
        }
    done
}

install_packages() {
    apt install --no-install-recommends "$@" >&2 && return 0
    # Old package lists name versions that are gone.
    unset UNDERSTUDY_APT_UPDATED
    apt_update && apt install --no-install-recommends "$@" >&2
}

# candidate PACKAGE: its version in the package lists; fetches the lists if they are not there.
candidate() {
    local version
    command -v apt-cache >/dev/null || {
        say "this needs Debian's apt (to get $1)"
        return 1
    }
    version="$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p')"
    if [ -z "$version" ] || [ "$version" = "(none)" ]; then
        if [ "$(id -u)" -eq 0 ]; then
            apt_update
            version="$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p')"
        fi
    fi
    if [ -z "$version" ] || [ "$version" = "(none)" ]; then
        say "the package lists do not have $1: run apt-get update as root, and see that Debian's packages are among the sources"
        return 1
    fi
    printf '%s' "$version"
}

# download DIR PACKAGE...: .deb files into DIR. The lists may be older than the archive: then they are renewed.
download() {
    local dir="$1"
    shift
    (cd "$dir" && apt download "$@") >"$dir/download.log" 2>&1 && return 0
    if [ "$(id -u)" -eq 0 ]; then
        apt_update
        (cd "$dir" && apt download "$@") >"$dir/download.log" 2>&1 && return 0
    fi
    say "cannot download $*:"
    tail -n 5 "$dir/download.log" >&2
    return 1
}

# unpacked PACKAGE...: prints the cache directory that holds these packages' files, unpacked but not installed.
unpacked() {
    local package version key='' dir
    for package in "$@"; do
        version="$(candidate "$package")" || return 1
        key+="${key:+,}${package}_${version}"
    done
    # Two packages are enough to tell; more would make the name too long.
    if [ ${#key} -gt 150 ]; then key="$1-$(printf '%s' "$key" | sha256sum | cut -c1-16)"; fi
    dir="$(cache_root)/packages/${key//[^A-Za-z0-9._,+-]/-}"
    [ -d "$dir" ] || with_lock packages unpack "$dir" "$@" || return 1
    printf '%s' "$dir"
}

unpack() {
    local dir="$1" work deb
    shift
    [ ! -d "$dir" ] || return 0
    mkdir -p "${dir%/*}"
    work="$(mktemp -d "${dir%/*}/.new.XXXXXX")"
    chmod 755 "$work"
    mkdir "$work/debs" "$work/root"
    say "fetching $*"
    if ! download "$work/debs" "$@"; then
        rm -rf "$work"
        return 1
    fi
    for deb in "$work"/debs/*.deb; do
        dpkg -x "$deb" "$work/root" || {
            rm -rf "$work"
            return 1
        }
    done
    mv "$work/root" "$dir"
    rm -rf "$work"
}

# busybox_path: a statically linked busybox, whether or not one is installed.
busybox_path() {
    local dir
    dir="$(unpacked busybox-static)" || return 1
    if [ -x "$dir/bin/busybox" ]; then printf '%s' "$dir/bin/busybox"; else printf '%s' "$dir/usr/bin/busybox"; fi
}
