"""StoreService: what the fleet keeps for its jobs apart from them.
Parses and checks what comes in; seals what must not be written in the clear; hands changes to the engine. Decides
nothing.
"""

import msgspec

from controller.audit import AuditLog
from controller.callers import Callers
from controller.core import sealed
from controller.core.events import SecretDeleteRequested, SecretPutRequested, SecretsResealed
from controller.parts import Parts
from controller.people import PeopleEdge, done
from controller.rpc import Context, unary
from outrider import codec
from outrider.errors import InputError
from outrider.ids import DEFAULT_NAMESPACE, Namespace, SecretName, is_name
from outrider.log import Log
from outrider.model.access import Capability
from outrider.model.belongings import SecretInfo
from outrider.v1 import belongings_pb2, stores_pb2, stores_pb2_grpc

SECRET_BYTES_MAX = 256 * 1024


class StoreService(PeopleEdge, stores_pb2_grpc.StoreServiceServicer):
    def __init__(self, parts: Parts, *, callers: Callers, audit: AuditLog) -> None:
        super().__init__(parts, callers=callers, audit=audit, log=Log("stores"))
        self._keyring = parts.keyring

    @unary
    async def PutSecret(self, request: stores_pb2.PutSecretRequest, context: Context) -> stores_pb2.PutSecretResponse:
        namespace, name = _named(request.namespace, request.name)
        if not 1 <= len(request.value) <= SECRET_BYTES_MAX:
            raise InputError(f"secret {name}: {len(request.value)} bytes; it has 1 to {SECRET_BYTES_MAX}")
        entry = self._engine.state.secrets.get((namespace, name))
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
        namespace, name = _named(request.namespace, request.name)
        done(await self._engine.request(lambda id_: SecretDeleteRequested(request=id_, namespace=namespace, name=name)))
        return stores_pb2.DeleteSecretResponse()

    @unary
    async def RekeySecrets(
        self, request: stores_pb2.RekeySecretsRequest, context: Context
    ) -> stores_pb2.RekeySecretsResponse:
        """Old keys go last: whatever ends this half-way, everything still opens."""
        self._keyring.turn()
        versions = 0
        while anew := self._sealed_anew():  # again for what was sealed before and written meanwhile
            versions += await self._reseal(anew)
        self._keyring.drop_others()
        self.log.info("secrets sealed anew", versions=versions, key=self._keyring.current)
        return stores_pb2.RekeySecretsResponse(sealed=versions, key=self._keyring.current)

    async def _reseal(self, anew: tuple[tuple[Namespace, SecretName, int, bytes], ...]) -> int:
        return done(await self._engine.request(lambda id_: SecretsResealed(request=id_, sealed=anew))).version

    def _sealed_anew(self) -> tuple[tuple[Namespace, SecretName, int, bytes], ...]:
        """All that is still under an older key."""
        return tuple(
            (put.namespace, put.name, put.version, self._keyring.seal(put.namespace, put.name, self._keyring.open(put)))
            for entry in self._engine.state.secrets.values()
            for put in entry.versions.values()
            if not self._keyring.is_current(put)
        )

    def _shown(self, info: SecretInfo) -> SecretInfo:
        if not info.variable:
            return info
        entry = self._engine.state.secrets[info.namespace, info.name]
        value = self._keyring.open(entry.versions[info.version]).decode(errors="replace")
        return msgspec.structs.replace(info, value=value)


def _named(namespace: str, name: str) -> tuple[Namespace, SecretName]:
    for what, text in (("namespace", namespace or DEFAULT_NAMESPACE), ("name", name)):
        if not is_name(text):
            raise InputError(f"{what}: {text[:80]!r} is no name; lower-case letters, digits and dashes, at most 63")
    return Namespace(namespace or DEFAULT_NAMESPACE), SecretName(name)
