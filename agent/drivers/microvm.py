"""A process with `isolation: vm`: its guest's init, and what that is told, as files of an archive on a disk.

Pure: owns the translation alone. `agent.microvms` makes the guest's disk from the task's image; the guest itself is as
`agent.drivers.vm` has it, with lines for the workload's output and for how it ended, and some for terminals. The guest
keeps what it is told in memory: secrets are never on a disk that it, or the node, writes.
"""

import shlex
import signal
from collections.abc import Mapping

from agent.belongings.artifacts import ARTIFACTS
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
TOLD_DISK, ARTIFACTS_DISK = "outrider.told", "outrider.artifacts"  # serials: no volume's name has a dot
RENEW, TERMINAL = "/renew", "/terminal"  # programs for the agent to run in there: see the texts below
TERMINALS = tuple(f"terminal{number}" for number in range(4))  # lines, for one conversation at a time each
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
for disk in /sys/block/vd*; do
  [ "$(cat "$disk/serial")" != @told@ ] || cpio -idu < "/dev/${disk##*/}" 2>/dev/null
done
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
mkdir -p /dev/pts /dev/shm /dev/outrider
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount --rbind /dev /root/dev
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

for each in secrets templates; do
  [ -e "/given/$each" ] || continue
  chown -R "$OWNER" "/given/$each"
  mkdir -p "/root/$each" && mount --bind "/given/$each" "/root/$each" && mount -o remount,bind,ro "/root/$each" || \
    fail "/$each of its image is no directory"
done

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
""".replace("@told@", TOLD_DISK)

# A file of /secrets or /templates that changed: its path below /given, and what it holds now as input.
_RENEW = """#!/bin/busybox sh
export PATH=/bin
. /given/settings
target="/given/$1"
mkdir -p "${target%/*}" && cat > /given/.new && chown "$OWNER" /given/.new && chmod 400 /given/.new && \
  mv /given/.new "$target"
"""

# A terminal on the line $1, for the command $3, quoted; the code at its end between NULs, with the word $2.
_TERMINAL = """#!/bin/busybox sh
export PATH=/bin LINE="$1" WORD="$2" COMMAND="$3"
for port in /sys/class/virtio-ports/*; do
  [ "$(cat "$port/name")" != "$LINE" ] || device="/dev/${port##*/}"
done
# One alone has the line: the server of a conversation that broke off may not have seen that yet.
before="$(cat "/run/$LINE" 2>/dev/null)"
while [ "$(cat "/proc/$before/comm" 2>/dev/null)" = telnetd ]; do kill "$before"; usleep 10000; done
echo "$$" > "/run/$LINE"
exec telnetd -i -l /session 0<> "$device" 1>&0
"""

_SESSION = """#!/bin/busybox sh
. /given/settings
chown "$OWNER" "$(tty)"
trap : INT QUIT  # what is typed is for the command
export TERMINAL=xterm-256color
eval "/given/inside $COMMAND"
code=$?
stty raw -echo
printf '\\0%s %s\\0' "$WORD" "$code"
read -r _  # until whoever listens has heard it, and hangs up
"""


def initrd_files() -> tuple[Entry, ...]:
    """What is the same in every such guest, beside busybox, modules and the guest's agent."""
    return (
        *(directory(path) for path in ("dev", "proc", "sys", "root", "run", "tmp")),
        regular("init", _INIT.encode(), mode=0o755),
        regular(RENEW.lstrip("/"), _RENEW.encode(), mode=0o755),
        regular(TERMINAL.lstrip("/"), _TERMINAL.encode(), mode=0o755),
        regular("session", _SESSION.encode(), mode=0o755),
    )


def given(task: Task, process: SandboxSpec, belongings: Mapping[str, bytes]) -> tuple[Entry, ...]:
    """What one guest is told. `process`: the task as a sandbox would run it; `belongings`: path below / -> content.

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
    press = f"#!/bin/sh\n{to_workload(signal.Signals[task.kill_signal])}\n"
    disks = [*map(_volume, task.volumes)]
    if task.artifacts:
        disks.append(f"{ARTIFACTS_DISK} ro {ARTIFACTS}\n")
    files = (
        regular("given/settings", "".join(f"{name}={shlex.quote(text)}\n" for name, text in settings.items()).encode()),
        regular("given/volumes", "".join(disks).encode()),
        regular("given/inside", _inside(process, owner).encode(), mode=0o755),
        regular("given/run", f"exec {INSIDE} {shlex.join(process.argv)}\n".encode()),
        regular("etc/acpi/PWRF/00000080", press.encode(), mode=0o755),
        *(regular(f"given/task/{safe_path(file.path)}", file.content, mode=file.mode & 0o777) for file in task.files),
        *(regular(f"given/{path}", content, mode=0o400) for path, content in belongings.items()),
    )
    return with_parents((directory("given/task"), *files))


def to_workload(number: int) -> str:
    """A command for the guest's own shell."""
    return f"kill -{int(number)} $(cat /workload)"


def ended(text: str) -> tuple[int, bool] | None:
    """The workload's exit code as its guest told it, and whether it was killed for want of memory. None: it did not."""
    word = text.strip()
    if word == OUT_OF_MEMORY:
        return 128 + signal.SIGKILL, True
    return (int(word), False) if word.isdecimal() and int(word) < _CODES else None


def _inside(process: SandboxSpec, owner: str) -> str:
    """A script: in the image's root, as the workload's user, with its environment, and with no way to more rights."""
    env = shlex.join(f"{name}={value}" for name, value in process.env.items())
    terminal = '${TERMINAL:+"TERM=$TERMINAL"}'
    # Whoever runs it gives the command: here it is `$@` of the first shell, and of the second.
    as_user = f"cd {shlex.quote(process.cwd)} || exit 126; command=$1; shift\n"
    as_user += (
        f'exec {_BUSYBOX} setpriv --nnp {_BUSYBOX} start-stop-daemon -S -p /none -c {owner} -a "$command" -- "$@"'
    )
    return f'#!/bin/sh\nexec env -i {env} {terminal} chroot {ROOT} {_BUSYBOX} sh -c {shlex.quote(as_user)} sh "$@"\n'


def _volume(use: VolumeUse) -> str:
    return f"{use.volume[:_SERIAL_CHARS_MAX]} {'ro' if use.read_only else 'rw'} {use.target}\n"
