"""A sidecar's files on the host. Owns their layout and permissions. The shared one goes by SHARED instead of ALLOC.

    RUN/ads/ads.sock            what the server listens on; root only
    RUN/state/ALLOC.json        token, access history; root only, survives the agent
    RUN/sidecars/ALLOC/         bound into the sandbox: bootstrap.json, ads.sock, admin.sock; the sidecar's uid only

`ads.sock` in a sidecar's directory is a hard link to the server's socket: one server serves all directories, and an
agent that restarts links its new socket into the directories that sandboxes have bound.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from outrider.errors import HostError
from outrider.ids import AllocId, ServiceName
from outrider.model.job import Value
from sidecar.bootstrap import ADMIN_SOCKET, ADS_SOCKET, BOOTSTRAP_FILE, bootstrap
from sidecar.core.access import AccessHistory

SHARED = AllocId("shared")


class SidecarState(Value, frozen=True, kw_only=True):
    """What must survive the agent for a running Envoy to keep its identity and its connections."""

    token: str = ""  # of an Envoy; a share of one has none
    history: Mapping[ServiceName, AccessHistory] = {}


class Directories:
    def __init__(self, run_directory: Path) -> None:
        self._run = run_directory
        self.server_socket = run_directory / "ads" / ADS_SOCKET

    def prepare(self) -> None:
        """Raises HostError where the run directory cannot be made ours."""
        try:
            for name in ("ads", "state", "sidecars"):
                (self._run / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            # Searchable, so that a bound sub-directory resolves; each sidecar's own is closed to the others.
            (self._run / "sidecars").chmod(0o711)
            self.server_socket.unlink(missing_ok=True)
        except OSError as error:
            raise HostError(str(self._run), step=f"prepare the sidecars' directories: {error}") from error

    def of(self, alloc: AllocId) -> Path:
        return self._run / "sidecars" / alloc

    def admin_socket(self, alloc: AllocId) -> Path:
        return self.of(alloc) / ADMIN_SOCKET

    def create(self, alloc: AllocId, uid: int, token: str) -> Path:
        """The sidecar's directory with what Envoy needs to start; made, or brought up to date for this agent."""
        directory = self.of(alloc)
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            self._write(directory / BOOTSTRAP_FILE, msgspec.json.encode(bootstrap(alloc, token)), uid)
            link = directory / ADS_SOCKET
            link.unlink(missing_ok=True)
            link.hardlink_to(self.server_socket)
            os.chown(directory, uid, uid)
        except OSError as error:
            raise HostError(str(directory), step=f"make the sidecar's directory: {error}") from error
        return directory

    def remove(self, alloc: AllocId) -> None:
        self._state_file(alloc).unlink(missing_ok=True)
        if self.of(alloc).exists():
            shutil.rmtree(self.of(alloc))

    def rename(self, alloc: AllocId, to: AllocId) -> None:
        """What a sidecar has is another allocation's now; its sandbox keeps what it has bound. Raises HostError."""
        try:
            self.of(alloc).rename(self.of(to))
            self._state_file(alloc).rename(self._state_file(to))
        except OSError as error:
            raise HostError(str(self.of(alloc)), step=f"give it to {to}: {error}") from error

    def load(self, alloc: AllocId) -> SidecarState | None:
        """None: this allocation's sidecar is new. Raises HostError where its state cannot be read."""
        path = self._state_file(alloc)
        try:
            return msgspec.json.decode(path.read_bytes(), type=SidecarState)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise HostError(
                str(path), step=f"read the sidecar's state: {error}", hint="restart the allocation"
            ) from error

    def save(self, alloc: AllocId, state: SidecarState) -> None:
        try:
            self._write(self._state_file(alloc), msgspec.json.encode(state), os.getuid())
        except OSError as error:
            raise HostError(str(self._state_file(alloc)), step=f"write the sidecar's state: {error}") from error

    def _state_file(self, alloc: AllocId) -> Path:
        return self._run / "state" / f"{alloc}.json"

    def _write(self, path: Path, content: bytes, uid: int) -> None:
        """Whole or not at all. A new file each time: what a sidecar put in its place is never followed."""
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchown(descriptor, uid, uid)
        fresh.rename(path)
