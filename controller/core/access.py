"""Who may do what in the fleet: the durable part of it, what operators change in it, and the answers to "may they?".

Owns the rules: nothing is allowed that no grant allows; `admin` is all capabilities; a token that has ended, and a
node's key that was revoked, are worth nothing. Never sees a secret: hashes alone.
"""

from collections.abc import Iterable, Iterator
from typing import assert_never

import msgspec

from controller.core.access_records import (
    AccessRecord,
    NamespaceDeleted,
    NamespaceSet,
    NodeCertified,
    NodeRevoked,
    RoleDeleted,
    RoleSet,
    TokenCreated,
    TokenRevoked,
    TokenUsed,
    UserDeleted,
    UserSet,
)
from outrider.ids import DEFAULT_NAMESPACE, Namespace, NodeId
from outrider.model.access import EVERYWHERE, Capability, Grant, NamespaceSpec, Role, Token, TokenKind, User
from outrider.model.job import Value

ADMIN_ROLE = Role(name="admin")  # always there, and allows everything: `allowed` knows it by its name


class Refusal(Value, frozen=True, kw_only=True):
    """Why a change cannot be made. `code` is RefusedError's."""

    code: str
    message: str


class Access:
    """What is true after each record."""

    def __init__(self) -> None:
        self.namespaces: dict[Namespace, NamespaceSpec] = {DEFAULT_NAMESPACE: NamespaceSpec(name=DEFAULT_NAMESPACE)}
        self.roles: dict[str, Role] = {ADMIN_ROLE.name: ADMIN_ROLE}
        self.users: dict[str, User] = {}
        self.tokens: dict[str, TokenCreated] = {}  # by id
        self.by_hash: dict[str, str] = {}  # sha256 -> id
        self.node_keys: dict[NodeId, str] = {}  # sha256 of the key that each node joined with
        self.revoked_keys: dict[str, NodeId] = {}

    def apply(self, record: AccessRecord) -> None:
        match record:
            case NamespaceSet():
                self.namespaces[record.namespace.name] = record.namespace
            case NamespaceDeleted():
                del self.namespaces[record.name]
            case RoleSet():
                self.roles[record.role.name] = record.role
            case RoleDeleted():
                del self.roles[record.name]
            case UserSet():
                self.users[record.user.name] = record.user
            case UserDeleted():
                del self.users[record.name]
                for token in [each.token.id for each in self.tokens.values() if each.token.user == record.name]:
                    self._drop_token(token)
            case TokenCreated() | TokenUsed() | TokenRevoked():
                self._apply_token(record)
            case NodeCertified():
                self.node_keys[record.node] = record.key_sha256
                self.revoked_keys.pop(record.key_sha256, None)
            case NodeRevoked():
                self.revoked_keys[record.key_sha256] = record.node
            case _:
                assert_never(record)

    def snapshot(self) -> Iterator[AccessRecord]:
        """Equal for equal states."""
        yield from (NamespaceSet(namespace=self.namespaces[name]) for name in sorted(self.namespaces))
        yield from (RoleSet(role=self.roles[name]) for name in sorted(self.roles) if name != ADMIN_ROLE.name)
        yield from (UserSet(user=self.users[name]) for name in sorted(self.users))
        yield from (self.tokens[token] for token in sorted(self.tokens))
        for node, key in sorted(self.node_keys.items()):
            yield NodeCertified(node=node, key_sha256=key)
        for key, node in sorted(self.revoked_keys.items()):
            yield NodeRevoked(node=node, key_sha256=key)

    def allowed(self, roles: Iterable[str], capability: Capability, namespace: str) -> str:
        """The first of `roles` that allows it; "" where none does. `namespace`: a name, or EVERYWHERE."""
        return next((role for role in roles if self._allows(role, capability, namespace)), "")

    def allowed_somewhere(self, roles: Iterable[str], capability: Capability) -> bool:
        """In one namespace at least."""
        return any(
            role == ADMIN_ROLE.name or any(_covers(grant.capabilities, capability) for grant in self._grants(role))
            for role in roles
        )

    def token_by_hash(self, sha256: str, kind: TokenKind, now_s: float) -> Token | None:
        """The valid token with that hash."""
        found = self.tokens.get(self.by_hash.get(sha256, ""))
        return found.token if found is not None and _valid(found.token, kind, now_s) else None

    def _allows(self, role: str, capability: Capability, namespace: str) -> bool:
        return role == ADMIN_ROLE.name or any(
            _covers(grant.capabilities, capability)
            and (EVERYWHERE in grant.namespaces or namespace in grant.namespaces)
            for grant in self._grants(role)
        )

    def _grants(self, role: str) -> tuple[Grant, ...]:
        known = self.roles.get(role)
        return known.grants if known is not None else ()

    def _apply_token(self, record: TokenCreated | TokenUsed | TokenRevoked) -> None:
        match record:
            case TokenCreated():
                self.tokens[record.token.id] = record
                self.by_hash[record.sha256] = record.token.id
            case TokenUsed():
                created = self.tokens[record.id]
                if created.token.uses_left <= 1:
                    self._drop_token(record.id)
                else:
                    fewer = msgspec.structs.replace(created.token, uses_left=created.token.uses_left - 1)
                    self.tokens[record.id] = msgspec.structs.replace(created, token=fewer)
            case TokenRevoked():
                self._drop_token(record.id)
            case _:
                assert_never(record)

    def _drop_token(self, token: str) -> None:
        self.by_hash.pop(self.tokens.pop(token).sha256, None)


def _covers(capabilities: Iterable[Capability], wanted: Capability) -> bool:
    """Whoever may change or mend something may see it; `exec` and `secrets` come with nothing else."""
    given = set(capabilities)
    if wanted in given or Capability.ADMIN in given:
        return True
    return wanted is Capability.READ and bool(given & {Capability.SUBMIT, Capability.OPERATE})


def _valid(token: Token, kind: TokenKind, now_s: float) -> bool:
    return token.kind is kind and token.expires_at_s > now_s and (kind is not TokenKind.JOIN or token.uses_left > 0)
