"""Whose an allocation's sidecar is."""

from enum import StrEnum


class SidecarKind(StrEnum):
    OWN = "own"
    SHARED = "shared"  # one Envoy for all allocations of a node that ask for it, in a namespace of its own
