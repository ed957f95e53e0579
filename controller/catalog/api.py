"""The catalog's API without HTTP: a call in, an answer out, on a `Store`. Which routes there are, and who may use them.

A handler that answers with an index is a read: the server asks it again when one of its topics has changed. All
others run inside a transaction. Owns the shapes of answers; knows nothing of sockets, clocks or disks.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from controller.catalog.ca import ConnectCa
from controller.catalog.store import Store
from outrider.errors import InputError
from outrider.model.job import Value

T = TypeVar("T")


class Access(StrEnum):
    """Who may use a route (DESIGN, Parts): the controller all but leaves, the others as said."""

    READ = "read"  # everybody with a certificate of the fleet
    PRIVATE = "private"  # reading keys and sessions: operators
    INTENTIONS = "intentions"  # writing them: operators
    LEAF = "leaf"  # operators alone: it hands out a private key
    WRITE = "write"  # the controller alone


class Call(Value, frozen=True, kw_only=True):
    """One request. `monotonic_s` is for lock delays, `at` for what people read."""

    path: Mapping[str, str] = {}
    query: Mapping[str, str] = {}
    body: bytes = b""
    monotonic_s: float
    at: datetime
    new_id: str  # for what this call may create

    def flag(self, name: str) -> bool:
        return name in self.query

    def number(self, name: str) -> int:
        text = self.query.get(name, "0")
        if not text.isascii() or not text.isdigit():
            raise InputError(f"?{name}={text}: must be a whole number")
        return int(text)


class Answer(Value, frozen=True, kw_only=True):
    """`body` is JSON to be, or bytes as they are. `index`: of a read that can block; `topics` is what it waits on."""

    body: Any = None
    status: int = 200
    index: int | None = None
    topics: tuple[str, ...] = ()
    renewed: str = ""  # the session whose time begins anew


class Scope(Value, frozen=True, kw_only=True):
    """What handlers work on beside their call."""

    store: Store
    ca: ConnectCa
    own_node: str
    address: str  # what status/leader shows
    version: str


Handler = Callable[[Scope, Call], Answer]


class Route(Value, frozen=True, kw_only=True):
    method: str
    path: str  # as aiohttp's router reads it, below /v1
    access: Access
    handler: Handler


def decode(call: Call, kind: type[T]) -> T:
    """The body as `kind`. Raises InputError with the path of what is wrong."""
    try:
        return msgspec.json.decode(call.body or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"Request decode failed: {error}") from error
