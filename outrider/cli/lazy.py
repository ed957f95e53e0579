"""The top commands: name, module and a line of help each. `outrider --help` imports none of them, a command its own."""

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_group


class Entry(NamedTuple):
    module: str  # below outrider.cli
    name: str  # in the module: a Typer, or the function of one command
    help: str


COMMANDS = {
    "job": Entry("jobs", "app", "Run jobs and see how they are."),
    "deployment": Entry("deployments", "app", "Promote, fail, pause or resume a rollout."),
    "node": Entry("nodes", "app", "See the fleet's nodes, close and empty them."),
    "alloc": Entry("allocations", "app", "See what runs, its logs, run commands beside it, restart and stop it."),
    "logs": Entry("allocations", "job_logs", "What all allocations of a job say, each line with its name."),
    "exec": Entry("allocations", "exec_", "Run a command beside a task, in its sandbox."),
    "events": Entry("events", "events", "What changed, oldest first."),
    "intention": Entry("intentions", "app", "Who may call whom."),
    "mesh": Entry("mesh", "app", "Who really calls whom, why a call fails, requests as they happen, certificates."),
    "secret": Entry("secrets", "app", "What jobs are given by name, and nobody may see."),
    "variable": Entry("secrets", "variables", "What jobs are given by name, and operators may see."),
    "volume": Entry("volumes", "app", "Storage that outlives the jobs that use it."),
    "vm": Entry("vms", "app", "Virtual machines."),
    "namespace": Entry("namespaces", "app", "Namespaces of jobs, and their quotas."),
    "role": Entry("roles", "app", "What users may do."),
    "user": Entry("users", "app", "People and programs, their roles and certificates."),
    "token": Entry("tokens", "app", "Tokens that let nodes join, and users in."),
    "auth": Entry("auth", "app", "Who you are here, and what you may do."),
    "audit": Entry("audit", "audit", "Who changed what, oldest first."),
    "operator": Entry("operator", "app", "Snapshots of the fleet's state, and an archive to look for faults."),
    "deploy": Entry("deploy.commands", "deploy", "Make hosts part of a fleet over SSH."),
    "dev": Entry("dev.commands", "app", "A fleet on this machine."),
    "controller": Entry("programs", "controller", "Run a controller here, until it is told to stop."),
    "agent": Entry("programs", "agent", "Run this host's agent, until it is told to stop; what it started goes on."),
}


class _Loaded(MutableMapping[str, Any]):
    """The commands, each imported when it is asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = _load(name, COMMANDS[name])
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class LazyGroup(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "commands": {}})
        self.commands = _Loaded()

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - the signature is typer's
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def _load(name: str, entry: Entry) -> Any:
    found = getattr(importlib.import_module(f"outrider.cli.{entry.module}"), entry.name)
    parent = typer.Typer(rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        parent.add_typer(found, name=name, help=entry.help)
    else:
        parent.command(name)(found)
    return get_group(parent).commands[name]
