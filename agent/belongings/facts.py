"""What the agent and the program that renders templates say to each other. Values only."""

from collections.abc import Mapping

import msgspec

CPU_S_MAX = 2  # for all of a task's templates


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What templates may speak of."""

    node: Mapping[str, str] = {}
    alloc: Mapping[str, str | int] = {}
    ports: Mapping[str, int] = {}
    secrets: Mapping[str, str] = {}
    services: Mapping[str, tuple[Mapping[str, str | int], ...]] = {}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    facts: Facts
    templates: Mapping[str, str]


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """By path. `errors` has a sentence for each that could not be rendered."""

    files: Mapping[str, str] = {}
    errors: Mapping[str, str] = {}
