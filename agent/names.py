"""The node's DNS responder, kept running and told what each allocation may resolve. Level-triggered.

Task: `run`, which starts the responder's sandbox, watches it, starts it again when it ends, and tells it what
changed. A responder that is away delays names, never a workload.
"""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from agent.network.dns.resolver import Resolver, open_dns_sockets
from agent.network.dns.sandbox import RESPONDER_ID, responder_socket, responder_spec
from agent.network.namespaces import AllocationNetworks
from agent.sandbox.runtime import SandboxRuntime
from agent.sandbox.spec import INNER_USER, StartError
from outrider.errors import HostError, InputError, PeerError
from outrider.ids import AllocId, ServiceName
from outrider.log import Log
from outrider.model.job import Group, has_guest
from outrider.model.mesh import MESH_DOMAIN, MeshView, external_address
from outrider.validate_external import is_address

_RETRY_S = 0.5
_STARTED_S = 5.0
_POLL_S = 0.01


class Names:
    def __init__(
        self,
        *,
        runtime: SandboxRuntime,
        networks: AllocationNetworks,
        run_directory: Path,
        directory: Path,
        uid_first: int,
        log: Log,
    ) -> None:
        """`directory`: the responder's sandbox's own. `uid_first`: its range of host uids."""
        self._runtime = runtime
        self._networks = networks
        self._sockets = run_directory / "dns"
        self._directory = directory
        self._uid_first = uid_first
        self._resolver = Resolver(socket=responder_socket(self._sockets))
        self._log = log
        self._view: Mapping[ServiceName, str] | None = None  # None: the mesh is not known yet
        self._reach: Mapping[ServiceName, tuple[ServiceName, ...]] = {}  # of transparent services
        self._services: dict[AllocId, frozenset[ServiceName]] = {}
        self._upstreams: dict[AllocId, frozenset[ServiceName]] = {}
        self._outside: dict[AllocId, Mapping[str, str]] = {}  # full names of external services and their hosts
        self._guests: set[AllocId] = set()  # those that get their address from the responder
        self._told: dict[AllocId, Mapping[str, str]] = {}
        self._changed = asyncio.Event()

    def set_view(self, view: MeshView) -> None:
        addresses = {name: service.virtual_address for name, service in view.services.items()}
        if (addresses, view.reach) != (self._view, self._reach):
            self._view, self._reach = addresses, view.reach
            self._changed.set()

    async def attach(self, alloc: AllocId, group: Group) -> None:
        """Before the allocation's tasks start. Returns even where the responder is away: it is told later."""
        self._remember(alloc, group)
        try:
            await self._tell(alloc)
        except (PeerError, HostError, InputError) as error:
            self._log.warning("names delayed", alloc=alloc, reason=str(error))
            self._changed.set()

    def adopt(self, alloc: AllocId, group: Group) -> None:
        """The responder may have answered for it all the while: nothing changes until the mesh is known."""
        self._remember(alloc, group)
        self._changed.set()

    async def detach(self, alloc: AllocId) -> None:
        """Its sockets would keep the namespace alive. A responder that is away holds none."""
        self._upstreams.pop(alloc, None)
        self._services.pop(alloc, None)
        self._outside.pop(alloc, None)
        self._guests.discard(alloc)
        self._told.pop(alloc, None)
        try:
            await self._resolver.detach(alloc)
        except PeerError as error:
            self._log.info("names not detached", alloc=alloc, reason=str(error))
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled; the responder runs on."""
        task = asyncio.current_task()
        # Python 3.11's TaskGroup drops a cancellation that comes together with an error: ask for it by hand.
        while task is not None and not task.cancelling():
            try:
                await self._ensure()
                async with asyncio.TaskGroup() as group:
                    watching = group.create_task(self._runtime.wait(RESPONDER_ID), name="names-watch")
                    telling = group.create_task(self._keep_telling(), name="names-tell")
                    await asyncio.wait({watching, telling}, return_when=asyncio.FIRST_COMPLETED)
                    telling.cancel()
                self._log.warning("responder ended", code=watching.result().code)
            except* (HostError, StartError, PeerError) as group_error:
                self._log.warning("responder not running", reason=str(group_error.exceptions[0]))
            self._told.clear()
            await asyncio.sleep(_RETRY_S)

    async def _ensure(self) -> None:
        """Started, or found running; listening when this returns."""
        running = {status.id for status in await self._runtime.list() if status.running}
        if RESPONDER_ID not in running:
            uid = self._uid_first + INNER_USER
            self._sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chown(self._sockets, uid, uid)
            spec = responder_spec(
                directory=self._directory,
                socket_directory=self._sockets,
                network_namespace=await self._networks.isolated(),
                uid_first=self._uid_first,
            )
            await self._runtime.start(spec)
        await self._listening()

    async def _listening(self) -> None:
        """Nobody tells when a socket begins to listen, so it is tried."""
        try:
            async with asyncio.timeout(_STARTED_S):
                while True:
                    try:
                        await self._resolver.held()
                    except PeerError:
                        await asyncio.sleep(_POLL_S)
                    else:
                        return
        except TimeoutError as error:
            raise PeerError(f"the DNS responder does not listen {_STARTED_S:g} s after its start") from error

    async def _keep_telling(self) -> None:
        while True:
            self._changed.clear()
            if self._view is not None:
                await self._sync(self._view)
            await self._changed.wait()

    async def _sync(self, view: Mapping[ServiceName, str]) -> None:
        held = await self._resolver.held()
        for alloc in held - self._upstreams.keys():
            await self._resolver.detach(alloc)
        for alloc in tuple(self._upstreams):
            if alloc not in held:
                self._told.pop(alloc, None)
            elif self._told.get(alloc) == self._names(alloc, view):
                continue
            await self._tell(alloc, attached=alloc in held)

    async def _tell(self, alloc: AllocId, *, attached: bool = False) -> None:
        names = self._names(alloc, self._view or {})
        if not attached:
            guest = alloc in self._guests
            await self._resolver.attach(alloc, open_dns_sockets(alloc, self._networks.open_socket, guest=guest))
        await self._resolver.set_names(alloc, names)
        self._told[alloc] = names

    def _remember(self, alloc: AllocId, group: Group) -> None:
        self._services[alloc] = frozenset(service.name for service in group.services)
        self._upstreams[alloc] = frozenset(one.service for service in group.services for one in service.upstreams)
        self._outside[alloc] = outside_names(group)
        if has_guest(group):
            self._guests.add(alloc)

    def _names(self, alloc: AllocId, view: Mapping[ServiceName, str]) -> Mapping[str, str]:
        """Full ones. What the job itself calls external goes before what a transparent service may call."""
        reached = (name for service in self._services.get(alloc, ()) for name in self._reach.get(service, ()))
        called = {*self._upstreams.get(alloc, ()), *reached}
        inside = {f"{name}.{MESH_DOMAIN}": view[name] for name in called if name in view}
        return {**inside, **self._outside.get(alloc, {})}


def outside_names(group: Group) -> Mapping[str, str]:
    """Of a group's external services: each by its name in the mesh, and by its hosts' own."""
    found: dict[str, str] = {}
    for index, one in enumerate(group.network.external):
        names = (host for host in one.hosts if not is_address(host))
        found |= dict.fromkeys((f"{one.name}.{MESH_DOMAIN}", *names), external_address(index))
    return found
