"""The agents' open streams: what is on its way to each. Reads no stream and owns no task: `fleet` does.

Queues: one for each session, MESSAGES_MAX long. When it is full the session is ended: the agent dials again and is
told everything anew, which is cheaper than to remember what it missed.
"""

import asyncio
import itertools

from controller.core.commands import CloseSession, ProbeNode, SendAssignments
from controller.core.events import SessionId
from outrider import codec
from outrider.errors import OutriderError, PeerError, RefusedError
from outrider.ids import NodeId
from outrider.model.job import Group
from outrider.model.mesh import MeshUpdate
from outrider.v1 import allocation_pb2, fleet_pb2, job_pb2, mesh_pb2

MESSAGES_MAX = 512
GROUPS_MAX = 256  # of which the wire form is kept
PROBE_SEQUENCE = 0  # a heartbeat that nobody sent: the agent answers with one of its own at once


class AgentSession:
    """One agent's stream."""

    def __init__(self, session: SessionId, node: NodeId) -> None:
        self.id = session
        self.node = node
        self.answered_s = float("-inf")  # when its last heartbeat was answered
        self.ended = asyncio.Event()
        self.reason = ""
        self.error: OutriderError | None = None
        self.trusting: fleet_pb2.Trusting | None = None  # None: its agent knows nothing of Trust
        self._queue: asyncio.Queue[fleet_pb2.ControllerMessage] = asyncio.Queue(MESSAGES_MAX)

    def send(self, message: fleet_pb2.ControllerMessage) -> None:
        """Never waits."""
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self.end(RefusedError("slow-listener", f"{MESSAGES_MAX} messages wait for node {self.node}: dial again"))

    async def next(self) -> fleet_pb2.ControllerMessage:
        return await self._queue.get()

    def end(self, why: OutriderError | str) -> None:
        """The first reason counts."""
        if not self.ended.is_set():
            self.reason = str(why)
            self.error = why if isinstance(why, OutriderError) else None
            self.ended.set()


class _GroupMessages:
    """The wire form of groups told of lately: a job's is the same for each of its copies, and most of what is sent."""

    def __init__(self) -> None:
        self._kept: dict[
            int, tuple[Group, job_pb2.Group]
        ] = {}  # by identity: to compare is as much work as to make one

    def of(self, group: Group) -> job_pb2.Group:
        kept = self._kept.get(id(group))
        if kept is None:
            if len(self._kept) >= GROUPS_MAX:
                self._kept.clear()
            kept = self._kept[id(group)] = group, codec.to_wire(group, job_pb2.Group)
        return kept[1]


class Sessions:
    """The newest session of each node. A newer one ends the older."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._current: dict[NodeId, AgentSession] = {}
        self._groups = _GroupMessages()

    def __len__(self) -> int:
        return len(self._current)

    def begin(self, node: NodeId) -> AgentSession:
        older = self._current.get(node)
        if older is not None:
            older.end(RefusedError("replaced", f"a newer session of node {node} took this one's place"))
        session = self._current[node] = AgentSession(SessionId(next(self._ids)), node)
        return session

    def finish(self, session: AgentSession) -> bool:
        """Whether it was its node's newest."""
        newest = self._current.get(session.node) is session
        if newest:
            del self._current[session.node]
        return newest

    def send(self, command: SendAssignments) -> None:
        session = self._of(command.session, command.node)
        if session is not None:
            assignments = fleet_pb2.Assignments(
                generation=codec.to_wire(command.generation, allocation_pb2.Generation),
                full=command.full,
                assignments=[
                    codec.to_wire(each, allocation_pb2.Assignment, group=self._groups.of(each.group))
                    for each in command.assignments
                ],
                removed=command.removed,
            )
            session.send(fleet_pb2.ControllerMessage(assignments=assignments))

    def probe(self, command: ProbeNode) -> None:
        session = self._of(command.session, command.node)
        if session is not None:
            heartbeat = fleet_pb2.Heartbeat(sequence=PROBE_SEQUENCE)
            session.send(fleet_pb2.ControllerMessage(heartbeat=heartbeat))

    def close(self, command: CloseSession) -> None:
        session = self._of(command.session, command.node)
        if session is not None:
            session.end(PeerError(command.reason))

    def deliver(self, node: NodeId, update: MeshUpdate) -> None:
        session = self._current.get(node)
        if session is not None:
            session.send(fleet_pb2.ControllerMessage(mesh_update=codec.to_wire(update, mesh_pb2.MeshUpdate)))

    def trust(self, trust: fleet_pb2.Trust) -> None:
        """Tell all, and whoever comes from here on."""
        for session in self._current.values():
            if session.trusting is not None:
                session.send(fleet_pb2.ControllerMessage(trust=trust))

    def behind(self, node: NodeId, trust: fleet_pb2.Trust) -> str:
        """Why the node could not do with the issuer of `trust` alone; "" where it can."""
        session = self._current.get(node)
        if session is None:
            return "it is not connected"
        if session.trusting is None:
            return "its agent is too old: upgrade it"
        if session.trusting.issuer_sha256 != trust.issuer_sha256:
            return "its certificate is of the CA before"
        return "" if trust.issuer_sha256 in session.trusting.roots_sha256 else "it does not trust the new CA yet"

    def check(self, node: NodeId) -> None:
        """Raises PeerError where the node has no session."""
        if node not in self._current:
            raise PeerError(f"node {node} is not connected; `outrider node status {node}` says since when")

    def open_tunnel(self, node: NodeId, request: fleet_pb2.OpenTunnel) -> None:
        """Raises PeerError where the node has no session."""
        self.check(node)
        self._current[node].send(fleet_pb2.ControllerMessage(open_tunnel=request))

    def set_log_level(self, node: NodeId, level: str) -> None:
        """Raises PeerError where the node has no session."""
        self.check(node)
        self._current[node].send(fleet_pb2.ControllerMessage(log_level=level))

    def _of(self, session: SessionId, node: NodeId) -> AgentSession | None:
        """The core may speak of a session that has just ended."""
        current = self._current.get(node)
        return current if current is not None and current.id == session else None
