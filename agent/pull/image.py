"""What an image says of itself: its manifest, its configuration, who its USER is.

Pure: reads bytes that somebody else wrote, and believes none of them further than it must.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from agent.pull.complaints import PullError
from agent.sandbox.spec import INNER_USER, UID_RANGE
from outrider.model.job import Image, ImageKind, Value

V = TypeVar("V")

_OURS = {"x86_64": "amd64", "aarch64": "arm64"}
_ROOT = frozenset({"", "0", "root"})
_DIGITS = re.compile(r"^[0-9]{1,5}\Z")
_PORT_MAX = 65_535


class Descriptor(Value, frozen=True, kw_only=True):
    digest: str
    size: int


class Manifest(Value, frozen=True, kw_only=True):
    """Of one image for one architecture."""

    config: Descriptor
    layers: tuple[Descriptor, ...] = ()


class Index(Value, frozen=True, kw_only=True):
    """Of several: one for each architecture."""

    manifests: tuple[Descriptor, ...] = ()


class Settings(Value, frozen=True, kw_only=True, rename="pascal"):
    """The part of https://github.com/opencontainers/image-spec/blob/main/config.md that says how it runs."""

    user: str | None = None
    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    working_dir: str | None = None
    exposed_ports: Mapping[str, object] | None = None


class Configuration(Value, frozen=True, kw_only=True):
    architecture: str = ""
    os: str = ""
    config: Settings | None = None


class UnpackedImage(Value, frozen=True, kw_only=True):
    """One that is on the node. `digest` is its manifest's, or its index's where the job's reference means one."""

    digest: str
    root: str  # where its files are, owned as the image has it
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = {}
    workdir: str = ""
    user: int = INNER_USER
    group: int = INNER_USER
    ports: tuple[int, ...] = ()  # that it exposes over TCP


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def listed(raw: bytes) -> tuple[str, ...]:
    """The digests of the manifests that an index speaks of; none where it is a manifest itself."""
    return tuple(each.digest for each in read(raw, Index, "manifest").manifests)


def name_of(image: Image) -> str:
    """As the job has it: "oci:registry.example.org/app:1"."""
    return f"{image.kind.value}:{image.reference}"


def pinned(image: Image) -> str:
    """The digest that the reference itself names; "" for a tag, which may mean another image tomorrow."""
    return image.reference.partition("@")[2] if image.kind is ImageKind.OCI else ""


def registry_of(image: Image) -> str:
    return image.reference.partition("/")[0]


def read(data: bytes, kind: type[V], what: str) -> V:
    """Raises PullError where it is something else."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise PullError(f"its {what} cannot be read: {error}", retry=False) from error


def check_platform(configuration: Configuration, machine: str) -> None:
    """`machine` as uname has it. Raises PullError where such a node cannot run it."""
    ours = _OURS.get(machine, machine)
    if (configuration.architecture or ours) != ours or (configuration.os or "linux") != "linux":
        theirs = f"{configuration.os}/{configuration.architecture}"
        hint = "publish it for both, or constrain the job to nodes of its kind"
        raise PullError(f"it is built for {theirs}, this node is linux/{ours}; {hint}", retry=False)


def unpacked(configuration: Configuration, *, digest: str, root: str, passwd: str, group: str) -> UnpackedImage:
    """`passwd` and `group`: those files of the image. Raises PullError where its user is nobody."""
    settings = configuration.config or Settings()
    uid, gid = identity(settings.user or "", passwd, group)
    return UnpackedImage(
        digest=digest,
        root=root,
        entrypoint=settings.entrypoint or (),
        command=settings.cmd or (),
        env=dict(entry.split("=", 1) for entry in settings.env or () if "=" in entry),
        workdir=settings.working_dir or "",
        user=uid,
        group=gid,
        ports=_tcp_ports(settings.exposed_ports or {}),
    )


def _tcp_ports(exposed: Mapping[str, object]) -> tuple[int, ...]:
    """Of keys like `80`, `80/tcp` and `53/udp`; what is none is nobody's port."""
    found = set()
    for key in exposed:
        number, _, protocol = key.partition("/")
        if protocol in ("", "tcp") and _DIGITS.match(number) and 1 <= int(number) <= _PORT_MAX:
            found.add(int(number))
    return tuple(sorted(found))


def identity(user: str, passwd: str, group: str) -> tuple[int, int]:
    """The uid and gid of `USER[:GROUP]`, looked up in the image's own files. Root means 1000: nothing runs as root.

    A number without a group has the group of its entry, else 0, as elsewhere: one of the sandbox's own, with no rights.
    """
    name, _, group_name = user.partition(":")
    if name in _ROOT:
        return INNER_USER, INNER_USER
    entries = [line.split(":") for line in passwd.splitlines() if line.count(":") >= 3]
    entry = next((entry for entry in entries if name in (entry[0], entry[2])), None)
    uid = _number(name if entry is None else entry[2], f"user {name!r}", "/etc/passwd")
    if uid == 0:
        return INNER_USER, INNER_USER
    if not group_name:
        return uid, 0 if entry is None else _number(entry[3], f"group of user {name!r}", "/etc/passwd")
    groups = [line.split(":") for line in group.splitlines() if line.count(":") >= 2]
    found = next((each[2] for each in groups if group_name in (each[0], each[2])), group_name)
    return uid, _number(found, f"group {group_name!r}", "/etc/group")


def _number(text: str, what: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < UID_RANGE):
        raise PullError(f"its {what} is neither in its {where} nor a number below {UID_RANGE}", retry=False)
    return int(text)
