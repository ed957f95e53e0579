"""A dumb scheduler: one copy after the other, every node looked at, nothing remembered, plain dictionaries.

Obviously right rather than fast. It shares no code with the real one: only the model's values, and the formula that
`controller.core.scores` documents.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from outrider.model.job import Constraint, Group, Job, Operator, Packing, Spread
from outrider.model.node import Node

NOWHERE = float("-inf")


@dataclass
class Place:
    """A node, and what stands on it."""

    node: Node
    ready: bool = True
    copies: int = 0  # of the group that is placed
    job_copies: int = 0  # of its job
    cpu: int = 0
    memory: int = 0
    disk: int = 0
    devices: Counter[str] = field(default_factory=Counter)
    ports: set[int] = field(default_factory=set)

    def attributes(self) -> dict[str, str]:
        found = self.node.fingerprint
        values = {"node.id": self.node.id, "node.pool": found.pool, "node.kernel": found.kernel}
        values.update({f"meta.{name}": value for name, value in found.meta.items()})
        return {name: value for name, value in values.items() if value}


class Reference:
    def __init__(self, places: list[Place], job: Job, group: Group) -> None:
        self.places, self.job, self.group = places, job, group
        self.cpu = sum(task.resources.cpu_millis for task in group.tasks)
        self.memory = sum(task.resources.memory_bytes for task in group.tasks)
        self.disk = sum(2 * task.resources.disk_bytes for task in group.tasks)
        self.devices = Counter({name: n for task in group.tasks for name, n in task.resources.devices.items()})
        self.statics = {port.static for port in group.network.ports if port.static is not None}
        self.dynamic = sum(port.dynamic for port in group.network.ports)

    def scores(self) -> list[float]:
        return [self.score(place) if self.fits(place) else NOWHERE for place in self.places]

    def put(self, at: int) -> None:
        place = self.places[at]
        place.copies, place.job_copies = place.copies + 1, place.job_copies + 1
        place.cpu, place.memory, place.disk = place.cpu + self.cpu, place.memory + self.memory, place.disk + self.disk
        place.devices += self.devices
        place.ports |= self.statics

    def fits(self, place: Place) -> bool:
        found = place.node.fingerprint
        kept = found.reserved
        free_ports = set(range(found.port_first, found.port_last + 1)) - place.ports - set(kept.ports)
        return (
            place.ready
            and (self.job.pool in ("all", found.pool))
            and all(holds(one, place.attributes()) for one in (*self.job.constraints, *self.group.constraints))
            and self.distinct_holds(place)
            and place.cpu + self.cpu <= found.cpu_millis - kept.cpu_millis
            and place.memory + self.memory <= found.memory_bytes - kept.memory_bytes
            and place.disk + self.disk <= found.disk_bytes - kept.disk_bytes
            and all(place.devices[name] + n <= found.devices.get(name, 0) for name, n in self.devices.items())
            and not self.statics & (place.ports | set(kept.ports))
            and self.dynamic <= len(free_ports - self.statics)
        )

    def distinct_holds(self, place: Place) -> bool:
        for owner, whole_job in ((self.job, True), (self.group, False)):
            for one in owner.constraints:
                if one.operator is Operator.DISTINCT:
                    value = place.attributes().get(one.attribute)
                    same = [other for other in self.places if other.attributes().get(one.attribute) == value]
                    count = sum(other.job_copies if whole_job else other.copies for other in same)
                    if value is None or count >= int(one.value):
                        return False
        return True

    def score(self, place: Place) -> float:
        found, kept, count = place.node.fingerprint, place.node.fingerprint.reserved, max(1, self.group.count)
        room = min(
            (found.cpu_millis - kept.cpu_millis - place.cpu - self.cpu) / (found.cpu_millis - kept.cpu_millis),
            (found.memory_bytes - kept.memory_bytes - place.memory - self.memory)
            / (found.memory_bytes - kept.memory_bytes),
        )
        score = (1 - room) / 4 if self.job.placement is Packing.PACK else (room / 2 - place.copies) / count / 4
        for affinity in (*self.job.affinities, *self.group.affinities):
            if holds(affinity.prefer, place.attributes()):
                score += affinity.weight / 100
        wishes = {wish.attribute: wish for wish in (*self.job.spread, *self.group.spread)}
        return score + sum(self.balance(wish, place) for wish in wishes.values())

    def balance(self, wish: Spread, place: Place) -> float:
        value = place.attributes().get(wish.attribute)
        if value is None:
            return -wish.weight / 100
        count = max(1, self.group.count)
        targets = {target.value: target.percent / 100 * count for target in wish.targets}
        others = {
            other.attributes()[wish.attribute]
            for other in self.places
            if self.job.pool in ("all", other.node.fingerprint.pool)
            and wish.attribute in other.attributes()
            and all(holds(one, other.attributes()) for one in (*self.job.constraints, *self.group.constraints))
        } - targets.keys()
        share = targets.get(value, max(0.0, count - sum(targets.values())) / max(1, len(others)))
        copies = sum(one.copies for one in self.places if one.attributes().get(wish.attribute) == value)
        return wish.weight / 100 * (1 - copies / share) if share > 0 else -wish.weight / 100


def holds(constraint: Constraint, attributes: dict[str, str]) -> bool:  # noqa: PLR0911  a list of meanings
    value, wanted = attributes.get(constraint.attribute), constraint.value
    match constraint.operator:
        case Operator.IS_SET:
            return value is not None
        case Operator.IS_NOT_SET:
            return value is None
        case Operator.NOT_EQUAL:
            return value != wanted
        case Operator.DISTINCT:
            return value is not None
    if value is None:
        return False
    match constraint.operator:
        case Operator.EQUAL:
            return value == wanted
        case Operator.MATCHES:
            return bool(re.search(wanted, value))
        case Operator.VERSION:
            return version(value) >= version(wanted.removeprefix(">= "))
        case Operator.CONTAINS:
            return set(wanted.split(",")) <= set(value.split(","))
        case Operator.CONTAINS_ANY:
            return bool(set(wanted.split(",")) & set(value.split(",")))
    if not value.isdigit():
        return False
    left, right = int(value), int(wanted)
    return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[constraint.operator]


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("-", maxsplit=1)[0].split("."))
