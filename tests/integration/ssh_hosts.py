"""Hosts for `outrider deploy`: each a real sshd in a network namespace and a mount namespace of its own, on one bridge.

What a deployment writes (/opt/outrider, /etc/outrider, /var/lib/outrider ...) is a directory of the host's own; the
kernel and /usr are the machine's. There is no systemd in them.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import yaml

NETWORK = "10.98.7"  # each bridge has a namespace of its own: two that stand at once may be alike
_OWN = ("/opt/outrider", "/etc/outrider", "/var/lib/outrider", "/var/log/outrider", "/usr/local/bin", "/var/tmp")  # noqa: S108
_ROOT = Path(__file__).parents[2]

# $1 the host's directory, $2 its address; mounts what is its own, and becomes sshd.
_HOST = """
set -eu
own=$1; address=$2; shift 2
for path in "$@"; do
  mkdir -p "$path" "$own$path"; mount --bind "$own$path" "$path"
done
[ ! -d /run/systemd ] || mount -t tmpfs none /run/systemd
mkdir -p /run/outrider/claims "$own/claims" /run/sshd
mount --bind /run/outrider/claims "$own/claims"
mount -t tmpfs -o mode=755 none /run/outrider
mkdir /run/outrider/claims; mount --bind "$own/claims" /run/outrider/claims
ip link set lo up
exec /usr/sbin/sshd -D -e -f "$own/sshd_config"
"""


class SshHosts:
    """`count` of them, with the addresses NETWORK.11 on. Use as a context manager."""

    def __init__(self, count: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="outrider-ssh-"))
        self.addresses = [f"{NETWORK}.{11 + at}" for at in range(count)]
        self.key = self.directory / "id"
        self.known_hosts = self.directory / "known_hosts"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._bridge: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.directory.chmod(0o711)
            _keygen(self.key)
            (self.directory / "authorized_keys").write_text(self.key.with_suffix(".pub").read_text())
            self._bridge = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"])
            _until(lambda: _has_own_network(self.switch), "the bridge's namespace is there")
            bridge = f"ip link add br0 type bridge; ip address add {NETWORK}.1/24 dev br0; ip link set br0 up"
            _run("nsenter", f"--net=/proc/{self.switch}/ns/net", "sh", "-c", f"ip link set lo up; {bridge}")
            for address in self.addresses:
                self._start(address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for address in list(self._processes):
            self._stop(address)
        if self._bridge is not None:
            self._bridge.kill()
            self._bridge.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def switch(self) -> int:
        assert self._bridge is not None, "entered"
        return self._bridge.pid

    def path(self, address: str, path: str) -> Path:
        """Where the host's `path` is for us."""
        return self.directory / address / path.lstrip("/")

    def inventory(
        self, cluster: str, *, each: Mapping[str, Mapping[str, object]] | None = None, **more: object
    ) -> Path:
        """One controller, that is a node too; all others are nodes. `each`: address -> more of that host."""
        document = {
            "cluster": cluster,
            "ssh": {"user": "root", "identity": str(self.key), "known_hosts": str(self.known_hosts)},
            "agent": {"host_image": True},
            "hosts": [
                {
                    "host": address,
                    "name": f"h{at}",
                    "roles": ["controller", "agent"] if at == 0 else ["agent"],
                    **(each or {}).get(address, {}),
                }
                for at, address in enumerate(self.addresses)
            ],
            **more,
        }
        path = self.directory / "hosts.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def outrider(
        self, *words: str, source: Path = _ROOT, timeout_s: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """The command line, run on the bridge."""
        return subprocess.run(
            ["nsenter", f"--net=/proc/{self.switch}/ns/net", sys.executable, "-m", "outrider", *words],
            capture_output=True, text=True, timeout=timeout_s, check=False, cwd=source,
            env={**os.environ, "OUTRIDER_BUNDLES": str(self.directory / "bundles"), **environment},
        )  # fmt: skip

    def inside(self, address: str, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """On the host itself."""
        pid = self._processes[address].pid
        return subprocess.run(
            ["nsenter", f"--net=/proc/{pid}/ns/net", f"--mount=/proc/{pid}/ns/mnt", "--", *words],
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def start_inside(self, address: str, *words: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        pid = self._processes[address].pid
        return subprocess.Popen(
            ["nsenter", f"--net=/proc/{pid}/ns/net", f"--mount=/proc/{pid}/ns/mnt", "--",
             "setpriv", "--pdeathsig", "KILL", "--", *words],
            stdout=stdout, text=True,
        )  # fmt: skip

    def change_host_key(self, address: str) -> None:
        """As of a host that was set up anew, or of somebody in between. Nothing of Outrider may run there."""
        self._end(address)
        for path in (self.directory / address).glob("host_key*"):
            path.unlink()
        self._start(address)

    def reconfigure(self, address: str, *lines: str) -> None:
        """Its sshd has these lines before the usual ones, which they go before. Nothing of Outrider may run there."""
        self._end(address)
        self._start(address, *lines)

    def trust(self, address: str) -> None:
        """Its present key is the known one."""
        lines = self.known_hosts.read_text().splitlines() if self.known_hosts.exists() else []
        public = " ".join((self.directory / address / "host_key.pub").read_text().split()[:2])
        kept = [line for line in lines if not line.startswith(f"{address} ")]
        self.known_hosts.write_text("\n".join([*kept, f"{address} {public}"]) + "\n")

    def _end(self, address: str) -> None:
        process = self._processes.pop(address)
        process.terminate()
        process.wait()

    def _start(self, address: str, *lines: str) -> None:
        own = self.directory / address
        if not own.exists():
            own.mkdir(mode=0o711)
            _keygen(own / "host_key")
            self.trust(address)
        elif not (own / "host_key").exists():
            _keygen(own / "host_key")
        usual = (
            f"ListenAddress {address}", f"HostKey {own}/host_key", f"PidFile {own}/sshd.pid", "StrictModes no",
            f"AuthorizedKeysFile {self.directory}/authorized_keys", "UsePAM no", "PasswordAuthentication no",
            "PermitRootLogin yes", "MaxSessions 20",
        )  # fmt: skip
        (own / "sshd_config").write_text("".join(f"{line}\n" for line in (*lines, *usual)))
        name = f"v{secrets.token_hex(4)}"
        with (own / "sshd.log").open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "sh", "-c",
                 f"read -r _; exec sh -c '{_HOST}' host \"$@\"", "host", str(own), address, *_OWN],
                stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip
        self._processes[address] = process
        _until(lambda: _has_own_network(process.pid), "the host's namespace is there")
        switch = f"--net=/proc/{self.switch}/ns/net"
        # The same card after a new start: what others remember of the address stays true.
        card = f"02:00:{':'.join(f'{int(part):02x}' for part in address.split('.'))}"
        peer = f"peer name eth0 address {card} netns {process.pid}"
        _run("nsenter", switch, "sh", "-c", f"ip link add {name} type veth {peer}")
        _run("nsenter", switch, "ip", "link", "set", name, "master", "br0", "up")
        up = f"ip address add {address}/24 dev eth0; ip link set eth0 up; ip route add default via {NETWORK}.1"
        _run("nsenter", f"--net=/proc/{process.pid}/ns/net", "sh", "-c", f"ip link set lo up; {up}")
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
        _until(lambda: self._answers(address), f"sshd of {address} answers; see {own}/sshd.log")

    def _answers(self, address: str) -> bool:
        knock = f"timeout 2 bash -c 'exec 3<>/dev/tcp/{address}/22'"
        words = ["nsenter", f"--net=/proc/{self.switch}/ns/net", "sh", "-c", knock]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def _stop(self, address: str) -> None:
        process = self._processes.pop(address)
        if process.poll() is None and self.path(address, "/opt/outrider/current").is_symlink():
            self._processes[address] = process
            purge = "/opt/outrider/current/bin/python -m agent --config /etc/outrider/agent.yaml --purge"
            self.inside(
                address, "sh", "-c", f"cd /; for f in /var/lib/outrider/*.pid; do kill $(cat $f); done; {purge}"
            )
            self._processes.pop(address)
        with contextlib.suppress(OSError):
            for pid in list(_processes_in(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _processes_in(leader: int) -> Iterator[int]:
    """Of the leader's network namespace."""
    wanted = Path(f"/proc/{leader}/ns/net").stat().st_ino
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "ns/net").stat().st_ino == wanted:
                    yield int(entry.name)


def _has_own_network(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/ns/net").stat().st_ino != Path("/proc/self/ns/net").stat().st_ino
    return False


def _keygen(path: Path) -> None:
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def _until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
