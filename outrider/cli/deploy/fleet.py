"""What `deploy` needs of the fleet itself: join tokens, and how its nodes are. Owns the ways there, and nothing else.

As any command, where OUTRIDER_ADDRESS says; through SSH to the socket of a controller that is among the hosts; or,
where root is only to be had by sudo there, by the command line installed on that host.
"""

import asyncio
import json
from pathlib import Path
from typing import Any, Protocol

from outrider.cli.address import Address, find
from outrider.cli.client import Fleet, open_channel
from outrider.cli.deploy.remote import Remote
from outrider.cli.deploy.units import OPERATOR_SOCKET
from outrider.errors import PeerError, RefusedError
from outrider.model.job import Value
from outrider.v1 import access_pb2, node_pb2, operator_pb2

TOKEN_VALID_S = 3600.0
_POLL_S = 0.25


class Seen(Value, frozen=True, kw_only=True):
    """A node, as the fleet tells of it."""

    status: str
    version: str
    reason: str
    allocations: frozenset[str]


class FleetAccess(Protocol):
    """Raises OutriderError, PeerError where nobody answers."""

    async def answers(self) -> None: ...
    async def join_token(self, node: str) -> str: ...
    async def node(self, node: str) -> Seen: ...


class Direct:
    """By the fleet's own protocol."""

    def __init__(self, address: Address | None = None) -> None:
        self._address = address
        self._fleet: Fleet | None = None

    async def answers(self) -> None:
        await asyncio.to_thread(lambda: self._open().call(self._open().stub.GetFleet, operator_pb2.GetFleetRequest()))

    async def join_token(self, node: str) -> str:
        request = access_pb2.CreateTokenRequest(
            kind=access_pb2.TOKEN_KIND_JOIN, nodes=[node], uses=1, valid_s=TOKEN_VALID_S
        )
        answer = await asyncio.to_thread(lambda: self._open().call(self._open().access.CreateToken, request))
        return str(answer.secret)

    async def node(self, node: str) -> Seen:
        request = operator_pb2.GetNodeRequest(node=node)
        answer = await asyncio.to_thread(lambda: self._open().call(self._open().stub.GetNode, request))
        status = node_pb2.NodeStatus.Name(answer.node.status).removeprefix("NODE_STATUS_").lower()
        return Seen(
            status=status,
            version=answer.node.node.version,
            reason=answer.node.reason,
            allocations=frozenset(each.id for each in answer.allocations),
        )

    def _open(self) -> Fleet:
        if self._fleet is None:
            address = self._address or find()
            self._fleet = Fleet(address, open_channel(address))
        return self._fleet


class ByCommand:
    """By `outrider` on the controller's own host, as root."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    async def answers(self) -> None:
        await self._ask("node", "ls")

    async def join_token(self, node: str) -> str:
        return str((await self._ask("token", "create", "--node", node, "--valid", "1h"))["secret"])

    async def node(self, node: str) -> Seen:
        answer = await self._ask("node", "status", node)
        state = answer["node"]
        return Seen(
            status=state["status"],
            version=state["node"]["version"],
            reason=state["reason"],
            allocations=frozenset(each["id"] for each in answer["allocations"]),
        )

    async def _ask(self, *words: str) -> Any:
        done = await self._remote.ask("run", words=["--address", f"unix:{OPERATOR_SOCKET}", *words, "--json"])
        if done["code"]:
            raise PeerError(str(done["err"]).strip().removeprefix("outrider: "))
        return json.loads(done["out"])


async def on_controller(remote: Remote, directory: Path) -> FleetAccess:
    """Through an open connection; `directory` is for the near end of the socket."""
    if remote.sudo:
        return ByCommand(remote)
    near = directory / f"{remote.host.node}.sock"
    await remote.forward(near, OPERATOR_SOCKET)
    return Direct(Address(target=f"unix:{near}"))


async def wait_ready(fleet: FleetAccess, node: str, *, version: str, timeout_s: float) -> str:
    """ "" once the fleet says that the node is ready and runs `version`; else what it says at the end."""
    told = "the fleet does not know it"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    seen = await fleet.node(node)
                    if seen.status == "ready" and seen.version == version:
                        return ""
                    told = f"it is {seen.status}, version {seen.version or 'unknown'}: {seen.reason}"
                except (PeerError, RefusedError) as error:
                    told = str(error)
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        return told
