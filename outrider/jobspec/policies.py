"""`update:`, `restart:`, `reschedule:` and `disconnect:` of a group: how its copies are replaced, and when."""

from outrider.jobspec.fields import Faults, Fields
from outrider.jobspec.units import duration_s
from outrider.model.job import DisconnectPolicy, ReschedulePolicy, RestartPolicy, Survivor, UpdatePolicy

_UPDATE_KEYS = (
    "max_parallel", "canary", "blue_green", "auto_promote", "min_healthy", "healthy_deadline", "progress_deadline",
    "auto_revert",
)  # fmt: skip


def read_update(group: Fields, faults: Faults) -> UpdatePolicy:
    node = group.node("update")
    default = UpdatePolicy()
    if node is None:
        return default
    fields = Fields(node, (*group.path, "update"), faults, _UPDATE_KEYS)
    return UpdatePolicy(
        max_parallel=fields.integer("max_parallel", default.max_parallel),
        canary=fields.integer("canary", default.canary),
        blue_green=fields.flag("blue_green", default=default.blue_green),
        auto_promote=fields.flag("auto_promote", default=default.auto_promote),
        min_healthy_s=fields.quantity("min_healthy", duration_s, default.min_healthy_s),
        healthy_deadline_s=fields.quantity("healthy_deadline", duration_s, default.healthy_deadline_s),
        progress_deadline_s=_optional_s(fields, "progress_deadline"),
        auto_revert=fields.flag("auto_revert", default=default.auto_revert),
    )


def read_restart(group: Fields, faults: Faults) -> RestartPolicy:
    node = group.node("restart")
    default = RestartPolicy()
    if node is None:
        return default
    fields = Fields(node, (*group.path, "restart"), faults, ("attempts", "interval", "delay", "delay_max"))
    delay_s = fields.quantity("delay", duration_s, default.delay_s)
    return RestartPolicy(
        attempts=fields.integer("attempts", default.attempts),
        interval_s=fields.quantity("interval", duration_s, default.interval_s),
        delay_s=delay_s,
        delay_max_s=fields.quantity("delay_max", duration_s, max(default.delay_max_s, delay_s)),
    )


def read_reschedule(group: Fields, faults: Faults) -> ReschedulePolicy:
    node = group.node("reschedule")
    default = ReschedulePolicy()
    if node is None:
        return default
    fields = Fields(node, (*group.path, "reschedule"), faults, ("attempts", "interval", "delay", "delay_max"))
    delay_s = fields.quantity("delay", duration_s, default.delay_s)
    return ReschedulePolicy(
        attempts=fields.integer("attempts", 0) if "attempts" in fields else None,
        interval_s=fields.quantity("interval", duration_s, default.interval_s),
        delay_s=delay_s,
        delay_max_s=fields.quantity("delay_max", duration_s, max(default.delay_max_s, delay_s)),
    )


def read_disconnect(group: Fields, faults: Faults) -> DisconnectPolicy:
    node = group.node("disconnect")
    default = DisconnectPolicy()
    if node is None:
        return default
    fields = Fields(
        node, (*group.path, "disconnect"), faults, ("lost_after", "replace_after", "survivor", "stop_after")
    )
    return DisconnectPolicy(
        lost_after_s=_optional_s(fields, "lost_after"),
        replace_after_s=_optional_s(fields, "replace_after"),
        survivor=fields.choice("survivor", Survivor, default.survivor),
        stop_after_s=_optional_s(fields, "stop_after"),
    )


def _optional_s(fields: Fields, key: str) -> float | None:
    return fields.quantity(key, duration_s, 0.0) if key in fields else None
