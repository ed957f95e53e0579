"""The fleet's events on MQTT, and the nodes' last wills. A broker that is away or slow slows nothing.

Tasks: `mqtt` (connects, again and again, and receives), and while connected `mqtt-publish`.
Queues: what waits to be published, OUTBOX_MAX; when it is full the oldest is dropped and counted.
docs/EVENTS.md has topics and schema.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable

import aiomqtt
import msgspec

from controller.config import MqttConfig
from controller.core.events import LastWillSeen
from outrider.broker import MESSAGE_BYTES_MAX, controller_topic, node_status_topic, node_topic, topic_root
from outrider.clock import wall_s
from outrider.errors import ConfigError
from outrider.ids import NodeId, is_name
from outrider.log import Log
from outrider.model.fleet import FleetEvent
from outrider.model.job import Value

OUTBOX_MAX = 10_000
CONNECT_TIMEOUT_S = 5.0
RECONNECT_S = 1.0
KEEPALIVE_S = 5

_EVERY_NODE = NodeId("+")


class PresenceMessage(Value, frozen=True, kw_only=True, omit_defaults=False):
    """The payload of a `status` topic. Retained; `gone` is the last will."""

    status: str  # "online" or "gone"
    at_s: float = 0.0


class Broker:
    """The controller's connection to the broker."""

    def __init__(
        self,
        *,
        config: MqttConfig,
        cluster: str,
        tls: Callable[[], ssl.SSLContext],
        seen: Callable[[LastWillSeen], None],
        log: Log,
    ) -> None:
        """`seen` is called for every last will, a retained one too: the core looks, and decides nothing by it."""
        self.connected = False
        self.published = 0
        self.dropped = 0
        self._config = config
        self._cluster = cluster
        self._tls = tls
        self._seen = seen
        self._log = log
        self._outbox: deque[FleetEvent] = deque(maxlen=OUTBOX_MAX)
        self._ready = asyncio.Event()

    def put(self, event: FleetEvent) -> None:
        """Never waits."""
        self.dropped += len(self._outbox) == OUTBOX_MAX
        self._outbox.append(event)
        self._ready.set()

    async def run(self) -> None:
        """Until cancelled."""
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
            async with self._client() as client, asyncio.TaskGroup() as group:
                # A new connection is a new session at the broker: what was subscribed before is subscribed again.
                await client.subscribe(node_status_topic(self._cluster, _EVERY_NODE), qos=1, timeout=CONNECT_TIMEOUT_S)
                await client.publish(self._status_topic, _presence("online"), qos=1, retain=True)
                self.connected = True
                self._log.info("broker connected", host=self._config.host, port=self._config.port)
                group.create_task(self._publish(client), name="mqtt-publish")
                await self._receive(client)
        except* (aiomqtt.MqttError, OSError, ConfigError) as errors:
            reason = "; ".join(str(error) for error in errors.exceptions)
        return reason

    def _client(self) -> aiomqtt.Client:
        return aiomqtt.Client(
            self._config.host,
            self._config.port,
            identifier=f"outrider-{self._cluster}-controller",
            protocol=aiomqtt.ProtocolVersion.V5,
            tls_context=self._tls(),
            timeout=CONNECT_TIMEOUT_S,
            keepalive=KEEPALIVE_S,
            will=aiomqtt.Will(self._status_topic, _presence("gone"), qos=1, retain=True),
            max_queued_incoming_messages=OUTBOX_MAX,
        )

    @property
    def _status_topic(self) -> str:
        return f"{controller_topic(self._cluster)}/status"

    async def _publish(self, client: aiomqtt.Client) -> None:
        while True:
            while self._outbox:
                event = self._outbox[0]
                await client.publish(event_topic(self._cluster, event), msgspec.json.encode(event), qos=1)
                self.published += 1
                if self._outbox and self._outbox[0] is event:  # it may have been dropped meanwhile
                    self._outbox.popleft()
            self._ready.clear()
            await self._ready.wait()

    async def _receive(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            try:
                node = gone_node(self._cluster, message.topic.value, message.payload)
            except ValueError as error:
                self._log.warning("bad status message", topic=message.topic.value[:200], reason=str(error))
                continue
            if node is not None:
                self._seen(LastWillSeen(node=node))


def gone_node(cluster: str, topic: str, payload: object) -> NodeId | None:
    """The node whose client vanished, if the message says so. Raises ValueError for one that makes no sense."""
    node = _node_of(cluster, topic)
    if node is None or not isinstance(payload, bytes) or len(payload) > MESSAGE_BYTES_MAX:
        return None
    presence = msgspec.json.decode(payload, type=PresenceMessage)
    return node if presence.status == "gone" else None


def event_topic(cluster: str, event: FleetEvent) -> str:
    """By what the event is about: an allocation, else a job, else a node, else the fleet."""
    for noun, name in (("alloc", event.alloc), ("job", event.job), ("node", event.node)):
        if name:
            return f"{controller_topic(cluster)}/event/{noun}/{name}"
    return f"{controller_topic(cluster)}/event/fleet"


def _node_of(cluster: str, topic: str) -> NodeId | None:
    name = topic.removeprefix(f"{topic_root(cluster)}/node/").removesuffix("/status")
    return NodeId(name) if is_name(name) and topic == f"{node_topic(cluster, NodeId(name))}/status" else None


def _presence(status: str) -> bytes:
    return msgspec.json.encode(PresenceMessage(status=status, at_s=wall_s()))
