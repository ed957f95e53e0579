"""Who may do what: namespaces with quotas, roles, users, tokens. Values alone; `controller.core.access` decides."""

from enum import StrEnum

from outrider.ids import Namespace, NodeId
from outrider.model.job import Value

EVERYWHERE = "*"  # in a grant: every namespace, and what belongs to none (nodes, tokens, the fleet itself)


class Capability(StrEnum):
    """What a grant allows. `admin` is all of them; `exec` and `secrets` come with nothing else."""

    READ = "read"  # see jobs, allocations, logs, events
    SUBMIT = "submit"  # change what runs: jobs and who may call them
    OPERATE = "operate"  # keep it running: restart, drain, scale
    EXEC = "exec"  # run commands and open consoles inside workloads
    SECRETS = "secrets"  # read and write secrets
    ADMIN = "admin"  # namespaces, roles, users, tokens, nodes' trust


class Grant(Value, frozen=True, kw_only=True):
    namespaces: tuple[str, ...]  # names, or EVERYWHERE
    capabilities: tuple[Capability, ...]


class Role(Value, frozen=True, kw_only=True):
    name: str
    grants: tuple[Grant, ...] = ()


class User(Value, frozen=True, kw_only=True):
    """A person or a program. Without a role it may do nothing."""

    name: str
    roles: tuple[str, ...] = ()


class Quota(Value, frozen=True, kw_only=True):
    """What the jobs of a namespace may want together; 0 is no limit."""

    jobs: int = 0
    allocations: int = 0
    cpu_millis: int = 0
    memory_bytes: int = 0


class NamespaceSpec(Value, frozen=True, kw_only=True):
    name: Namespace
    description: str = ""
    quota: Quota = Quota()


class NamespaceState(Value, frozen=True, kw_only=True):
    """A namespace and what its jobs want."""

    spec: NamespaceSpec
    used: Quota = Quota()


class TokenKind(StrEnum):
    JOIN = "join"  # lets nodes in
    USER = "user"  # lets its user in


class Token(Value, frozen=True, kw_only=True):
    """A token as it is told of; the secret itself is shown once and kept nowhere."""

    id: str  # the first digits of its hash
    kind: TokenKind
    user: str = ""  # of a user's
    nodes: tuple[NodeId, ...] = ()  # of a join token: the names that it may join as; () is any that is new to the fleet
    uses_left: int = 0  # of a join token
    created_at_s: float = 0.0
    expires_at_s: float = 0.0
    created_by: str = ""


class NodeBehind(Value, frozen=True, kw_only=True):
    node: NodeId
    reason: str


class CaState(Value, frozen=True, kw_only=True):
    """The CA of the fleet's own certificates; while it is changed, two are trusted."""

    sha256: str  # of the one that signs
    previous_sha256: str = ""  # "": it is trusted alone
    rotated_at_s: float | None = None
    behind: tuple[NodeBehind, ...] = ()  # nodes that would be shut out without the previous one
    tokens_before: int = 0  # valid tokens that are older than the change: they end with the previous one


class AuditEntry(Value, frozen=True, kw_only=True):
    """One changing call, done or refused: who, from where, what, and what it changed."""

    at_s: float
    caller: str  # a user's name, or "root" on the controller's own host
    by: str  # "socket", "certificate" or "token ID"
    peer: str = ""  # address; "" on the socket
    call: str
    namespace: str = ""
    subject: str = ""  # the job, node, token ... that it is about
    outcome: str = ""  # "done", or the code of the refusal
    changes: tuple[str, ...] = ()  # a line each; never a secret
