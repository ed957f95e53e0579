"""Who may do what: nothing without a grant, tokens counted and ended, keys remembered and revoked, quotas kept."""

import msgspec
import pytest

from controller.core import views
from controller.core.access import Access
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
    UserDeleted,
    UserSet,
)
from controller.core.commands import CloseSession, Reply
from controller.core.events import AccessChangeRequested, NodeJoinRequested
from controller.core.policy import Policy
from controller.core.state import State
from outrider.ids import DEFAULT_NAMESPACE, JobName, Namespace, NodeId
from outrider.model.access import (
    EVERYWHERE,
    Capability,
    Grant,
    NamespaceSpec,
    Quota,
    Role,
    Token,
    TokenKind,
    User,
)
from outrider.model.allocation import AllocStatus
from outrider.model.job import MIB, Job, JobType
from outrider.model.node import NodeStatus
from tests.scenarios.world import World, group, job, node, service

TEAM = Namespace("team")
KEY, OTHER_KEY = "a" * 64, "b" * 64


@pytest.fixture
def world() -> World:
    made = World()
    made.join(node("n1"), node("n2"))
    return made


def change(world: World, record: AccessRecord) -> Reply:
    return world.ask(lambda request: AccessChangeRequested(request=request, change=record))


def join(world: World, token: str, name: str = "n9", key: str = KEY) -> Reply:
    return world.ask(
        lambda request: NodeJoinRequested(request=request, token_sha256=token, node=NodeId(name), key_sha256=key)
    )


def namespace(name: Namespace = TEAM, **quota: int) -> NamespaceSet:
    return NamespaceSet(namespace=NamespaceSpec(name=name, quota=Quota(**quota)))


def join_token(sha256: str = "t", uses: int = 1, *names: str, expires_at_s: float = 1e9) -> TokenCreated:
    nodes = tuple(map(NodeId, names))
    token = Token(id=sha256, kind=TokenKind.JOIN, nodes=nodes, uses_left=uses, expires_at_s=expires_at_s)
    return TokenCreated(token=token, sha256=sha256)


def in_team(wanted: Job) -> Job:
    return msgspec.structs.replace(wanted, namespace=TEAM)


def access_with(*grants: Grant) -> Access:
    access = Access()
    access.apply(RoleSet(role=Role(name="r", grants=grants)))
    return access


def test_nothing_is_allowed_without_a_grant() -> None:
    access = access_with()
    for capability in Capability:
        assert not access.allowed(("r", "unknown"), capability, DEFAULT_NAMESPACE)
        assert not access.allowed_somewhere(("r", "unknown"), capability)


def test_the_admin_role_allows_everything_everywhere() -> None:
    assert all(Access().allowed(("admin",), capability, EVERYWHERE) == "admin" for capability in Capability)


def test_a_grant_holds_in_its_namespaces_alone() -> None:
    access = access_with(Grant(namespaces=("team",), capabilities=(Capability.SUBMIT,)))
    assert access.allowed(("r",), Capability.SUBMIT, "team")
    assert not access.allowed(("r",), Capability.SUBMIT, "default")
    assert not access.allowed(("r",), Capability.SUBMIT, EVERYWHERE)


@pytest.mark.parametrize("given", [Capability.SUBMIT, Capability.OPERATE])
def test_who_may_change_may_look_but_neither_exec_nor_read_secrets(given: Capability) -> None:
    access = access_with(Grant(namespaces=("team",), capabilities=(given,)))
    assert access.allowed(("r",), Capability.READ, "team")
    for other in (Capability.EXEC, Capability.SECRETS, Capability.ADMIN):
        assert not access.allowed(("r",), other, "team")


def test_a_token_lets_in_as_often_as_it_says(world: World) -> None:
    change(world, join_token(uses=2))
    assert join(world, "t", "n8").changed
    assert join(world, "t", "n9", OTHER_KEY).changed
    reply = join(world, "t", "n10")
    assert (reply.code, reply.message) == ("bad-token", "the token is unknown, used up, expired or for another node")


def test_two_joins_at_once_do_not_share_one_use(world: World) -> None:
    change(world, join_token())
    world.journal_works = False
    requests = []
    for name in ("n8", "n9"):
        world.journal_works = False

        def ask(request: object, name: str = name) -> NodeJoinRequested:
            requests.append(request)
            return NodeJoinRequested(request=request, token_sha256="t", node=NodeId(name), key_sha256=KEY)  # type: ignore[arg-type]

        with pytest.raises(KeyError):  # no reply yet
            world.ask(ask)
    world.journal_works = True
    world.write()
    assert [world.replies[request].code for request in requests] == ["", "bad-token"]  # type: ignore[index]


def test_an_expired_token_is_worth_nothing_and_goes_with_the_next_one(world: World) -> None:
    change(world, join_token("old", 5, expires_at_s=world.now_s - 1))
    assert join(world, "old").code == "bad-token"
    change(world, join_token("new"))
    assert set(world.state.access.tokens) == {"new"}


def test_a_token_for_one_node_is_for_no_other(world: World) -> None:
    change(world, join_token("t", 5, "n8"))
    assert join(world, "t", "n9").code == "bad-token"
    assert join(world, "t", "n8").changed


def test_nobody_takes_a_known_nodes_name_unless_the_token_names_it(world: World) -> None:
    change(world, join_token(uses=9))
    change(world, join_token("named", 9, "n9"))
    assert join(world, "t").changed
    assert join(world, "t").changed  # the same key: known
    assert join(world, "t", key=OTHER_KEY).code == "node-known"
    assert join(world, "named", key=OTHER_KEY).changed
    assert world.state.access.node_keys[NodeId("n9")] == OTHER_KEY


def test_a_revoked_node_is_down_at_once_and_its_work_moves(world: World) -> None:
    world.submit(job("shop", group(count=2)))
    world.state.access.apply(NodeCertified(node=NodeId("n1"), key_sha256=KEY))
    world.commands.clear()
    assert change(world, NodeRevoked(node=NodeId("n1"), key_sha256="")).changed
    assert any(isinstance(command, CloseSession) and command.node == "n1" for command in world.commands)
    state = views.node_state(world.state, NodeId("n1"))
    assert state is not None
    assert (state.status, state.reason) == (NodeStatus.DOWN, "its certificate was revoked")
    placed = views.allocations(world.state, job=JobName("shop"))
    assert {each.node for each in placed if each.status is not AllocStatus.LOST} == {"n2"}
    assert not change(world, NodeRevoked(node=NodeId("n1"), key_sha256="")).changed


def test_a_revoked_key_comes_back_only_by_a_token_that_names_its_node(world: World) -> None:
    change(world, join_token(uses=9))
    change(world, join_token("named", 1, "n9"))
    join(world, "t")
    change(world, NodeRevoked(node=NodeId("n9"), key_sha256=""))
    assert join(world, "t").code == "denied"
    assert join(world, "named").changed
    assert not world.state.access.revoked_keys


def test_a_job_needs_a_namespace_that_is_there(world: World) -> None:
    wanted = in_team(job("shop", group()))
    assert world.submit(wanted).code == "not-found"
    change(world, namespace())
    assert world.submit(wanted).changed


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"jobs": 1}, "1 jobs and would have 2 jobs"),
        ({"allocations": 3}, "3 allocations and would have 4 allocations"),
        ({"cpu_millis": 350}, "0.35 cores and would have 0.4 cores"),
        ({"memory_bytes": 255 * MIB}, "255 MiB of memory and would have 256 MiB of memory"),
    ],
)
def test_a_quota_counts_all_jobs_of_its_namespace(world: World, limits: dict[str, int], told: str) -> None:
    change(world, namespace(**limits))
    assert world.submit(in_team(job("a", group(count=2)))).changed
    reply = world.submit(in_team(job("b", group(count=2))))
    assert reply.code == "quota"
    assert told in reply.message
    world.stop("a")
    assert world.submit(in_team(job("b", group(count=2)))).changed
    assert world.submit(job("elsewhere", group(count=50))).changed


def test_two_jobs_of_one_batch_do_not_share_the_last_of_a_quota(world: World) -> None:
    change(world, namespace(jobs=1))
    world.journal_works = False
    requests = [world.request(in_team(job(name, group()))) for name in ("a", "b")]
    world.journal_works = True
    world.write()
    assert [world.replies[request].code for request in requests] == ["", "quota"]


def test_a_system_job_counts_once_for_each_node(world: World) -> None:
    change(world, namespace(allocations=1))
    reply = world.submit(in_team(job("everywhere", group(), type=JobType.SYSTEM)))
    assert "would have 2 allocations" in reply.message


@pytest.mark.parametrize("port", ["http", None])
def test_a_service_name_is_one_namespaces(world: World, port: str | None) -> None:
    """Whoever has the name has its identity: offered, or only called by."""
    change(world, namespace())
    world.submit(job("theirs", group(services=[service("api")])))
    reply = world.submit(in_team(job("mine", group(services=[service("api", port=port)]))))
    assert (reply.code, "in another namespace" in reply.message) == ("conflict", True)
    world.stop("theirs")
    assert world.submit(in_team(job("mine", group(services=[service("api", port=port)])))).changed


def test_what_is_in_use_is_not_deleted(world: World) -> None:
    change(world, namespace())
    change(world, RoleSet(role=Role(name="r")))
    change(world, UserSet(user=User(name="alice", roles=("r",))))
    world.submit(in_team(job("shop", group())))
    for record in (NamespaceDeleted(name=TEAM), NamespaceDeleted(name=DEFAULT_NAMESPACE), RoleDeleted(name="r")):
        assert change(world, record).code == "conflict"
    world.stop("shop")
    assert change(world, NamespaceDeleted(name=TEAM)).changed
    change(world, UserDeleted(name="alice"))
    assert change(world, RoleDeleted(name="r")).changed


def test_a_users_tokens_go_with_the_user(world: World) -> None:
    change(world, UserSet(user=User(name="alice")))
    token = Token(id="t", kind=TokenKind.USER, user="alice", expires_at_s=1e9)
    assert change(world, TokenCreated(token=token, sha256="h")).changed
    assert world.state.access.token_by_hash("h", TokenKind.USER, 0) == token
    assert world.state.access.token_by_hash("h", TokenKind.JOIN, 0) is None
    change(world, UserDeleted(name="alice"))
    assert world.state.access.token_by_hash("h", TokenKind.USER, 0) is None


@pytest.mark.parametrize(
    "record",
    [
        RoleSet(role=Role(name="r", grants=(Grant(namespaces=("nowhere",), capabilities=(Capability.READ,)),))),
        UserSet(user=User(name="alice", roles=("nothing",))),
        TokenCreated(token=Token(id="t", kind=TokenKind.USER, user="nobody", expires_at_s=1e9), sha256="h"),
        TokenRevoked(id="nothing"),
        NodeRevoked(node=NodeId("nobody"), key_sha256=""),
        NamespaceDeleted(name=Namespace("nowhere")),
    ],
    ids=lambda record: type(record).__name__,
)
def test_what_is_named_must_be_there(world: World, record: AccessRecord) -> None:
    assert change(world, record).code == "not-found"


def test_the_admin_role_is_never_changed(world: World) -> None:
    assert change(world, RoleSet(role=Role(name="admin"))).code == "conflict"
    assert change(world, RoleDeleted(name="admin")).code == "conflict"


def test_a_snapshot_makes_the_same_rights(world: World) -> None:
    for record in (
        namespace(jobs=7),
        RoleSet(role=Role(name="r", grants=(Grant(namespaces=("*",), capabilities=(Capability.READ,)),))),
        UserSet(user=User(name="alice", roles=("r",))),
        join_token(uses=3),
    ):
        change(world, record)
    join(world, "t")
    change(world, NodeRevoked(node=NodeId("n9"), key_sha256=""))
    again = State(Policy())
    for part in world.state.snapshot():
        again.apply(part)
    assert list(again.access.snapshot()) == list(world.state.access.snapshot())
    assert again.access.tokens == world.state.access.tokens
    assert again.service_owners == world.state.service_owners
