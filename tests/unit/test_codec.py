"""Every wire message mirrors a model value, and survives the round trip."""

import inspect

import msgspec
import pytest

from outrider import codec
from outrider.errors import InputError
from outrider.ids import AllocId, GroupName, JobName, NodeId, PortName, ServiceName, TaskName
from outrider.model import access, allocation, belongings, fleet, gateway, insight, job, mesh, node, traffic
from outrider.v1 import (
    access_pb2,
    allocation_pb2,
    belongings_pb2,
    insight_pb2,
    job_pb2,
    mesh_pb2,
    node_pb2,
    operator_pb2,
    traffic_pb2,
)

PAIRS = (
    (access, access_pb2),
    (fleet, operator_pb2),
    (job, job_pb2),
    (node, node_pb2),
    (allocation, allocation_pb2),
    (mesh, mesh_pb2),
    (belongings, belongings_pb2),
    (traffic, traffic_pb2),
    (insight, insight_pb2),
    (gateway, job_pb2),
)
LOCAL_ONLY = {"Value", "TrafficValue", "Belonging", "MeshView", "LocalService"}  # never sent whole

STRUCTS = [
    (name, kind, wire)
    for module, wire in PAIRS
    for name, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__ and name not in LOCAL_ONLY
]


@pytest.mark.parametrize(("name", "kind", "wire"), STRUCTS, ids=[name for name, _, _ in STRUCTS])
def test_wire_message_has_exactly_the_fields_of_the_model(name: str, kind: type[msgspec.Struct], wire: object) -> None:
    descriptor = getattr(wire, name).DESCRIPTOR
    assert set(descriptor.fields_by_name) == set(kind.__struct_fields__)
    codec._fields(kind, descriptor)  # every enum member and nested message is translated


def test_a_full_assignment_survives_the_round_trip() -> None:
    group = job.Group(
        name=GroupName("web"),
        tasks=(
            job.Task(
                name=TaskName("server"),
                command=("python3", "app.py"),
                env={"A": "b"},
                files=(job.File(path="app.py", content=b"\x00x", mode=0o755),),
                resources=job.Resources(cpu_max_millis=500),
            ),
        ),
        network=job.Network(ports=(job.Port(name=PortName("http"), static=8080),), egress=("10.0.0.0/8",)),
        services=(
            job.Service(
                name=ServiceName("web"),
                port=PortName("http"),
                protocol=job.Protocol.HTTP,
                check=job.Check(kind=job.CheckKind.HTTP, path="/healthz"),
                upstreams=(job.Upstream(service=ServiceName("api"), port=9001),),
            ),
        ),
    )
    sent = allocation.Assignment(
        alloc=AllocId("00000000aa"), job=JobName("shop"), job_version=3, group=group, index=2, mesh_ports={"web": 20001}
    )
    wire = codec.to_wire(sent, allocation_pb2.Assignment)
    received = codec.from_wire(allocation_pb2.Assignment.FromString(wire.SerializeToString()), allocation.Assignment)
    assert received == sent


def test_an_absent_node_stays_absent() -> None:
    sent = allocation.Allocation(
        id=AllocId("00000000aa"),
        job=JobName("a"),
        job_version=1,
        group=GroupName("g"),
        index=0,
        node=None,
        desired=allocation.Desired.RUN,
        status=allocation.AllocStatus.PENDING,
    )
    assert codec.from_wire(codec.to_wire(sent, allocation_pb2.Allocation), allocation.Allocation) == sent


def test_an_unknown_enum_number_names_the_field() -> None:
    message = mesh_pb2.Intention(source="a", destination="b")
    message.action = 77  # type: ignore[assignment]
    with pytest.raises(InputError, match="action: 77 is no value of Action"):
        codec.from_wire(message, mesh.Intention)


def test_a_missing_required_enum_is_an_input_error() -> None:
    with pytest.raises(InputError, match="action"):
        codec.from_wire(mesh_pb2.Intention(source="a", destination="b"), mesh.Intention)


def test_a_node_keeps_its_fingerprint() -> None:
    sent = node.Node(
        id=NodeId("n1"),
        address="10.0.0.1",
        fingerprint=node.Fingerprint(cpu_millis=2000, memory_bytes=1 << 34, disk_bytes=0, runtimes={"crun": "1.8.1"}),
    )
    assert codec.from_wire(codec.to_wire(sent, node_pb2.Node), node.Node) == sent
