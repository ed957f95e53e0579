"""What a host lacks, as steps. Pure: facts in, steps out, none where nothing lacks."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from outrider.cli.deploy.bundle import Bundle
from outrider.cli.deploy.inventory import Host
from outrider.errors import HostError
from outrider.model.job import Value

AGENT_PACKAGES = ("crun", "conmon", "nftables", "iproute2", "procps", "mount", "util-linux", "catatonit")
CONTROLLER_PACKAGES: tuple[str, ...] = ()
ROOM_BYTES = 1 << 30
CLOCK_S_MAX = 240.0  # certificates are good from five minutes before they are made


class Facts(Value, frozen=True, kw_only=True):
    """What `host.py probe` found."""

    python: str
    machine: str
    hostname: str = ""
    uid: int = 0
    systemd: bool = False
    apt: bool = False
    missing: tuple[str, ...] = ()  # packages
    free_bytes: int = 0
    clock_s: float = 0.0
    versions: tuple[str, ...] = ()
    current: str = ""
    bundle_there: bool = False
    joined: Mapping[str, bool] = {}
    identity: str = ""  # of the node's certificate: outrider://CLUSTER/node/NODE
    trusts: tuple[str, ...] = ()  # the fingerprints of the CAs by which it knows its fleet
    running: Mapping[str, bool] = {}
    configured: Mapping[str, str] = {}  # role -> sha256 of its configuration


class Step(StrEnum):
    PACKAGES = "install packages"
    PUSH = "push the bundle"
    INSTALL = "install"
    CONFIGURE = "configure"
    ACTIVATE = "switch to the version"
    JOIN = "join"
    START = "start"
    RESTART = "restart"


class Plan(Value, frozen=True, kw_only=True):
    steps: tuple[Step, ...]
    packages: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        words = [f"{step} ({', '.join(self.packages)})" if step is Step.PACKAGES else str(step) for step in self.steps]
        return ", ".join(words) or "nothing to do"


def packages_of(host: Host) -> tuple[str, ...]:
    wanted = (AGENT_PACKAGES if "agent" in host.roles else ()) + (
        CONTROLLER_PACKAGES if "controller" in host.roles else ()
    )
    return tuple(dict.fromkeys(wanted))


def make_plan(
    host: Host, facts: Facts, bundle: Bundle, wanted: Mapping[str, str], *, authorities: frozenset[str] | None = None
) -> Plan:
    """`wanted`: role -> sha256 of the configuration that it shall have. `authorities`: the fleet's CAs, where known.

    A node that trusts none of them has missed a change of the CA, or knows a fleet that was of the same name.
    """
    steps: list[Step] = []
    if facts.missing:
        steps.append(Step.PACKAGES)
    if bundle.id not in facts.versions:
        steps += [*([] if facts.bundle_there else [Step.PUSH]), Step.INSTALL]
    changed = any(facts.configured.get(role) != sha256 for role, sha256 in wanted.items())
    if changed:
        steps.append(Step.CONFIGURE)
    if facts.current != bundle.id:
        steps.append(Step.ACTIVATE)
    known = authorities is None or not authorities.isdisjoint(facts.trusts)
    joins = "agent" in host.roles and not (facts.joined.get("agent") and known)
    if joins:
        steps.append(Step.JOIN)
    if not all(facts.running.get(role) for role in host.roles):
        steps.append(Step.START)
    elif changed or joins or facts.current != bundle.id:
        steps.append(Step.RESTART)
    return Plan(steps=tuple(steps), packages=facts.missing)


def check(host: Host, facts: Facts, bundle: Bundle, *, cluster: str, now_s: float, took_s: float) -> None:
    """Raises HostError for a host on which Outrider cannot run: nothing was changed there.

    `took_s`: how long the question took; the host's clock was read somewhere within.
    """
    name = host.host
    if facts.uid != 0:
        hint = "set `ssh.sudo: true`, or deploy as root"
        raise HostError(name, step=f"its user has uid {facts.uid}, and root is needed", hint=hint)
    if facts.machine != bundle.machine:
        hint = "deploy from a machine like it: a bundle holds what runs there"
        raise HostError(name, step=f"it is {facts.machine}, the bundle is for {bundle.machine}", hint=hint)
    if facts.python != bundle.python:
        hint = f"install Python {bundle.python} on it, or deploy from a machine with Python {facts.python}"
        raise HostError(name, step=f"it has Python {facts.python}, the bundle is for {bundle.python}", hint=hint)
    off_s = facts.clock_s - now_s
    if abs(off_s) > CLOCK_S_MAX + took_s:
        direction = "ahead" if off_s > 0 else "behind"
        hint = "certificates would not be valid: run an NTP client on it"
        raise HostError(name, step=f"its clock is {abs(off_s):.0f} s {direction} of this machine's", hint=hint)
    if bundle.id not in facts.versions and facts.free_bytes < ROOM_BYTES:
        hint = "make room below /opt"
        raise HostError(name, step=f"{facts.free_bytes >> 20} MiB are free, {ROOM_BYTES >> 20} are needed", hint=hint)
    if facts.joined.get("agent") and urlsplit(facts.identity).netloc != cluster:
        hint = "take it out of that one first: `outrider deploy --remove --data`, `--force` where that fleet is no more"
        raise HostError(name, step=f"it is of another fleet: {facts.identity}", hint=hint)
    if facts.missing and not facts.apt:
        hint = "install them by its own means"
        raise HostError(name, step=f"it lacks {', '.join(facts.missing)} and has no apt-get", hint=hint)


def facts_from(answer: Mapping[str, Any]) -> Facts:
    import msgspec

    return msgspec.convert(answer, Facts)
