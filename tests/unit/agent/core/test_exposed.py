"""A port that is the image's to say: which number it becomes, and what cannot be one."""

import pytest

from agent.core import exposed
from outrider.errors import InputError
from outrider.ids import AllocId, GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.allocation import Assignment
from outrider.model.job import Group, Network, Port, Service, Task, Upstream, inner_ports

WEB, LOG, ADMIN, OTHER = TaskName("web"), TaskName("log"), PortName("admin"), PortName("other")
HTTP = Port(name=PortName("http"), from_image=True)


def assignment(*ports: Port) -> Assignment:
    calls = Service(
        name=ServiceName("web"), port=HTTP.name, upstreams=(Upstream(service=ServiceName("db"), port=5432),)
    )
    group = Group(
        name=GroupName("web"),
        tasks=(Task(name=WEB), Task(name=LOG)),
        network=Network(ports=(*ports, HTTP)),
        services=(calls,),
    )
    return Assignment(alloc=AllocId("0"), job=JobName("shop"), job_version=1, group=group, index=0)


def test_the_only_port_of_the_image_serves_until_the_image_is_let_go() -> None:
    given = assignment(Port(name=ADMIN), Port(name=OTHER, to=8081))
    assert exposed.is_open(given)
    assert inner_ports(given.group.network) == {ADMIN: 8080, OTHER: 8081}
    known = exposed.filled(given, {WEB: (8080,), LOG: ()})
    assert not exposed.is_open(known)
    assert inner_ports(known.group.network) == {HTTP.name: 8080, ADMIN: 8082, OTHER: 8081}
    assert exposed.filled(known, {WEB: (1, 2)}) == known
    assert exposed.carried(known, given) == known
    assert exposed.opened(known) == given


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({WEB: ()}, "port http is `to: image`, and its image exposes none over TCP: write `to: NUMBER`"),
        ({WEB: (80, 443), LOG: (80,)}, "more than one (task web 80, 443; task log 80): write which, `to: 80`"),
        ({WEB: (9000,)}, "port 9000 of its image is port admin already"),
        ({WEB: (15001,)}, "port 15001 of its image is taken by the sidecar"),
        ({WEB: (15100,)}, "port 15100 of its image is taken by the sidecar"),
        ({WEB: (5432,)}, "port 5432 of its image is taken by the sidecar"),
    ],
)
def test_what_cannot_be_the_port_is_told(images: dict[TaskName, tuple[int, ...]], words: str) -> None:
    with pytest.raises(InputError) as caught:
        exposed.filled(assignment(Port(name=ADMIN, to=9000)), images)
    assert words in str(caught.value)
