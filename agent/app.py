"""The agent's only wiring: configuration -> join -> claims -> parts -> what runs already -> run until SIGTERM.

Tasks: `engine`, `writer`, `fleet`, `mesh`, `names`, `logs`, `refusals`, `belongings`, `spares`, `load`, `kvm`, `mqtt`,
and what these start, in one TaskGroup: when one fails, the agent ends with its error. The allocations run on.
"""

import asyncio
import contextlib
import random
import signal
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from agent.belongings.artifacts import Artifacts
from agent.belongings.belongings import Belongings
from agent.belongings.devices import Devices
from agent.belongings.mounted import Mounted
from agent.belongings.sticky import StickyDisks
from agent.belongings.volumes import Volumes
from agent.config import Config
from agent.core.commands import Report
from agent.core.events import Assigned, ControllerHeard, Recovered, Saved
from agent.discovery import Discovery
from agent.drivers.process import sandbox_id
from agent.engine import Engine
from agent.envoys import Envoys
from agent.executor import Executor
from agent.externals import Externals, resolved
from agent.fingerprint import NodeFingerprint
from agent.fleet import FleetSession, Greeting, Wish
from agent.gateways import Gateways
from agent.guest_states import GuestStates
from agent.guests import Guests
from agent.held import SIDECAR, refused, workloads
from agent.host import Host, open_host
from agent.images import Images
from agent.insight import Insight
from agent.isolated import IsolatedProcesses
from agent.join import join
from agent.last_heard import LastHeard
from agent.leaves import Leaves
from agent.library import SidecarLibrary
from agent.load import Load
from agent.mesh_relay import MeshRelay
from agent.metrics import Inside, NodeFigures, Workload, http_listener
from agent.microvms import Microvms
from agent.migration import Migration
from agent.names import Names
from agent.network.dns.resolver import resolv_conf
from agent.peers import Peers
from agent.pull.cache import Cache
from agent.pull.gate import Gate
from agent.pull.keeper import Keeper
from agent.pull.puller import Puller, Registries
from agent.qmp.guest_agent import GuestAgents
from agent.record_writer import RecordWriter
from agent.renewal import Renewal
from agent.shared_envoy import Shared
from agent.snapshots import Snapshots
from agent.sources import Sources
from agent.spares import Spares
from agent.trust import trusting
from agent.tunnels import Tunnels
from agent.vm_operations import VmOperations
from agent.vms import Vms
from outrider import __version__
from outrider.clock import wall_s
from outrider.errors import PeerError
from outrider.ids import AllocId, TaskName
from outrider.log import Log
from outrider.model.allocation import AllocReport
from outrider.model.job import is_guest
from outrider.model.mesh import MeshUpdate, MeshView, wants_own_sidecar
from outrider.model.node import Node
from outrider.tls import Identity, IdentityKind, ssl_context
from outrider.v1.fleet_pb2 import OpenTunnel
from sidecar.core.intent import SidecarStats
from sidecar.sidecars import Sidecars

if TYPE_CHECKING:
    from agent.events import Broker


async def run(config: Config) -> None:
    """Until SIGTERM or SIGINT. Raises OutriderError, alone or in a group: the process ends with its exit code."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    log = Log("agent", node=config.node)
    joining = asyncio.create_task(join(config, log), name="join")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    await asyncio.wait({joining, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not joining.done():
        joining.cancel()
        return
    joining.result()
    await _serve(config, stop, log)


class _Stopped(Exception):  # noqa: N818 - no error: how the TaskGroup is told to end
    """SIGTERM came."""


async def _serve(config: Config, stop: asyncio.Event, log: Log) -> None:
    async with contextlib.AsyncExitStack() as stack:
        host = await stack.enter_async_context(open_host(config, log))
        sidecars = await stack.enter_async_context(Sidecars(run_directory=config.run / "envoy", now_s=wall_s))
        try:
            async with asyncio.TaskGroup() as tasks:
                agent = Agent(config, host, sidecars, tasks, log)
                await agent.begin(stack)
                await stop.wait()
                log.info("stopping", allocations="run on")
                raise _Stopped  # noqa: TRY301 - it is the group that must see it
        except* _Stopped:
            pass


class Agent:
    """The parts, each made once. The core's listener, the controller's listener, and where metrics come from."""

    def __init__(self, config: Config, host: Host, sidecars: Sidecars, tasks: asyncio.TaskGroup, log: Log) -> None:
        rng = random.Random()  # noqa: S311 - jitter
        self._config, self._host, self._sidecars, self._tasks, self._log = config, host, sidecars, tasks, log
        self._fleet = FleetSession(
            controllers=config.controllers, tls=config.tls, listener=self, log=Log("fleet", node=config.node), rng=rng
        )
        self._fingerprint = NodeFingerprint(config, changed=self._fleet.fingerprint_changed, log=log)
        self._heard = LastHeard(config.run)
        self._mounted = Mounted(config.run)
        self._volumes = Volumes(data=config.data, run=config.run, mounted=self._mounted, paths=config.volume_paths)
        identity = Identity(kind=IdentityKind.NODE, name=config.node, cluster=config.cluster)
        self._renewal = Renewal(
            files=config.tls,
            identity=identity,
            renew=self._fleet.renew_certificate,
            changed=self._fleet.trusts,
            log=log,
            rng=rng,
        )
        self._broker = self._make_broker()
        self._gateways = Gateways(ask=self._fleet.secrets, give=sidecars.set_gateway_certificate, tasks=tasks, log=log)
        self._library = SidecarLibrary(
            sidecars,
            node=config.node_id,
            gateways=self._gateways,
            externals=Externals(give=sidecars.set_external, resolve=resolved, tasks=tasks, log=log),
            traces=config.traces,
        )
        self._leaves = Leaves(issue=self._fleet.issue_leaf, give=sidecars.set_leaf, log=log, rng=rng)
        self._engine = Engine(rng=rng)
        self._writer = RecordWriter(
            store=host.store,
            saved=lambda record: self._engine.tell(Saved(alloc=record.assignment.alloc, ended=record.ended)),
            acknowledged=self._fleet.applied,
        )
        self._names = Names(
            runtime=host.runtime,
            networks=host.networks,
            run_directory=config.run,
            directory=config.data / "dns",
            uid_first=host.uids.responder,
            log=log,
        )
        self._mesh = MeshRelay(
            show=self._show, acknowledged=sidecars.acknowledged, applied=self._fleet.mesh_applied, log=log
        )
        self._states = GuestStates(
            snapshots=Snapshots(config.data / "snapshots"),
            cluster=config.cluster,
            qemu_version=self._fingerprint.qemu_version,
            kvm=self._fingerprint.kvm_works,
            changed=lambda: self._fingerprint.snapshots_changed(self._states.snapshots.names()),
        )
        self._images = Images(config.data / "images")
        self._guest_agents = GuestAgents()
        self._vms = Vms(run=config.run, images=self._images, states=self._states, kvm=self._fingerprint.kvm_works)
        self._peers = Peers(cluster=config.cluster, tls=config.tls, log=log)
        self._migration = Migration(
            peers=self._peers,
            came=self._guest_came,
            idle=self._connections,
            tell=self._engine.tell,
            log=log,
        )
        self._guests = Guests(
            store=host.store,
            runtime=host.runtime,
            vms=self._vms,
            microvms=Microvms(config.data / "microvms", config=config.guest, kvm=self._fingerprint.kvm_works),
            migration=self._migration,
            tasks=tasks,
            log=log,
        )
        self._spares = Spares(
            directory=config.data / "spares",
            runtime=host.runtime,
            networks=host.networks,
            uids=host.uids,
            library=self._library,
            in_use=lambda: any(wants_own_sidecar(held.assignment.group) for held in self._executor.held()),
            log=log,
        )
        self._peer_address = ""
        self._envoys = Envoys(
            runtime=host.runtime,
            networks=host.networks,
            library=self._library,
            spares=self._spares,
            shared=Shared(directory=config.data / "sidecar", uid_first=host.uids.shared_sidecar),
            tell=self._engine.tell,
            tasks=tasks,
            log=log,
        )
        self._executor = Executor(
            node=config.node_id,
            run_directory=config.run,
            block=host.block,
            store=host.store,
            uids=host.uids,
            runtime=host.runtime,
            networks=host.networks,
            names=self._names,
            leaves=self._leaves,
            envoys=self._envoys,
            guests=self._guests,
            images=self._make_images(),
            belongings=self._make_belongings(),
            tell=self._engine.tell,
            write=self._writer.put,
            report=self._reported,
            tasks=tasks,
            log=log,
        )
        self._sources = Sources(
            store=host.store,
            runtime=host.runtime,
            held=self._executor.held,
            operations=self._operations(),
            agents=self._guest_agents,
            volumes=self._volumes,
            shared_log=self._envoys.shared_log,
        )
        self._load = Load(
            held=self._executor.held,
            group=self._engine.group,
            cpu_s=lambda alloc, task: host.runtime.usage(sandbox_id(alloc, task)).cpu_s,
            sidecar=sidecars.stats,
            tell=self._fleet.measured,
        )
        insight = Insight(
            node=config.node_id,
            library=sidecars,
            sidecars=self.sidecars,
            open_socket=host.networks.open_socket,
            rng=rng,
        )
        self._tunnels = Tunnels(sources=self._sources, insight=insight, dial=self._fleet.open_tunnel, log=log)

    async def begin(self, stack: contextlib.AsyncExitStack) -> None:
        """What runs is taken over first; the controller hears of it in the first greeting."""
        config = self._config
        (config.run / "resolv.conf").write_text(resolv_conf())
        self._states.snapshots.sweep()
        await self._fingerprint.take(self._states.snapshots.names())
        self._cache.open(self._host.store.directories())
        self._images.open()
        self._artifacts.open(self._host.store.directories())
        await self._spares.sweep()
        await self._take_over()
        listening = self._peers.listening(config.address, config.peer_port, self._migration.take)
        self._peer_address = await stack.enter_async_context(listening)
        if config.metrics_listen is not None:
            await stack.enter_async_context(http_listener(config.metrics_listen, self))
        works = {
            "engine": self._engine.run(),
            "writer": self._writer.run(),
            "fleet": self._fleet.run(),
            "mesh": self._mesh.run(),
            "names": self._names.run(),
            "logs": self._host.runtime.rotate_logs(),
            "refusals": self._forward_refusals(),
            "renewal": self._renewal.run(),
            "load": self._load.run(),
            "belongings": self._belongings.run(),
            "spares": self._spares.run(),
            "kvm": self._fingerprint.probe_kvm(),
        }
        if self._broker is not None:
            works["mqtt"] = self._broker.run()
        for name, work in works.items():
            self._tasks.create_task(work, name=name)
        self._log.info("ready", address=config.address, allocations=len(self._executor.held()))

    # The controller's listener (agent.fleet.FleetListener).

    def greeting(self) -> Greeting:
        node = Node(
            id=self._config.node_id,
            address=self._config.address,
            fingerprint=self._fingerprint.value,
            peer_address=self._peer_address,
            metrics_address=self._config.metrics_listen or "",
            version=__version__,
        )
        return Greeting(
            node=node,
            acknowledged=self._engine.acknowledged,
            reports=self._engine.reports(),
            trusting=trusting(self._config.tls),
        )

    async def heard(self, at_s: float) -> None:
        self._heard.remember(at_s)
        await self._engine.tell(ControllerHeard(at_s=at_s))

    async def assigned(self, wish: Wish) -> None:
        await self._engine.tell(
            Assigned(generation=wish.generation, full=wish.full, assignments=wish.assignments, removed=wish.removed)
        )

    def mesh_changed(self, update: MeshUpdate) -> None:
        self._mesh.take(update)

    def trust_told(self, roots_pem: tuple[str, ...], issuer_sha256: str) -> None:
        self._renewal.tell(roots_pem, issuer_sha256)

    def tunnel_wanted(self, request: OpenTunnel) -> None:
        self._tunnels.open(request, self._tasks)

    # Where the metrics come from (agent.metrics.Figures).

    def node(self) -> NodeFigures:
        return NodeFigures(
            cluster=self._config.cluster,
            node=self._config.node,
            connected=self._fleet.connected,
            broker_connected=self._broker is not None and self._broker.connected,
            broker_dropped=self._broker.dropped if self._broker is not None else 0,
            refusals_dropped=self._sidecars.refusals_dropped,
            certificate_expires_at_s=self._renewal.expires_at_s,
            leaf_expiries={str(service): at_s for service, at_s in self._leaves.expiries().items()},
        )

    def reports(self) -> tuple[AllocReport, ...]:
        return self._engine.reports()

    def workloads(self) -> tuple[Workload, ...]:
        return workloads(self._executor.held(), self._host.runtime)

    async def guests(self) -> tuple[Inside, ...]:
        return await self._operations().inside()

    async def refused(self) -> Mapping[AllocId, int]:
        return await refused(self._executor.held(), self._host.networks)

    def sidecars(self) -> tuple[AllocId, ...]:
        return tuple(held.assignment.alloc for held in self._executor.held() if SIDECAR in held.watchers)

    async def sidecar(self, alloc: AllocId) -> SidecarStats:
        return await self._sidecars.stats(alloc)

    def _reported(self, command: Report) -> None:
        self._fleet.report(command.report)
        if self._broker is not None:
            self._broker.put(command.report, command.job)

    def _show(self, view: MeshView) -> None:
        self._sidecars.set_view(view)
        self._names.set_view(view)
        self._belongings.set_view(view)
        self._leaves.set_roots(view.roots)

    async def _take_over(self) -> None:
        host = self._host
        discovery = Discovery(store=host.store, runtime=host.runtime, networks=host.networks, log=self._log)
        found = await discovery.find(host.loaded.records)
        await self._envoys.take_over([alloc for alloc, network in discovery.networks.items() if network.shared])
        self._executor.found(discovery.networks)
        recovered = Recovered(acknowledged=host.loaded.acknowledged, found=found, heard_s=self._heard.at_s())
        self._engine.begin(recovered, execute=self._executor.execute)

    def _make_images(self) -> Keeper:
        config = self._config.images
        self._cache = Cache(self._config.data / "roots", bytes_max=config.cache_bytes)
        registries = Registries(auth_file=config.auth_file, certificates=config.certificates)
        puller = Puller(
            cache=self._cache,
            registries=registries,
            gate=Gate(config.policy, self._log),
            tasks=self._tasks,
            log=self._log,
        )
        self._artifacts = Artifacts(
            data=self._config.data, bytes_max=self._config.artifact_cache_bytes, puller=puller, log=self._log
        )
        return Keeper(
            cache=self._cache, puller=puller, artifacts=self._artifacts, tell=self._engine.tell, tasks=self._tasks
        )

    def _make_belongings(self) -> Belongings:
        inside = IsolatedProcesses(agents=self._guest_agents, allocation=self._host.store.allocation_directory)

        async def signal_task(alloc: AllocId, task: TaskName, number: int) -> None:
            if any(map(is_guest, self._host.store.tasks(alloc))):  # then it is the only one
                await inside.signal(alloc, task, number)
            else:
                await self._host.runtime.signal(sandbox_id(alloc, task), number)

        self._belongings = Belongings(
            node=self._config.node_id,
            run_directory=self._config.run,
            ask=self._fleet.secrets,
            signal=signal_task,
            replace=inside.replace,
            tell=self._engine.tell,
            volumes=self._volumes,
            artifacts=self._artifacts,
            devices=Devices(
                run=self._config.run, files=self._config.device_files, capabilities=self._config.capabilities
            ),
            mounted=self._mounted,
            sticky=StickyDisks(self._config.run),
            tasks=self._tasks,
            rng=random.Random(),  # noqa: S311 - splay
            log=self._log,
        )
        return self._belongings

    def _make_broker(self) -> "Broker | None":
        config = self._config
        if config.mqtt is None:
            return None
        from agent.events import Broker  # noqa: PLC0415 - a megabyte that few agents need

        tls = partial(ssl_context, config.tls, server=False)
        return Broker(config=config.mqtt, cluster=config.cluster, node=config.node_id, tls=tls, log=self._log)

    def _operations(self) -> VmOperations:
        return VmOperations(
            store=self._host.store,
            runtime=self._host.runtime,
            held=self._executor.held,
            vms=self._vms,
            states=self._states,
            agents=self._guest_agents,
        )

    def _guest_came(self, alloc: AllocId) -> bool:
        directory = self._host.store.allocation_directory(alloc)
        return any(self._vms.was_taken_up(directory / task.name) for task in self._host.store.tasks(alloc))

    async def _connections(self, alloc: AllocId) -> int:
        try:
            return await self._library.inbound_active(alloc)
        except (PeerError, KeyError):  # it has no sidecar, or one that starts anew
            return 0

    async def _forward_refusals(self) -> None:
        while True:
            self._fleet.refused(await self._sidecars.refusals.get())
