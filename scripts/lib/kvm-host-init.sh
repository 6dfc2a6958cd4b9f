#!/bin/sh
# First process of the emulated KVM host that scripts/kvm-host starts. Its own messages go to the kernel's console;
# the command's output has ports of its own, so that neither ever mixes with the other.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

stop() {
    sync
    poweroff -f
    # The host sees QEMU end; this process must not, or the kernel panics first.
    while :; do sleep 1; done
}
fail() {
    echo "kvm-host: $*"
    [ -d /job/out ] && echo "$*" >/job/out/error
    stop
}

while read -r module; do
    insmod "/modules/$module" || echo "kvm-host: cannot load $module"
done </modules/list

share() { # TAG DIRECTORY OPTIONS
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2"
}
mkdir -p /job /lower /rw /new "/lib/modules/$(uname -r)"
share job /job cache=none || fail "cannot mount the job directory"
: >/job/out/booted
# The machine's own files. What changes on the machine meanwhile need not be seen here: shares are for that.
share root /lower ro,cache=loose || fail "cannot mount the machine's root"
# For modules asked for later, by the kernel or by modprobe.
share modules "/lib/modules/$(uname -r)" ro,cache=loose || fail "cannot mount the kernel's modules"
mount -t tmpfs -o size=60% rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work root /new || fail "cannot mount the overlay"

mkdir -p /new/proc /new/sys /new/dev /new/run /new/tmp
mount -t proc proc /new/proc
mount -t sysfs sysfs /new/sys
mount -t debugfs debugfs /new/sys/kernel/debug 2>/dev/null
mount -t cgroup2 cgroup /new/sys/fs/cgroup 2>/dev/null
mount -o bind /dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs -o mode=1777 shm /new/dev/shm
[ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
mount -t tmpfs -o mode=755 run /new/run
chmod 1777 /new/tmp
mkdir -p "/new/lib/modules/$(uname -r)" && mount -o bind "/lib/modules/$(uname -r)" "/new/lib/modules/$(uname -r)"
mkdir -p /run && ip link set lo up
hostname kvm-host
ulimit -n 65536

while read -r tag path; do
    mkdir -p "/new$path"
    share "$tag" "/new$path" cache=none || fail "cannot share $path"
done </job/shares

# Through pipes, because a virtio port can be opened only once and /dev/stdout has to work.
for port in /sys/class/virtio-ports/*; do
    ln -s "/dev/${port##*/}" "/port-$(cat "$port/name")"
done
[ -e /port-stdout ] && [ -e /port-stderr ] || fail "there are no ports for the output"
mkfifo /stdout /stderr
cat </stdout >/port-stdout &
out=$!
cat </stderr >/port-stderr &
err=$!
mkdir -p /new/run/kvm-host
cp /job/command /new/run/kvm-host/command
: >/job/out/started
# All processors but the first, as a mask: QEMU's TCG has every processor write the first one's SVM flags when it loads
# floating point state, without a lock. A nested guest that runs there loses nested paging or the masking of interrupts.
taskset "$(printf '%x' $(((1 << $(nproc)) - 2)))" chroot /new /bin/sh /run/kvm-host/command </dev/null >/stdout 2>/stderr
status=$?
# A process that the command left behind may hold the pipes for ever: what has been written by now is read within this
# time, what comes later is not the command's output.
tries=0
while kill -0 $out 2>/dev/null || kill -0 $err 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 20 ] || break
    usleep 100000
done
echo "$status" >/job/out/status
stop
