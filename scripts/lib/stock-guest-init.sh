#!/bin/sh
# First process of the stock guest that scripts/stock-guest builds: an ordinary small Linux system with a redis server.
# It knows nothing of the VMM it runs in. The kernel command line says what to do:
#   us.ip=A.B.C.D/N   address of the first network card (default 10.77.0.2/24)
#   us.gw=A.B.C.D     default route (default: none)
#   us.aof=1          redis keeps an append-only file in /data; us.fsync=always|everysec|no (default everysec)
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

aof=no
[ "$(argument us.aof 0)" != 1 ] || aof=yes
say "starting redis, appendonly $aof"
redis-server --bind 0.0.0.0 --port 6379 --protected-mode no --save '' --daemonize no --dir /data \
    --appendonly "$aof" --appendfsync "$(argument us.fsync everysec)" --loglevel warning --ignore-warnings ARM64-COW-BUG &
redis=$!
while :; do
    # Reading an old append-only file answers -LOADING.
    answer="$(printf 'PING\r\n' | timeout 5 nc 127.0.0.1 6379 2>/dev/null | head -n 1)"
    case "$answer" in *PONG*) break ;; esac
    kill -0 $redis 2>/dev/null || fail "redis did not start"
    usleep 100000
done
say "ready $(argument us.ip 10.77.0.2/24) port 6379 cpus $(grep -c ^processor /proc/cpuinfo)"

if [ "$(argument us.shell 0)" = 1 ]; then
    while :; do setsid cttyhack sh; done &
fi
wait $redis
fail "redis ended with status $?"
