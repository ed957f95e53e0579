"""The port of a group that is its image's to say (`to: image`): open until the images are there, then a number.

Owns that number's way into an assignment; all that follows from it (network, sidecar, checks) is made of the result.
"""

from collections.abc import Mapping

import msgspec

from outrider.errors import InputError
from outrider.ids import PortName, TaskName
from outrider.model.allocation import Assignment
from outrider.model.job import Group, Port
from outrider.model.mesh import PUBLIC_PORT, VIRTUAL_PORT


def is_open(assignment: Assignment) -> bool:
    """Whether nobody can say yet where its workload will listen."""
    return any(port.from_image and port.to is None for port in assignment.group.network.ports)


def filled(assignment: Assignment, exposed: Mapping[TaskName, tuple[int, ...]]) -> Assignment:
    """`exposed`: by each task's image. Raises InputError where they expose none, several, or one that is taken."""
    if not is_open(assignment):
        return assignment
    number = _only(assignment.group, exposed)
    for port in assignment.group.network.ports:
        if not port.from_image and number in (port.to, port.static):
            raise InputError(f"port {number} of its image is port {port.name} already: give that one another number")
    if number in _sidecars(assignment.group):
        raise InputError(f"port {number} of its image is taken by the sidecar: have the image listen elsewhere")
    return _with_number(assignment, {port.name: number for port in assignment.group.network.ports})


def opened(assignment: Assignment) -> Assignment:
    """As its job has it: the next images may expose another."""
    return _with_number(assignment, {})


def carried(before: Assignment, after: Assignment) -> Assignment:
    """`after`, a newer one of what runs, with the number that was found for it."""
    known = {port.name: port.to for port in before.group.network.ports if port.to is not None}
    return _with_number(after, known)


def _with_number(assignment: Assignment, numbers: Mapping[PortName, int]) -> Assignment:
    if not any(port.from_image for port in assignment.group.network.ports):
        return assignment
    network = assignment.group.network
    ports = tuple(_numbered(port, numbers.get(port.name)) for port in network.ports)
    group = msgspec.structs.replace(assignment.group, network=msgspec.structs.replace(network, ports=ports))
    return msgspec.structs.replace(assignment, group=group)


def _numbered(port: Port, number: int | None) -> Port:
    return msgspec.structs.replace(port, to=number) if port.from_image else port


def _only(group: Group, exposed: Mapping[TaskName, tuple[int, ...]]) -> int:
    (name,) = (port.name for port in group.network.ports if port.from_image)
    numbers = sorted({number for each in exposed.values() for number in each})
    if len(numbers) == 1:
        return numbers[0]
    where = f"port {name} is `to: image`"
    if not numbers:
        raise InputError(f"{where}, and its image exposes none over TCP: write `to: NUMBER`")
    told = "; ".join(f"task {task} {', '.join(map(str, each))}" for task, each in exposed.items() if each)
    raise InputError(f"{where}, and there is more than one ({told}): write which, `to: {numbers[0]}`")


def _sidecars(group: Group) -> frozenset[int]:
    """Where it listens beside the workload."""
    upstreams = {upstream.port for service in group.services for upstream in service.upstreams if upstream.port}
    return frozenset({VIRTUAL_PORT, *range(PUBLIC_PORT, PUBLIC_PORT + len(group.services)), *upstreams})
