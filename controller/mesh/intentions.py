"""Who may call whom: precedence, decisions, and what the jobs' `allow:` lines demand. Pure."""

import re
from collections.abc import Iterable

from controller.core.mesh_intent import OwnedIntention
from controller.entries import http_match
from controller.mesh.shapes import ConsulIntention
from outrider.ids import ServiceName
from outrider.model.job import Value
from outrider.model.mesh import Action, Intention
from outrider.model.traffic import Permission, Verdict

WILDCARD = "*"
DEFAULT_DENY = ConsulIntention(
    source_name=WILDCARD, destination_name=WILDCARD, action="deny", description="outrider: default deny"
)
# The mark of ownership stands in the description, which both dialects keep.
_OWNER = re.compile(r"^outrider cluster=(?P<cluster>\S+) job=(?P<job>\S+)$")


class IntentionPlan(Value, frozen=True, kw_only=True):
    create: tuple[ConsulIntention, ...] = ()
    update: tuple[ConsulIntention, ...] = ()
    delete: tuple[ConsulIntention, ...] = ()


def intention(found: ConsulIntention, cluster: str) -> Intention:
    """As the model has it. One with permissions denies what none of them grants."""
    owner = _OWNER.match(found.description)
    permissions = tuple(
        Permission(action=Verdict.ALLOW if one.action == "allow" else Verdict.DENY, match=http_match(one.http))
        for one in found.permissions or ()
    )
    return Intention(
        source=found.source_name,
        destination=found.destination_name,
        action=Action.ALLOW if found.action == "allow" and not permissions else Action.DENY,
        permissions=permissions,
        id=found.id,
        precedence=precedence(found.source_name, found.destination_name),
        owner=owner["job"] if owner and owner["cluster"] == cluster else "",
        description=found.description,
    )


def precedence(source: str, destination: str) -> int:
    """Consul's numbers: an exact destination outweighs an exact source."""
    if destination == WILDCARD:
        return 5 if source == WILDCARD else 6
    return 8 if source == WILDCARD else 9


def bearing_on(intentions: Iterable[Intention], destination: ServiceName) -> tuple[Intention, ...]:
    """Those that a sidecar of `destination` must know, highest precedence first."""
    found = (one for one in intentions if one.destination in (destination, WILDCARD))
    return tuple(sorted(found, key=lambda one: (-one.precedence, one.source, one.destination)))


def decide(intentions: Iterable[Intention], source: ServiceName, destination: ServiceName) -> Intention | None:
    """The one that decides. None: no intention does, and the default holds."""
    bearing = bearing_on(intentions, destination)
    return next((one for one in bearing if one.source in (source, WILDCARD)), None)


def plan_owned(wanted: Iterable[OwnedIntention], found: Iterable[ConsulIntention], cluster: str) -> IntentionPlan:
    """What makes Consul have the jobs' `allow:` lines. One by hand for the same pair wins, whatever it says, and stays;
    one of another cluster too."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for owned in sorted(wanted, key=lambda one: (one.source, one.destination, one.job)):
        pairs.setdefault((owned.source, owned.destination), []).append(owned.job)
    present = {(one.source_name, one.destination_name): one for one in found}
    create, update, delete = [], [], []
    for pair, jobs in pairs.items():
        one = present.get(pair)
        if one is None:
            create.append(_owned(pair, jobs[0], cluster))
            continue
        owner = intention(one, cluster).owner
        if owner and (owner not in jobs or one.action != "allow"):
            update.append(_owned(pair, jobs[0], cluster, one.id))
    for pair, one in present.items():
        if intention(one, cluster).owner and pair not in pairs:
            delete.append(one)
    return IntentionPlan(create=tuple(create), update=tuple(update), delete=tuple(delete))


def _owned(pair: tuple[str, str], job: str, cluster: str, intention_id: str = "") -> ConsulIntention:
    return ConsulIntention(
        id=intention_id,
        source_name=pair[0],
        destination_name=pair[1],
        action="allow",
        description=f"outrider cluster={cluster} job={job}",
    )
