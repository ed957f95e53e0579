"""A host over SSH: connects, runs `host.py` there, pushes a file. Owns the connection and how its failures are told.

Host keys are verified: one that is not known, or has changed, is an error that says so.
"""

import contextlib
import json
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import asyncssh

from outrider.cli.deploy.inventory import Host, Ssh
from outrider.errors import HostError, InputError

CONNECT_S = 20.0
KEEPALIVE_S, KEEPALIVES = 10, 3
_CHUNK = 1 << 20
_ASKED = "ASKED: str  # set by whoever sends this file\n"


class Remote:
    """An open connection. Every call raises HostError, which names the host and says what to do next."""

    def __init__(self, host: Host, ssh: Ssh, connection: asyncssh.SSHClientConnection) -> None:
        self.host = host
        self._ssh = ssh
        self._connection = connection

    async def ask(self, task: str, timeout_s: float = 120.0, **asked: Any) -> dict[str, Any]:
        """What `host.py` answers there."""
        done = await self._run("python3 -", program(task, **asked), timeout_s, step=task)
        try:
            answer = json.loads(_text(done.stdout).strip().splitlines()[-1])
        except (ValueError, IndexError) as error:
            raise HostError(self.host.host, step=f"{task}: {_last_line(done) or 'no answer'}") from error
        if "error" in answer:
            raise HostError(self.host.host, step=str(answer["error"]))
        return dict(answer)

    @property
    def sudo(self) -> bool:
        return self._ssh.sudo

    async def forward(self, near: Path, far: str) -> None:
        """Whoever opens the socket `near` here talks to the socket `far` there, until the connection ends."""
        try:
            await self._connection.forward_local_path(str(near), far)
        except (OSError, asyncssh.Error) as error:
            hint = "does its sshd allow AllowStreamLocalForwarding?"
            raise HostError(self.host.host, step=f"forward {far}: {error}", hint=hint) from error

    async def push(self, local: Path, remote: str) -> None:
        """Whole or not at all: it is moved into place when all of it is there."""
        partial = f"{remote}.partial"
        try:
            async with self._connection.create_process(
                f"cat > {partial} && mv {partial} {remote}", encoding=None
            ) as to:
                with local.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        to.stdin.write(chunk)
                        await to.stdin.drain()
                to.stdin.write_eof()
                done = await to.wait()
        except (OSError, asyncssh.Error) as error:
            raise HostError(
                self.host.host, step=f"push the bundle: {error}", hint="deploy again goes on here"
            ) from error
        if done.exit_status:
            told = _text(done.stderr).strip()
            raise HostError(self.host.host, step=f"push the bundle to {remote}: {told}", hint="is its disk full?")

    async def _run(self, command: str, text: str, timeout_s: float, *, step: str) -> asyncssh.SSHCompletedProcess:
        words = f"sudo -n {command}" if self._ssh.sudo else command
        try:
            done = await self._connection.run(words, input=text, timeout=timeout_s, check=False)
        except asyncssh.TimeoutError as error:
            raise HostError(self.host.host, step=f"{step}: no end within {timeout_s:g} s") from error
        except (OSError, asyncssh.Error) as error:
            raise HostError(self.host.host, step=f"{step}: the connection broke: {error}") from error
        if done.exit_status == 127:
            hint = "apt install python3 on it"
            raise HostError(self.host.host, step="find python3: the host has none in its PATH", hint=hint)
        if done.exit_status and self._ssh.sudo and "sudo:" in _text(done.stderr):
            hint = "let the user run sudo without a password, or deploy as root"
            raise HostError(self.host.host, step=f"sudo -n: {_last_line(done)}", hint=hint)
        return done


def program(task: str, **asked: Any) -> str:
    """`host.py`, with what it is asked."""
    document = json.dumps({**asked, "task": task})
    text = files("outrider.cli.deploy").joinpath("host.py").read_text()
    return text.replace(_ASKED, f"ASKED = {document!r}\n")


@contextlib.asynccontextmanager
async def connect(host: Host, ssh: Ssh) -> AsyncIterator[Remote]:
    """Raises HostError, with the reason in words."""
    options: dict[str, Any] = {
        "known_hosts": str(ssh.known_hosts.expanduser()) if ssh.known_hosts is not None else (),
        "keepalive_interval": KEEPALIVE_S,
        "keepalive_count_max": KEEPALIVES,
        "connect_timeout": CONNECT_S,
        "login_timeout": CONNECT_S,
    }
    if ssh.user is not None:
        options["username"] = ssh.user
    if ssh.port is not None:
        options["port"] = ssh.port
    if ssh.identity is not None:
        options["client_keys"] = [str(ssh.identity.expanduser())]
    if ssh.password_file is not None:
        options["password"] = _password(ssh.password_file)
    try:
        connection = await asyncssh.connect(host.host, **options)
    except asyncssh.HostKeyNotVerifiable as error:
        known = ssh.known_hosts or Path("~/.ssh/known_hosts")
        hint = f"compare the key with the host's own, then `ssh-keyscan {host.host} >> {known}`"
        raise HostError(
            host.host, step=f"its host key is not the known one, or not known: {error.reason}", hint=hint
        ) from error
    except asyncssh.PermissionDenied as error:
        hint = "check the user, and the key or password: `ssh.user`, `ssh.identity`, `ssh.password_file`"
        raise HostError(host.host, step=f"it does not let us in: {error.reason}", hint=hint) from error
    except (OSError, asyncssh.Error, TimeoutError) as error:
        raise HostError(host.host, step=f"no SSH connection: {error or type(error).__name__}") from error
    async with connection:
        yield Remote(host, ssh, connection)


def ssh_of(common: Ssh, host: Ssh) -> Ssh:
    """The host's own settings over those for all."""
    default = Ssh()
    chosen = {
        name: getattr(host, name) if getattr(host, name) != getattr(default, name) else getattr(common, name)
        for name in Ssh.__struct_fields__
    }
    return Ssh(**chosen)


def _password(path: Path) -> str:
    try:
        return path.expanduser().read_text().rstrip("\n")
    except OSError as error:
        raise InputError(f"ssh.password_file: {path} cannot be read: {error.strerror}") from error


def _last_line(done: asyncssh.SSHCompletedProcess) -> str:
    lines = _text(done.stderr).strip().splitlines()
    return lines[-1] if lines else ""


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
