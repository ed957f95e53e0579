"""The files that all controllers of a fleet must have alike, kept in Consul's KV: the fleet's CA.

Owns `outrider/CLUSTER/files/`. Every call blocks. Whoever may read that prefix can make certificates of this fleet: it
takes a token of its own in Consul, as the journal does.
"""

import os
from pathlib import Path
from typing import Final

from controller.journal import LeadershipLostError
from controller.journal.consul import lock_key, prefix
from controller.journal.kv import ConsulKv, Operation
from outrider.errors import HostError

_CA: Final = ("ca/ca.crt", "ca/ca.key")


class SharedFiles:
    def __init__(self, kv: ConsulKv, *, cluster: str, data: Path) -> None:
        self._kv, self._data = kv, data
        self._lock_key = lock_key(cluster)
        self._prefix = f"{prefix(cluster)}/files/"

    def adopt_ca(self, *, fresh: bool = False) -> bool:
        """Take the fleet's CA over, or give it this controller's own where the fleet has none yet.

        False: neither has one. `fresh`: the own one was made just now, and nobody trusts it yet. Raises HostError
        where this controller comes from another fleet.
        """
        found = {name: pair.value for name in _CA if (pair := self._kv.get(self._prefix + name)) is not None}
        own = {name: (self._data / name).read_bytes() for name in _CA if (self._data / name).exists()}
        if len(found) < len(_CA):
            if len(own) < len(_CA):
                return False
            try:
                self._kv.transact(
                    [
                        Operation(verb="cas", key=self._prefix + name, value=value, index=0)
                        for name, value in own.items()
                    ]
                )
            except LeadershipLostError:
                return self.adopt_ca(fresh=fresh)  # another controller was quicker
            return True
        if own and own != found and not fresh:
            hint = "give it an empty data directory to join the fleet, or another `cluster` to found one"
            raise HostError(
                str(self._data / "ca"), step="compare it with the CA that the fleet has in Consul", hint=hint
            )
        for name, value in found.items():
            self._write(name, value)
        return True

    def pull(self) -> None:
        """What the leader before this one left."""
        for pair in self._kv.pairs(self._prefix):
            self._write(pair.key.removeprefix(self._prefix), pair.value)

    def _write(self, name: str, content: bytes) -> None:
        path = self._data / name
        if path.exists() and path.read_bytes() == content:
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644 if name == "ca/ca.crt" else 0o600)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
