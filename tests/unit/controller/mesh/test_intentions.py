"""Intentions: precedence as Consul has it, and whose is whose."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from controller.core.mesh_intent import OwnedIntention
from controller.mesh.consul_adapter import Dialect, intention_dialect
from controller.mesh.intentions import bearing_on, decide, intention, plan_owned, precedence
from controller.mesh.shapes import ConsulIntention
from outrider.ids import JobName, ServiceName
from outrider.model.mesh import Action, Intention

NAMES = ["web", "api", "db"]
pairs = st.dictionaries(
    st.tuples(st.sampled_from([*NAMES, "*"]), st.sampled_from([*NAMES, "*"])), st.sampled_from(list(Action))
)


@given(pairs, st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_decisions_are_those_of_the_four_pairs_tried_in_turn(
    actions: dict[tuple[str, str], Action], source: str, destination: str
) -> None:
    intentions = [
        Intention(source=pair[0], destination=pair[1], action=action, precedence=precedence(*pair))
        for pair, action in actions.items()
    ]
    tried = [(source, destination), ("*", destination), (source, "*"), ("*", "*")]
    expected = next((pair for pair in tried if pair in actions), None)

    found = decide(intentions, ServiceName(source), ServiceName(destination))

    assert (None if found is None else (found.source, found.destination)) == expected


def test_precedences_are_consuls() -> None:
    given_pairs = list(product(["web", "*"], ["api", "*"]))
    assert [precedence(*pair) for pair in given_pairs] == [9, 6, 8, 5]


def by_hand(source: str, destination: str, action: str) -> ConsulIntention:
    return ConsulIntention(source_name=source, destination_name=destination, action=action, id="1")


def owned(source: str, destination: str, job: str, cluster: str = "c") -> ConsulIntention:
    made = by_hand(source, destination, "allow")
    description = f"outrider cluster={cluster} job={job}"
    return ConsulIntention(
        **{**{name: getattr(made, name) for name in made.__struct_fields__}, "description": description}
    )


def line(source: str, destination: str, job: str) -> OwnedIntention:
    return OwnedIntention(source=ServiceName(source), destination=ServiceName(destination), job=JobName(job))


def test_what_a_hand_made_is_left_alone_whatever_it_says() -> None:
    for action in ("allow", "deny"):
        assert plan_owned([line("web", "api", "shop")], [by_hand("web", "api", action)], "c") == plan_owned([], [], "c")


def test_a_jobs_intention_goes_with_it_and_others_stay() -> None:
    found = [owned("web", "api", "shop"), owned("web", "db", "shop", cluster="other"), by_hand("db", "api", "allow")]
    plan = plan_owned([], found, "c")
    assert plan.delete == (found[0],)
    assert (plan.create, plan.update) == ((), ())


def test_a_pair_that_two_jobs_want_outlives_the_first() -> None:
    both = [line("web", "api", "shop"), line("web", "api", "blog")]
    (made,) = plan_owned(both, [], "c").create
    assert intention(made, "c").owner == "blog"
    assert plan_owned(both, [made], "c") == plan_owned([], [], "c")
    (changed,) = plan_owned([both[0]], [made], "c").update
    assert intention(changed, "c").owner == "shop"
    assert changed.id == made.id


def test_an_intention_with_http_permissions_is_not_taken_for_a_grant() -> None:
    assert intention(by_hand("web", "api", ""), "c").action is Action.DENY


def test_a_sidecar_is_told_of_its_own_and_of_everybodys() -> None:
    found = [intention(by_hand(*pair, "deny"), "c") for pair in product(["*", "web"], ["*", "api", "db"])]
    told = bearing_on(found, ServiceName("api"))
    assert [(one.source, one.destination) for one in told] == [("web", "api"), ("*", "api"), ("web", "*"), ("*", "*")]


def test_the_dialect_goes_by_version() -> None:
    versions = ["1.8.7", "1.7.0+ent", "1.9.0", "1.15.2", "2.0.0-rc1"]
    assert [intention_dialect(version) for version in versions] == [Dialect.BY_ID] * 2 + [Dialect.EXACT] * 3
