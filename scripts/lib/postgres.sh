# PostgreSQL for the stock guest: Debian's packages, unpacked, and a disk image with the server and a database cluster.
# Sourced after debian.sh and kernel.sh by scripts/stock-guest, whose add_program it uses.
# shellcheck shell=bash

# Rows of pgbench_accounts: fewer than pgbench makes, for checkers that read every page under emulation.
PG_ACCOUNTS=10000

# postgres_version: the major version that Debian's metapackage stands for.
postgres_version() {
    candidate postgresql >/dev/null || return 1
    apt-cache depends postgresql | sed -n 's/^ *Depends: postgresql-\([0-9]*\)$/\1/p' | head -n 1
}

# postgres_packages VERSION: the server (pgbench is in it), the client programs, and those libraries that this machine
# does not have as they are needed. Left out are LLVM, which is for the just-in-time compiler, a module that nobody loads;
# what maintainer scripts need; and the C library, which has to be the one that the machine's loader belongs to.
postgres_packages() {
    printf 'postgresql-%s\npostgresql-client-%s\n' "$1" "$1"
    candidate "postgresql-$1" >/dev/null || return 1
    apt-get -s install --no-install-recommends "postgresql-$1" "postgresql-client-$1" 2>/dev/null |
        sed -n 's/^Inst \(lib[^ ]*\) .*/\1/p' | grep -vE '^lib(llvm|z3|perl|c6$|c-)|-(perl|dev|common)$' || true
}

# unprivileged COMMAND...: PostgreSQL refuses root, and users that the machine does not know.
unprivileged() {
    if [ "$(id -u)" -ne 0 ]; then "$@"; else setpriv --reuid=nobody --regid=nogroup --clear-groups "$@"; fi
}

# library_path ROOT: for programs that are unpacked there.
library_path() { printf '%s' "$1/usr/lib/x86_64-linux-gnu:$1/lib/x86_64-linux-gnu"; }

# pg ROOT VERSION PROGRAM ARGS...: one of the programs unpacked in ROOT.
pg() {
    local root="$1" program="$1/usr/lib/postgresql/$2/bin/$3"
    shift 3
    LD_LIBRARY_PATH="$(library_path "$root")" TZ=GMT LC_ALL=C unprivileged "$program" "$@"
}

# build_cluster ROOT VERSION DATA SOCKETS: a database cluster with checksums and pgbench's tables. SOCKETS is an empty
# directory with a short path.
build_cluster() {
    local root="$1" version="$2" data="$3" sockets="$4" status=0
    mkdir "$data"
    [ "$(id -u)" -ne 0 ] || chown nobody:nogroup "$data" "$sockets"
    pg "$root" "$version" initdb -D "$data" -U postgres -A trust -k --locale=C -E UTF8 --wal-segsize=4 --no-sync \
        --no-instructions || return 1
    # Small, because memory is; checkpoints as often as may be, so that a short test sees some.
    cat >>"$data/postgresql.conf" <<CONF
listen_addresses = '*'
unix_socket_directories = ''
max_connections = 20
shared_buffers = 8MB
min_wal_size = 8MB
max_wal_size = 32MB
checkpoint_timeout = 30s
huge_pages = off
jit = off
max_parallel_workers = 0
timezone = 'GMT'
log_timezone = 'GMT'
log_line_prefix = 'postgres[%p]: '
CONF
    echo "host all all 0.0.0.0/0 trust" >>"$data/pg_hba.conf"
    pg "$root" "$version" pg_ctl start -w -t 120 -D "$data" -o "-c listen_addresses= -k $sockets" -l "$data/build.log" || {
        cat "$data/build.log"
        return 1
    }
    {
        pg "$root" "$version" pgbench -h "$sockets" -U postgres -i -q postgres &&
            pg "$root" "$version" psql -h "$sockets" -U postgres -X -v ON_ERROR_STOP=1 postgres \
                -c "DELETE FROM pgbench_accounts WHERE aid > $PG_ACCOUNTS" -c 'VACUUM FULL ANALYZE pgbench_accounts' \
                -c 'CREATE EXTENSION amcheck'
    } || status=1
    pg "$root" "$version" pg_ctl stop -w -t 120 -m fast -D "$data" || status=1
    # What is left of the log of all this would be copied to every backup.
    [ "$status" -ne 0 ] || pg "$root" "$version" pg_resetwal -D "$data" || status=1
    rm -f "$data/build.log"
    return "$status"
}

# build_postgres_tree ROOT VERSION TREE SOCKETS: what is on the guest's disk: the server, programs that check it, busybox for a
# shell, the cluster.
build_postgres_tree() {
    local root="$1" version="$2" tree="$3" sockets="$4" lib="usr/lib/postgresql/$2" program
    mkdir -p "$tree"/{bin,dev,proc,etc,"$lib/bin","$lib/lib","usr/share/postgresql/$version"}
    cp "$(busybox_path)" "$tree/bin/busybox" || return 1
    ln -s busybox "$tree/bin/sh"
    # Where the server looks for its own files depends on where it is itself.
    for program in postgres pg_isready pg_amcheck pg_checksums pg_ctl psql; do
        add_program "$tree" "$root" "$root/$lib/bin/$program" "$program" || return 1
        mv "$tree/bin/$program" "$tree/$lib/bin/$program"
        ln -s "../$lib/bin/$program" "$tree/bin/$program"
    done
    cp "$root/$lib/lib"/{amcheck,plpgsql}.so "$tree/$lib/lib/" || return 1
    cp -r "$root/usr/share/postgresql/$version"/{timezonesets,extension} "$tree/usr/share/postgresql/$version/" || return 1
    build_cluster "$root" "$version" "$tree/pgdata" "$sockets" >"$tree.log" 2>&1 || {
        say "cannot make a database cluster:"
        tail -n 20 "$tree.log" >&2
        return 1
    }
    # The server's user in the guest is whoever it was here.
    printf 'root:x:0:0::/:/bin/sh\npostgres:x:%s::/:/bin/sh\n' "$(stat -c '%u:%g' "$tree/pgdata")" >"$tree/etc/passwd"
}

build_postgres_disk() { # ROOT VERSION OUTPUT
    local work status=0
    [ ! -e "$3" ] || return 0
    mkdir -p "${3%/*}"
    say "making a disk with PostgreSQL $2"
    # Not in the cache: the unprivileged user may have no way into root's.
    work="$(mktemp -d "${TMPDIR:-/tmp}/pg.XXXXXX")"
    chmod 755 "$work"
    mkdir "$work/s"
    rm -f "$3.new"
    cp -r "$1" "$work/root" && build_postgres_tree "$work/root" "$2" "$work/tree" "$work/s" &&
        disk "$3.new" 256M "$work/tree" && mv "$3.new" "$3" || status=1
    rm -rf "$work" "$3.new"
    return "$status"
}

# postgres_guest: see stock-guest's usage.
postgres_guest() {
    local version root packages key image known
    local parts=("$0" "$here/lib/postgres.sh" "$here/lib/kernel.sh" "$here/lib/debian.sh")
    require_packages util-linux:setpriv e2fsprogs:mke2fs || return 1
    known="$(cache_root)/stock-guest/known-postgres-$(state_of "${parts[@]}")"
    if [ -r "$known" ]; then { read -r version && read -r root && read -r image; } <"$known"; fi
    if [ ! -e "${image:-}" ] || [ ! -d "${root:-}" ]; then
        version="$(postgres_version)" && [ -n "$version" ] || {
            say "the package postgresql does not say which version it stands for"
            return 1
        }
        packages="$(postgres_packages "$version")" || return 1
        # shellcheck disable=SC2086 # one word each
        root="$(unpacked $packages)" || return 1
        key="$({
            printf '%s\n' "$root"
            cat "${parts[@]}"
            busybox_path
            dpkg-query -W libc6
        } | sha256sum | cut -c1-16)"
        image="$(cache_root)/stock-guest/postgres-$version-$key"
        with_lock stock-guest build_postgres_disk "$root" "$version" "$image" || return 1
        known="$(cache_root)/stock-guest/known-postgres-$(state_of "${parts[@]}")"
        printf '%s\n' "$version" "$root" "$image" >"$known.$$" && mv "$known.$$" "$known"
    fi
    # Quoted for eval.
    printf 'PG_DISK=%q\nPG_BIN=%q\nPG_LIB=%q\n' "$image" "$root/usr/lib/postgresql/$version/bin" \
        "$(library_path "$root")"
}
