"""What is wrong with a port that is to be the image's own, `to: image`. Yields paths below the group, and messages."""

from collections.abc import Iterator

from outrider.model.job import PULLED, Group

Path = tuple[str | int, ...]


def exposed_findings(group: Group) -> Iterator[tuple[Path, str]]:
    wanted = [port for port in group.network.ports if port.from_image]
    gateways = {listener.port for service in group.services for listener in service.gateway}
    for port in wanted:
        at: Path = ("network", "ports", port.name, "to")
        if port.to is not None:
            yield at, "give either the number or `image`"
        elif len(wanted) > 1:
            yield at, "an image does not say which of its ports is which: one port of a group may be `image`"
        elif port.name in gateways:
            yield at, "here the sidecar listens for a gateway, and no image; give a number, or leave it out"
        elif not any(task.image.kind in PULLED for task in group.tasks):
            yield at, "no task of the group has an image of the kind that exposes ports; give a number"
