"""What `deploy` needs of the fleet itself: join tokens, how its nodes are, drains. Owns the ways there, nothing else.

As any command, where OUTRIDER_ADDRESS says; through SSH to the socket of a controller that is among the hosts; or,
where root is only to be had by sudo there, by the command line installed on that host.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
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
DRAIN_SLACK_S = 90.0  # a workload may take its time after SIGTERM
_POLL_S = 0.25


class Seen(Value, frozen=True, kw_only=True):
    """A node, as the fleet tells of it."""

    status: str
    version: str
    reason: str
    allocations: frozenset[str]
    draining: bool


class FleetAccess(Protocol):
    """Raises OutriderError, PeerError where nobody answers."""

    async def answers(self) -> None: ...
    async def join_token(self, node: str) -> str: ...

    async def authorities(self) -> frozenset[str]:
        """The fingerprints of the CAs by which the fleet is known: two, while it changes."""
        ...

    async def node(self, node: str) -> Seen: ...

    async def nodes(self) -> Mapping[str, str]:
        """Each that the fleet knows, and its status."""
        ...

    async def close(self, node: str) -> None:
        """It gets no new work."""
        ...

    async def drain(self, node: str, deadline_s: float | None) -> None:
        """Begin it. 0: at once; None: as long as it takes."""
        ...

    async def revoke(self, node: str) -> None: ...


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

    async def authorities(self) -> frozenset[str]:
        request = access_pb2.GetCaRequest()
        answer = await asyncio.to_thread(lambda: self._open().call(self._open().access.GetCa, request))
        return frozenset(filter(None, (answer.sha256, answer.previous_sha256)))

    async def node(self, node: str) -> Seen:
        request = operator_pb2.GetNodeRequest(node=node)
        answer = await asyncio.to_thread(lambda: self._open().call(self._open().stub.GetNode, request))
        return Seen(
            status=_status(answer.node.status),
            version=answer.node.node.version,
            reason=answer.node.reason,
            allocations=frozenset(each.id for each in answer.allocations),
            draining=answer.node.HasField("drain"),
        )

    async def nodes(self) -> Mapping[str, str]:
        request = operator_pb2.ListNodesRequest()
        answer = await asyncio.to_thread(lambda: self._open().call(self._open().stub.ListNodes, request))
        return {state.node.id: _status(state.status) for state in answer.nodes}

    async def close(self, node: str) -> None:
        await self._steer(operator_pb2.SteerNodeRequest(node=node, eligible=False))

    async def drain(self, node: str, deadline_s: float | None) -> None:
        await self._steer(operator_pb2.SteerNodeRequest(node=node, eligible=False, drain=True, deadline_s=deadline_s))

    async def revoke(self, node: str) -> None:
        request = access_pb2.RevokeNodeRequest(node=node)
        await asyncio.to_thread(lambda: self._open().call(self._open().access.RevokeNode, request))

    async def _steer(self, request: operator_pb2.SteerNodeRequest) -> None:
        await asyncio.to_thread(lambda: self._open().call(self._open().stub.SteerNode, request))

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

    async def authorities(self) -> frozenset[str]:
        answer = await self._ask("operator", "ca", "status")
        return frozenset(filter(None, (answer["sha256"], answer["previous_sha256"])))

    async def node(self, node: str) -> Seen:
        answer = await self._ask("node", "status", node)
        state = answer["node"]
        return Seen(
            status=state["status"],
            version=state["node"]["version"],
            reason=state["reason"],
            allocations=frozenset(each["id"] for each in answer["allocations"]),
            draining=state["drain"] is not None,
        )

    async def nodes(self) -> Mapping[str, str]:
        return {state["node"]["id"]: state["status"] for state in await self._ask("node", "ls")}

    async def close(self, node: str) -> None:
        await self._run("node", "eligibility", node, "--disable")

    async def drain(self, node: str, deadline_s: float | None) -> None:
        deadline = "none" if deadline_s is None else f"{deadline_s:g}s"
        await self._run("node", "drain", node, "--deadline", deadline, "--detach")

    async def revoke(self, node: str) -> None:
        await self._run("node", "revoke", node)

    async def _ask(self, *words: str) -> Any:
        return json.loads(await self._run(*words, "--json"))

    async def _run(self, *words: str) -> str:
        done = await self._remote.ask("run", words=["--address", f"unix:{OPERATOR_SOCKET}", *words])
        if done["code"]:
            raise PeerError(str(done["err"]).strip().removeprefix("outrider: "))
        return str(done["out"])


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


async def empty(
    fleet: FleetAccess, node: str, *, leaving: frozenset[str], deadline_s: float | None, tell: Callable[[str], None]
) -> None:
    """Work leaves the node for others; at once where all others leave too. Raises RefusedError where it does not end.

    `leaving`: all nodes that are being removed, closed to new work already.
    """
    statuses = await fleet.nodes()
    if node not in statuses:
        return  # it never joined
    others = {other for other, status in statuses.items() if status == "ready"} - leaving
    if statuses[node] != "ready" or not others:
        why = f"it is {statuses[node]}" if others else "no other node is left"
        tell(f"drain at once: {why}")
        deadline_s = 0.0
    else:
        tell("drain")
    await fleet.drain(node, deadline_s)
    if statuses[node] != "ready":
        return  # nobody there who could stop it: the purge does
    left: frozenset[str] = frozenset()
    try:
        async with asyncio.timeout(None if deadline_s is None else deadline_s + DRAIN_SLACK_S):
            while (seen := await fleet.node(node)).draining:
                left = seen.allocations
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        text = f"node {node} is not empty {DRAIN_SLACK_S:g} s after its deadline: {', '.join(sorted(left)[:5])}"
        raise RefusedError("not-empty", f"{text}; see `outrider node status {node}`") from error


def _status(number: int) -> str:
    return node_pb2.NodeStatus.Name(number).removeprefix("NODE_STATUS_").lower()  # type: ignore[arg-type]
