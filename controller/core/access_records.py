"""The journal's records of who may do what. Owns their shapes; `controller.core.access` gives them meaning."""

from outrider.ids import Namespace, NodeId
from outrider.model.access import NamespaceSpec, Role, Token, User
from outrider.model.job import Value


class NamespaceSet(Value, frozen=True, kw_only=True, tag=True):
    namespace: NamespaceSpec


class NamespaceDeleted(Value, frozen=True, kw_only=True, tag=True):
    name: Namespace


class RoleSet(Value, frozen=True, kw_only=True, tag=True):
    role: Role


class RoleDeleted(Value, frozen=True, kw_only=True, tag=True):
    name: str


class UserSet(Value, frozen=True, kw_only=True, tag=True):
    user: User


class UserDeleted(Value, frozen=True, kw_only=True, tag=True):
    """Their tokens go too."""

    name: str


class TokenCreated(Value, frozen=True, kw_only=True, tag=True):
    """A token is 256 random bits: a plain hash of it cannot be guessed back."""

    token: Token
    sha256: str


class TokenUsed(Value, frozen=True, kw_only=True, tag=True):
    """A join token has one use less."""

    id: str


class TokenRevoked(Value, frozen=True, kw_only=True, tag=True):
    """Or found to have ended: it is forgotten."""

    id: str


class NodeCertified(Value, frozen=True, kw_only=True, tag=True):
    """The node joined with this key: another key may not speak for it."""

    node: NodeId
    key_sha256: str


class NodeRevoked(Value, frozen=True, kw_only=True, tag=True):
    node: NodeId
    key_sha256: str


AccessRecord = (
    NamespaceSet
    | NamespaceDeleted
    | RoleSet
    | RoleDeleted
    | UserSet
    | UserDeleted
    | TokenCreated
    | TokenUsed
    | TokenRevoked
    | NodeCertified
    | NodeRevoked
)
