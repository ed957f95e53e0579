"""JoinService: a node shows a join token and gets a certificate. The one service without a client certificate.

Wrong tokens are answered late, counted, and stop an address that keeps trying. No task of its own; at most
JOINS_MAX joins at a time.
"""

import asyncio
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from controller.ca import FleetCa, requested_key
from controller.core.events import NodeJoinRequested, RequestId
from controller.engine import Engine
from controller.people import done
from controller.rpc import Context, Edge, unary
from outrider.clock import monotonic_s
from outrider.errors import InputError, RefusedError
from outrider.ids import NodeId, is_name
from outrider.keys import key_sha256
from outrider.log import Log
from outrider.v1 import fleet_pb2, fleet_pb2_grpc

JOINS_MAX = 16
ATTEMPTS_MAX = 10  # wrong tokens from one address within ATTEMPTS_WINDOW_S
ATTEMPTS_WINDOW_S = 60.0
ADDRESSES_MAX = 1024
WRONG_TOKEN_DELAY_S = 0.25


# With the hashes of the token and of the node's key. Raises RefusedError where the node may not join.
Admit = Callable[[str, NodeId, str], Awaitable[None]]


def admission(engine: Engine) -> Admit:
    """By the journal: a token is used up, and a key known, before there is a certificate."""

    async def admit(token_sha256: str, node: NodeId, key_sha256: str) -> None:
        def event(request: RequestId) -> NodeJoinRequested:
            return NodeJoinRequested(request=request, token_sha256=token_sha256, node=node, key_sha256=key_sha256)

        done(await engine.request(event))

    return admit


class JoinService(Edge, fleet_pb2_grpc.JoinServiceServicer):
    def __init__(self, *, cluster: str, ca: FleetCa, admit: Admit, refused: Counter[str]) -> None:
        super().__init__(log=Log("join"), refused=refused)
        self._cluster = cluster
        self._ca = ca
        self._admit = admit
        self._attempts = Attempts()
        self._joining = 0

    def authorize(self, context: Context, method: str, request: Any) -> None:
        """Anybody may ask, a few at a time; the token decides."""
        if self._joining >= JOINS_MAX:
            raise RefusedError("too-many-attempts", f"{JOINS_MAX} nodes are joining right now; try again in a second")

    @unary
    async def Join(self, request: fleet_pb2.JoinRequest, context: Context) -> fleet_pb2.JoinResponse:
        self._joining += 1
        try:
            return await self._join(request, address=context.peer().rpartition(":")[0])
        finally:
            self._joining -= 1

    async def _join(self, request: fleet_pb2.JoinRequest, *, address: str) -> fleet_pb2.JoinResponse:
        if not is_name(request.node):
            raise InputError(f"{request.node[:80]!r} cannot name a node: lower-case letters, digits and dashes")
        if self._attempts.spent(address, monotonic_s()):
            raise RefusedError("too-many-attempts", f"too many wrong tokens; wait {ATTEMPTS_WINDOW_S:g} s")
        try:
            certificate_pem = await self._certificate(request.token, NodeId(request.node), request.csr_pem.encode())
        except RefusedError as error:
            if error.code == "bad-token":
                self._attempts.failed(address, monotonic_s())
                self.log.warning("wrong join token", address=address, node=request.node)
                await asyncio.sleep(WRONG_TOKEN_DELAY_S)
            raise
        self.log.info("node joined", node=request.node, address=address)
        return fleet_pb2.JoinResponse(
            certificate_pem=certificate_pem.decode(), ca_pem=self._ca.roots_pem.decode(), cluster=self._cluster
        )

    async def _certificate(self, plain: str, node: NodeId, csr_pem: bytes) -> bytes:
        key = key_sha256(requested_key(csr_pem))
        token = hashlib.sha256(plain.encode()).hexdigest()
        await self._admit(token, node, key)
        return (await asyncio.to_thread(self._ca.issue_node, csr_pem, node)).pem


class Attempts:
    """Wrong tokens by address. Of more than ADDRESSES_MAX addresses the one seen longest ago is forgotten."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    def failed(self, address: str, now_s: float) -> None:
        self._failures[address] = [*self._recent(address, now_s), now_s]
        self._failures.move_to_end(address)
        if len(self._failures) > ADDRESSES_MAX:
            self._failures.popitem(last=False)

    def spent(self, address: str, now_s: float) -> bool:
        return len(self._recent(address, now_s)) >= ATTEMPTS_MAX

    def _recent(self, address: str, now_s: float) -> list[float]:
        return [at_s for at_s in self._failures.get(address, ()) if at_s > now_s - ATTEMPTS_WINDOW_S]
