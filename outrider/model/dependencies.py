"""Which services wait for which before their copies are placed, and where that goes round in a circle."""

from collections.abc import Iterable, Mapping

from outrider.ids import ServiceName
from outrider.model.job import Group


def circle(depends: Mapping[ServiceName, Iterable[ServiceName]]) -> tuple[ServiceName, ...]:
    """Services that wait for each other, the first again at the end; () where none do."""
    done: set[ServiceName] = set()
    for start in sorted(depends):
        path: list[ServiceName] = [start]
        waiting = [iter(depends.get(start, ()))]
        while waiting:
            following = next(waiting[-1], None)
            if following is None:
                done.add(path.pop())
                waiting.pop()
            elif following in path:
                return (*path[path.index(following) :], following)
            elif following not in done:
                path.append(following)
                waiting.append(iter(depends.get(following, ())))
    return ()


def waits(groups: Iterable[Group]) -> dict[ServiceName, set[ServiceName]]:
    """What each service that `groups` provide waits for."""
    found: dict[ServiceName, set[ServiceName]] = {}
    for group in groups:
        for service in group.services:
            if service.port is not None:
                found.setdefault(service.name, set()).update(group.depends_on)
    return found
