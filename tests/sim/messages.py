"""What agents and controllers say to each other, as the codec's edges see it."""

from outrider.ids import AllocId
from outrider.model.allocation import AllocReport, Assignment, Generation
from outrider.model.job import Value
from outrider.model.node import Fingerprint, Node


class Hello(Value, frozen=True, kw_only=True):
    node: Node
    acknowledged: Generation
    reports: tuple[AllocReport, ...]


class Welcome(Value, frozen=True, kw_only=True):
    interval_s: float


class NotLeader(Value, frozen=True, kw_only=True):
    """Try another one."""


class Heartbeat(Value, frozen=True, kw_only=True):
    sequence: int


class Reports(Value, frozen=True, kw_only=True):
    reports: tuple[AllocReport, ...]


class Applied(Value, frozen=True, kw_only=True):
    generation: Generation


class Found(Value, frozen=True, kw_only=True):
    fingerprint: Fingerprint


class Assignments(Value, frozen=True, kw_only=True):
    generation: Generation
    full: bool
    assignments: tuple[Assignment, ...]
    removed: tuple[AllocId, ...]
