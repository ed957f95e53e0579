"""What a host lacks, and which hosts are refused before anything is changed on them."""

from pathlib import Path

import msgspec
import pytest

from outrider.cli.deploy.bundle import Bundle
from outrider.cli.deploy.inventory import Host
from outrider.cli.deploy.plan import ROOM_BYTES, Facts, Step, check, make_plan
from outrider.errors import HostError

BUNDLE = Bundle(path=Path("b.tar"), id="0.1.0-abc", version="0.1.0", python="3.11", machine="x86_64")
HOST = Host(host="h1.example")
BARE = Facts(python="3.11", machine="x86_64", apt=True, free_bytes=8 * ROOM_BYTES, clock_s=1000.0)
WANTED = {"agent": "sha"}
WHOLE = msgspec.structs.replace(
    BARE, versions=("0.1.0-abc",), current="0.1.0-abc", joined={"agent": True}, running={"agent": True},
    configured={"agent": "sha"}, identity="outrider://prod/node/h1", trusts=("new",),
)  # fmt: skip


def steps(facts: Facts) -> tuple[Step, ...]:
    return make_plan(HOST, facts, BUNDLE, WANTED).steps


def test_a_bare_host_lacks_everything() -> None:
    facts = msgspec.structs.replace(BARE, missing=("crun",))
    assert steps(facts) == (
        Step.PACKAGES, Step.PUSH, Step.INSTALL, Step.CONFIGURE, Step.ACTIVATE, Step.JOIN, Step.START,
    )  # fmt: skip


def test_a_whole_host_lacks_nothing() -> None:
    assert steps(WHOLE) == ()
    assert make_plan(HOST, WHOLE, BUNDLE, WANTED).told == "nothing to do"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"configured": {"agent": "other"}}, (Step.CONFIGURE, Step.RESTART)),
        ({"current": "0.0.9-old"}, (Step.ACTIVATE, Step.RESTART)),
        ({"running": {}}, (Step.START,)),
        ({"joined": {}, "running": {}}, (Step.JOIN, Step.START)),
        ({"versions": (), "bundle_there": True}, (Step.INSTALL,)),
    ],
    ids=["configuration", "version", "stopped", "not joined", "pushed and not unpacked"],
)
def test_what_an_earlier_run_left_undone_is_done(changed: dict[str, object], expected: tuple[Step, ...]) -> None:
    assert steps(msgspec.structs.replace(WHOLE, **changed)) == expected


def test_a_node_that_knows_none_of_the_fleets_cas_joins_anew() -> None:
    for authorities, expected in ((None, ()), ({"old", "new"}, ()), ({"newest"}, (Step.JOIN, Step.RESTART))):
        known = frozenset(authorities) if authorities is not None else None
        assert make_plan(HOST, WHOLE, BUNDLE, WANTED, authorities=known).steps == expected


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"uid": 1000}, "uid 1000, and root is needed"),
        ({"machine": "aarch64"}, "it is aarch64, the bundle is for x86_64"),
        ({"python": "3.9"}, "it has Python 3.9, the bundle is for 3.11"),
        ({"clock_s": 4600.0}, "its clock is 3600 s ahead"),
        ({"clock_s": 1000.0 - 3600}, "its clock is 3600 s behind"),
        ({"free_bytes": 100 << 20}, "100 MiB are free, 1024 are needed"),
        ({"missing": ("crun",), "apt": False}, "it lacks crun and has no apt-get"),
        (
            {"joined": {"agent": True}, "identity": "outrider://other/node/h1"},
            "it is of another fleet: outrider://other/node/h1",
        ),
    ],
)
def test_a_host_that_cannot_be_a_node_is_refused_with_the_reason(changed: dict[str, object], told: str) -> None:
    with pytest.raises(HostError, match=told):
        check(HOST, msgspec.structs.replace(BARE, **changed), BUNDLE, cluster="prod", now_s=1000.0, took_s=1.0)


def test_a_good_host_passes() -> None:
    check(HOST, BARE, BUNDLE, cluster="prod", now_s=1000.0, took_s=1.0)
    check(HOST, WHOLE, BUNDLE, cluster="prod", now_s=1000.0, took_s=1.0)
