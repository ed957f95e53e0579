"""The node's sidecars: each one's files, configuration, readiness, drain and figures.

Owns the ADS server and who has been told what. Starts no Envoy: the agent runs them as sandboxes. Used as
`async with Sidecars(...) as sidecars`. Tasks: the gRPC server's own. Queues: `refusals`, which drops its oldest.
"""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Self

import msgspec
from envoy.service.discovery.v3 import discovery_pb2

from outrider.errors import PeerError, RefusedError
from outrider.ids import AllocId, SecretName, ServiceName
from outrider.log import Log
from outrider.model.insight import TappedCall
from outrider.model.job import Value
from outrider.model.mesh import Leaf, MeshService, MeshView, ObservedRefusal
from sidecar.admin import Admin
from sidecar.ads import AdsServer, Stream
from sidecar.bootstrap import BINARY_INSIDE, DIRECTORY_INSIDE, argv, envoy_binary
from sidecar.core.access import access_rules, refused_by, remember
from sidecar.core.external import Addresses
from sidecar.core.intent import SidecarSpec, SidecarStats
from sidecar.core.resources import Kind, Pair, ResourceSet, is_http, resources
from sidecar.core.subscription import Rejection, Versions
from sidecar.core.traffic import used_services
from sidecar.directory import Directories, SidecarState
from sidecar.render import render
from sidecar.stats import sidecar_stats
from sidecar.tap import tapped_calls

_REFUSALS_MAX = 256
_READY_POLL_S = 0.005
_TAP_S = 5.0  # for a sidecar to begin to tell
_log = Log("sidecar")


class SidecarFiles(Value, frozen=True, kw_only=True):
    """What the sidecar's sandbox needs: bind `directory` (read-write) at `directory_inside`, `binary` (read-only) at
    `binary_inside`, run `argv`. The access log is its standard output."""

    directory: Path
    directory_inside: Path  # /run/outrider/sidecar
    binary: Path
    binary_inside: Path  # /run/outrider/envoy
    argv: tuple[str, ...]


class Sidecars:
    def __init__(self, *, run_directory: Path, now_s: Callable[[], float]) -> None:
        """`run_directory`: volatile, ours alone. `now_s`: the wall clock, stamps refusals."""
        self.refusals: asyncio.Queue[ObservedRefusal] = asyncio.Queue(maxsize=_REFUSALS_MAX)
        self.refusals_dropped = 0
        self._now_s = now_s
        self._directories = Directories(run_directory)
        self._server = AdsServer(
            socket=self._directories.server_socket, identify=self._identify, refused=self._observe_refusal
        )
        self._view = MeshView()
        self._leaves: dict[ServiceName, Leaf] = {}
        self._sidecars: dict[AllocId, _Sidecar] = {}
        self._by_token: dict[bytes, _Sidecar] = {}

    async def __aenter__(self) -> Self:
        self._directories.prepare()
        await self._server.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stops serving; Envoys keep their configuration, and reconnect to the next agent."""
        await self._server.stop()

    @property
    def tokens_refused(self) -> int:
        return self._server.tokens_refused

    @property
    def resources_sent(self) -> int:
        return self._server.resources_sent

    async def add(self, spec: SidecarSpec) -> SidecarFiles:
        """Also adopts: the same spec after an agent's restart keeps the running Envoy's token and configuration.

        Without services it waits, with nothing to serve, for the allocation that `give` names.

        Raises HostError.
        """
        waiting = self._sidecars.get(spec.alloc)
        assert waiting is None or not waiting.spec.services, f"sidecar of {spec.alloc} is added twice"
        state = self._directories.load(spec.alloc)
        if state is None:
            state = SidecarState(token=secrets.token_urlsafe(32))
            self._directories.save(spec.alloc, state)
        directory = self._directories.create(spec.alloc, spec.uid, state.token)
        admin = Admin(spec.alloc, self._directories.admin_socket(spec.alloc))
        sidecar = _Sidecar(spec, state, admin) if waiting is None else waiting
        sidecar.serve(spec, state, admin)
        self._sidecars[spec.alloc] = sidecar
        self._by_token[_digest(state.token)] = sidecar
        self._update(sidecar)
        return SidecarFiles(
            directory=directory,
            directory_inside=DIRECTORY_INSIDE,
            binary=envoy_binary(),
            binary_inside=BINARY_INSIDE,
            argv=argv(),
        )

    def give(self, alloc: AllocId, to: AllocId) -> None:
        """The sidecar that waits as `alloc` is the allocation `to`'s: `add` says what it serves. Raises HostError."""
        self._directories.rename(alloc, to)
        self._sidecars[to] = self._sidecars.pop(alloc)
        self._sidecars[to].alloc = to

    def set_view(self, view: MeshView) -> None:
        """The node's mesh, whole. An intention that a service's entry lacks was taken away, which cuts connections; a
        service without an entry keeps its rules, an upstream that went its listener, without endpoints.

        Costs little for what did not change. Raises HostError (a state file), with the view in force all the same.
        """
        self._view = view
        self._update(*self._sidecars.values())

    def set_leaf(self, leaf: Leaf) -> None:
        """A service's certificate, with its key. Open connections stay, new ones use it."""
        assert leaf.key_pem, f"the leaf of {leaf.service} comes without its key"
        self._leaves[leaf.service] = leaf
        self._update(*self._sidecars.values())

    def set_gateway_certificate(self, alloc: AllocId, secret: SecretName, pem: str) -> None:
        """What its gateway shows to callers from outside: certificates and key. Nothing for one that has gone."""
        sidecar = self._sidecars.get(alloc)
        if sidecar is not None:
            sidecar.pems = {**sidecar.pems, secret: pem}
            self._update(sidecar)

    def set_external(self, alloc: AllocId, addresses: Addresses) -> None:
        """Where hosts outside of the mesh are. Nothing for one that has gone."""
        sidecar = self._sidecars.get(alloc)
        if sidecar is not None:
            sidecar.addresses = addresses
            self._update(sidecar)

    async def ready(self, alloc: AllocId, deadline_s: float) -> None:
        """Returns once Envoy serves; `deadline_s` is a duration. Raises PeerError that names what is missing."""
        sidecar = self._sidecars[alloc]
        try:
            async with asyncio.timeout(deadline_s):
                await sidecar.progress.until(sidecar.settled)
                while not await sidecar.admin.workers_started(len(sidecar.versions[Kind.LISTENER])):  # noqa: ASYNC110
                    await asyncio.sleep(_READY_POLL_S)  # Envoy tells nobody when its listeners open
        except TimeoutError as error:
            raise PeerError(f"sidecar of {alloc} is not ready after {deadline_s:g} s: {sidecar.why_not()}") from error

    async def acknowledged(self, deadline_s: float) -> tuple[AllocId, ...]:
        """Waits until every connected sidecar acknowledged the newest view; returns those that have not in time."""
        try:
            async with asyncio.timeout(deadline_s):
                # One after the other: what an answer costs does not grow with the number of sidecars.
                while behind := self._behind():
                    for sidecar in behind:
                        await sidecar.caught_up()
        except TimeoutError:
            return tuple(sidecar.alloc for sidecar in self._behind())
        return ()

    def rejected(self, alloc: AllocId) -> str:
        """What Envoy refused of its newest configuration, and why; "" where it took all."""
        return self._sidecars[alloc].rejected()

    async def drain(self, alloc: AllocId) -> None:
        """Inbound health fails, inbound listeners drain (GOAWAY, no new connections); outbound stays.

        Raises PeerError where its Envoy does not answer.
        """
        await self._sidecars[alloc].admin.drain()

    async def remove(self, alloc: AllocId) -> None:
        """Forgets the sidecar, if there is one, and deletes its directory. The sandbox is gone by then."""
        sidecar = self._sidecars.pop(alloc, None)
        self._directories.remove(alloc)
        if sidecar is not None:
            del self._by_token[_digest(sidecar.state.token)]
            sidecar.forget()

    async def stats(self, alloc: AllocId) -> SidecarStats:
        """Raises PeerError where its Envoy does not answer."""
        return sidecar_stats(alloc, await self._sidecars[alloc].admin.figures())

    def leaves(self) -> tuple[Leaf, ...]:
        """In use, without their keys."""
        return tuple(msgspec.structs.replace(leaf, key_pem="") for leaf in self._leaves.values())

    async def tap(
        self, alloc: AllocId, source: ServiceName, destination: ServiceName, *, headers: bool
    ) -> AsyncGenerator[TappedCall, None]:
        """The pair's requests as its sidecar passes them on, until closed; all `headers`, or those without secrets.

        One at a time of each sidecar. Raises RefusedError, PeerError.
        """
        sidecar = self._sidecars.get(alloc)
        if sidecar is None:
            raise RefusedError("not-found", f"allocation {alloc} has no sidecar here")
        known = self._view.services.get(destination)
        if known is None or not is_http(known.protocol):
            raise RefusedError(
                "no-http",
                f"service {destination} speaks tcp, which has no requests; `outrider alloc logs {alloc} sidecar` has "
                "its connections",
            )
        if sidecar.tapped is not None:
            raise RefusedError("in-use", f"somebody looks at the requests of {alloc} already")
        sidecar.tapped = (source, destination)
        try:
            self._update(sidecar)
            try:
                async with asyncio.timeout(_TAP_S):
                    await sidecar.progress.until(sidecar.settled)
            except TimeoutError as error:
                raise PeerError(f"sidecar of {alloc}: {sidecar.why_not()}") from error
            calls = tapped_calls(sidecar.admin, alloc, sidecar.tapped, headers=headers)
            async with contextlib.aclosing(calls):
                async for call in calls:
                    yield call
        finally:
            sidecar.tapped = None
            self._update(sidecar)

    def _update(self, *sidecars: "_Sidecar") -> None:
        changed = [sidecar for sidecar in sidecars if sidecar.update(self._view, self._leaves)]
        for sidecar in changed:
            self._directories.save(sidecar.alloc, sidecar.state)

    def _identify(self, token: str) -> "_Sidecar | None":
        return self._by_token.get(_digest(token))

    def _behind(self) -> tuple["_Sidecar", ...]:
        return tuple(sidecar for sidecar in self._sidecars.values() if sidecar.behind())

    def _observe_refusal(self, alloc: AllocId, source_spiffe: str, policy: str) -> None:
        sidecar = self._sidecars.get(alloc)
        if sidecar is None:
            return  # removed since; its Envoy's last words
        rule, intention_id = refused_by(policy)
        refusal = ObservedRefusal(
            at_s=self._now_s(),
            node=sidecar.spec.node,
            alloc=alloc,
            source_spiffe=source_spiffe,
            rule=rule,
            intention_id=intention_id,
        )
        if self.refusals.full():
            self.refusals.get_nowait()
            self.refusals_dropped += 1
        self.refusals.put_nowait(refusal)


class Progress:
    """Wakes all who wait for a condition that a sidecar's answer may have made true."""

    def __init__(self) -> None:
        self._beat = asyncio.Event()

    def beat(self) -> None:
        self._beat.set()
        self._beat = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._beat.wait()


class _Sidecar:
    """One sidecar: what it should have, and the stream of its Envoy. The ADS server's `Client`."""

    def __init__(self, spec: SidecarSpec, state: SidecarState, admin: Admin) -> None:
        self.progress = Progress()
        self.serve(spec, state, admin)
        self.rendered: Mapping[Kind, Mapping[str, discovery_pb2.Resource]] = {}
        self.versions: Versions = {}
        self.tapped: Pair | None = None
        self.pems: Mapping[SecretName, str] = {}
        self.addresses: Addresses = {}
        self.stream: Stream | None = None
        self._missing: tuple[str, ...] = ()
        self._rejection: tuple[Rejection, Mapping[str, str]] | None = None
        self._services: dict[ServiceName, MeshService] = {}
        self._reach: dict[ServiceName, tuple[ServiceName, ...]] = {}

    def serve(self, spec: SidecarSpec, state: SidecarState, admin: Admin) -> None:
        """What it should have from now on, beginning with nothing."""
        self.spec, self.state, self.admin = spec, state, admin
        self.alloc = spec.alloc
        self.complete = False
        self._seen: tuple[object, ...] = ()

    def update(self, view: MeshView, leaves: Mapping[ServiceName, Leaf]) -> bool:
        """Takes the newest view in. Returns whether `state` changed and must be saved."""
        view = self._own(view)
        own = tuple(service.service for service in self.spec.services)
        leaves = {name: leaves[name] for name in own if name in leaves}
        seen = (view, leaves, self.tapped, self.pems, self.addresses)
        if seen == self._seen:
            return False
        self._seen = seen
        history = self.state.history
        if view.roots.trust_domain:
            # A controller that just started may not know yet what runs here: no key is not the same as no intention.
            rules = {name: access_rules(name, found, view.roots) for name, found in view.intentions.items()}
            history = remember(history, rules)
        wanted = resources(
            self.spec, view, leaves, history, tapped=self.tapped, pems=self.pems, addresses=self.addresses
        )
        self._install(wanted)
        changed = history != self.state.history
        self.state = SidecarState(token=self.state.token, history=history)
        return changed

    def connected(self, stream: Stream) -> None:
        self.stream = stream
        stream.changed.set()

    def disconnected(self, stream: Stream) -> None:
        if self.stream is stream:
            self.stream = None
            self.progress.beat()

    def answered(self, rejection: Rejection | None) -> None:
        if rejection is not None:
            versions = {name: self.versions.get(rejection.kind, {}).get(name, "") for name in rejection.names}
            self._rejection = (rejection, versions)
        self.progress.beat()

    def forget(self) -> None:
        """Removed: nobody waits for it any more."""
        self.stream = None
        self.progress.beat()

    def behind(self) -> bool:
        """One that has nothing yet, or no Envoy, sends traffic nowhere: it is not waited for."""
        return self.complete and self.stream is not None and not self.settled()

    async def caught_up(self) -> None:
        await self.progress.until(lambda: not self.behind())

    def settled(self) -> bool:
        return self.complete and self.stream is not None and self.stream.subscription.settled(self.versions)

    def rejected(self) -> str:
        if self._rejection is None:
            return ""
        rejection, versions = self._rejection
        now = self.versions.get(rejection.kind, {})
        if all(now.get(name, "") != version for name, version in versions.items()):
            return ""  # all of it has been replaced since
        return f"{', '.join(rejection.names)}: {rejection.error}"

    def why_not(self) -> str:
        if self._missing:
            return f"the controller has not sent {', '.join(self._missing)}"
        if rejected := self.rejected():
            return f"Envoy refused {rejected}"
        if self.stream is None:
            return "its Envoy has not connected; see `outrider alloc logs ALLOC sidecar`"
        return "its Envoy has not opened all listeners; see `outrider alloc logs ALLOC sidecar`"

    def _own(self, view: MeshView) -> MeshView:
        """The part of the node's view that this sidecar uses. A service that left the view has no endpoints: its
        listener stays, for what was sent once never goes."""
        for service in self.spec.services:
            # What was once in reach keeps its listener; its names went, and its sidecars refuse.
            reached = dict.fromkeys((*self._reach.get(service.service, ()), *view.reach.get(service.service, ())))
            if reached:
                self._reach[service.service] = tuple(reached)
            for called in (*(upstream.service for upstream in service.upstreams), *reached):
                self._take(view, called)
                for name in used_services(self._services[called]) if called in self._services else ():
                    self._take(view, ServiceName(name))
        own = tuple(service.service for service in self.spec.services)
        intentions = {name: view.intentions[name] for name in own if name in view.intentions}
        rates = {name: view.rates[name] for name in own if name in view.rates}
        return MeshView(
            services=dict(self._services),
            intentions=intentions,
            rates=rates,
            reach=dict(self._reach),
            roots=view.roots,
        )

    def _take(self, view: MeshView, name: ServiceName) -> None:
        if name in view.services:
            self._services[name] = view.services[name]
        elif name in self._services and self._services[name].endpoints:
            last = self._services[name]
            self._services[name] = MeshService(name=name, virtual_address=last.virtual_address, protocol=last.protocol)

    def _install(self, wanted: ResourceSet) -> None:
        self._missing = wanted.missing
        # Once complete, always complete: what is missing later (a root, a leaf) is a change, and the last good stays.
        if wanted.missing and self.complete:
            _log.warning("view incomplete, the last one stays", alloc=self.alloc, missing=wanted.missing)
            return
        self.rendered = {
            kind: {name: render(resource) for name, resource in by_name.items()}
            for kind, by_name in wanted.resources.items()
        }
        self.versions = {
            kind: {name: resource.version for name, resource in by_name.items()}
            for kind, by_name in self.rendered.items()
        }
        self.complete = not wanted.missing
        if self.stream is not None:
            self.stream.changed.set()
        self.progress.beat()


def _digest(token: str) -> bytes:
    # Looked up by hash: how long a wrong token takes to be refused says nothing about the right ones.
    return hashlib.sha256(token.encode()).digest()
