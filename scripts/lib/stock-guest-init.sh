#!/bin/sh
# First process of the stock guest that scripts/stock-guest builds: an ordinary small Linux system with a redis server,
# or PostgreSQL's.
# It knows nothing of the VMM it runs in. The kernel command line says what to do:
#   us.ip=A.B.C.D/N   address of the first network card (default 10.77.0.2/24)
#   us.gw=A.B.C.D     default route (default: none)
#   us.aof=1          redis keeps an append-only file in /data; us.fsync=always|everysec|no (default everysec)
#   us.service=postgres  not redis: the PostgreSQL that is on the first disk (scripts/stock-guest postgres). When it ends,
#                        by a signal for instance, the disk is unmounted and the machine switched off
#   us.shell=1        a shell on the console
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

say() { echo "stock-guest: $*"; }
fail() {
    say "FAILED: $*"
    reboot -f
}
argument() { # NAME DEFAULT
    for word in $(cat /proc/cmdline); do
        case "$word" in "$1="*) echo "${word#*=}" && return ;; esac
    done
    echo "$2"
}

say "loading modules"
while read -r module; do
    # Hardware variants of the checksum are there for those processors that have them.
    insmod "/modules/$module" 2>/dev/null || case "$module" in crc32c*) ;; *) say "cannot load $module" ;; esac
done </modules/list

echo 1 >/proc/sys/vm/overcommit_memory
ip link set lo up
mkdir -p /data
if [ -b /dev/vda ]; then
    mount -t ext4 /dev/vda /data || fail "cannot mount /dev/vda"
    say "disk mounted at /data"
fi

card=''
for tries in 1 2 3 4 5 6 7 8 9 10; do
    for path in /sys/class/net/*; do
        name="${path##*/}"
        [ "$name" = lo ] || card="${card:-$name}"
    done
    [ -z "$card" ] || break
    usleep 200000
done
[ -n "$card" ] || fail "there is no network card"
ip addr add "$(argument us.ip 10.77.0.2/24)" dev "$card" || fail "us.ip is no address"
ip link set "$card" up
gateway="$(argument us.gw '')"
[ -z "$gateway" ] || ip route add default via "$gateway"

redis_starts() {
    aof=no
    [ "$(argument us.aof 0)" != 1 ] || aof=yes
    say "starting redis, appendonly $aof"
    redis-server --bind 0.0.0.0 --port 6379 --protected-mode no --save '' --daemonize no --dir /data \
        --appendonly "$aof" --appendfsync "$(argument us.fsync everysec)" --loglevel warning --ignore-warnings ARM64-COW-BUG &
}
redis_answers() {
    # Reading an old append-only file answers -LOADING.
    answer="$(printf 'PING\r\n' | timeout 5 nc 127.0.0.1 6379 2>/dev/null | head -n 1)"
    case "$answer" in *PONG*) ;; *) false ;; esac
}

postgres_starts() {
    [ -d /data/pgdata ] || fail "there is no PostgreSQL on the first disk"
    say "starting PostgreSQL"
    mount -t proc proc /data/proc
    mount -t devtmpfs dev /data/dev
    mkdir -p /data/dev/shm
    mount -t tmpfs -o mode=1777 shm /data/dev/shm
    chroot /data /bin/busybox su postgres -c 'exec /bin/postgres -D /pgdata' &
}
postgres_answers() { chroot /data /bin/pg_isready -q -h 127.0.0.1 -U postgres; }

service="$(argument us.service redis)"
case "$service" in
redis) port=6379 ;;
postgres) port=5432 ;;
*) fail "us.service=$service is not known" ;;
esac
"${service}_starts"
server=$!
until "${service}_answers"; do
    kill -0 $server 2>/dev/null || fail "$service did not start"
    usleep 100000
done
say "ready $(argument us.ip 10.77.0.2/24) port $port cpus $(grep -c ^processor /proc/cpuinfo)"

if [ "$(argument us.shell 0)" = 1 ]; then
    while :; do setsid cttyhack sh; done &
fi
wait $server
status=$?
[ "$service" = postgres ] && [ $status -eq 0 ] || fail "$service ended with status $status"
umount /data/dev/shm && umount /data/dev && umount /data/proc && umount /data || fail "the disk cannot be unmounted"
say "the disk is unmounted"
poweroff -f
