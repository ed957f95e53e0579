"""A task's templates: what they may speak of, and what they say now. Rendered by a program of its own.

Owns the facts; `agent.belongings.rendering` has jinja2, and `agent.belongings.belongings` writes the files.
"""

import asyncio
import os
import signal
import sys

import msgspec

from agent.belongings.facts import CPU_S_MAX, Facts, Rendered, Request
from agent.belongings.secrets import Secrets
from agent.sandbox import process
from outrider.errors import HostError
from outrider.ids import NodeId
from outrider.model.allocation import Assignment
from outrider.model.job import Task, inner_ports
from outrider.model.mesh import MeshView

_DEADLINE_S = 30.0  # of a host under load; the program's own is CPU time
_OUTPUT_BYTES_MAX = 64 * 1024 * 1024


def facts(assignment: Assignment, task: Task, node: NodeId, secrets: Secrets, view: MeshView) -> Facts:
    """Alike wherever nothing has changed: endpoints are in order."""
    called = {upstream.service for service in assignment.group.services for upstream in service.upstreams}
    return Facts(
        node={"id": node},
        alloc={
            "id": assignment.alloc,
            "index": assignment.index,
            "job": assignment.job,
            "group": assignment.group.name,
            "task": task.name,
        },
        ports={str(name): number for name, number in inner_ports(assignment.group.network).items()},
        secrets={use.name: secrets[use.name].content.decode(errors="replace") for use in task.secrets},
        services={
            name: tuple(
                {"node": str(endpoint.node), "address": endpoint.address, "port": endpoint.port}
                for endpoint in sorted(service.endpoints, key=lambda each: (each.address, each.port))
                if endpoint.healthy
            )
            if (service := view.services.get(name)) is not None
            else ()
            for name in sorted(called)
        },
    )


async def render(task: Task, known: Facts) -> Rendered:
    """All of the task's. Raises HostError where the host is at fault."""
    templates = {template.path: template.content for template in task.templates}
    request = msgspec.json.encode(Request(facts=known, templates=templates))
    code, output, complaint = await _run(request)
    if code in (-signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return await _one_by_one(task, known)
    if code != 0:
        raise HostError("templates", step=f"render: {complaint.strip().splitlines()[-1:] or code}")
    return msgspec.json.decode(output, type=Rendered)


async def _one_by_one(task: Task, known: Facts) -> Rendered:
    """One of them never ends: find which, so that it can be named."""
    files: dict[str, str] = {}
    errors: dict[str, str] = {}
    for template in task.templates:
        request = msgspec.json.encode(Request(facts=known, templates={template.path: template.content}))
        code, output, _ = await _run(request)
        if code != 0:
            errors[template.path] = f"it takes more than {CPU_S_MAX} s: does it loop for ever?"
            continue
        one = msgspec.json.decode(output, type=Rendered)
        files |= one.files
        errors |= one.errors
    return Rendered(files=files, errors=errors)


async def _run(request: bytes) -> tuple[int, bytes, str]:
    """The renderer's exit code, output and complaints. Nothing of it touches a disk."""
    streams = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("request", "rendered", "complaint")]
    try:
        await asyncio.to_thread(_write, streams[0], request)
        argv = ("setpriv", "--pdeathsig", "KILL", "--no-new-privs", sys.executable, "-m", "agent.belongings.rendering")
        pid = process.spawn(
            (process.program(argv[0]), *argv[1:]), descriptors={0: streams[0], 1: streams[1], 2: streams[2]}
        )
        try:
            async with asyncio.timeout(_DEADLINE_S):
                code = await process.ended(pid) or 0
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            code = await process.ended(pid) or 0
        return code, os.pread(streams[1], _OUTPUT_BYTES_MAX, 0), os.pread(streams[2], 4096, 0).decode(errors="replace")
    finally:
        for stream in streams:
            os.close(stream)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def services_named(assignment: Assignment) -> bool:
    """Whether a change in the mesh may change what its templates say."""
    return any(service.upstreams for service in assignment.group.services)
