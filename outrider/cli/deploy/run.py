"""Carries plans out: hosts in parallel, controllers first, each on its own; an upgrade a few at a time.

Tasks: one for each host that is worked on, `parallel` at most. One host's failure stops no other, but an upgrade begins
no further host after the first that is sick.
"""

import asyncio
import contextlib
import hashlib
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from outrider.cli.deploy.bundle import Bundle
from outrider.cli.deploy.fleet import Direct, FleetAccess, empty, on_controller, wait_ready
from outrider.cli.deploy.inventory import Host, Inventory, Role
from outrider.cli.deploy.plan import Facts, Plan, Step, check, facts_from, make_plan, packages_of
from outrider.cli.deploy.remote import Remote, connect, ssh_of
from outrider.cli.deploy.units import (
    AGENT_CONFIG,
    CONTROLLER_CONFIG,
    JOIN_TOKEN,
    agent_files,
    controller_files,
)
from outrider.errors import HostError, OutriderError, PeerError, RefusedError
from outrider.model.job import Value

READY_S = 60.0
INSTALL_S = 600.0
CONTROLLER_READY_S = 60.0
_POLL_S = 0.25

Tell = Callable[[str, str], None]  # host, and what happens there


class Outcome(Value, frozen=True, kw_only=True):
    host: str
    done: str = ""  # what was done; "" where it failed
    error: str = ""


class Deployment:
    """One run over an inventory. `tell` is called for every step of every host."""

    def __init__(
        self,
        inventory: Inventory,
        bundle: Bundle,
        *,
        ways: Sequence[Host] = (),
        parallel: int,
        dry_run: bool,
        tell: Tell,
    ) -> None:
        """`ways`: hosts with a controller of the fleet, worked on or not; none: it is that of OUTRIDER_ADDRESS."""
        self._inventory, self._bundle, self._ways = inventory, bundle, ways
        self._parallel = parallel
        self._gate = asyncio.Semaphore(parallel)
        self._dry_run = dry_run
        self._tell = tell
        self._fleet: FleetAccess | None = None if ways else Direct()
        self._leaving: list[Host] = []  # nodes of the fleet that are being removed
        self._stack = contextlib.AsyncExitStack()

    async def deploy(self) -> tuple[Outcome, ...]:
        """Controllers, then all others at once."""
        async with self._stack:
            first = await self._each(self._inventory.controller_hosts, self._whole)
            if any(outcome.error for outcome in first):
                rest = [host for host in self._inventory.hosts if "controller" not in host.roles]
                left = tuple(Outcome(host=host.host, error="not begun: a controller failed") for host in rest)
                return (*first, *left)
            others = [host for host in self._inventory.hosts if "controller" not in host.roles]
            await self._known(others)
            return (*first, *await self._each(others, self._whole))

    async def upgrade(self) -> tuple[Outcome, ...]:
        """Controllers one by one, then agents; after the first sick host no other is begun."""
        async with self._stack:
            outcomes: list[Outcome] = []
            controllers = self._inventory.controller_hosts
            agents = [host for host in self._inventory.hosts if "controller" not in host.roles]
            for host in controllers:
                outcomes += await self._each([host], self._whole)
                if outcomes[-1].error:
                    break
            waiting = list(agents)
            sick = any(outcome.error for outcome in outcomes)
            if not sick:
                await self._known(agents)
            while waiting and not sick:
                batch, waiting = waiting[: self._parallel], waiting[self._parallel :]
                outcomes += await self._each(batch, self._whole)
                sick = any(outcome.error for outcome in outcomes)
            begun = {outcome.host for outcome in outcomes}
            left = [host for host in self._inventory.hosts if host.host not in begun]
            outcomes += [Outcome(host=host.host, error="not begun: an earlier host is sick") for host in left]
            return tuple(outcomes)

    async def remove(self, *, data: bool, deadline_s: float | None, force: bool) -> tuple[Outcome, ...]:
        """Nodes first: work leaves them, what is left ends; then controllers, where all nodes went well.

        `force` asks no controller: what runs there ends.
        """
        nodes = [host for host in self._inventory.hosts if "agent" in host.roles]
        controllers = self._inventory.controller_hosts
        async with self._stack:
            if self._dry_run:
                return tuple(await self._each(self._inventory.hosts, self._would_remove))
            emptied: list[Outcome] = []
            if not force:
                emptied = await self._emptied(nodes, deadline_s)
            sick = {outcome.host for outcome in emptied if outcome.error}
            alone = [host for host in nodes if host not in controllers and host.host not in sick]
            removed = await self._each(alone, partial(self._take_away, data=data))
            if sick or any(outcome.error for outcome in removed):
                failed = [outcome for outcome in emptied if outcome.error]
                left = [
                    Outcome(host=host.host, error="not begun: a node could not be removed")
                    for host in controllers
                    if host.host not in sick
                ]
                return (*failed, *removed, *left)
            return (*removed, *await self._each(controllers, partial(self._take_away, data=data)))

    async def _emptied(self, nodes: Sequence[Host], deadline_s: float | None) -> list[Outcome]:
        """No copy goes from one node that leaves to another: all are closed before the first is drained."""

        async def look(host: Host, remote: Remote) -> str:
            if facts_from(await remote.ask("probe")).joined.get("agent"):
                self._leaving.append(host)
                return "is a node"
            return "is no node"

        away = [outcome for outcome in await self._each(nodes, look) if outcome.error]
        if not self._leaving:
            return away
        leaving = frozenset(host.node for host in self._leaving)
        try:
            fleet = await self._reach()
            for node in leaving & (await fleet.nodes()).keys():
                await fleet.close(node)
        except OutriderError as error:
            text = f"no drain: {error}; `--force` removes without"
            return [*away, *(Outcome(host=host.host, error=text) for host in self._leaving)]

        async def one(host: Host, _: Remote) -> str:
            told = partial(self._tell, host.host)
            await empty(fleet, host.node, leaving=leaving, deadline_s=deadline_s, tell=told)
            return "empty"

        return [*away, *await self._each(self._leaving, one)]

    async def _would_remove(self, host: Host, _: Remote) -> str:
        return "would be drained and removed" if "agent" in host.roles else "would be removed"

    async def _take_away(self, host: Host, remote: Remote, *, data: bool) -> str:
        if "agent" in host.roles:
            await self._stop(host, remote, "agent")
            self._tell(host.host, "end what runs there")
            await remote.ask("purge", 330.0)
            if data and host in self._leaving:
                await self._distrust(host)
        if "controller" in host.roles:
            await self._stop(host, remote, "controller")
        await remote.ask("remove", data=data)
        return "removed"

    async def _stop(self, host: Host, remote: Remote, role: Role) -> None:
        self._tell(host.host, f"stop the {role}")
        await remote.ask("service", role=role, verb="stop")

    async def _distrust(self, host: Host) -> None:
        """Whoever kept a copy of its key has nothing. Of a fleet whose last controller goes there is no trust left."""
        last = contextlib.suppress(PeerError) if "controller" in host.roles else contextlib.nullcontext()
        with last, contextlib.suppress(RefusedError):  # the fleet may not know it any more
            await (await self._reach()).revoke(host.node)

    async def _known(self, nodes: Sequence[Host]) -> None:
        """The fleet that these nodes are of, before anything is done to them."""
        if nodes and not self._dry_run:
            await self._reach()

    async def _reach(self) -> FleetAccess:
        """The fleet, by the first of its controllers' hosts that answers. Raises HostError."""
        for at, way in enumerate(self._ways if self._fleet is None else ()):
            try:
                remote = await self._stack.enter_async_context(connect(way, ssh_of(self._inventory.ssh, way.ssh)))
                self._fleet = await on_controller(remote, self._sockets())
                break
            except HostError:
                if at == len(self._ways) - 1:
                    raise
        assert self._fleet is not None, "without ways there is the fleet of OUTRIDER_ADDRESS"
        return self._fleet

    async def _each(self, hosts: Iterable[Host], work: Callable[[Host, Remote], Awaitable[str]]) -> list[Outcome]:
        async def one(host: Host) -> Outcome:
            async with self._gate:
                try:
                    remote = await self._stack.enter_async_context(connect(host, ssh_of(self._inventory.ssh, host.ssh)))
                    done = await work(host, remote)
                except OutriderError as error:
                    text = str(error).removeprefix(f"{host.host}: ")
                    self._tell(host.host, f"failed: {text}")
                    return Outcome(host=host.host, error=text)
                self._tell(host.host, done)
                return Outcome(host=host.host, done=done)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(host), name=f"deploy-{host.host}") for host in hosts]
        return [task.result() for task in tasks]

    async def _whole(self, host: Host, remote: Remote) -> str:
        """All that the host lacks."""
        began_s = time.time()
        remote_bundle = f"/var/tmp/outrider-{self._bundle.id}.tar"  # noqa: S108 - root's file, moved into place whole
        answer = await remote.ask("probe", packages=list(packages_of(host)), bundle=remote_bundle)
        facts = facts_from(answer)
        check(host, facts, self._bundle, cluster=self._inventory.cluster, now_s=began_s, took_s=time.time() - began_s)
        if facts.running.get("controller") and "controller" in host.roles and not self._dry_run:
            self._fleet = await on_controller(remote, self._sockets())
        wanted = self._files(host)
        authorities = await self._authorities(facts)
        plan = make_plan(host, facts, self._bundle, _digests(wanted), authorities=authorities)
        if self._dry_run:
            return plan.told
        before = await self._running(host, facts)
        await self._prepare(host, remote, plan, wanted, remote_bundle)
        if "controller" in host.roles:
            await self._controller(host, remote, facts, plan)
        if "agent" in host.roles:
            await self._agent(host, remote, facts, plan)
            lost = before - await self._running(host, facts)
            if lost:
                raise HostError(host.host, step=f"allocations ended meanwhile: {', '.join(sorted(lost)[:5])}")
        return f"healthy, {plan.told}"

    async def _prepare(
        self, host: Host, remote: Remote, plan: Plan, wanted: Mapping[str, tuple[str, str]], remote_bundle: str
    ) -> None:
        for step in plan.steps:
            if step not in {Step.JOIN, Step.START, Step.RESTART}:  # the roles' own
                self._tell(host.host, str(step))
            match step:
                case Step.PACKAGES:
                    await remote.ask("packages", 900.0, packages=list(plan.packages))
                case Step.PUSH:
                    await remote.push(self._bundle.path, remote_bundle)
                case Step.INSTALL:
                    await remote.ask("install", INSTALL_S, bundle=remote_bundle)
                case Step.CONFIGURE:
                    files = {path: {"content": text, "mode": mode} for path, (text, mode) in wanted.items()}
                    await remote.ask("configure", files=files)
                case Step.ACTIVATE:
                    await remote.ask("activate", version=self._bundle.id)
                case _:
                    return  # the roles' own

    async def _controller(self, host: Host, remote: Remote, facts: Facts, plan: Plan) -> None:
        if Step.START in plan.steps or Step.RESTART in plan.steps:
            verb = "restart" if facts.running.get("controller") else "start"
            await remote.ask("service", role="controller", verb=verb)
        fleet = await on_controller(remote, self._sockets())
        told = ""
        try:
            async with asyncio.timeout(CONTROLLER_READY_S):
                while True:
                    try:
                        await fleet.answers()
                    except PeerError as error:
                        told = str(error)
                        await asyncio.sleep(_POLL_S)
                    else:
                        break
        except TimeoutError as error:
            text = (await remote.ask("logs", role="controller"))["text"]
            raise HostError(host.host, step=f"the controller does not answer: {told}\n{_indented(text)}") from error
        self._fleet = fleet

    async def _agent(self, host: Host, remote: Remote, facts: Facts, plan: Plan) -> None:
        if Step.JOIN in plan.steps:
            self._tell(host.host, "join")
            token = await (await self._reach()).join_token(host.node)
            await remote.ask("configure", files={JOIN_TOKEN: {"content": token, "mode": "600"}})
            await remote.ask("forget")
        if Step.START in plan.steps or Step.RESTART in plan.steps:
            verb = "restart" if facts.running.get("agent") else "start"
            self._tell(host.host, verb)
            await remote.ask("service", role="agent", verb=verb)
        told = await wait_ready(await self._reach(), host.node, version=self._bundle.version, timeout_s=READY_S)
        if told:
            text = (await remote.ask("logs", role="agent"))["text"]
            raise HostError(host.host, step=f"node {host.node} is not healthy: {told}\n{_indented(text)}")

    async def _authorities(self, facts: Facts) -> frozenset[str] | None:
        """The fleet's CAs, where the host is a node already and they are to be had."""
        if facts.joined.get("agent") and self._fleet is not None:
            with contextlib.suppress(PeerError):  # a controller that is mended just now
                return await self._fleet.authorities()
        return None

    async def _running(self, host: Host, facts: Facts) -> frozenset[str]:
        """What runs on the node, where it is one already."""
        if "agent" not in host.roles or not facts.joined.get("agent") or self._fleet is None:
            return frozenset()
        with contextlib.suppress(PeerError, RefusedError):
            return (await self._fleet.node(host.node)).allocations
        return frozenset()

    def _sockets(self) -> Path:
        """A directory for sockets, gone with the deployment; short, because sun_path is."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="outrider-")))

    def _files(self, host: Host) -> dict[str, tuple[str, str]]:
        files: dict[str, tuple[str, str]] = {}
        if "controller" in host.roles:
            files |= controller_files(self._inventory, host)
        if "agent" in host.roles:
            files |= agent_files(self._inventory, host)
        return files


def _digests(files: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    paths = {"agent": AGENT_CONFIG, "controller": CONTROLLER_CONFIG}
    return {role: hashlib.sha256(files[path][0].encode()).hexdigest() for role, path in paths.items() if path in files}


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-12:])
