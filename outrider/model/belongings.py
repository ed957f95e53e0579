"""What a workload brings along beside its image: secrets, volumes. As a task names it, and as the fleet tells of it.

Values of the model like those of `outrider.model.job`, which names them.
"""

from enum import StrEnum

import msgspec

from outrider.ids import AllocId, JobName, Namespace, NodeId, SecretName, VolumeName


class Belonging(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of these values: frozen, compared by content, defaults left out on the wire."""


class OnChange(StrEnum):
    """What follows in a running task when what it was given changes."""

    ROLL = "roll"  # a new version of the job, rolled out by its group's `update`
    RESTART = "restart"  # of the task, where it runs
    SIGNAL = "signal"
    NONE = "none"


class SecretUse(Belonging, frozen=True, kw_only=True):
    """A secret or a variable that a task is given."""

    name: SecretName
    env: str = ""  # the environment variable that has it
    file: str = ""  # its path below /secrets; "" where there is an `env`: no file
    on_change: OnChange = OnChange.ROLL
    signal: str = "SIGHUP"
    version: int | None = None  # this one for ever; None: the newest


class SecretInfo(Belonging, frozen=True, kw_only=True):
    """A secret as operators see it: everything but what it holds. A variable's value is there to be seen."""

    name: SecretName
    namespace: Namespace
    version: int  # the newest
    versions: tuple[int, ...] = ()  # those that are kept
    variable: bool = False
    value: str = ""  # of a variable
    changed_at_s: float = 0.0
    jobs: tuple[JobName, ...] = ()  # not stopped, and naming it


class Access(StrEnum):
    """How many allocations may have a volume at a time."""

    SINGLE = "single"
    MANY = "many"


class Volume(Belonging, frozen=True, kw_only=True):
    """Storage that outlives what uses it. It is on one node, and pulls its users there."""

    name: VolumeName
    namespace: Namespace
    node: NodeId
    size_bytes: int = 0  # its limit; 0 of a path, whose limit is what it is on
    path: str = ""  # a directory of the node; "": one that the node makes, of limited size
    access: Access = Access.SINGLE
    read_only: bool = False

    @property
    def key(self) -> str:
        """Its name on its node. Neither part has a dot."""
        return f"{self.namespace}.{self.name}"


class VolumeUse(Belonging, frozen=True, kw_only=True):
    """A volume that a task has, and where."""

    volume: VolumeName
    target: str  # the path inside; a vm sees a disk of the volume's name
    read_only: bool = False


class StickyDisk(Belonging, frozen=True, kw_only=True):
    """A disk of a task that the copy in its place finds again, on the same node."""

    target: str  # the path inside
    size_bytes: int


class VolumeSnapshot(Belonging, frozen=True, kw_only=True):
    name: str
    at_s: float
    bytes: int = 0  # that it takes on the node's disk


class VolumeInfo(Belonging, frozen=True, kw_only=True):
    """A volume as operators see it."""

    volume: Volume
    created_at_s: float = 0.0
    snapshots: tuple[VolumeSnapshot, ...] = ()
    allocations: tuple[AllocId, ...] = ()  # that have it now
    jobs: tuple[JobName, ...] = ()  # not stopped, and naming it


class Artifact(Belonging, frozen=True, kw_only=True):
    """Something that the node fetches for a task. What it holds is known before: nothing else is taken."""

    path: str  # below /artifacts, where the task finds it: a file, or a directory where it is unpacked
    source: str  # "https://...", "http://...", "file:/PATH" on the node, "oci:REGISTRY/NAME:TAG"
    sha256: str
    unpack: bool = False  # a tar, plain or compressed, or a zip
    mode: int = 0o644  # of a file


class Template(Belonging, frozen=True, kw_only=True):
    """A file that the node renders for a task, and renders again when what it speaks of changes."""

    path: str  # below /templates
    content: str
    on_change: OnChange = OnChange.RESTART
    signal: str = "SIGHUP"
    splay_s: float = 5.0  # the most by which copies are kept apart, beside the group's `update`
