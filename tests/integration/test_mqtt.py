"""Events and presence through a real Mosquitto: TLS, the ACL, last wills, a broker that comes and goes."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import aiomqtt
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from controller import events
from controller.ca import FleetCa
from controller.config import MqttConfig
from controller.core.events import LastWillSeen
from controller.events import Broker
from outrider.broker import mosquitto_acl, mosquitto_conf, node_status_topic
from outrider.ids import NodeId
from outrider.log import Log
from outrider.model.fleet import FleetEvent
from outrider.tls import TlsFiles, ssl_context
from tests.integration.processes import free_port, listening, program, until

CLUSTER = "mqtt-test"
N1, N2 = NodeId("n1"), NodeId("n2")
GONE = b'{"status":"gone","at_s":1.0}'


class Lab:
    """A fleet's CA and the broker's configuration, in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.ca = FleetCa(directory / "ca", CLUSTER)
        self.controller = self.ca.issue_server([])
        self.operator = self.ca.issue_operator("cli")
        acl = directory / "acl"
        acl.write_text(mosquitto_acl(CLUSTER))
        files = self.ca.issue_broker(["127.0.0.1"])
        conf = mosquitto_conf(host="127.0.0.1", port=self.port, files=files, acl=acl, user="root")
        (directory / "mosquitto.conf").write_text(conf)

    def node(self, node: NodeId) -> TlsFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        csr = request.public_bytes(serialization.Encoding.PEM)
        files = TlsFiles(
            ca=self.controller.ca, certificate=self.directory / f"{node}.crt", key=self.directory / f"{node}.key"
        )
        files.certificate.write_bytes(self.ca.issue_node(csr, node).pem)
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    @contextlib.asynccontextmanager
    async def mosquitto(self) -> AsyncIterator[None]:
        log = self.directory / "mosquitto.log"
        async with program("mosquitto", "-c", self.directory / "mosquitto.conf", log=log):
            await listening(self.port)
            yield

    def client(self, files: TlsFiles, *, will: aiomqtt.Will | None = None, timeout_s: float = 5.0) -> aiomqtt.Client:
        return aiomqtt.Client(
            "127.0.0.1",
            self.port,
            protocol=aiomqtt.ProtocolVersion.V5,
            tls_context=ssl_context(files, server=False),
            timeout=timeout_s,
            will=will,
        )

    @contextlib.asynccontextmanager
    async def broker(self, seen: list[LastWillSeen]) -> AsyncIterator[Broker]:
        broker = Broker(
            config=MqttConfig(host="127.0.0.1", port=self.port),
            cluster=CLUSTER,
            tls=partial(ssl_context, self.controller, server=False),
            seen=seen.append,
            log=Log("mqtt"),
        )
        async with asyncio.TaskGroup() as group:
            running = group.create_task(broker.run(), name="mqtt")
            yield broker
            running.cancel()


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture(autouse=True)
def quick_reconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "RECONNECT_S", 0.05)


async def test_a_last_will_reaches_the_core_and_events_reach_operators(lab: Lab) -> None:
    seen: list[LastWillSeen] = []
    async with lab.mosquitto(), lab.broker(seen) as broker, lab.client(lab.operator) as operator:
        await operator.subscribe(f"outrider/{CLUSTER}/controller/#", qos=1)
        await until(lambda: broker.connected, "the controller is connected")
        broker.put(FleetEvent(sequence=7, kind="alloc.running", node="n1", job="shop", alloc="a1"))
        topics = {}
        async with asyncio.timeout(10):
            async for message in operator.messages:
                assert isinstance(message.payload, bytes)
                topics[message.topic.value] = message.payload
                if len(topics) == 2:
                    break
        event = topics[f"outrider/{CLUSTER}/controller/event/alloc/a1"]
        assert msgspec.json.decode(event, type=FleetEvent).sequence == 7
        assert b"online" in topics[f"outrider/{CLUSTER}/controller/status"]

        will = aiomqtt.Will(node_status_topic(CLUSTER, N1), GONE, qos=1, retain=True)
        with contextlib.suppress(aiomqtt.MqttError):
            async with lab.client(lab.node(N1), will=will) as node:
                transport = node._client.socket()
                assert transport is not None
                transport.shutdown(2)  # no DISCONNECT: the client vanishes
                await until(lambda: seen == [LastWillSeen(node=N1)], "the last will is told")


async def test_a_node_cannot_write_under_anothers_topic_nor_read(lab: Lab) -> None:
    seen: list[LastWillSeen] = []
    async with lab.mosquitto(), lab.broker(seen) as broker, lab.client(lab.node(N1)) as node:
        await until(lambda: broker.connected, "the controller is connected")
        for forged in (node_status_topic(CLUSTER, N2), f"outrider/{CLUSTER}/controller/status"):
            with contextlib.suppress(aiomqtt.MqttError):  # MQTT 5 may say so, or drop it in silence
                await node.publish(forged, GONE, qos=1)
        await node.publish(node_status_topic(CLUSTER, N1), GONE, qos=1)  # in order: what came before it was dropped
        await until(lambda: bool(seen), "its own is told")
        assert seen == [LastWillSeen(node=N1)]
        granted = await node.subscribe(f"outrider/{CLUSTER}/#", qos=1)
        await node.publish(f"outrider/{CLUSTER}/node/n1/alloc/a/event", b"{}", qos=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await anext(aiter(node.messages))
        assert granted


async def test_nobody_connects_without_a_certificate_of_the_fleet(lab: Lab, tmp_path: Path) -> None:
    stranger = Lab(tmp_path / "stranger")
    foreign = TlsFiles(ca=lab.controller.ca, certificate=stranger.operator.certificate, key=stranger.operator.key)
    without = ssl.create_default_context(cafile=str(lab.controller.ca))
    async with lab.mosquitto():
        with pytest.raises(aiomqtt.MqttError):
            async with lab.client(foreign, timeout_s=0.5):
                pass
        with pytest.raises(aiomqtt.MqttError):
            async with aiomqtt.Client("127.0.0.1", lab.port, tls_context=without, timeout=0.5):
                pass


async def test_garbage_is_passed_over(lab: Lab) -> None:
    seen: list[LastWillSeen] = []
    async with lab.mosquitto(), lab.broker(seen) as broker, lab.client(lab.node(N1)) as node:
        await until(lambda: broker.connected, "the controller is connected")
        for payload in (b"", b"\xff", b"[]", b'{"status": 3}', b'{"status":"online","at_s":1}'):
            await node.publish(node_status_topic(CLUSTER, N1), payload, qos=1)
        await node.publish(node_status_topic(CLUSTER, N1), GONE, qos=1)
        await until(lambda: bool(seen), "the good one is told")
        assert len(seen) == 1


async def test_a_broker_that_is_away_slows_nothing_and_all_is_as_before_when_it_is_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "OUTBOX_MAX", 3)
    seen: list[LastWillSeen] = []
    async with lab.broker(seen) as broker:
        for number in range(5):
            broker.put(FleetEvent(sequence=number, kind="node.ready", node="n1"))
        assert broker.dropped == 2
        async with lab.mosquitto():
            await until(lambda: broker.published == 3, "what was kept is published")
        await until(lambda: not broker.connected, "the loss is noticed")
        async with lab.mosquitto():
            await until(lambda: broker.connected, "it is connected again")
            async with lab.client(lab.node(N1)) as node:
                await node.publish(node_status_topic(CLUSTER, N1), GONE, qos=1)
            await until(lambda: seen == [LastWillSeen(node=N1)], "it is subscribed again")
