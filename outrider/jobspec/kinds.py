"""The keys that make a job's kind: `schedule:`, `parameters:`, `scaling:`, `depends_on:` -> their values."""

from outrider.ids import ServiceName
from outrider.jobspec.document import Mapping, Scalar
from outrider.jobspec.fields import Faults, Fields
from outrider.jobspec.units import duration_s
from outrider.model.job import Parameters, Payload, ScalingMetric, ScalingPolicy, Schedule

_OVERLAP = {"forbid": False, "allow": True}


def read_schedule(job: Fields, faults: Faults) -> Schedule | None:
    """`schedule: "*/5 * * * *"`, or a mapping that says more."""
    node = job.node("schedule")
    if node is None:
        return None
    if isinstance(node, Scalar):
        return Schedule(cron=job.text("schedule", ""))
    fields = Fields(node, (*job.path, "schedule"), faults, ("cron", "time_zone", "overlap"))
    if isinstance(node, Mapping):
        fields.required("cron", '"*/5 * * * *"')
    return Schedule(
        cron=fields.text("cron", ""),
        time_zone=fields.text("time_zone", "UTC"),
        overlap=fields.quantity("overlap", _overlap, default=False),
    )


def read_parameters(job: Fields, faults: Faults) -> Parameters | None:
    node = job.node("parameters")
    if node is None:
        return None
    fields = Fields(node, (*job.path, "parameters"), faults, ("required", "optional", "payload"))
    return Parameters(
        required=fields.texts("required"),
        optional=fields.texts("optional"),
        payload=fields.choice("payload", Payload, Payload.OPTIONAL),
    )


def read_scaling(group: Fields, faults: Faults) -> ScalingPolicy | None:
    node = group.node("scaling")
    if node is None:
        return None
    path = (*group.path, "scaling")
    fields = Fields(node, path, faults, ("min", "max", "target", "cooldown"))
    if isinstance(node, Mapping):
        fields.required("max", "10")
    metric, target = _target(fields, faults)
    return ScalingPolicy(
        count_min=fields.integer("min", 1),
        count_max=fields.integer("max", 1),
        metric=metric,
        target=target,
        cooldown_s=fields.quantity("cooldown", duration_s, 60.0),
    )


def read_depends_on(group: Fields) -> tuple[ServiceName, ...]:
    return tuple(ServiceName(name) for name in group.texts("depends_on", "write [db, cache]"))


def _target(scaling: Fields, faults: Faults) -> tuple[ScalingMetric, float]:
    """Of exactly one metric. What is given where that is wrong is judged no further."""
    nobody = ScalingMetric.CPU, 100.0
    node = scaling.required("target", "{cpu: 70%}")
    if node is None:
        return nobody
    metrics = tuple(str(metric) for metric in ScalingMetric)
    path = (*scaling.path, "target")
    fields = Fields(node, path, faults, metrics)
    given = [metric for metric in ScalingMetric if metric in fields]
    if len(given) != 1:
        if not faults.told(path):
            faults.add(path, f"expected exactly one of {', '.join(metrics)}, found {' and '.join(given) or 'none'}")
        return nobody
    read = _percent if given[0] is ScalingMetric.CPU else _number
    return given[0], fields.quantity(given[0], read, 1.0)


def _overlap(text: str) -> bool:
    if text not in _OVERLAP:
        raise ValueError(f"{text[:80]!r} is neither forbid nor allow")
    return _OVERLAP[text]


def _percent(text: str) -> float:
    if not text.endswith("%"):
        raise ValueError(f"{text[:80]!r} is no share of what the group reserves; write 70%")
    return _number(text.removesuffix("%"))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text[:80]!r} is no number") from None
