"""The verbs of a script that operators would type: rollouts, nodes and allocations by hand; and a group's policies."""

from collections.abc import Callable, Mapping

import msgspec

from controller.core.events import (
    AllocSteerRequested,
    JobRestartRequested,
    NodeSteerRequested,
    RolloutSteerRequested,
)
from outrider.ids import AllocId, JobName, NodeId
from outrider.model.allocation import AllocAction
from outrider.model.fleet import RolloutAction
from outrider.model.job import (
    DisconnectPolicy,
    Group,
    ReschedulePolicy,
    RestartPolicy,
    Survivor,
    UpdatePolicy,
)
from tests.scenarios.world import World

Verb = Callable[[list[str], dict[str, str]], None]


def steering_verbs(world: World, alloc: Callable[[str], AllocId]) -> Mapping[str, Verb]:
    def rollout(action: RolloutAction) -> Verb:
        return lambda names, _: world.call(RolloutSteerRequested, job=JobName(names[0]), action=action) and None

    def allocation(action: AllocAction) -> Verb:
        return lambda names, _: world.call(AllocSteerRequested, alloc=alloc(names[0]), action=action) and None

    def drain(names: list[str], options: dict[str, str]) -> None:
        """drain NODE deadline=SECONDS keep_system=true"""
        deadline_s = float(options["deadline"]) if "deadline" in options else None
        keep_system = options.get("keep_system") == "true"
        for name in names:
            node = NodeId(name)
            world.call(
                NodeSteerRequested,
                node=node,
                eligible=False,
                drain=True,
                deadline_s=deadline_s,
                keep_system=keep_system,
            )

    return {
        "promote": rollout(RolloutAction.PROMOTE),
        "give_up": rollout(RolloutAction.FAIL),
        "pause": rollout(RolloutAction.PAUSE),
        "resume": rollout(RolloutAction.RESUME),
        "restart_job": lambda names, _: world.call(JobRestartRequested, job=JobName(names[0])) and None,
        "restart_alloc": allocation(AllocAction.RESTART),
        "stop_alloc": allocation(AllocAction.STOP),
        "drain": drain,
        "open": lambda names, _: world.call(NodeSteerRequested, node=NodeId(names[0]), eligible=True) and None,
        "close": lambda names, _: world.call(NodeSteerRequested, node=NodeId(names[0]), eligible=False) and None,
    }


def with_policies(group: Group, options: Mapping[str, str]) -> Group:
    """`max_parallel=2 canary=1 blue_green=true progress_deadline=60 attempts=2 lost_after=60 survivor=healthy ...`"""

    def seconds(key: str) -> float | None:
        return float(options[key]) if key in options else None

    return msgspec.structs.replace(
        group,
        update=UpdatePolicy(
            max_parallel=int(options.get("max_parallel", "1")),
            canary=int(options.get("canary", "0")),
            blue_green=options.get("blue_green") == "true",
            auto_promote=options.get("auto_promote") == "true",
            healthy_deadline_s=float(options.get("healthy_deadline", "120")),
            progress_deadline_s=seconds("progress_deadline"),
            auto_revert=options.get("auto_revert") == "true",
        ),
        restart=RestartPolicy(delay_s=float(options.get("restart_delay", "1"))),
        reschedule=ReschedulePolicy(attempts=int(options["attempts"]) if "attempts" in options else None),
        disconnect=DisconnectPolicy(
            lost_after_s=seconds("lost_after"),
            replace_after_s=seconds("replace_after"),
            stop_after_s=seconds("stop_after"),
            survivor=Survivor(options.get("survivor", "original")),
        ),
    )
