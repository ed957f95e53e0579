"""What all controllers of a fleet must have alike: the fleet's CA, whose files are kept in Consul's KV, and the key
that secrets are sealed under, of which the KV has the id alone.

Owns `outrider/CLUSTER/files/` and `outrider/CLUSTER/secrets-key`. Every call blocks. Whoever may read the former can
make certificates of this fleet: it takes a token of its own in Consul, as the journal does.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from controller.journal import LeadershipLostError
from controller.journal.consul import lock_key, prefix
from controller.journal.kv import ConsulKv, Operation
from controller.keyring import Keyring
from outrider.errors import ConfigError, HostError

_CA: Final = ("ca/ca.crt", "ca/ca.key")
_ALL: Final = ("ca/previous.crt", "ca/cross.crt", *_CA)  # the first two while the CA changes


class SharedFiles:
    def __init__(self, kv: ConsulKv, *, cluster: str, data: Path) -> None:
        self._kv, self._data = kv, data
        self._lock_key = lock_key(cluster)
        self._prefix = f"{prefix(cluster)}/files/"
        self._secrets_key = f"{prefix(cluster)}/secrets-key"

    def adopt_ca(self, *, fresh: bool = False) -> bool:
        """Take the fleet's CA over, or give it this controller's own where the fleet has none yet.

        False: neither has one. `fresh`: the own one was made just now, and nobody trusts it yet. Raises HostError
        where this controller comes from another fleet.
        """
        found = self._found()
        own = {name: (self._data / name).read_bytes() for name in _ALL if (self._data / name).exists()}
        if not found.keys() >= set(_CA):
            if not own.keys() >= set(_CA):
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
        if own and not fresh and not _roots(own) & _roots(found):
            hint = "give it an empty data directory to join the fleet, or another `cluster` to found one"
            raise HostError(
                str(self._data / "ca"), step="compare it with the CA that the fleet has in Consul", hint=hint
            )
        self._take(found)
        return True

    def pull(self) -> bool:
        """What the leader made of the CA. False: nothing new."""
        found = self._found()
        return found.keys() >= set(_CA) and self._take(found)

    def push(self, session: str) -> None:
        """What this leader made of it, all or nothing. Raises LeadershipLostError where it leads no more, PeerError."""
        operations = [Operation(verb="check-session", key=self._lock_key, session=session)]
        for name in _ALL:
            path = self._data / name
            if path.exists():
                operations.append(Operation(verb="set", key=self._prefix + name, value=path.read_bytes()))
            else:
                operations.append(Operation(verb="delete", key=self._prefix + name))
        self._kv.transact(operations)

    def check(self, keyring: Keyring) -> None:
        """Raises ConfigError where what the other controllers seal would not open with it."""
        found = self._kv.get(self._secrets_key)
        told = found.value.decode(errors="replace") if found is not None else ""
        if told and not keyring.has(told):
            raise ConfigError(
                f"secrets.key_file: {keyring.source} has key {keyring.current}, the fleet's secrets are sealed under "
                f"key {told}: give all controllers the same (if it is lost, delete {self._secrets_key} from Consul's "
                "KV, and put the secrets again)"
            )

    def agree(self, keyring: Keyring, session: str) -> None:
        """From here on the others are asked for this key. Raises as `check` and `push` do."""
        self.check(keyring)
        self._kv.transact(
            [
                Operation(verb="check-session", key=self._lock_key, session=session),
                Operation(verb="set", key=self._secrets_key, value=keyring.current.encode()),
            ]
        )

    def _found(self) -> dict[str, bytes]:
        pairs = {pair.key.removeprefix(self._prefix): pair.value for pair in self._kv.pairs(self._prefix)}
        return {name: value for name, value in pairs.items() if name in _ALL}

    def _take(self, found: Mapping[str, bytes]) -> bool:
        # Those that are needed to follow the others' chains come first, the key last: a crash leaves a CA that works.
        changed = [self._write(name, found[name]) for name in _ALL if name in found]
        for name in _ALL:
            if name not in found and (self._data / name).exists():
                (self._data / name).unlink()
                changed.append(True)
        return any(changed)

    def _write(self, name: str, content: bytes) -> bool:
        path = self._data / name
        if path.exists() and path.read_bytes() == content:
            return False
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600 if name == "ca/ca.key" else 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return True


def _roots(files: Mapping[str, bytes]) -> set[bytes]:
    """The one that signs, and the one before while both are trusted."""
    return {files[name] for name in ("ca/ca.crt", "ca/previous.crt") if name in files}
