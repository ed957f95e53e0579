"""One sidecar's delta subscription: what it asked for, has, and was last sent. A state machine without I/O.

Level-triggered: `responses` compares what the sidecar has with what there is. At most one response of a kind is under
way, so changes that arrive meanwhile are sent once, together, and nothing queues up.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from outrider.model.job import Value
from sidecar.core.resources import Kind

WILDCARD = "*"
_LOST = ""  # no version of anything: whatever there is differs from it, and what is gone is told
_WILDCARD_KINDS = (Kind.CLUSTER, Kind.LISTENER)
Versions = Mapping[Kind, Mapping[str, str]]  # by kind and name: a hash of the content


class Request(Value, frozen=True, kw_only=True):
    """A DeltaDiscoveryRequest: a subscription's change, and the answer to the response `nonce` names ("": to none)."""

    kind: Kind
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    versions: Mapping[str, str] = {}  # what a reconnecting Envoy still has
    nonce: str = ""
    error: str = ""  # not "": Envoy refused the response and keeps the last good


class Response(Value, frozen=True, kw_only=True):
    kind: Kind
    nonce: str
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


class Rejection(Value, frozen=True, kw_only=True):
    """Envoy refused these resources. They are not sent again until their content changes."""

    kind: Kind
    names: tuple[str, ...]
    error: str


@dataclass(slots=True)
class _Stream:
    """The state of one kind."""

    seen: bool = False
    wildcard: bool = False
    names: set[str] = field(default_factory=set)
    sent: dict[str, str] = field(default_factory=dict)
    under_way: Response | None = None
    alone: set[str] = field(default_factory=set)  # one of these was refused: each is sent by itself
    owes_answer: bool = False  # a wildcard is answered even with nothing: Envoy waits for it before it starts


class Subscription:
    def __init__(self, kept: Callable[[str], bool] = lambda _: False) -> None:
        """`kept`: which of the names that the sidecar has stay, though nobody speaks of them for now."""
        self._kept = kept
        self._streams = {kind: _Stream() for kind in Kind}
        self._nonce = 0

    def receive(self, request: Request) -> Rejection | None:
        """Takes one request in. Returns what Envoy refused, if it did."""
        stream = self._streams[request.kind]
        rejection = self._answer(stream, request)
        first = not stream.seen
        stream.seen = True
        if first:
            stream.sent.update(request.versions)
        if WILDCARD in request.subscribe or (first and request.kind in _WILDCARD_KINDS and not request.subscribe):
            stream.wildcard = True
            stream.owes_answer = not request.versions
        for name in request.subscribe:
            if name != WILDCARD:
                stream.names.add(name)
                # Who asks again has lost it: Envoy does so when it replaces a cluster.
                if name in stream.sent and name not in request.versions:
                    stream.sent[name] = _LOST
        for name in request.unsubscribe:
            if name == WILDCARD:
                stream.wildcard = False
            stream.names.discard(name)
            if not stream.wildcard:
                stream.sent.pop(name, None)
        return rejection

    def responses(self, available: Versions) -> tuple[Response, ...]:
        """What to send now, in order; it counts as sent. `available` is all that this sidecar should have."""
        found = []
        for kind in Kind:
            stream = self._streams[kind]
            if not stream.seen or stream.under_way is not None:
                continue
            changed, removed = self._difference(kind, available)
            if alone := sorted(stream.alone.intersection(changed)):
                changed, removed = (alone[0],), ()
            stream.alone = set(alone[1:])
            if changed or removed or stream.owes_answer:
                self._nonce += 1
                response = Response(kind=kind, nonce=str(self._nonce), changed=changed, removed=removed)
                versions = available.get(kind, {})
                if kind is Kind.CLUSTER and any(name in stream.sent for name in changed):
                    # A cluster that replaces another waits for endpoints, of which Envoy thinks that it has them:
                    # it does not ask, and answers for no cluster until they have come.
                    endpoints = self._streams[Kind.ENDPOINTS].sent
                    endpoints.update(dict.fromkeys(endpoints, _LOST))
                stream.sent.update((name, versions[name]) for name in changed)
                for name in removed:
                    del stream.sent[name]
                stream.under_way, stream.owes_answer = response, False
                found.append(response)
        return tuple(found)

    def settled(self, available: Versions) -> bool:
        """Whether the sidecar answered for all that it asked for, as it is now in `available`."""
        return all(
            # Until it has asked for listeners and clusters, it has asked for nothing.
            (stream.seen or kind not in _WILDCARD_KINDS)
            and stream.under_way is None
            and not stream.owes_answer
            and self._difference(kind, available) == ((), ())
            for kind, stream in self._streams.items()
        )

    def _answer(self, stream: _Stream, request: Request) -> Rejection | None:
        response = stream.under_way
        if response is None or request.nonce != response.nonce:
            return None
        stream.under_way = None
        if not request.error:
            return None
        if len(response.changed) > 1 and request.kind not in _WILDCARD_KINDS:
            # Envoy stops at the first that it refuses, and may have taken none of the others.
            stream.alone.update(response.changed)
            stream.sent.update(dict.fromkeys(response.changed, _LOST))
            return None
        return Rejection(kind=request.kind, names=response.changed + response.removed, error=request.error)

    def _difference(self, kind: Kind, available: Versions) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(changed, removed) names. A name that is asked for before it exists waits: secrets come when issued."""
        stream, versions = self._streams[kind], available.get(kind, {})
        wanted = versions.keys() if stream.wildcard else versions.keys() & stream.names
        changed = tuple(sorted(name for name in wanted if stream.sent.get(name) != versions[name]))
        removed = tuple(sorted(name for name in stream.sent if name not in versions and not self._kept(name)))
        if kind is Kind.CLUSTER and removed and not self._users_settled(available):
            removed = ()  # break last: listeners and routes let go of a cluster before it goes
        return changed, removed

    def _users_settled(self, available: Versions) -> bool:
        return all(
            self._streams[kind].under_way is None and self._difference(kind, available) == ((), ())
            for kind in (Kind.LISTENER, Kind.ROUTES)
        )
