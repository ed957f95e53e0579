"""StoreService: what the fleet keeps for its jobs apart from them.
Parses and checks what comes in; seals what must not be written in the clear; hands changes to the engine. Decides
nothing.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import msgspec

from controller.audit import AuditLog
from controller.callers import Callers
from controller.core import sealed, volumes
from controller.core.events import (
    SecretDeleteRequested,
    SecretPutRequested,
    SecretsResealed,
    VolumeDeleteRequested,
    VolumeMade,
    VolumeSnapshotMade,
)
from controller.core.stored import VolumeEntry
from controller.parts import Parts
from controller.people import PeopleEdge, done
from controller.rpc import Context, unary
from outrider import codec
from outrider.errors import InputError, RefusedError
from outrider.ids import DEFAULT_NAMESPACE, Namespace, SecretName, VolumeName, is_name
from outrider.log import Log
from outrider.model.access import EVERYWHERE, Capability
from outrider.model.belongings import SecretInfo, Volume
from outrider.model.job import MIB
from outrider.v1 import belongings_pb2, fleet_pb2, stores_pb2, stores_pb2_grpc

SECRET_BYTES_MAX = 256 * 1024
VOLUME_BYTES_MIN = 8 * MIB  # what a file system of its own takes some of
N = TypeVar("N")


class StoreService(PeopleEdge, stores_pb2_grpc.StoreServiceServicer):
    def __init__(self, parts: Parts, *, callers: Callers, audit: AuditLog) -> None:
        super().__init__(parts, callers=callers, audit=audit, log=Log("stores"))
        self._keyring, self._agree = parts.keyring, parts.agree
        self._sessions = parts.sessions
        self._tunnels = parts.tunnels

    @unary
    async def PutSecret(self, request: stores_pb2.PutSecretRequest, context: Context) -> stores_pb2.PutSecretResponse:
        namespace, name = _named(request.namespace, request.name, SecretName)
        if not 1 <= len(request.value) <= SECRET_BYTES_MAX:
            raise InputError(f"secret {name}: {len(request.value)} bytes; it has 1 to {SECRET_BYTES_MAX}")
        entry = self._engine.state.stored.secrets.get((namespace, name))
        if entry is not None and entry.variable is request.variable:
            newest = entry.versions[entry.latest]
            if self._keyring.open(newest) == request.value:
                return stores_pb2.PutSecretResponse(version=newest.version, changed=False)
        content = self._keyring.seal(namespace, name, request.value)
        reply = done(
            await self._engine.request(
                lambda id_: SecretPutRequested(
                    request=id_, namespace=namespace, name=name, sealed=content, variable=request.variable
                )
            )
        )
        return stores_pb2.PutSecretResponse(version=reply.version, changed=True, notes=reply.warnings)

    @unary
    async def ListSecrets(
        self, request: stores_pb2.ListSecretsRequest, context: Context
    ) -> stores_pb2.ListSecretsResponse:
        infos = sealed.infos(self._engine.state, request.namespace)
        found = (self._shown(info) for info in infos if self.may(Capability.SECRETS, info.namespace))
        return stores_pb2.ListSecretsResponse(
            secrets=[codec.to_wire(info, belongings_pb2.SecretInfo) for info in found]
        )

    @unary
    async def DeleteSecret(
        self, request: stores_pb2.DeleteSecretRequest, context: Context
    ) -> stores_pb2.DeleteSecretResponse:
        namespace, name = _named(request.namespace, request.name, SecretName)
        done(await self._engine.request(lambda id_: SecretDeleteRequested(request=id_, namespace=namespace, name=name)))
        return stores_pb2.DeleteSecretResponse()

    @unary
    async def RekeySecrets(
        self, request: stores_pb2.RekeySecretsRequest, context: Context
    ) -> stores_pb2.RekeySecretsResponse:
        """Old keys go last: whatever ends this half-way, everything still opens."""
        self._keyring.turn()
        await asyncio.to_thread(self._agree, self._keyring)
        versions = 0
        while anew := self._sealed_anew():  # again for what was sealed before and written meanwhile
            versions += await self._reseal(anew)
        self._keyring.drop_others()
        self.log.info("secrets sealed anew", versions=versions, key=self._keyring.current)
        return stores_pb2.RekeySecretsResponse(sealed=versions, key=self._keyring.current)

    @unary
    async def CreateVolume(
        self, request: stores_pb2.CreateVolumeRequest, context: Context
    ) -> belongings_pb2.VolumeInfo:
        volume = self._wanted(codec.from_wire(request.volume, Volume))
        self.require(Capability.SUBMIT, volume.namespace, f"volume {volume.name}")
        if volume.path:  # which lets a job see what is on a node already
            self.require(Capability.ADMIN, EVERYWHERE, f"volume {volume.name}")
        await self._on_node(volume, fleet_pb2.VOLUME_OPERATION_CREATE)
        done(await self._engine.request(lambda id_: VolumeMade(request=id_, volume=volume)))
        return self._told(volume.namespace, volume.name)

    @unary
    async def ListVolumes(
        self, request: stores_pb2.ListVolumesRequest, context: Context
    ) -> stores_pb2.ListVolumesResponse:
        state = self._engine.state
        found = (
            volumes.info(state, entry)
            for (namespace, _), entry in sorted(state.stored.volumes.items())
            if request.namespace in ("", namespace) and self.sees(namespace)
        )
        return stores_pb2.ListVolumesResponse(
            volumes=[codec.to_wire(each, belongings_pb2.VolumeInfo) for each in found]
        )

    @unary
    async def DeleteVolume(
        self, request: stores_pb2.DeleteVolumeRequest, context: Context
    ) -> stores_pb2.DeleteVolumeResponse:
        """The fleet forgets it first: nothing can be placed with what is being removed."""
        volume = self._known(request.namespace, request.name).volume
        if request.snapshot:
            await self._remove_snapshot(volume, request.snapshot)
            return stores_pb2.DeleteVolumeResponse()
        self._sessions.check(volume.node)
        done(
            await self._engine.request(
                lambda id_: VolumeDeleteRequested(request=id_, namespace=volume.namespace, name=volume.name)
            )
        )
        await self._on_node(volume, fleet_pb2.VOLUME_OPERATION_DELETE)
        return stores_pb2.DeleteVolumeResponse()

    @unary
    async def SnapshotVolume(
        self, request: stores_pb2.SnapshotVolumeRequest, context: Context
    ) -> belongings_pb2.VolumeInfo:
        entry = self._known(request.namespace, request.name)
        volume, snapshot = entry.volume, request.snapshot
        if not is_name(snapshot):
            raise InputError(f"snapshot: {snapshot[:80]!r} is no name; lower-case letters, digits and dashes")
        if snapshot in entry.snapshots:
            raise RefusedError("conflict", f"volume {volume.name} has a snapshot {snapshot} already")
        taken = await self._on_node(volume, fleet_pb2.VOLUME_OPERATION_SNAPSHOT, snapshot)
        await self._note_snapshot(volume, snapshot, taken=taken)
        return self._told(volume.namespace, volume.name)

    @unary
    async def RestoreVolume(
        self, request: stores_pb2.RestoreVolumeRequest, context: Context
    ) -> belongings_pb2.VolumeInfo:
        entry = self._known(request.namespace, request.name)
        volume, snapshot = entry.volume, request.snapshot
        self._snapshot_known(volume, snapshot)
        if entry.claims:
            whose = self._engine.state.alloc_id(next(iter(entry.claims)))
            raise RefusedError("in-use", f"volume {volume.name} is claimed: allocation {whose} has it; stop it first")
        await self._on_node(volume, fleet_pb2.VOLUME_OPERATION_RESTORE, snapshot)
        return self._told(volume.namespace, volume.name)

    async def _remove_snapshot(self, volume: Volume, snapshot: str) -> None:
        self._snapshot_known(volume, snapshot)
        await self._on_node(volume, fleet_pb2.VOLUME_OPERATION_DELETE_SNAPSHOT, snapshot)
        await self._note_snapshot(volume, snapshot, removed=True)

    async def _note_snapshot(self, volume: Volume, snapshot: str, *, taken: int = 0, removed: bool = False) -> None:
        done(
            await self._engine.request(
                lambda id_: VolumeSnapshotMade(
                    request=id_,
                    namespace=volume.namespace,
                    name=volume.name,
                    snapshot=snapshot,
                    bytes=taken,
                    removed=removed,
                )
            )
        )

    def _snapshot_known(self, volume: Volume, snapshot: str) -> None:
        known = self._known(volume.namespace, volume.name).snapshots
        if snapshot not in known:
            shown = ", ".join(known) or "none"
            raise RefusedError(
                "not-found", f"volume {volume.name} has no snapshot {snapshot[:80]!r}; there are {shown}"
            )

    def _wanted(self, volume: Volume) -> Volume:
        """As it is asked of its node. Raises InputError and RefusedError."""
        namespace, name = _named(volume.namespace, volume.name, VolumeName)
        state = self._engine.state
        if (namespace, name) in state.stored.volumes:
            raise RefusedError("conflict", f"volume {name} is there already, in namespace {namespace}")
        if volume.path and (volume.size_bytes or not volume.path.startswith("/") or ".." in volume.path.split("/")):
            raise InputError(f"path: {volume.path[:80]!r} must be a whole path on the node, and has no size of its own")
        if not volume.path and volume.size_bytes < VOLUME_BYTES_MIN:
            raise InputError(f"size: {volume.size_bytes} bytes; a volume has at least {VOLUME_BYTES_MIN // MIB} MiB")
        if volume.path and not volume.node:
            raise InputError("node: a path is one of a node: say which")
        node = volume.node or volumes.roomiest(state, volume.size_bytes)
        if not node:
            raise RefusedError("no-room", f"no ready node has {volume.size_bytes} bytes of disk to give away")
        if node not in state.nodes.reference:
            raise RefusedError("not-found", f"no node {node[:80]!r}; `outrider node ls` lists them")
        free = int(state.nodes.disk_free[state.nodes.reference[node]])
        if volume.size_bytes > free:
            raise RefusedError("no-room", f"node {node} has {max(0, free)} bytes of disk to give away; take less")
        return msgspec.structs.replace(volume, namespace=namespace, name=name, node=node)

    def _known(self, namespace: str, name: str) -> VolumeEntry:
        key = _named(namespace, name, VolumeName)
        entry = self._engine.state.stored.volumes.get(key)
        if entry is None:
            message = f"no volume {key[1]!r} in namespace {key[0]}; `outrider volume ls` lists them"
            raise RefusedError("not-found", message)
        return entry

    def _told(self, namespace: Namespace, name: VolumeName) -> belongings_pb2.VolumeInfo:
        entry = self._engine.state.stored.volumes[namespace, name]
        return codec.to_wire(volumes.info(self._engine.state, entry), belongings_pb2.VolumeInfo)

    async def _on_node(self, volume: Volume, operation: fleet_pb2.VolumeOperation.ValueType, snapshot: str = "") -> int:
        """The node does it; how many bytes of its disk what it made takes. Raises RefusedError with what it says."""
        request = fleet_pb2.VolumeRequest(
            operation=operation, volume=codec.to_wire(volume, belongings_pb2.Volume), snapshot=snapshot
        )
        with self._tunnels.open(volume.node) as tunnel:
            self._sessions.open_tunnel(volume.node, fleet_pb2.OpenTunnel(tunnel=tunnel.id, volume=request))
            output = b""
            async for frame in tunnel.frames():
                output += frame.stdout
                if frame.HasField("end") and frame.end.error:
                    raise RefusedError("node-refused", f"node {volume.node}: {frame.end.error}")
        return int(output or b"0")

    async def _reseal(self, anew: tuple[tuple[Namespace, SecretName, int, bytes], ...]) -> int:
        return done(await self._engine.request(lambda id_: SecretsResealed(request=id_, sealed=anew))).version

    def _sealed_anew(self) -> tuple[tuple[Namespace, SecretName, int, bytes], ...]:
        """All that is still under an older key."""
        return tuple(
            (put.namespace, put.name, put.version, self._keyring.seal(put.namespace, put.name, self._keyring.open(put)))
            for entry in self._engine.state.stored.secrets.values()
            for put in entry.versions.values()
            if not self._keyring.is_current(put)
        )

    def _shown(self, info: SecretInfo) -> SecretInfo:
        if not info.variable:
            return info
        entry = self._engine.state.stored.secrets[info.namespace, info.name]
        value = self._keyring.open(entry.versions[info.version]).decode(errors="replace")
        return msgspec.structs.replace(info, value=value)


def _named(namespace: str, name: str, kind: Callable[[str], N]) -> tuple[Namespace, N]:
    for what, text in (("namespace", namespace or DEFAULT_NAMESPACE), ("name", name)):
        if not is_name(text):
            raise InputError(f"{what}: {text[:80]!r} is no name; lower-case letters, digits and dashes, at most 63")
    return Namespace(namespace or DEFAULT_NAMESPACE), kind(name)
