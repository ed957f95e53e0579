"""A node: what it is, what it offers, how the controller sees it."""

from collections.abc import Mapping
from enum import StrEnum

from outrider.ids import NodeId
from outrider.model.hugepages import counted_as
from outrider.model.job import Value

KVM = "kvm"  # the device that is there or not
ANY_POOL = "all"


class NodeStatus(StrEnum):
    """Gone is not suspect (DESIGN, decision 5): `GONE` lost its agent, `SUSPECT` fell silent."""

    READY = "ready"
    GONE = "gone"  # stream closed or last will: kernel and workloads may well run; endpoints stay
    SUSPECT = "suspect"  # silence: endpoints leave load balancing
    DOWN = "down"  # the disconnect policy ran out


class Reserved(Value, frozen=True, kw_only=True):
    """What the node keeps for others than the fleet's workloads."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    ports: tuple[int, ...] = ()


GUEST_KERNEL = "guest-kernel"  # of `runtimes`: what processes with `isolation: vm` get


class Hugepages(Value, frozen=True, kw_only=True):
    """The kernel's pool of one size, in pages."""

    page: str  # "2Mi"
    total: int
    free: int  # when the agent looked


class Fingerprint(Value, frozen=True, kw_only=True):
    """What the agent found on its host."""

    cpu_millis: int
    memory_bytes: int
    disk_bytes: int
    kernel: str = ""
    architecture: str = ""
    cgroup: str = ""  # "v1", "v2" or "hybrid"
    runtimes: Mapping[str, str] = {}  # program -> version; an absent one is not installed
    kvm: str = ""  # "works", or why not; "" while the self-test has not ended
    meta: Mapping[str, str] = {}  # what its operator says of it
    port_first: int = 20000  # the host ports that the scheduler may give out, both ends included
    port_last: int = 29999
    host_image: bool = False  # whether the node allows `image: host`
    snapshots: tuple[str, ...] = ()  # of guests, that are kept there
    pool: str = "default"
    devices: Mapping[str, int] = {}  # counted ones, as its operator says; `kvm` has a field of its own
    reserved: Reserved = Reserved()
    hugepages: tuple[Hugepages, ...] = ()


def countable(found: Fingerprint) -> dict[str, int]:
    """What is counted by name: devices, and pages of each size."""
    return {**found.devices, **{counted_as(pool.page): pool.total for pool in found.hugepages}}


class Drain(Value, frozen=True, kw_only=True):
    """Work leaves the node, with care until the deadline."""

    started_at_s: float
    deadline_at_s: float | None = None  # from then on at once; None: as long as it takes
    keep_system: bool = False  # copies of system jobs stay


class Node(Value, frozen=True, kw_only=True):
    id: NodeId
    address: str  # where other nodes reach its sidecars
    fingerprint: Fingerprint
    peer_address: str = ""  # host:port where other agents bring guests; "" takes none
    metrics_address: str = ""  # host:port for Prometheus; "" serves none
    version: str = ""
