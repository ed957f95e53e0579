"""The node's presence and its allocations' changes on MQTT. A broker that is away or slow slows nothing.

Tasks: `run`, which watches the connection, and while connected one that publishes. Queue: what waits to be
published, OUTBOX_MAX; when it is full the oldest is dropped and counted. docs/EVENTS.md has topics and schema.
"""

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable

import aiomqtt
import msgspec

from agent.config import MqttConfig
from outrider.broker import alloc_event_topic, node_status_topic
from outrider.clock import wall_s
from outrider.errors import ConfigError
from outrider.ids import AllocId, NodeId
from outrider.log import Log
from outrider.model.allocation import AllocReport
from outrider.model.job import Value

OUTBOX_MAX = 1024
CONNECT_TIMEOUT_S = 5.0
RECONNECT_S = 1.0
# The broker tells of a silent node's last will after one and a half of these.
KEEPALIVE_S = 1


class PresenceMessage(Value, frozen=True, kw_only=True, omit_defaults=False):
    """The payload of the node's `status` topic. Retained; `gone` is the last will."""

    status: str  # "online" or "gone"
    at_s: float


class AllocMessage(Value, frozen=True, kw_only=True, omit_defaults=False):
    """The payload of an allocation's `event` topic."""

    at_s: float
    node: str
    alloc: str
    job: str
    status: str
    tasks: dict[str, str]  # name -> status
    passing: list[str]  # services whose check passes
    message: str


class Broker:
    def __init__(
        self, *, config: MqttConfig, cluster: str, node: NodeId, tls: Callable[[], ssl.SSLContext], log: Log
    ) -> None:
        self.connected = False
        self.published = 0
        self.dropped = 0
        self._config = config
        self._cluster = cluster
        self._node = node
        self._tls = tls
        self._log = log
        self._outbox: deque[AllocMessage] = deque(maxlen=OUTBOX_MAX)
        self._ready = asyncio.Event()

    def put(self, report: AllocReport, job: str) -> None:
        """Never waits."""
        self.dropped += len(self._outbox) == OUTBOX_MAX
        self._outbox.append(
            AllocMessage(
                at_s=wall_s(),
                node=self._node,
                alloc=report.alloc,
                job=job,
                status=report.status,
                tasks={task.name: str(task.status) for task in report.tasks},
                passing=[check.service for check in report.checks if check.passing],
                message=report.message,
            )
        )
        self._ready.set()

    async def run(self) -> None:
        """Until cancelled; then the node says that its agent is gone, if the broker still listens."""
        known_reason = ""
        task = asyncio.current_task()
        # Python 3.11's TaskGroup drops a cancellation that comes together with an error: ask for it by hand.
        while task is not None and not task.cancelling():
            reason = await self._connection()
            self.connected = False
            if reason != known_reason:  # once for each reason, not once for each attempt
                self._log.warning("broker away", host=self._config.host, port=self._config.port, reason=reason)
                known_reason = reason
            await asyncio.sleep(RECONNECT_S)

    async def _connection(self) -> str:
        """One connection, until it ends. Why it ended."""
        reason = "closed"
        try:
            async with self._client() as client:
                await client.publish(self._status_topic, _presence("online"), qos=1, retain=True)
                self.connected = True
                self._log.info("broker connected", host=self._config.host, port=self._config.port)
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._publish(client), name="mqtt-publish")
                        await _watch(client)
                except asyncio.CancelledError:
                    await self._say_gone(client)
                    raise
        except* (aiomqtt.MqttError, OSError, ConfigError) as errors:
            reason = "; ".join(str(error) for error in errors.exceptions)
        return reason

    async def _say_gone(self, client: aiomqtt.Client) -> None:
        with contextlib.suppress(aiomqtt.MqttError):
            await client.publish(self._status_topic, _presence("gone"), qos=1, retain=True, timeout=1.0)

    def _client(self) -> aiomqtt.Client:
        return aiomqtt.Client(
            self._config.host,
            self._config.port,
            identifier=f"outrider-{self._cluster}-{self._node}",
            protocol=aiomqtt.ProtocolVersion.V5,
            tls_context=self._tls(),
            timeout=CONNECT_TIMEOUT_S,
            keepalive=KEEPALIVE_S,
            will=aiomqtt.Will(self._status_topic, _presence("gone"), qos=1, retain=True),
        )

    @property
    def _status_topic(self) -> str:
        return node_status_topic(self._cluster, self._node)

    async def _publish(self, client: aiomqtt.Client) -> None:
        while True:
            while self._outbox:
                message = self._outbox[0]
                topic = alloc_event_topic(self._cluster, self._node, AllocId(message.alloc))
                await client.publish(topic, msgspec.json.encode(message), qos=1)
                self.published += 1
                if self._outbox and self._outbox[0] is message:  # it may have been dropped meanwhile
                    self._outbox.popleft()
            self._ready.clear()
            await self._ready.wait()


async def _watch(client: aiomqtt.Client) -> None:
    """Nothing is subscribed to: this ends, with MqttError, when the connection does."""
    async for _ in client.messages:
        pass


def _presence(status: str) -> bytes:
    return msgspec.json.encode(PresenceMessage(status=status, at_s=wall_s()))
