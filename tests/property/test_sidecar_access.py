"""For any intentions: the rules decide as Consul's precedence does, and no revocation goes unnoticed."""

from hypothesis import given
from hypothesis import strategies as st

from outrider.ids import ServiceName
from outrider.model.mesh import Action, Intention, TrustRoots, spiffe_id
from sidecar.core.access import access_rules, allowed, revokes
from sidecar.core.resources import Kind
from sidecar.core.subscription import Request, Subscription

ROOTS = TrustRoots(datacenter="dc1", trust_domain="mesh.consul", certificates_pem=("root",))
API = ServiceName("api")
CALLERS = ("web", "admin", "cron", "stranger")
_PRECEDENCE = {(False, False): 9, (True, False): 8, (False, True): 6, (True, True): 5}


@st.composite
def intention_sets(draw: st.DrawFn) -> tuple[Intention, ...]:
    """What Consul can hold for one destination: an action per (source, destination) pair, sorted by precedence."""
    pairs = st.tuples(st.sampled_from((*CALLERS[:3], "*")), st.sampled_from(("api", "*")))
    actions = draw(st.dictionaries(pairs, st.sampled_from(Action)))
    found = [
        Intention(
            source=source,
            destination=destination,
            action=action,
            id=f"{source}:{destination}",
            precedence=_PRECEDENCE[source == "*", destination == "*"],
        )
        for (source, destination), action in actions.items()
    ]
    return tuple(sorted(found, key=lambda intention: -intention.precedence))


def _consul_allows(intentions: tuple[Intention, ...], caller: str) -> bool:
    """Consul's own words: of all intentions that match, the one of highest precedence decides; ours, then: deny."""
    matching = [intention for intention in intentions if intention.source in ("*", caller)]
    if not matching:
        return False
    return max(matching, key=lambda intention: intention.precedence).action is Action.ALLOW


def _spiffe(caller: str) -> str:
    return spiffe_id("mesh.consul", "dc1", ServiceName(caller))


@given(intention_sets())
def test_rules_decide_as_consul_does(intentions: tuple[Intention, ...]) -> None:
    rules = access_rules(API, intentions, ROOTS)
    for caller in CALLERS:
        assert allowed(rules, _spiffe(caller)) == _consul_allows(intentions, caller)


@given(intention_sets(), intention_sets())
def test_a_change_revokes_exactly_when_some_caller_loses(
    before: tuple[Intention, ...], after: tuple[Intention, ...]
) -> None:
    lost = any(_consul_allows(before, caller) and not _consul_allows(after, caller) for caller in CALLERS)
    assert revokes(access_rules(API, before, ROOTS), access_rules(API, after, ROOTS)) == lost


@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abc"), st.sampled_from("12")),
            st.sets(st.sampled_from("abc")),
            st.booleans(),
            st.booleans(),
        ),
        max_size=20,
    )
)
def test_a_sidecar_ends_with_what_it_should_have_whatever_happens_between(
    steps: list[tuple[dict[str, str], set[str], bool, bool]],
) -> None:
    """Contents and subscriptions change, Envoy answers late or reconnects: in the end it has what it subscribed to."""
    subscription, held, names, content = Subscription(), dict[str, str](), set[str](), dict[str, str]()
    for content, subscribe, answers, reconnects in steps:  # the last content is what counts
        if reconnects:
            subscription = Subscription()
            subscription.receive(Request(kind=Kind.SECRET, subscribe=tuple(sorted(names)), versions=held))
        names |= subscribe
        subscription.receive(Request(kind=Kind.SECRET, subscribe=tuple(sorted(subscribe))))
        if answers:
            _exchange(subscription, content, held)
    while _exchange(subscription, content, held):
        pass
    assert held == {name: version for name, version in content.items() if name in names}


def _exchange(subscription: Subscription, content: dict[str, str], held: dict[str, str]) -> bool:
    """One round: what is sent is applied and acknowledged. Whether anything was sent."""
    responses = subscription.responses({Kind.SECRET: content})
    for response in responses:
        held.update((name, content[name]) for name in response.changed)
        for name in response.removed:
            held.pop(name, None)
        subscription.receive(Request(kind=response.kind, nonce=response.nonce))
    return bool(responses)
