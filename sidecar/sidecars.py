"""The node's sidecars: each one's files, configuration, readiness, drain and figures.

Owns the ADS server and who has been told what. Starts no Envoy: the agent runs them as sandboxes. Used as
`async with Sidecars(...) as sidecars`. Tasks: the gRPC server's own. Queues: `refusals`, which drops its oldest.
"""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from typing import Self

import msgspec

from outrider.errors import PeerError, RefusedError
from outrider.ids import AllocId, SecretName, ServiceName
from outrider.model.insight import TappedCall
from outrider.model.job import Value
from outrider.model.mesh import Leaf, MeshView, ObservedRefusal
from sidecar.admin import Admin
from sidecar.ads import AdsServer
from sidecar.bootstrap import BINARY_INSIDE, DIRECTORY_INSIDE, argv, envoy_binary
from sidecar.core.access import refused_by
from sidecar.core.external import Addresses
from sidecar.core.intent import SidecarSpec, SidecarStats
from sidecar.core.resources import Kind, is_http
from sidecar.directory import SHARED, Directories, SidecarState
from sidecar.envoy import Envoy
from sidecar.sidecar import Sidecar
from sidecar.stats import sidecar_stats
from sidecar.tap import tapped_calls

_REFUSALS_MAX = 256
_READY_POLL_S = 0.005
_TAP_S = 5.0  # for a sidecar to begin to tell


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
        self._sidecars: dict[AllocId, Sidecar] = {}
        self._envoys: dict[AllocId, Envoy] = {}  # by allocation; those that share one have the same
        self._shared: Envoy | None = None
        self._awaited: frozenset[AllocId] = frozenset()
        self._by_token: dict[bytes, Envoy] = {}

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
            state = SidecarState(token="" if spec.shared else secrets.token_urlsafe(32))
            self._directories.save(spec.alloc, state)
        envoy = self._shared_envoy(spec.uid) if spec.shared else self._envoy(spec.alloc, spec.uid, state.token)
        sidecar = Sidecar(spec, state)
        self._sidecars[spec.alloc] = envoy.parts[spec.alloc] = sidecar
        self._envoys[spec.alloc] = envoy
        self._update(sidecar)
        return SidecarFiles(
            directory=self._directories.of(envoy.name),
            directory_inside=DIRECTORY_INSIDE,
            binary=envoy_binary(),
            binary_inside=BINARY_INSIDE,
            argv=argv(),
        )

    def give(self, alloc: AllocId, to: AllocId) -> None:
        """The sidecar that waits as `alloc` is the allocation `to`'s: `add` says what it serves. Raises HostError."""
        self._directories.rename(alloc, to)
        envoy = self._envoys[to] = self._envoys.pop(alloc)
        self._sidecars[to] = self._sidecars.pop(alloc)
        self._sidecars[to].alloc = envoy.name = to
        envoy.parts = {to: self._sidecars[to]}

    def await_shares(self, allocs: Iterable[AllocId]) -> None:
        """Before any of them is added: the shared Envoy that runs may serve these. It keeps what it has of each until
        that is known again, or removed."""
        self._awaited = frozenset(allocs)

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
        sidecar, envoy = self._sidecars[alloc], self._envoys[alloc]
        try:
            async with asyncio.timeout(deadline_s):
                await envoy.progress.until(lambda: envoy.serves(sidecar))
                while not await envoy.admin.accepts(sidecar.versions[Kind.LISTENER].keys()):  # noqa: ASYNC110
                    await asyncio.sleep(_READY_POLL_S)  # Envoy tells nobody when its listeners open
        except TimeoutError as error:
            why = envoy.why_not(sidecar)
            raise PeerError(f"sidecar of {alloc} is not ready after {deadline_s:g} s: {why}") from error

    async def acknowledged(self, deadline_s: float) -> tuple[AllocId, ...]:
        """Waits until every connected sidecar acknowledged the newest view; returns those that have not in time."""
        try:
            async with asyncio.timeout(deadline_s):
                # One after the other: what an answer costs does not grow with the number of sidecars.
                while behind := self._behind():
                    for envoy in behind:
                        await envoy.caught_up()
        except TimeoutError:
            return tuple(envoy.name for envoy in self._behind())
        return ()

    def rejected(self, alloc: AllocId) -> str:
        """What Envoy refused of its newest configuration, and why; "" where it took all."""
        return self._envoys[alloc].rejected(self._sidecars[alloc])

    async def drain(self, alloc: AllocId) -> None:
        """Inbound health fails, inbound listeners drain (GOAWAY, no new connections); outbound stays.

        Raises PeerError where its Envoy does not answer.
        """
        await self._envoys[alloc].admin.drain()

    async def remove(self, alloc: AllocId) -> None:
        """Forgets the sidecar, if it is known, and deletes its directory. Its own sandbox is gone by then; of a shared
        Envoy goes what is the allocation's, and nothing else."""
        self._sidecars.pop(alloc, None)
        self._awaited -= {alloc}
        envoy = self._envoys.pop(alloc, None)
        if self._shared is not None:
            self._shared.awaited.discard(alloc)
        if envoy is not None and envoy.shared:
            del envoy.parts[alloc]
            envoy.refresh()
        elif envoy is not None:
            self._forget(envoy)
        elif self._shared is not None:
            self._shared.refresh()
        self._directories.remove(alloc)

    def remove_shared(self) -> None:
        """The shared Envoy's sandbox is gone. Nothing is done where it has been wanted again meanwhile."""
        if self._shared is not None and not self._shared.parts:
            self._forget(self._shared)
            self._shared = None
        if self._shared is None:
            self._directories.remove(SHARED)

    async def stats(self, alloc: AllocId) -> SidecarStats:
        """Raises PeerError where its Envoy does not answer."""
        text = await self._envoys[alloc].admin.figures(self._sidecars[alloc].spec.scope)
        return sidecar_stats(alloc, text)

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
        envoy = self._envoys[alloc]
        if envoy.tapped is not None:
            whose = "an allocation of this node's shared sidecar" if envoy.shared else alloc
            raise RefusedError("in-use", f"somebody looks at the requests of {whose} already")
        sidecar.tapped = (source, destination)
        try:
            self._update(sidecar)
            try:
                async with asyncio.timeout(_TAP_S):
                    await envoy.progress.until(lambda: envoy.serves(sidecar))
            except TimeoutError as error:
                raise PeerError(f"sidecar of {alloc}: {envoy.why_not(sidecar)}") from error
            calls = tapped_calls(envoy.admin, alloc, sidecar.tapped, scope=sidecar.spec.scope, headers=headers)
            async with contextlib.aclosing(calls):
                async for call in calls:
                    yield call
        finally:
            sidecar.tapped = None
            self._update(sidecar)

    def _shared_envoy(self, uid: int) -> Envoy:
        if self._shared is None:
            state = self._directories.load(SHARED)
            if state is None:
                state = SidecarState(token=secrets.token_urlsafe(32))
                self._directories.save(SHARED, state)
            self._shared = self._envoy(SHARED, uid, state.token, shared=True)
            self._shared.awaited |= self._awaited
        return self._shared

    def _envoy(self, name: AllocId, uid: int, token: str, *, shared: bool = False) -> Envoy:
        self._directories.create(name, uid, token)
        admin = Admin(name, self._directories.admin_socket(name))
        envoy = self._envoys.get(name)
        if envoy is None:
            envoy = self._by_token[_digest(token)] = Envoy(name, token, admin, shared=shared)
        envoy.admin = admin  # one that waited was moved
        return envoy

    def _forget(self, envoy: Envoy) -> None:
        del self._by_token[_digest(envoy.token)]
        envoy.forget()

    def _update(self, *sidecars: Sidecar) -> None:
        before = [(sidecar, sidecar.state) for sidecar in sidecars]
        changed = [sidecar for sidecar in sidecars if sidecar.update(self._view, self._leaves)]
        for envoy in dict.fromkeys(self._envoys[each.alloc] for each in changed if each.alloc in self._envoys):
            envoy.refresh()
        for sidecar, state in before:
            if sidecar.state is not state and sidecar.alloc in self._sidecars:
                self._directories.save(sidecar.alloc, sidecar.state)

    def _identify(self, token: str) -> Envoy | None:
        return self._by_token.get(_digest(token))

    def _behind(self) -> tuple[Envoy, ...]:
        return tuple(envoy for envoy in self._by_token.values() if envoy.behind())

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


def _digest(token: str) -> bytes:
    # Looked up by hash: how long a wrong token takes to be refused says nothing about the right ones.
    return hashlib.sha256(token.encode()).digest()
