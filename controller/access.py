"""AccessService: who may do what, who did what. Parses, checks shapes, makes secrets and tells them once.

Decides nothing: `permissions` says who may call, the core what may change. Secrets are hashed here and kept nowhere.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncGenerator, Iterator

import msgspec

from controller.audit import AuditLog
from controller.ca import FleetCa
from controller.callers import Callers
from controller.core import quota
from controller.core.access_records import (
    AccessRecord,
    NamespaceDeleted,
    NamespaceSet,
    NodeRevoked,
    RoleDeleted,
    RoleSet,
    TokenCreated,
    TokenRevoked,
    UserDeleted,
    UserSet,
)
from controller.core.events import AccessChangeRequested
from controller.parts import Parts
from controller.people import PeopleEdge, done
from controller.rotation import Rotation
from controller.rpc import Context, stream, unary
from outrider import codec
from outrider.clock import wall_s
from outrider.errors import InputError, RefusedError
from outrider.ids import Namespace, NodeId, is_name
from outrider.log import Log
from outrider.model.access import (
    EVERYWHERE,
    Capability,
    NamespaceSpec,
    NamespaceState,
    Quota,
    Role,
    Token,
    TokenKind,
    User,
)
from outrider.model.job import Value
from outrider.tokens import join_token, user_token
from outrider.v1 import access_pb2, access_pb2_grpc

TOKEN_VALID_S_MAX = 366 * 24 * 3600.0
USES_MAX = 100_000
NODES_MAX = 1_000
GRANTS_MAX = 100
WRITE_TIMEOUT_S = 60.0
_ID_CHARS = 12


class AccessService(PeopleEdge, access_pb2_grpc.AccessServiceServicer):
    def __init__(self, parts: Parts, *, callers: Callers, audit: AuditLog, ca: FleetCa, rotation: Rotation) -> None:
        super().__init__(parts, callers=callers, audit=audit, log=Log("access"))
        self._ca = ca
        self._rotation = rotation

    @unary
    async def WhoAmI(self, request: access_pb2.WhoAmIRequest, context: Context) -> access_pb2.WhoAmIResponse:
        caller = self.call.caller
        roles = [self.access.roles[name] for name in caller.roles if name in self.access.roles]
        return access_pb2.WhoAmIResponse(
            caller=caller.name,
            by=caller.by,
            roles=caller.roles,
            grants=[codec.to_wire(grant, access_pb2.Grant) for role in roles for grant in role.grants],
            expires_at_s=caller.expires_at_s,
        )

    @unary
    async def Can(self, request: access_pb2.CanRequest, context: Context) -> access_pb2.CanResponse:
        names = {number: name for name, number in access_pb2.Capability.items()}
        name = names.get(request.capability, "").removeprefix("CAPABILITY_").lower()
        if name not in set(Capability):
            raise InputError(f"capability: one of {', '.join(Capability)}")
        role = self.access.allowed(self.call.caller.roles, Capability(name), request.namespace or EVERYWHERE)
        return access_pb2.CanResponse(allowed=bool(role), role=role)

    @unary
    async def ListNamespaces(
        self, request: access_pb2.ListNamespacesRequest, context: Context
    ) -> access_pb2.ListNamespacesResponse:
        seen = [spec for name, spec in sorted(self.access.namespaces.items()) if self.sees(name)]
        states = [NamespaceState(spec=spec, used=quota.used(self.state, spec.name)) for spec in seen]
        return access_pb2.ListNamespacesResponse(
            namespaces=[codec.to_wire(state, access_pb2.NamespaceState) for state in states]
        )

    @unary
    async def SetNamespace(
        self, request: access_pb2.SetNamespaceRequest, context: Context
    ) -> access_pb2.ChangeResponse:
        wanted = codec.from_wire(request.namespace, NamespaceSpec)
        _check_name("namespace", wanted.name)
        _check_length("description", wanted.description)
        for field in Quota.__struct_fields__:
            if getattr(wanted.quota, field) < 0:
                raise InputError(f"quota.{field}: cannot be negative; 0 is no limit")
        self.call.subject = wanted.name
        return await self._change(NamespaceSet(namespace=wanted), self.access.namespaces.get(wanted.name), wanted)

    @unary
    async def DeleteNamespace(
        self, request: access_pb2.DeleteNamespaceRequest, context: Context
    ) -> access_pb2.ChangeResponse:
        return await self._change(NamespaceDeleted(name=Namespace(request.name)))

    @unary
    async def ListRoles(self, request: access_pb2.ListRolesRequest, context: Context) -> access_pb2.ListRolesResponse:
        roles = [codec.to_wire(role, access_pb2.Role) for _, role in sorted(self.access.roles.items())]
        return access_pb2.ListRolesResponse(roles=roles)

    @unary
    async def SetRole(self, request: access_pb2.SetRoleRequest, context: Context) -> access_pb2.ChangeResponse:
        wanted = codec.from_wire(request.role, Role)
        _check_name("role", wanted.name)
        if len(wanted.grants) > GRANTS_MAX:
            raise InputError(f"role {wanted.name}: more than {GRANTS_MAX} grants")
        for at, grant in enumerate(wanted.grants):
            if not grant.namespaces or not grant.capabilities:
                raise InputError(f"grants[{at}]: name a namespace and a capability at least")
        self.call.subject = wanted.name
        return await self._change(RoleSet(role=wanted), self.access.roles.get(wanted.name), wanted)

    @unary
    async def DeleteRole(self, request: access_pb2.DeleteRoleRequest, context: Context) -> access_pb2.ChangeResponse:
        return await self._change(RoleDeleted(name=request.name))

    @unary
    async def ListUsers(self, request: access_pb2.ListUsersRequest, context: Context) -> access_pb2.ListUsersResponse:
        users = [codec.to_wire(user, access_pb2.User) for _, user in sorted(self.access.users.items())]
        return access_pb2.ListUsersResponse(users=users)

    @unary
    async def SetUser(self, request: access_pb2.SetUserRequest, context: Context) -> access_pb2.ChangeResponse:
        wanted = codec.from_wire(request.user, User)
        _check_name("user", wanted.name)
        if wanted.name == "root":
            raise InputError("user: root is whoever opens the controller's own socket; take another name")
        self.call.subject = wanted.name
        return await self._change(UserSet(user=wanted), self.access.users.get(wanted.name), wanted)

    @unary
    async def DeleteUser(self, request: access_pb2.DeleteUserRequest, context: Context) -> access_pb2.ChangeResponse:
        return await self._change(UserDeleted(name=request.name))

    @unary
    async def IssueCertificate(
        self, request: access_pb2.IssueCertificateRequest, context: Context
    ) -> access_pb2.IssueCertificateResponse:
        if request.user not in self.access.users:
            raise RefusedError("not-found", f"no user {request.user[:80]!r}; `outrider user ls` lists them")
        issued = await asyncio.to_thread(self._ca.issue_user, request.csr_pem.encode(), request.user)
        self.call.changes = (f"serial {issued.serial}",)
        return access_pb2.IssueCertificateResponse(
            certificate_pem=issued.pem.decode(), ca_pem=self._ca.roots_pem.decode(), expires_at_s=issued.expires_at_s
        )

    @unary
    async def CreateToken(
        self, request: access_pb2.CreateTokenRequest, context: Context
    ) -> access_pb2.CreateTokenResponse:
        secret = secrets.token_urlsafe(32)
        token = self._token(request)
        make = join_token if token.kind is TokenKind.JOIN else user_token
        plain = make(ca_sha256=self._ca.sha256, secret=secret)
        sha256 = hashlib.sha256(plain.encode()).hexdigest()
        token = _with_id(token, sha256)
        self.call.subject = token.id
        shown = [f"{token.kind} token", *([f"user {token.user}"] if token.user else [])]
        shown += [f"nodes {', '.join(token.nodes)}"] if token.nodes else []
        await self._change(TokenCreated(token=token, sha256=sha256))
        self.call.changes = tuple(shown)
        return access_pb2.CreateTokenResponse(token=codec.to_wire(token, access_pb2.Token), secret=plain)

    @unary
    async def ListTokens(
        self, request: access_pb2.ListTokensRequest, context: Context
    ) -> access_pb2.ListTokensResponse:
        valid = [each.token for each in self.access.tokens.values() if each.token.expires_at_s > wall_s()]
        valid.sort(key=lambda token: token.created_at_s)
        return access_pb2.ListTokensResponse(tokens=[codec.to_wire(token, access_pb2.Token) for token in valid])

    @unary
    async def RevokeToken(self, request: access_pb2.RevokeTokenRequest, context: Context) -> access_pb2.ChangeResponse:
        return await self._change(TokenRevoked(id=request.id))

    @unary
    async def RevokeNode(self, request: access_pb2.RevokeNodeRequest, context: Context) -> access_pb2.ChangeResponse:
        return await self._change(NodeRevoked(node=NodeId(request.node), key_sha256=""))

    @unary
    async def GetCa(self, request: access_pb2.GetCaRequest, context: Context) -> access_pb2.CaState:
        return codec.to_wire(self._rotation.told(), access_pb2.CaState)

    @unary
    async def RotateCa(self, request: access_pb2.RotateCaRequest, context: Context) -> access_pb2.CaState:
        now = await self._rotation.rotate()
        self.call.changes = (f"signs: {now.sha256}", f"trusted too: {now.previous_sha256}")
        return codec.to_wire(now, access_pb2.CaState)

    @unary
    async def RetireCa(self, request: access_pb2.RetireCaRequest, context: Context) -> access_pb2.CaState:
        before = self._rotation.told()
        now = await self._rotation.retire(force=request.force)
        self.call.changes = (f"no longer trusted: {before.previous_sha256}",) if before.previous_sha256 else ()
        return codec.to_wire(now, access_pb2.CaState)

    @stream(write_timeout_s=WRITE_TIMEOUT_S)
    async def ReadAudit(
        self, request: access_pb2.ReadAuditRequest, context: Context
    ) -> AsyncGenerator[access_pb2.AuditEntry, None]:
        for entry in await asyncio.to_thread(self._audit.read, max(0, request.newest)):
            yield codec.to_wire(entry, access_pb2.AuditEntry)

    async def _change(
        self, change: AccessRecord, before: Value | None = None, after: Value | None = None
    ) -> access_pb2.ChangeResponse:
        reply = done(await self._engine.request(lambda request: AccessChangeRequested(request=request, change=change)))
        if reply.changed and after is not None:
            self.call.changes = tuple(_changes(before, after))
        return access_pb2.ChangeResponse(changed=reply.changed)

    def _token(self, request: access_pb2.CreateTokenRequest) -> Token:
        kind = {access_pb2.TOKEN_KIND_JOIN: TokenKind.JOIN, access_pb2.TOKEN_KIND_USER: TokenKind.USER}.get(
            request.kind
        )
        if kind is None:
            raise InputError("kind: join or user")
        if not 0 < request.valid_s <= TOKEN_VALID_S_MAX:
            raise InputError(f"valid_s: above 0, and a year at most; {request.valid_s:g} is not")
        if kind is TokenKind.USER:
            if request.nodes or request.uses:
                raise InputError("a user's token has no nodes and no number of uses")
        elif request.user:
            raise InputError("a join token is no user's")
        elif not 1 <= request.uses <= USES_MAX or len(request.nodes) > NODES_MAX:
            raise InputError(f"a join token has 1 to {USES_MAX} uses and names {NODES_MAX} nodes at most")
        for node in request.nodes:
            _check_name("nodes", node)
        now_s = wall_s()
        return Token(
            id="",
            kind=kind,
            user=request.user,
            nodes=tuple(NodeId(node) for node in request.nodes),
            uses_left=request.uses,
            created_at_s=now_s,
            expires_at_s=now_s + request.valid_s,
            created_by=self.call.caller.name,
        )


def _with_id(token: Token, sha256: str) -> Token:
    return Token(**{**{name: getattr(token, name) for name in Token.__struct_fields__}, "id": sha256[:_ID_CHARS]})


def _changes(before: Value | None, after: Value) -> Iterator[str]:
    for field in after.__struct_fields__:
        old, new = getattr(before, field, None), getattr(after, field)
        if old != new:
            yield f"{field}: {'' if before is None else _shown(old) + ' -> '}{_shown(new)}"


def _shown(part: object) -> str:
    return msgspec.json.encode(part).decode()


def _check_name(field: str, name: str) -> None:
    if not is_name(name):
        raise InputError(f"{field}: {name[:80]!r} is no name: lower-case letters, digits and dashes, 63 at most")


def _check_length(field: str, text: str) -> None:
    if len(text) > 256:
        raise InputError(f"{field}: more than 256 characters")
