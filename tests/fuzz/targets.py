"""Every input that comes from outside, each with samples that are right and the reader that must bear what is wrong.

A reader returns, or raises an error that its callers know; anything else is a crash. Owns no mutation.
"""

import asyncio
import json
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from dnslib import DNSRecord
from google.protobuf.message import DecodeError

from agent.core.events import AllocRecord
from agent.network import dhcp
from agent.network.dns.answers import MalformedQueryError, answer
from agent.network.dns.control import decode_request
from agent.store import AgentRecord
from controller.catalog.api import Call
from controller.catalog.catalog import _ROUTES, Catalog
from controller.catalog.txn import FailedTransactionError
from controller.core.records import Record
from controller.events import gone_node
from controller.journal.archive import pack, unpack
from outrider import codec
from outrider.errors import OutriderError
from outrider.jobspec.reader import parse_job
from outrider.log import Log
from outrider.model.allocation import AllocReport, Assignment, Generation
from outrider.model.job import Job
from outrider.model.mesh import MeshUpdate
from outrider.model.node import Fingerprint, Node
from outrider.v1 import allocation_pb2, fleet_pb2, job_pb2, mesh_pb2, node_pb2, operator_pb2
from outrider.validate import problems
from tests.fuzz.emulators import Answers, ask_emulator, emulator_answers, guest_agent_answers, run_in_guest
from tests.scenarios.world import World, group, job, node, service

ROOT = Path(__file__).parents[2]
KNOWN = (OutriderError, DecodeError, msgspec.MsgspecError, UnicodeDecodeError)


@dataclass(frozen=True)
class Target:
    name: str
    share: int  # of all cases, in percent
    samples: list[bytes]
    read: Callable[[bytes], object]
    known: tuple[type[Exception], ...] = KNOWN


def all_targets() -> list[Target]:
    return [
        Target("job file", 7, job_files(), lambda content: parse_job(content, ROOT / "examples/shop/shop.yaml")),
        Target("protobuf: operator", 22, operator_messages(), read_operator),
        Target("protobuf: agent", 22, agent_messages(), read_agent),
        Target("protobuf: controller", 8, controller_messages(), read_controller),
        Target("catalog HTTP", 14, catalog_calls(), CatalogReader(), (*KNOWN, FailedTransactionError)),
        Target("MQTT", 7, mqtt_messages(), read_mqtt, (ValueError,)),
        Target("state files", 8, state_files(), read_state),
        Target("QMP", 1, emulator_answers(), Answers(ask_emulator, when_asked=False)),
        Target("guest agent", 1, guest_agent_answers(), Answers(run_in_guest, when_asked=True)),
        Target("snapshot", 2, snapshots(), lambda content: unpack(content, cluster="test")),
        Target("journal", 2, journal_records(), lambda content: msgspec.msgpack.decode(content, type=list[Record])),
        Target("DNS", 3, dns_queries(), lambda query: answer(query, {"api": "198.18.0.5"}),
               (MalformedQueryError,)),
        Target("DHCP", 2, dhcp_packets(), dhcp.reply),
        Target("responder control", 1, [b'{"do": "attach", "alloc": "a", "names": {"api": "198.18.0.5"}}'],
               decode_request, (ValueError, TypeError)),
    ]  # fmt: skip


def job_files() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "examples").rglob("*.yaml"))]


def a_job() -> Job:
    return job("shop", group("web", 3, services=[service("web", upstreams=["api"], allow=["*"])], static=8080))


def operator_messages() -> list[bytes]:
    wire = codec.to_wire(a_job(), job_pb2.Job)
    return [
        operator_pb2.SubmitJobRequest(job=wire).SerializeToString(),
        wire.SerializeToString(),
        operator_pb2.ListAllocationsRequest(job="shop", node="n1").SerializeToString(),
        fleet_pb2.ExecRequest(alloc="a", command=["sh"], tty=True).SerializeToString(),
    ]


def read_operator(content: bytes) -> None:
    """As `SubmitJob` does; the other calls read names alone."""
    for request in (operator_pb2.SubmitJobRequest(), job_pb2.Job()):
        request.ParseFromString(content)
        wire = request.job if isinstance(request, operator_pb2.SubmitJobRequest) else request
        problems(codec.from_wire(wire, Job))


def a_world() -> World:
    world = World()
    world.join(node("n1"))
    world.submit(a_job())
    return world


def agent_messages() -> list[bytes]:
    world = a_world()
    agent = world.agents[node("n1").id]
    reports = [codec.to_wire(one, allocation_pb2.AllocReport) for one in agent.reports()]
    described = codec.to_wire(node("n1"), node_pb2.Node)
    hello = fleet_pb2.Hello(node=described, reports=reports, protocol=1)
    return [
        fleet_pb2.AgentMessage(hello=hello).SerializeToString(),
        fleet_pb2.AgentMessage(reports=fleet_pb2.Reports(reports=reports)).SerializeToString(),
        fleet_pb2.AgentMessage(heartbeat=fleet_pb2.Heartbeat(sequence=7)).SerializeToString(),
        fleet_pb2.AgentMessage(
            fingerprint_changed=fleet_pb2.FingerprintChanged(fingerprint=described.fingerprint)
        ).SerializeToString(),
    ]


def read_agent(content: bytes) -> None:
    """As the controller reads a session."""
    message = fleet_pb2.AgentMessage()
    message.ParseFromString(content)
    match message.WhichOneof("message"):
        case "hello":
            codec.from_wire(message.hello.node, Node)
            codec.from_wire(message.hello.acknowledged, Generation)
            for report in message.hello.reports:
                codec.from_wire(report, AllocReport)
        case "reports":
            for report in message.reports.reports:
                codec.from_wire(report, AllocReport)
        case "applied":
            codec.from_wire(message.applied.generation, Generation)
        case "fingerprint_changed":
            codec.from_wire(message.fingerprint_changed.fingerprint, Fingerprint)


def controller_messages() -> list[bytes]:
    world = a_world()
    assignments = [
        codec.to_wire(one, allocation_pb2.Assignment) for one in world.agents[node("n1").id].running.values()
    ]
    update = codec.to_wire(MeshUpdate(version=1, full=True), mesh_pb2.MeshUpdate)
    return [
        fleet_pb2.ControllerMessage(
            assignments=fleet_pb2.Assignments(full=True, assignments=assignments)
        ).SerializeToString(),
        fleet_pb2.ControllerMessage(mesh_update=update).SerializeToString(),
    ]


def read_controller(content: bytes) -> None:
    """As the agent reads a session."""
    message = fleet_pb2.ControllerMessage()
    message.ParseFromString(content)
    match message.WhichOneof("message"):
        case "assignments":
            codec.from_wire(message.assignments.generation, Generation)
            for each in message.assignments.assignments:
                codec.from_wire(each, Assignment)
        case "mesh_update":
            codec.from_wire(message.mesh_update, MeshUpdate)


def catalog_calls() -> list[bytes]:
    """A route's number, a query, a body."""
    register = {"Node": "n", "Address": "10.0.0.1", "Service": {"Service": "web", "Port": 80}, "Check": {"Name": "c"}}
    txn = [{"KV": {"Verb": "set", "Key": "k", "Value": "dg=="}}, {"Node": {"Verb": "set", "Node": {"Node": "n"}}}]
    session = {"Name": "s", "TTL": "10s", "LockDelay": "0s", "Behavior": "release"}
    intention = {"SourceName": "a", "DestinationName": "b", "Action": "deny"}
    bodies = [b"", b"value", *(json.dumps(body).encode() for body in (register, txn, session, intention))]
    return [
        bytes([number]) + query + b"\n" + body
        for number in range(len(_ROUTES))
        for query in (b"recurse", b"acquire=x&index=0&passing", b"source=a&destination=b&service=web")
        for body in bodies
    ]


class CatalogReader:
    """The routes' own handlers, on a store in memory; the sockets before them are aiohttp's."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="outrider-fuzz-")
        path = Path(directory.name)
        self._catalog = Catalog(
            database=path / "c.db", socket=path / "c.sock", listen=None, tls=None, cluster="test", log=Log("catalog")
        )

        async def found() -> None:
            await self._catalog.start()
            await self._catalog.stop()

        asyncio.run(found())
        directory.cleanup()
        self._cases = 0

    def __call__(self, content: bytes) -> None:
        self._cases += 1
        if self._cases % 2000 == 0:
            self._begin()  # what was registered is not to grow without end
        number, rest = (content[0] if content else 0), content[1:]
        route = _ROUTES[number % len(_ROUTES)]
        query, _, body = rest.partition(b"\n")
        words = [part.partition("=") for part in query.decode(errors="replace").split("&")]
        call = Call(
            path=dict.fromkeys(re.findall(r"{(\w+)", route.path), words[0][0] or "x"),
            query={name: value for name, _, value in words},
            body=body,
            monotonic_s=1.0,
            at=datetime.now(UTC),
            new_id=f"00000000-0000-0000-0000-{random.Random(content).getrandbits(48):012x}",  # noqa: S311
        )
        if route.method == "GET":
            route.handler(self._catalog._scope, call)
        else:
            with self._catalog._store.transaction():
                route.handler(self._catalog._scope, call)


def mqtt_messages() -> list[bytes]:
    return [
        b'outrider/v1/test/node/n1/status\n{"status": "gone", "at_s": 1.5}',
        b'outrider/v1/test/node/n1/status\n{"status": "online"}',
    ]


def read_mqtt(content: bytes) -> None:
    topic, _, payload = content.partition(b"\n")
    gone_node("test", topic.decode(errors="replace"), payload)


def state_files() -> list[bytes]:
    agent = a_world().agents[node("n1").id]
    records = [AllocRecord(assignment=one, stopping=True, failure="it failed") for one in agent.running.values()]
    own = AgentRecord(node="n1", acknowledged=Generation(epoch=3, counter=4))
    return [*map(msgspec.json.encode, records), msgspec.json.encode(own)]


def read_state(content: bytes) -> None:
    for kind in (AllocRecord, AgentRecord):
        try:
            msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError:
            continue


def snapshots() -> list[bytes]:
    return [pack(tuple(a_world().journal), cluster="test", saved_at_s=1.0)]


def journal_records() -> list[bytes]:
    return [msgspec.msgpack.encode(a_world().journal)]


def dns_queries() -> list[bytes]:
    return [
        DNSRecord.question(name, kind).pack() for name in ("api.mesh", "other.org") for kind in ("A", "AAAA", "ANY")
    ]


def dhcp_packets() -> list[bytes]:
    fixed = bytes([1, 1, 6, 0]) + b"abcd" + bytes(20) + b"\x02\x00\x00\x00\x00\x01" + bytes(10) + bytes(192)
    return [fixed + b"\x63\x82\x53\x63" + bytes([53, 1, kind, 255]) for kind in (1, 3)]
