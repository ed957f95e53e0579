"""Consul's KV as the journal's thread uses it: blocking calls, each with a deadline. Owns one connection.

Keys, values and transactions alone; what they mean is `consul`'s. py-consul's own `txn.put` takes no token and no
consistency mode, hence its `http` transport. The event loop speaks to Consul through `mesh/consul_adapter`.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote, urlsplit

import consul.base
import consul.std
import msgspec
import requests

from controller.journal import LeadershipLostError
from outrider.errors import JournalError, PeerError
from outrider.model.job import Value

T = TypeVar("T")

CALL_TIMEOUT_S: Final = 2.0
OPERATIONS_MAX: Final = 64  # of one transaction
# Consul takes a body of 512 KiB, base64 and JSON included: raw bytes of values, with room for the keys around them.
VALUE_BYTES_MAX: Final = 340 * 1024


class Pair(Value, frozen=True, kw_only=True):
    key: str
    value: bytes
    index: int  # of its last change


class Operation(Value, frozen=True, kw_only=True):
    """One step of a transaction, as Consul names it: set, cas, delete, delete-tree, check-session, get."""

    verb: str
    key: str
    value: bytes = b""
    index: int | None = None
    session: str = ""


class _WirePair(msgspec.Struct, frozen=True, rename="pascal"):
    key: str
    modify_index: int
    value: bytes | None = None


class _WireResult(msgspec.Struct, frozen=True):
    kv: _WirePair = msgspec.field(name="KV")


class _WireError(msgspec.Struct, frozen=True, rename="pascal"):
    op_index: int
    what: str = ""


class _WireAnswer(msgspec.Struct, frozen=True, rename="pascal"):
    results: list[_WireResult] | None = None
    errors: list[_WireError] | None = None


class ConsulKv:
    """Raises PeerError where Consul does not answer (whether it did what was asked is not known then)."""

    def __init__(
        self, url: str, *, token: str = "", ca: Path | None = None, certificate: tuple[Path, Path] | None = None
    ) -> None:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        self.url = url
        self._headers = {"X-Consul-Token": token} if token else {}
        self._http = consul.std.HTTPClient(
            parts.hostname,
            port,
            parts.scheme,
            str(ca) if ca is not None else True,
            tuple(map(str, certificate)) if certificate is not None else None,
            connections_timeout=CALL_TIMEOUT_S,
        )

    def get(self, key: str) -> Pair | None:
        """The newest there is: confirmed by a majority of Consul's servers."""
        found = self.pairs(key, recurse=False)
        return found[0] if found else None

    def pairs(self, prefix: str, *, recurse: bool = True) -> list[Pair]:
        params = [("consistent", "1"), *([("recurse", "1")] if recurse else [])]
        answer = self._call("get", f"/v1/kv/{quote(prefix)}", params)
        if answer.code == 404:
            return []
        if answer.code != 200:
            raise _unexpected("GET /v1/kv", answer)
        return [_pair(each) for each in _decode(answer.body, list[_WirePair])]

    def transact(self, operations: Sequence[Operation]) -> list[Pair]:
        """All or none. Raises LeadershipLostError where a session check or an expected index does not hold."""
        body = msgspec.json.encode([{"KV": _wire(each)} for each in operations])
        answer = self._call("put", "/v1/txn", [("consistent", "1")], body)
        if answer.code == 413:
            raise JournalError(f"Consul at {self.url} refuses a transaction of {len(body)} bytes: {_text(answer)}")
        if answer.code not in (200, 409):
            raise _unexpected("PUT /v1/txn", answer)
        found = _decode(answer.body, _WireAnswer)
        if found.errors:
            raise LeadershipLostError("; ".join(dict.fromkeys(error.what for error in found.errors)))
        return [_pair(result.kv) for result in found.results or ()]

    def close(self) -> None:
        self._http.session.close()

    def _call(
        self, method: str, path: str, params: list[tuple[str, str]], body: bytes | None = None
    ) -> consul.base.Response:
        arguments = {"data": body} if body is not None else {}
        try:
            return getattr(self._http, method)(
                lambda response: response, path, params=params, headers=self._headers, **arguments
            )
        except requests.RequestException as error:
            raise PeerError(f"Consul at {self.url} does not answer {method.upper()} {path}: {error}") from error


def _wire(operation: Operation) -> dict[str, object]:
    wire: dict[str, object] = {"Verb": operation.verb, "Key": operation.key}
    if operation.verb in ("set", "cas"):
        wire["Value"] = base64.b64encode(operation.value).decode()
    if operation.index is not None:
        wire["Index"] = operation.index
    if operation.session:
        wire["Session"] = operation.session
    return wire


def _pair(wire: _WirePair) -> Pair:
    return Pair(key=wire.key, value=wire.value or b"", index=wire.modify_index)


def _decode(body: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise PeerError(f"Consul's answer is not what its API promises: {error}") from error


def _unexpected(what: str, answer: consul.base.Response) -> JournalError | PeerError:
    if answer.code == 403:
        return JournalError(f"Consul refuses {what}: {_text(answer)}; the token needs key_prefix and session rights")
    return PeerError(f"Consul fails {what}: status {answer.code}: {_text(answer)}")


def _text(answer: consul.base.Response) -> str:
    return str(answer.body).strip()[:300]
