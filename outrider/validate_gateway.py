"""What is wrong with a service's `gateway:`. Yields paths below the group, and messages."""

import re
from collections.abc import Iterator

from outrider.ids import is_name
from outrider.model.gateway import GatewayListener
from outrider.model.job import Group

Path = tuple[str | int, ...]
ROUTES_MAX = 200
_HOST = re.compile(r"^(\*|(\*\.)?[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*)\Z")
_PREFIX = re.compile(r"^/[A-Za-z0-9._~!$&'()*+,;=:@%/-]{0,255}\Z")


def gateway_findings(group: Group) -> Iterator[tuple[Path, str]]:
    taken: set[str] = set()
    published = {port.name for port in group.network.ports if port.static is not None or port.dynamic}
    served = {service.port for service in group.services}
    for index, service in enumerate(group.services):
        if not group.tasks and (service.port is not None or service.check is not None):
            yield ("services", index), "the group has no task that could serve, or be checked: leave port and check out"
        for place, listener in enumerate(service.gateway):
            at: Path = ("services", index, "gateway", place)
            if listener.port and listener.port not in published:
                yield (
                    (*at, "port"),
                    f"port {listener.port} is not published: give it `static: NUMBER`, or `dynamic: true`",
                )
            if listener.port in served:
                yield (*at, "port"), f"port {listener.port} is the workload's own, for a service; take another"
            if listener.port in taken:
                yield (*at, "port"), f"port {listener.port} has a listener already; put its routes together"
            taken.add(listener.port)
            yield from _listener(at, listener)


def _listener(at: Path, listener: GatewayListener) -> Iterator[tuple[Path, str]]:
    if bool(listener.to) == bool(listener.routes):
        yield at, "give either `to`, for connections as they are, or `routes`, for requests"
    if len(listener.routes) > ROUTES_MAX:
        yield (*at, "routes"), f"{len(listener.routes)} routes; at most {ROUTES_MAX}"
    for key, name in (("to", listener.to), ("tls", listener.secret)):
        if name is not None and not is_name(name):
            yield (*at, key), f"{name[:80]!r} is no name; lower-case letters, digits and dashes"
    seen: dict[tuple[str, str], int] = {}
    for number, route in enumerate(listener.routes):
        where: Path = (*at, "routes", number)
        if not is_name(route.to):
            yield (*where, "to"), f"{route.to[:80]!r} is no service's name"
        if not _HOST.match(route.host) or len(route.host) > 253:
            yield (*where, "host"), f"{route.host[:80]!r} is no host: a name, *.NAME for all below it, or * for all"
        if not _PREFIX.match(route.prefix):
            yield (*where, "prefix"), f"{route.prefix[:80]!r} is no path: it begins with /, without ? or #"
        first = seen.setdefault((route.host, route.prefix), number)
        if first != number:
            yield where, f"overlaps routes[{first}]: the same host and prefix; one of them would never be used"
