"""What Prometheus should scrape, for its discovery by HTTP and by file, which have one form
(https://prometheus.io/docs/prometheus/latest/http_sd/). Task: `targets`, which keeps the file. Decides nothing.
"""

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from controller.files import write_file
from outrider.log import Log
from outrider.model.fleet import NodeState
from outrider.model.job import Value

FILE_MODE: Final = 0o644
_LOOK_S: Final = 2.0


class TargetGroup(Value, frozen=True, kw_only=True):
    targets: tuple[str, ...]
    labels: dict[str, str]


def target_groups(cluster: str, controller: str, nodes: Iterable[NodeState]) -> tuple[TargetGroup, ...]:
    """Every node that serves metrics, whatever its status: an absent one must show as `up == 0`.

    `controller`: where the controller's own are, host:port.
    """
    own = TargetGroup(targets=(controller,), labels={"cluster": cluster, "component": "controller"})
    agents = tuple(
        TargetGroup(
            targets=(state.node.metrics_address,),
            labels={"cluster": cluster, "component": "agent", "node": state.node.id},
        )
        for state in nodes
        if state.node.metrics_address
    )
    return (own, *agents)


async def keep_targets(path: Path, targets: Callable[[], tuple[TargetGroup, ...]], log: Log) -> None:
    """For ever: the file holds what there is to scrape. One that cannot be written is told once, and tried again."""
    written, told = b"", ""
    while True:
        content = msgspec.json.encode(targets())
        if content != written:
            try:
                await asyncio.to_thread(write_file, path, content, FILE_MODE)
                written, told = content, ""
            except OSError as error:
                if told != str(error):
                    told = str(error)
                    log.warning("targets not written", path=str(path), reason=told)
        await asyncio.sleep(_LOOK_S)
