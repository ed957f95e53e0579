"""What is wrong with a group's `sidecar:`. Yields paths below the group, and messages."""

from collections.abc import Iterator

from outrider.model.job import Group, has_guest
from outrider.model.sidecar import SidecarKind

Path = tuple[str | int, ...]


def sidecar_findings(group: Group) -> Iterator[tuple[Path, str]]:
    """A shared one is in another namespace than the workload: what needs it beside the workload has its own."""
    if group.sidecar is SidecarKind.OWN:
        return
    if not group.services:
        yield ("sidecar",), "the group has no services, and so no sidecar that it could share; leave sidecar out"
    if has_guest(group):
        yield ("sidecar",), "a vm has a sidecar of its own, beside its emulator; leave sidecar out"
    if group.network.external:
        message = "a shared sidecar cannot see which port outside is meant; take `sidecar: own`, or another group"
        yield ("network", "external"), message
    for index, service in enumerate(group.services):
        if service.gateway:
            yield (
                ("services", index, "gateway"),
                "a gateway speaks to strangers: it has a sidecar of its own; take `sidecar: own`, or another group",
            )
        for place, upstream in enumerate(service.upstreams):
            if upstream.port is not None:
                message = (
                    f"a shared sidecar is not on 127.0.0.1; call http://{upstream.service}.mesh, and leave port out"
                )
                yield ("services", index, "upstreams", place, "port"), message
