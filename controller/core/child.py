"""A job made from one that others are launched from: named, and with its parameters filled in. Pure, holds no state."""

import re
from collections.abc import Mapping

import msgspec

from outrider.ids import JobName
from outrider.model.job import Driver, File, Group, Job, Task

PAYLOAD_FILE = "payload"
_PARAMETER = re.compile(r"\$\$\{|\$\{param\.([^}]*)\}")


def child(template: Job, name: JobName, parameters: Mapping[str, str], payload: bytes | None) -> Job:
    """What `template` has become. `parameters` are known to be its own."""
    names = (*template.parameters.required, *template.parameters.optional) if template.parameters is not None else ()
    values = {known: parameters.get(known, "") for known in names}
    given = {known: parameters[known] for known in names if known in parameters}
    groups = tuple(_group(group, values, given, payload) for group in template.groups)
    return msgspec.structs.replace(
        template, name=name, parent=template.name, schedule=None, parameters=None, groups=groups
    )


def filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with each `${param.NAME}` replaced by its value, in which nothing is filled in any more."""
    parts: list[str] = []
    end = 0
    for match in _PARAMETER.finditer(text):
        parts.append(text[end : match.start()])
        value = match[0] if match[1] is None else _escaped(values[match[1]])
        end = match.end()
        if value.endswith("$") and text[end : end + 1] == "{":
            value += "$"  # the value's last character and the text's next must not become a reference
        parts.append(value)
    return "".join((*parts, text[end:]))


def _escaped(value: str) -> str:
    return value.replace("${", "$${")


def _group(group: Group, values: Mapping[str, str], given: Mapping[str, str], payload: bytes | None) -> Group:
    return msgspec.structs.replace(group, tasks=tuple(_task(task, values, given, payload) for task in group.tasks))


def _task(task: Task, values: Mapping[str, str], given: Mapping[str, str], payload: bytes | None) -> Task:
    env = {name: filled(text, values) for name, text in task.env.items()}
    if task.driver is Driver.PROCESS:
        env |= {f"OUTRIDER_PARAM_{name.upper()}": _escaped(value) for name, value in given.items()}
    files = task.files
    if payload is not None:
        files = (*(file for file in files if file.path != PAYLOAD_FILE), File(path=PAYLOAD_FILE, content=payload))
    return msgspec.structs.replace(
        task,
        command=tuple(filled(word, values) for word in task.command),
        args=tuple(filled(word, values) for word in task.args),
        env=env,
        files=files,
    )
