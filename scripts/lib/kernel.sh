# Debian kernels and initial ram disks, unpacked and built in the cache. Sourced after debian.sh.
# shellcheck shell=bash

# Module directories that no test host or guest needs: most of the package's size.
UNWANTED_MODULES='sound drivers/gpu drivers/media drivers/staging drivers/infiniband drivers/iio drivers/scsi
    drivers/net/wireless drivers/net/ethernet drivers/usb drivers/input drivers/hwmon drivers/mtd drivers/isdn
    drivers/comedi drivers/bluetooth drivers/nfc drivers/hid drivers/mfd drivers/platform drivers/video'

# kernel_of METAPACKAGE: prints the directory of the kernel that it stands for, with vmlinuz, release (its version) and
# lib/modules with a modules.dep.
kernel_of() {
    local package version dir
    candidate "$1" >/dev/null || return 1
    package="$(apt-cache depends "$1" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)"
    [ -n "$package" ] || {
        say "$1 does not depend on a kernel package"
        return 1
    }
    version="$(candidate "$package")" || return 1
    dir="$(cache_root)/kernels/${package}_${version//[^A-Za-z0-9._+-]/-}"
    [ -d "$dir" ] || with_lock kernels unpack_kernel "$dir" "$package" || return 1
    printf '%s' "$dir"
}

unpack_kernel() {
    local dir="$1" package="$2" work release busybox unwanted
    [ ! -d "$dir" ] || return 0
    busybox="$(busybox_path)" || return 1
    mkdir -p "${dir%/*}"
    work="$(mktemp -d "${dir%/*}/.new.XXXXXX")"
    chmod 755 "$work"
    mkdir "$work/debs" "$work/root" "$work/kernel"
    say "fetching $package"
    if ! { download "$work/debs" "$package" && dpkg -x "$work"/debs/*.deb "$work/root"; }; then
        rm -rf "$work"
        return 1
    fi
    # /lib is /usr/lib in newer packages.
    [ -d "$work/root/lib/modules" ] || mv "$work/root/usr/lib" "$work/root/lib"
    release="$(ls "$work/root/lib/modules")"
    mv "$work/root/boot/vmlinuz-$release" "$work/kernel/vmlinuz"
    printf '%s' "$release" >"$work/kernel/release"
    mkdir -p "$work/kernel/lib"
    mv "$work/root/lib/modules" "$work/kernel/lib/modules"
    for unwanted in $UNWANTED_MODULES; do rm -rf "$work/kernel/lib/modules/$release/kernel/$unwanted"; done
    find "$work/kernel/lib/modules" -name '*.ko.xz' -exec xz -d {} +
    "$busybox" depmod -b "$work/kernel" "$release"
    sort_modules_dep "$work/kernel/lib/modules/$release/modules.dep"
    mv "$work/kernel" "$dir"
    rm -rf "$work"
}

# sort_modules_dep FILE: busybox's depmod lists a module's dependencies in no order. Afterwards each line lists them
# last first, as modprobe loads them.
sort_modules_dep() {
    awk -F': *' '
        { name[NR] = $1; deps[$1] = $2 }
        function visit(m, top,    list, n, i) {
            if (seen[m] == top) return
            seen[m] = top
            n = split(deps[m], list, " ")
            for (i = 1; i <= n; i++) visit(list[i], top)
            if (m != top) order = " " m order
        }
        END { for (k = 1; k <= NR; k++) { order = ""; visit(name[k], name[k]); print name[k] ":" order } }
    ' "$1" >"$1.sorted"
    mv "$1.sorted" "$1"
}

# modules_in_order KERNEL_DIR NAME...: the module files to load for these modules, in an order that works, relative to
# the kernel's module directory. Modules built into the kernel are left out; unknown ones are an error.
modules_in_order() {
    local kernel="$1" dir
    shift
    dir="$kernel/lib/modules/$(cat "$kernel/release")"
    awk -F': *' -v wanted="$*" -v me="$me" '
        function base(path) { sub(/.*\//, "", path); sub(/\.ko.*$/, "", path); gsub(/-/, "_", path); return path }
        FILENAME ~ /modules\.builtin$/ { builtin[base($1)] = 1; next }
        { file[base($1)] = $1; deps[$1] = $2 }
        function emit(path) { if (!(path in done)) { done[path] = 1; print path } }
        END {
            n = split(wanted, names, " ")
            for (i = 1; i <= n; i++) {
                name = names[i]; gsub(/-/, "_", name)
                if (name in file) {
                    m = split(deps[file[name]], list, " ")
                    for (j = m; j >= 1; j--) emit(list[j])
                    emit(file[name])
                } else if (!(name in builtin)) {
                    print me ": the kernel has no module " names[i] > "/dev/stderr"; exit 1
                }
            }
        }
    ' "$dir/modules.builtin" "$dir/modules.dep"
}

# pack_initrd TREE OUTPUT: the tree as a gzipped cpio archive.
pack_initrd() {
    local busybox
    busybox="$(busybox_path)" || return 1
    # Sorted and without names of this machine's users, so that the same tree gives the same archive.
    (cd "$1" && find . | LC_ALL=C sort | "$busybox" cpio -o -H newc -R 0:0 2>/dev/null) | gzip -n -1 >"$2"
}

# base_tree TREE KERNEL INIT NAME...: a tree with busybox, the modules under modules/ with modules/list naming them in
# order, and INIT as /init.
base_tree() {
    local tree="$1" kernel="$2" init="$3" release busybox module list
    shift 3
    release="$(cat "$kernel/release")"
    busybox="$(busybox_path)" || return 1
    list="$(modules_in_order "$kernel" "$@")" || return 1
    mkdir -p "$tree"/{bin,sbin,dev,proc,sys,run,tmp,modules}
    cp "$busybox" "$tree/bin/busybox"
    ln -s busybox "$tree/bin/sh"
    ln -s ../bin/busybox "$tree/sbin/modprobe"
    : >"$tree/modules/list"
    for module in $list; do
        cp "$kernel/lib/modules/$release/$module" "$tree/modules/"
        printf '%s\n' "${module##*/}" >>"$tree/modules/list"
    done
    cp "$init" "$tree/init"
    chmod 755 "$tree/init"
}

# state_of FILE...: changes when the package lists, the installed packages or these files do. What a script has worked
# out is remembered under this name, because asking apt takes seconds.
state_of() {
    {
        stat -c '%n %Y' /var/lib/apt/lists /etc/apt/sources.list /etc/apt/sources.list.d /var/lib/dpkg/status 2>/dev/null || true
        cat "$@"
    } | sha256sum | cut -c1-16
}
