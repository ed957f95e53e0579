"""A job made from one that others are launched from. Pure, holds no state."""

from collections.abc import Mapping

import msgspec

from outrider.ids import JobName
from outrider.model.job import File, Group, Job, Task

PAYLOAD_FILE = "payload"


def child(template: Job, name: JobName, parameters: Mapping[str, str], payload: bytes | None) -> Job:
    """What `template` has become. `parameters` are known to be its own; an optional one that is absent is ""."""
    known = (*template.parameters.required, *template.parameters.optional) if template.parameters is not None else ()
    groups = template.groups if payload is None else tuple(_with(group, payload) for group in template.groups)
    return msgspec.structs.replace(
        template,
        name=name,
        parent=template.name,
        schedule=None,
        parameters=None,
        arguments={parameter: parameters.get(parameter, "") for parameter in known},
        groups=groups,
    )


def _with(group: Group, payload: bytes) -> Group:
    return msgspec.structs.replace(group, tasks=tuple(_task(task, payload) for task in group.tasks))


def _task(task: Task, payload: bytes) -> Task:
    others = (file for file in task.files if file.path != PAYLOAD_FILE)
    return msgspec.structs.replace(task, files=(*others, File(path=PAYLOAD_FILE, content=payload)))
