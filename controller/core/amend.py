"""Changes of who may do what, and nodes that ask to be let in: what each writes, or why it is refused.

Owns the answers; writes nothing itself. What a call may be made by at all is the edges' to ask `Access.allowed`.
"""

from typing import assert_never

from controller.core.access import ADMIN_ROLE, Access
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
from controller.core.commands import Reply
from controller.core.events import AccessChangeRequested, NodeJoinRequested
from controller.core.records import Record
from controller.core.state import State
from outrider.ids import DEFAULT_NAMESPACE, Namespace
from outrider.model.access import EVERYWHERE, TokenKind

Answer = tuple[tuple[Record, ...], Reply]
USERS_MAX = 10_000
ROLES_MAX = 1_000
NAMESPACES_MAX = 1_000
TOKENS_MAX = 10_000


def answer(state: State, call: AccessChangeRequested | NodeJoinRequested, now_s: float) -> Answer:
    """The records that the call needs, and the reply for when the journal has them."""
    return amend(state, call, now_s) if isinstance(call, AccessChangeRequested) else admit(state, call, now_s)


def amend(state: State, call: AccessChangeRequested, now_s: float) -> Answer:
    """What the change writes."""
    change = call.change
    code, message = _refusal(state, change)
    if code:
        return (), Reply(request=call.request, code=code, message=message)
    records = _records(state.access, change, now_s)
    return records, Reply(request=call.request, changed=bool(records))


def admit(state: State, call: NodeJoinRequested, now_s: float) -> Answer:
    """One use of the token less, and the node's key is known. The refusal never says what was wrong with a token."""
    access = state.access
    token = access.token_by_hash(call.token_sha256, TokenKind.JOIN, now_s)
    if token is None or (token.nodes and call.node not in token.nodes):
        message = "the token is unknown, used up, expired or for another node"
        return (), Reply(request=call.request, code="bad-token", message=message)
    known = access.node_keys.get(call.node)
    if call.node not in token.nodes:
        if call.key_sha256 in access.revoked_keys:
            message = f"the key of node {call.node} was revoked; a token for `--node {call.node}` lets it in again"
            return (), Reply(request=call.request, code="denied", message=message)
        if known is not None and known != call.key_sha256:
            message = (
                f"node {call.node} joined before with another key; take another name, or a token for this node: "
                f"`outrider token create --node {call.node}`"
            )
            return (), Reply(request=call.request, code="node-known", message=message)
    records = (TokenUsed(id=token.id), NodeCertified(node=call.node, key_sha256=call.key_sha256))
    return records, Reply(request=call.request, changed=True)


def touched(call: AccessChangeRequested | NodeJoinRequested) -> str:
    """What two changes must not both touch in one batch: each is judged by the state before it."""
    return f"join {call.token_sha256}" if isinstance(call, NodeJoinRequested) else "access"


def _refusal(state: State, change: AccessRecord) -> tuple[str, str]:
    """Code and text; ("", "") where nothing speaks against it."""
    match change:
        case NamespaceSet() | NamespaceDeleted():
            return _refuse_namespace(state, change)
        case RoleSet() | RoleDeleted():
            return _refuse_role(state.access, change)
        case UserSet() | UserDeleted():
            return _refuse_user(state.access, change)
        case TokenCreated() | TokenUsed() | TokenRevoked():
            return _refuse_token(state.access, change)
        case NodeCertified() | NodeRevoked():
            if change.node not in state.access.node_keys:
                return "not-found", f"no node {change.node!r} ever joined; `outrider node ls` lists them"
            return "", ""
        case _:
            assert_never(change)


def _refuse_namespace(state: State, change: NamespaceSet | NamespaceDeleted) -> tuple[str, str]:
    namespaces = state.access.namespaces
    if isinstance(change, NamespaceSet):
        if change.namespace.name not in namespaces and len(namespaces) >= NAMESPACES_MAX:
            return "conflict", f"there are {NAMESPACES_MAX} namespaces already"
        return "", ""
    if change.name not in namespaces:
        return "not-found", f"no namespace {change.name!r}; `outrider namespace ls` lists them"
    if change.name == DEFAULT_NAMESPACE:
        return "conflict", f"namespace {DEFAULT_NAMESPACE} is always there"
    running = [name for name, job in state.jobs.items() if job.job.namespace == change.name and not job.stopped]
    if running:
        return "conflict", f"namespace {change.name} has jobs: {', '.join(sorted(running)[:5])}; stop them first"
    return "", ""


def _refuse_role(access: Access, change: RoleSet | RoleDeleted) -> tuple[str, str]:
    name = change.role.name if isinstance(change, RoleSet) else change.name
    if name == ADMIN_ROLE.name:
        return "conflict", f"role {name} is always there and allows everything; take another name"
    if isinstance(change, RoleDeleted):
        return _refuse_deletion(access, name)
    if name not in access.roles and len(access.roles) >= ROLES_MAX:
        return "conflict", f"there are {ROLES_MAX} roles already"
    for namespace in (namespace for grant in change.role.grants for namespace in grant.namespaces):
        if namespace != EVERYWHERE and Namespace(namespace) not in access.namespaces:
            return "not-found", f"no namespace {namespace!r}; `outrider namespace set {namespace}` makes it"
    return "", ""


def _refuse_deletion(access: Access, role: str) -> tuple[str, str]:
    if role not in access.roles:
        return "not-found", f"no role {role!r}; `outrider role ls` lists them"
    holders = sorted(user.name for user in access.users.values() if role in user.roles)
    if holders:
        return "conflict", f"users have role {role}: {', '.join(holders[:5])}; take it from them first"
    return "", ""


def _refuse_user(access: Access, change: UserSet | UserDeleted) -> tuple[str, str]:
    if isinstance(change, UserDeleted):
        if change.name not in access.users:
            return "not-found", f"no user {change.name!r}; `outrider user ls` lists them"
        return "", ""
    if change.user.name not in access.users and len(access.users) >= USERS_MAX:
        return "conflict", f"there are {USERS_MAX} users already"
    unknown = [role for role in change.user.roles if role not in access.roles]
    if unknown:
        return "not-found", f"no role {unknown[0]!r}; `outrider role ls` lists them"
    return "", ""


def _refuse_token(access: Access, change: TokenCreated | TokenUsed | TokenRevoked) -> tuple[str, str]:
    if not isinstance(change, TokenCreated):
        if change.id not in access.tokens:
            return "not-found", f"no token {change.id!r}; `outrider token ls` lists them"
        return "", ""
    if len(access.tokens) >= TOKENS_MAX:
        return "conflict", f"there are {TOKENS_MAX} tokens already; revoke some"
    if change.token.kind is TokenKind.USER and change.token.user not in access.users:
        return "not-found", f"no user {change.token.user!r}; `outrider user set {change.token.user}` makes one"
    return "", ""


def _records(access: Access, change: AccessRecord, now_s: float) -> tuple[AccessRecord, ...]:
    """() where it is so already."""
    match change:
        case NamespaceSet():
            return () if access.namespaces.get(change.namespace.name) == change.namespace else (change,)
        case RoleSet():
            return () if access.roles.get(change.role.name) == change.role else (change,)
        case UserSet():
            return () if access.users.get(change.user.name) == change.user else (change,)
        case TokenCreated():
            ended = sorted(each.token.id for each in access.tokens.values() if each.token.expires_at_s <= now_s)
            return (*(TokenRevoked(id=token) for token in ended), change)
        case NodeRevoked():
            key = access.node_keys[change.node]
            return () if key in access.revoked_keys else (NodeRevoked(node=change.node, key_sha256=key),)
        case _:
            return (change,)
