"""What Prometheus should scrape: its HTTP service discovery (https://prometheus.io/docs/prometheus/latest/http_sd/).

Pure: values in, the document out.
"""

from collections.abc import Iterable

from outrider.model.fleet import NodeState
from outrider.model.job import Value


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
