"""Golden scenario scripts: what happens (`> ...`), then what the controller's core made of it.

A script is a story: prose after `#`, actions after `>`, and below each action the trace that it caused, with the time
since the beginning. `python -m tests.scenarios` writes the traces anew; a change of them is reviewed as a diff.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from controller.core import mesh_intent, views
from controller.core.commands import (
    CloseSession,
    Command,
    ProbeNode,
    Publish,
    Reply,
    SendAssignments,
    SyncMesh,
    WithdrawEndpoints,
)
from controller.core.events import LastWillSeen
from outrider.ids import AllocId, JobName, NodeId, ServiceName
from outrider.job_diff import diff
from outrider.model.allocation import Allocation, AllocStatus, CopyRole
from outrider.model.job import (
    Constraint,
    Group,
    Job,
    JobType,
    Operator,
    Parameters,
    Protocol,
    ReschedulePolicy,
    ScalingMetric,
    ScalingPolicy,
    Schedule,
)
from tests.scenarios.steering import steering_verbs, with_policies
from tests.scenarios.world import START_S, World, group, job, node, service

HERE = Path(__file__).parent


def scripts() -> list[Path]:
    return sorted(HERE.glob("*.txt"))


def played(text: str) -> str:
    """The script with the traces that the core gives now."""
    stage = Stage()
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("> "):
            lines.append(line)
            lines.extend(stage.act(line[2:]))
        elif line.startswith("#") or not line.strip():
            lines.append(line)
    return "\n".join(lines) + "\n"


class TracedWorld(World):
    def __init__(self) -> None:
        self.trace: list[str] = []
        self.names: dict[AllocId, str] = {}
        super().__init__()

    def _execute(self, command: Command) -> None:
        for line in self._told(command):
            self.trace.append(f"  {self.now_s - START_S:6.1f}  {line}")
        super()._execute(command)

    def _told(self, command: Command) -> Iterator[str]:
        match command:
            case Publish(event=event):
                subject = self.name(AllocId(event.alloc)) if event.alloc else event.job
                where = f" on {event.node}" if event.node and subject else event.node
                yield f"{event.kind} {subject}{where}" + (f": {event.message}" if event.message else "")
            case Reply():
                what = f"version {command.version}, {'changed' if command.changed else 'nothing changed'}"
                yield f"reply: {command.code + ': ' + command.message if command.code else what}"
                yield from (f"warning: {warning}" for warning in command.warnings)
            case SendAssignments():
                parts = [f"{one.desired} {self.name(one.alloc)}" for one in command.assignments]
                parts += [f"forget {self.name(alloc)}" for alloc in command.removed]
                how = "everything" if command.full else "change"
                yield f"to {command.node} ({how} {command.generation.epoch}.{command.generation.counter}): " + (
                    ", ".join(parts) or "nothing"
                )
            case SyncMesh():
                for name in command.nodes:
                    yield self._registered(name)
            case WithdrawEndpoints():
                yield f"withdraw {', '.join(map(self.name, command.allocs))}"
            case ProbeNode():
                yield f"probe {command.node}"
            case CloseSession():
                yield f"close session of {command.node}: {command.reason}"
            case _:
                pass  # the journal's part shows in what follows from it

    def _registered(self, name: NodeId) -> str:
        wanted = mesh_intent.registration(self.state, name)
        shown = [
            f"{self.name(one.alloc)} {one.service}:{one.port} {'passing' if one.passing else 'critical'}"
            for one in wanted.services
        ]
        return f"mesh: {name} {'passing' if wanted.passing else 'critical'}" + "".join(f", {one}" for one in shown)

    def name(self, alloc: AllocId) -> str:
        """shop.web[0]v1, and where there was one like it before, shop.web[0]v1'2."""
        if alloc not in self.names:
            found = views.allocation(self.state, alloc)
            plain = f"{found.job}.{found.group}[{found.index}]v{found.job_version}" if found else str(alloc)
            copies = sum(known.split("'")[0] == plain for known in self.names.values())
            self.names[alloc] = f"{plain}'{copies + 1}" if copies else plain
        return self.names[alloc]


class Stage:
    """Knows the verbs of a script."""

    def __init__(self) -> None:
        self.world = TracedWorld()

    def act(self, line: str) -> list[str]:
        verb, *words = line.split()
        plain = [word for word in words if "=" not in word]
        options = dict(word.split("=", 1) for word in words if "=" in word)
        self.world.trace = []
        self._verbs()[verb](plain, options)
        return self.world.trace

    def _verbs(self) -> dict[str, Callable[[list[str], dict[str, str]], None]]:
        world = self.world
        return {
            "join": lambda names, options: world.join(
                *(
                    node(
                        name,
                        memory_mib=int(options.get("memory", "8192")),
                        meta={"rack": options["rack"]} if "rack" in options else {},
                    )
                    for name in names
                )
            ),
            "leave": lambda names, _: [world.leave(name) for name in names] and None,
            "silence": lambda names, _: [world.silence(name) for name in names] and None,
            "hear": lambda names, _: [self._hear(name) for name in names] and None,
            "will": lambda names, _: world.send(LastWillSeen(node=NodeId(names[0]))),
            "wait": lambda words, _: world.wait(float(words[0])),
            "submit": self._submit,
            "stop": lambda names, _: world.stop(names[0]) and None,
            "fail": lambda names, options: world.fail(self._alloc(names[0]), options.get("why", "exit-code-1")),
            "finish": lambda names, _: world.finish(self._alloc(names[0])),
            "agents": self._agents,
            "sidecars": lambda words, _: setattr(world, "withdraw_acknowledged", words == ["acknowledge"]),
            "restart": lambda words, _: self._restart(float(words[0]) if words else 0.0),
            "dispatch": lambda names, options: world.dispatch(names[0], **options) and None,
            "revert": lambda words, _: world.revert(words[0], int(words[1]) if len(words) > 1 else 0) and None,
            "scale": lambda words, _: world.scale(words[0], int(words[-1]), (*words[1:-1], None)[0]) and None,
            "load": lambda words, _: world.loads.__setitem__(words[0], float(words[1])),
            "history": lambda names, _: self._history(names[0]),
            "show": lambda names, _: self._show(names[0]),
            **steering_verbs(world, self._alloc),
        }

    def _submit(self, words: list[str], options: dict[str, str]) -> None:
        """submit JOB.GROUP count=N service=NAME upstream=NAME memory=MIB command=C type=T, and `with_policies` ...

        `schedule=*/5_*_*_*_*`, `overlap=allow`, `required=NAME`, `optional=NAME`, `depends_on=NAME`,
        `min=N`, `max=N`, `cpu=PERCENT`, `cooldown=S`, `attempts=N` (to reschedule):
        see docs/JOBS.md.
        """
        name, group_name = words[0].split(".")
        services = []
        if "service" in options:
            upstreams = [options["upstream"]] if "upstream" in options else []
            protocol = Protocol(options.get("protocol", "tcp"))
            services = [service(options["service"], upstreams=upstreams, protocol=protocol)]
        wanted = group(
            group_name,
            int(options.get("count", "1")),
            services=services,
            memory_mib=int(options.get("memory", "64")),
            command=options.get("command", "serve"),
        )
        wanted = with_policies(wanted, options)
        if "max" in options:
            scaling = ScalingPolicy(
                count_min=int(options.get("min", "1")),
                count_max=int(options["max"]),
                metric=ScalingMetric.CPU,
                target=float(options["cpu"]),
                cooldown_s=float(options.get("cooldown", "60")),
            )
            wanted = msgspec.structs.replace(wanted, scaling=scaling)
        if "attempts" in options:
            reschedule = ReschedulePolicy(attempts=int(options["attempts"]))
            wanted = msgspec.structs.replace(wanted, reschedule=reschedule)
        if "depends_on" in options:
            wanted = msgspec.structs.replace(wanted, depends_on=(ServiceName(options["depends_on"]),))
        if "rack" in options:
            on_rack = Constraint(attribute="meta.rack", operator=Operator.EQUAL, value=options["rack"])
            wanted = msgspec.structs.replace(wanted, constraints=(on_rack,))
        made = self._kind(name, wanted, options)
        self.world.submit(msgspec.structs.replace(made, priority=int(options.get("priority", "50"))))

    def _kind(self, name: str, wanted: Group, options: dict[str, str]) -> Job:
        launched = {"schedule", "required", "optional"} & options.keys()
        made = job(name, wanted, type=JobType(options.get("type", "batch" if launched else "service")))
        if "schedule" in options:
            cron = options["schedule"].replace("_", " ")
            schedule = Schedule(cron=cron, overlap=options.get("overlap") == "allow")
            return msgspec.structs.replace(made, schedule=schedule)
        if launched:
            names = ((options[key],) if key in options else () for key in ("required", "optional"))
            required, optional = names
            return msgspec.structs.replace(made, parameters=Parameters(required=required, optional=optional))
        return made

    def _history(self, name: str) -> None:
        versions = views.job_history(self.world.state, JobName(name)) or ()
        before = None
        for one in versions:
            changed = ", ".join(map(str, diff(before, one.version.job))) if before else "the first"
            reason = f" ({one.reason})" if one.reason else ""
            self.world.trace.append(f"  version {one.version.version} {one.rollout}{reason}: {changed}")
            before = one.version.job

    def _restart(self, away_s: float) -> None:
        """restart SECONDS: nobody is there for so long; then a controller starts on the journal as it is."""
        self.world.now_s += away_s
        self.world.begin()
        self.world.wait(0)

    def _hear(self, name: str) -> None:
        self.world.agents[NodeId(name)].silent = False

    def _agents(self, words: list[str], _options: dict[str, str]) -> None:
        """agents sick|well|slow|quick: whether what they start becomes healthy, and whether they start it at all.

        `ill` and `recovered` are said of what runs already too.
        """
        for agent in self.world.agents.values():
            agent.healthy = words[0] not in {"sick", "ill"}
            agent.obedient = words[0] != "slow"
            if words[0] in {"ill", "recovered"}:
                self.world.report(agent, *agent.reports())

    def _alloc(self, name: str) -> AllocId:
        return next(alloc for alloc, known in self.world.names.items() if known == name)

    def _show(self, name: str) -> None:
        status = views.job_status(self.world.state, JobName(name))
        assert status is not None, name
        reason = f": {status.rollout_reason}" if status.rollout_reason else ""
        self.world.trace.append(f"  rollout {status.rollout}{reason}")
        if status.job.job.is_template:
            self.world.trace.append(f"  {status.state}, next launch at {self._at(status.next_launch_s)}")
            self.world.trace.extend(f"  {one.name} {one.state}" for one in status.children)
        for one in status.scaling:
            measured = f"{one.measured:.4g}" if one.measured is not None else "unknown"
            self.world.trace.append(f"  group {one.group} of {one.count}, {measured} each: {one.note or 'as wanted'}")
        self.world.trace.extend(f"  warning: {warning}" for warning in status.warnings)
        self.world.trace.extend(f"  {self._line(one)}" for one in status.allocations)

    def _at(self, at_s: float | None) -> str:
        return f"{at_s - START_S:.1f}" if at_s is not None else "no time"

    def _line(self, one: Allocation) -> str:
        health = " healthy" if one.healthy else " not healthy" if one.status is AllocStatus.RUNNING else ""
        where = f" on {one.node}" if one.node else ""
        role = "" if one.role is CopyRole.ORDINARY else f" {one.role}"
        return f"{self.world.name(one.id)}{role} {one.status}{health}{where}" + (
            f": {one.reason}" if one.reason else ""
        )
