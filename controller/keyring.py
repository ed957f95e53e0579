"""The keys that secrets are sealed under (AES-256-GCM): from the environment, or from a file that is not the journal.

Owns the key file, one key a line as `ID HEX`, the newest first. What is sealed begins with the id of its key, so that
several may be in use while everything is sealed anew. Never logs nor keeps a value.
"""

import binascii
import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from controller.core.records import SecretPut
from outrider.errors import ConfigError, HostError
from outrider.ids import Namespace, SecretName

VARIABLE = "OUTRIDER_SECRETS_KEY"
PREVIOUS = "OUTRIDER_SECRETS_KEY_PREVIOUS"  # what VARIABLE was before: needed until `outrider secret rekey`
_KEY_BYTES, _ID_BYTES, _NONCE_BYTES = 32, 8, 12


class Keyring:
    """Raises ConfigError for a key that is none, HostError where the file cannot be used."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self._path = path
        self._from_environment = VARIABLE in environment
        if self._from_environment:
            keys = [_parsed(environment[name], name) for name in (VARIABLE, PREVIOUS) if name in environment]
        else:
            keys = self._read()
        self._current = _id(keys[0])
        self._keys = {_id(key): key for key in keys}

    @property
    def current(self) -> str:
        """The id of the key that is sealed under."""
        return self._current.hex()

    @property
    def source(self) -> str:
        """Where its keys come from, for whoever has to change them."""
        return VARIABLE if self._from_environment else str(self._path)

    def has(self, key_id: str) -> bool:
        return key_id in {each.hex() for each in self._keys}

    def seal(self, namespace: Namespace, name: SecretName, value: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        box = AESGCM(self._keys[self._current]).encrypt(nonce, value, _bound_to(namespace, name))
        return self._current + nonce + box

    def open(self, put: SecretPut) -> bytes:
        """Raises HostError where its key is not there, or the journal was tampered with."""
        key_id, rest = put.sealed[:_ID_BYTES], put.sealed[_ID_BYTES:]
        if key_id not in self._keys:
            step = f"version {put.version} is sealed under key {key_id.hex()}, which {self.source} does not have"
            raise HostError(f"secret {put.name}", step=step, hint="bring the key back, or put the secret again")
        try:
            return AESGCM(self._keys[key_id]).decrypt(
                rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], _bound_to(put.namespace, put.name)
            )
        except InvalidTag as error:
            raise HostError(f"secret {put.name}", step=f"version {put.version} is not what was sealed") from error

    def is_current(self, put: SecretPut) -> bool:
        return put.sealed[:_ID_BYTES] == self._current

    def turn(self) -> None:
        """A new key to seal under, in the file before it is used. One from the environment its operator turned."""
        if not self._from_environment:
            key = secrets.token_bytes(_KEY_BYTES)
            self._write([key, *self._keys.values()])
            self._current = _id(key)
            self._keys = {self._current: key, **self._keys}

    def drop_others(self) -> None:
        """Nothing is sealed under the older keys any more."""
        self._keys = {self._current: self._keys[self._current]}
        if not self._from_environment:
            self._write([*self._keys.values()])

    def _read(self) -> list[bytes]:
        try:
            if not self._path.exists():
                self._write([secrets.token_bytes(_KEY_BYTES)])
            lines = self._path.read_text().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise HostError(str(self._path), step=f"read the key of secrets: {error}") from error
        keys = [_parsed(line.split()[-1], str(self._path)) for line in lines if line.strip()]
        if not keys:
            raise ConfigError(f"secrets.key_file: {self._path} has no key; remove it, and a new one is made")
        return keys

    def _write(self, keys: list[bytes]) -> None:
        unfinished = self._path.with_name(f"{self._path.name}.new")
        text = "".join(f"{_id(key).hex()} {key.hex()}\n" for key in keys)
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise HostError(str(self._path), step=f"write the key of secrets: {error.strerror}") from error


def _parsed(text: str, where: str) -> bytes:
    try:
        key = binascii.unhexlify(text.strip())
    except (ValueError, binascii.Error) as error:
        raise ConfigError(f"{where}: a key is {2 * _KEY_BYTES} hexadecimal digits (`openssl rand -hex 32`)") from error
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"{where}: a key is {2 * _KEY_BYTES} hexadecimal digits, found {2 * len(key)}")
    return key


def _id(key: bytes) -> bytes:
    """Tells keys apart, and tells nothing of them."""
    return hashlib.sha256(b"outrider secrets key" + key).digest()[:_ID_BYTES]


def _bound_to(namespace: Namespace, name: SecretName) -> bytes:
    """A sealed value opens only under the name that it was put under."""
    return f"{namespace}/{name}".encode()
