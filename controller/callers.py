"""Who calls, and how often they may: the root user's socket, a certificate, or a token in the metadata.

Reads the state; decides no right: `permissions` does. In memory: a bucket of calls for each of CALLERS_MAX callers.
"""

import hashlib
from collections import OrderedDict

from controller.core.access import ADMIN_ROLE, Access
from controller.rpc import PEER_METADATA, TOKEN_METADATA, Context, caller
from outrider.clock import monotonic_s, wall_s
from outrider.errors import RefusedError
from outrider.model.access import TokenKind
from outrider.model.job import Value
from outrider.tls import IdentityKind, peer_identity

CALLERS_MAX = 4096
_BEARER = "Bearer "


class Caller(Value, frozen=True, kw_only=True):
    name: str  # "root" on the socket
    by: str  # "socket", "certificate" or "token ID"
    peer: str = ""  # address
    roles: tuple[str, ...] = ()
    expires_at_s: float = 0.0  # of a token


class Callers:
    """Tells who calls. `per_s` and `burst` are calls of one caller; root's own are not counted."""

    def __init__(self, *, cluster: str, access: Access, per_s: float, burst: float) -> None:
        self._cluster = cluster
        self._access = access
        self._buckets = Buckets(per_s=per_s, burst=burst)

    def identify(self, context: Context) -> Caller:
        """Raises RefusedError: "unauthenticated", "denied" for who is no user, or "too-many-calls"."""
        peer = _peer(context)
        if peer.startswith("unix:"):
            # Whoever may open the socket is root here: its mode says who.
            return Caller(name="root", by="socket", roles=(ADMIN_ROLE.name,))
        # Before the token is looked at: guessing is slow for an address, too.
        self._count(f"address {peer.rpartition(':')[0]}")
        found = self._by_certificate(context, peer) or self._by_token(context, peer)
        if found is None:
            raise RefusedError(
                "unauthenticated",
                f"no user of fleet {self._cluster}: show a token that is valid, or a user's certificate",
            )
        self._count(f"user {found.name}")
        return found

    def _count(self, who: str) -> None:
        if not self._buckets.take(who, monotonic_s()):
            raise RefusedError("too-many-calls", f"more than {self._buckets.per_s:g} calls a second; wait a little")

    def _by_certificate(self, context: Context, peer: str) -> Caller | None:
        identity = caller(context)
        if identity is None or identity.cluster != self._cluster:
            return None
        match identity.kind:
            case IdentityKind.OPERATOR:  # made by the controller for its own host
                return Caller(name=f"operator {identity.name}", by="certificate", peer=peer, roles=(ADMIN_ROLE.name,))
            case IdentityKind.USER if (user := self._access.users.get(identity.name)) is not None:
                return Caller(name=user.name, by="certificate", peer=peer, roles=user.roles)
            case IdentityKind.USER | IdentityKind.CONTROLLER:  # a controller that passes on a call with a token
                return None
            case _:
                raise RefusedError("denied", f"{identity.uri} is no user: only users may call this")

    def _by_token(self, context: Context, peer: str) -> Caller | None:
        metadata = dict(context.invocation_metadata() or ())
        shown = metadata.get(TOKEN_METADATA, "")
        if not isinstance(shown, str) or not shown.startswith(_BEARER):
            return None
        sha256 = hashlib.sha256(shown.removeprefix(_BEARER).encode()).hexdigest()
        token = self._access.token_by_hash(sha256, TokenKind.USER, wall_s())
        user = self._access.users.get(token.user) if token is not None else None
        if token is None or user is None:
            return None
        return Caller(
            name=user.name, by=f"token {token.id}", peer=peer, roles=user.roles, expires_at_s=token.expires_at_s
        )


def _peer(context: Context) -> str:
    """The caller's address; where a controller passes the call on, that of whoever called that one."""
    identity = peer_identity(context)
    if identity is not None and identity.kind is IdentityKind.CONTROLLER:
        told = dict(context.invocation_metadata() or ()).get(PEER_METADATA, "")
        if isinstance(told, str) and told:
            return told
    return context.peer()


class Buckets:
    """Calls that each may make: `burst` at once, refilled by `per_s`. Beyond CALLERS_MAX the stalest is forgotten."""

    def __init__(self, *, per_s: float, burst: float) -> None:
        self.per_s = per_s
        self._burst = burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # calls, and when it was so

    def take(self, who: str, now_s: float) -> bool:
        left, at_s = self._left.pop(who, (self._burst, now_s))
        left = min(self._burst, left + (now_s - at_s) * self.per_s)
        taken = left >= 1.0
        self._left[who] = (left - 1.0 if taken else left, now_s)
        if len(self._left) > CALLERS_MAX:
            self._left.popitem(last=False)
        return taken
