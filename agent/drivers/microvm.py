"""A process with `isolation: vm`: what its guest is told, as files of an archive that its kernel unpacks, and its init.

Pure: owns the translation alone. `agent.microvms` makes the guest's disk from the task's image; the guest itself is as
`agent.drivers.vm` has it, with lines for the workload's output and for how it ended.
"""

import shlex
import signal

from agent.drivers.task_directory import safe_path
from agent.sandbox.spec import SandboxSpec
from outrider.initrd import Entry, directory, regular, with_parents
from outrider.model.belongings import VolumeUse
from outrider.model.job import Task
from outrider.model.mesh import DNS_ADDRESS, GUEST_ADDRESS, GUEST_GATEWAY, GUEST_PREFIX

EXIT = "exit"  # in the emulator's directory: how the workload ended, as the guest says
ROOT = "/root"  # where the guest's own agent, which is outside of it, finds the image
INSIDE = "/given/inside"  # runs a command as the workload runs
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_balloon", "button", "evdev", "ext4")
# The lines' names, in the guest, and where each leads: the emulator's own output, or a file.
LINES = {"outrider.out": "/dev/fd/1", "outrider.err": "/dev/fd/2", "outrider.exit": f"/vm/{EXIT}"}
KERNEL_ARGUMENTS = "quiet loglevel=0"  # a panic is told all the same
OUT_OF_MEMORY = "oom"
_SERIAL_CHARS_MAX = 20  # as `agent.drivers.vm` has it
_CODES = 256
_BUSYBOX = "/dev/outrider/busybox"  # seen from the image

_INIT = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
$B --install -s /bin
export PATH=/bin:/usr/sbin
for module in $(cat /modules/order); do insmod "/modules/$module.ko"; done
. /given/settings
for port in /sys/class/virtio-ports/*; do
  case "$(cat "$port/name")" in
    outrider.out) OUT=/dev/${port##*/};;
    outrider.err) ERR=/dev/${port##*/};;
    outrider.exit) EXIT=/dev/${port##*/};;
    org.qemu.guest_agent.0) AGENT=/dev/${port##*/};;
  esac
done
end() { echo "$1" > "$EXIT"; sync; poweroff -f; }
fail() { echo "outrider: $1" > "$ERR"; end 1; }

mount -t ext4 /dev/vda /root || fail "its root does not mount"
for each in dev proc sys tmp etc task; do
  mkdir -p "/root/$each" || fail "/$each of its image is no directory"
done
mount -t proc proc /root/proc
mount -t sysfs -o ro sys /root/sys
mount --bind /dev /root/dev
mkdir -p /dev/pts /dev/shm /dev/outrider
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=1777 tmp /root/tmp
cp /bin/busybox /dev/outrider/busybox

ip link set lo up
ip link set eth0 up
ip address add "$ADDRESS" dev eth0
ip route add default via "$GATEWAY"
arping -q -c 1 -w 1 -I eth0 "$GATEWAY" &
hostname "$HOST"
rm -f /root/etc/resolv.conf
echo "nameserver $NAMES" > /root/etc/resolv.conf
[ -e /root/etc/hosts ] || echo "127.0.0.1 localhost" > /root/etc/hosts

# Once: what the workload has made of its directory since is kept over its restarts.
if [ ! -e /root/task/.outrider ]; then
  cp -a /given/task/. /root/task/ && : > /root/task/.outrider || fail "its files do not fit on its disk"
  chown -R "$OWNER" /root/task
fi
while read -r serial options target; do
  for disk in /sys/block/vd*; do
    [ "$(cat "$disk/serial" 2>/dev/null)" = "$serial" ] || continue
    mkdir -p "/root$target"
    mount -t ext4 -o "$options" "/dev/${disk##*/}" "/root$target" || fail "the volume at $target does not mount"
    [ "$options" = ro ] || [ "$(stat -c %u "/root$target")" != 0 ] || chown "$OWNER" "/root$target"
  done
done < /given/volumes

mkfifo /dev/outrider/out /dev/outrider/err
chown "$OWNER" /dev/outrider/out /dev/outrider/err
cat < /dev/outrider/out > "$OUT" & copies=$!
cat < /dev/outrider/err > "$ERR" & copies="$copies $!"
sh /given/run < /dev/null > /dev/outrider/out 2> /dev/outrider/err & workload=$!
echo "$workload" > /workload
acpid -d -l /dev/null > /dev/null 2>&1 &
[ -x /usr/sbin/qemu-ga ] && qemu-ga -m virtio-serial -p "$AGENT" -t /run > /dev/null 2>&1 &
# Whoever sits down at the console gets a shell of the image, at a press of Enter: before, nothing is said there.
while true; do
  read -r _ && setsid cttyhack /given/inside sh || sleep 5
done < /dev/ttyS0 > /dev/ttyS0 2>&1 &
wait "$workload"
code=$?
kill -0 "$workload" 2>/dev/null || timeout 5 sh -c "while kill -0 $copies 2>/dev/null; do usleep 10000; done"
[ "$code" = 137 ] && dmesg | grep -q "Out of memory: Killed process $workload " && code=oom
end "$code"
"""


def initrd_files() -> tuple[Entry, ...]:
    """What is the same in every such guest, beside busybox, modules and the guest's agent."""
    return (
        *(directory(path) for path in ("dev", "proc", "sys", "root", "run", "tmp")),
        regular("init", _INIT.encode(), mode=0o755),
    )


def given(task: Task, process: SandboxSpec) -> tuple[Entry, ...]:
    """What one guest is told. `process`: the task as a sandbox would run it.

    Raises InputError for files that lead out of the task's directory.
    """
    owner = f"{process.user}:{process.group}"
    settings = {
        "OWNER": owner,
        "ADDRESS": f"{GUEST_ADDRESS}/{GUEST_PREFIX}",
        "GATEWAY": GUEST_GATEWAY,
        "NAMES": DNS_ADDRESS,
        "HOST": process.hostname,
    }
    press = f"#!/bin/sh\nkill -{signal.Signals[task.kill_signal].value} $(cat /workload)\n"
    files = (
        regular("given/settings", "".join(f"{name}={shlex.quote(text)}\n" for name, text in settings.items()).encode()),
        regular("given/volumes", "".join(map(_volume, task.volumes)).encode()),
        regular("given/inside", _inside(process, owner).encode(), mode=0o755),
        regular("given/run", f"exec {INSIDE} {shlex.join(process.argv)}\n".encode()),
        regular("etc/acpi/PWRF/00000080", press.encode(), mode=0o755),
        *(regular(f"given/task/{safe_path(file.path)}", file.content, mode=file.mode & 0o777) for file in task.files),
    )
    return with_parents((directory("given/task"), *files))


def ended(text: str) -> tuple[int, bool] | None:
    """The workload's exit code as its guest told it, and whether it was killed for want of memory. None: it did not."""
    word = text.strip()
    if word == OUT_OF_MEMORY:
        return 128 + signal.SIGKILL, True
    return (int(word), False) if word.isdecimal() and int(word) < _CODES else None


def _inside(process: SandboxSpec, owner: str) -> str:
    """A script: in the image's root, as the workload's user, with its environment, and with no way to more rights."""
    env = shlex.join(f"{name}={value}" for name, value in process.env.items())
    # Whoever runs it gives the command: here it is `$@` of the first shell, and of the second.
    as_user = f"cd {shlex.quote(process.cwd)} || exit 126; command=$1; shift\n"
    as_user += (
        f'exec {_BUSYBOX} setpriv --nnp {_BUSYBOX} start-stop-daemon -S -p /none -c {owner} -a "$command" -- "$@"'
    )
    return f'#!/bin/sh\nexec env -i {env} chroot {ROOT} {_BUSYBOX} sh -c {shlex.quote(as_user)} sh "$@"\n'


def _volume(use: VolumeUse) -> str:
    return f"{use.volume[:_SERIAL_CHARS_MAX]} {'ro' if use.read_only else 'rw'} {use.target}\n"
