"""The delta subscription: who is sent what, and when it counts as known."""

from sidecar.core.resources import Kind
from sidecar.core.subscription import Request, Response, Subscription

ALL = {Kind.CLUSTER: {"c": "1"}, Kind.LISTENER: {"l": "1"}, Kind.ENDPOINTS: {"e": "1"}}


def _acknowledge(subscription: Subscription, *responses: Response, error: str = "") -> None:
    for response in responses:
        subscription.receive(Request(kind=response.kind, nonce=response.nonce, error=error))


def _subscribed() -> Subscription:
    subscription = Subscription()
    for request in (
        Request(kind=Kind.CLUSTER),
        Request(kind=Kind.ENDPOINTS, subscribe=("e",)),
        Request(kind=Kind.LISTENER),
    ):
        subscription.receive(request)
    return subscription


def test_nothing_is_sent_unasked() -> None:
    assert Subscription().responses(ALL) == ()
    assert not Subscription().settled(ALL)


def test_what_is_referred_to_is_pushed_before_what_refers_to_it() -> None:
    responses = _subscribed().responses(ALL)
    assert [(each.kind, each.changed) for each in responses] == [
        (Kind.CLUSTER, ("c",)),
        (Kind.ENDPOINTS, ("e",)),
        (Kind.LISTENER, ("l",)),
    ]


def test_settled_means_acknowledged_not_sent() -> None:
    subscription = _subscribed()
    responses = subscription.responses(ALL)
    assert not subscription.settled(ALL)
    _acknowledge(subscription, *responses)
    assert subscription.settled(ALL)
    assert subscription.responses(ALL) == ()
    assert not subscription.settled({**ALL, Kind.ENDPOINTS: {"e": "2"}})


def test_changes_while_a_response_is_under_way_are_sent_once_together() -> None:
    subscription = _subscribed()
    first = subscription.responses(ALL)
    for version in ("2", "3"):
        assert subscription.responses({**ALL, Kind.ENDPOINTS: {"e": version}}) == ()
    _acknowledge(subscription, *first)
    assert [each.changed for each in subscription.responses({**ALL, Kind.ENDPOINTS: {"e": "3"}})] == [("e",)]


def test_a_reconnecting_sidecar_is_sent_only_what_differs() -> None:
    subscription = Subscription()
    subscription.receive(Request(kind=Kind.CLUSTER, versions={"c": "1", "gone": "1"}))
    subscription.receive(Request(kind=Kind.LISTENER, versions={"l": "0"}))
    subscription.receive(Request(kind=Kind.ENDPOINTS, subscribe=("e",), versions={"e": "1"}))
    listeners = subscription.responses(ALL)
    assert [(each.kind, each.changed, each.removed) for each in listeners] == [(Kind.LISTENER, ("l",), ())]
    _acknowledge(subscription, *listeners)
    clusters = subscription.responses(ALL)
    assert [(each.kind, each.changed, each.removed) for each in clusters] == [(Kind.CLUSTER, (), ("gone",))]


def test_a_refused_version_is_not_sent_again_and_the_next_one_is() -> None:
    subscription = _subscribed()
    for response in subscription.responses(ALL):
        rejection = subscription.receive(Request(kind=response.kind, nonce=response.nonce, error="no"))
        assert rejection is not None
        assert rejection.names == response.changed
    assert subscription.responses(ALL) == ()
    assert [each.kind for each in subscription.responses({**ALL, Kind.LISTENER: {"l": "2"}})] == [Kind.LISTENER]


def test_a_wildcard_is_answered_even_with_nothing() -> None:
    subscription = Subscription()
    subscription.receive(Request(kind=Kind.LISTENER))
    assert [(each.kind, each.changed) for each in subscription.responses({})] == [(Kind.LISTENER, ())]


def test_a_name_asked_for_before_it_exists_waits() -> None:
    subscription = Subscription()
    subscription.receive(Request(kind=Kind.SECRET, subscribe=("leaf/web",)))
    assert subscription.responses({}) == ()
    assert [each.changed for each in subscription.responses({Kind.SECRET: {"leaf/web": "1"}})] == [("leaf/web",)]


def test_who_asks_again_is_sent_again() -> None:
    subscription = _subscribed()
    _acknowledge(subscription, *subscription.responses(ALL))
    subscription.receive(Request(kind=Kind.ENDPOINTS, subscribe=("e",)))
    assert [each.changed for each in subscription.responses(ALL)] == [("e",)]


def test_who_unsubscribes_is_told_no_more() -> None:
    subscription = _subscribed()
    _acknowledge(subscription, *subscription.responses(ALL))
    subscription.receive(Request(kind=Kind.ENDPOINTS, unsubscribe=("e",)))
    assert subscription.responses({**ALL, Kind.ENDPOINTS: {"e": "2"}}) == ()


def test_an_answer_to_another_nonce_answers_nothing() -> None:
    subscription = _subscribed()
    subscription.responses(ALL)
    assert subscription.receive(Request(kind=Kind.LISTENER, nonce="999", error="stale")) is None
    assert not subscription.settled(ALL)


def test_a_cluster_that_replaces_another_brings_its_endpoints_again() -> None:
    subscription = _subscribed()
    _acknowledge(subscription, *subscription.responses(ALL))
    replaced = subscription.responses({**ALL, Kind.CLUSTER: {"c": "2"}})
    assert [(each.kind, each.changed) for each in replaced] == [(Kind.CLUSTER, ("c",)), (Kind.ENDPOINTS, ("e",))]


def test_of_several_that_were_refused_together_each_is_sent_alone() -> None:
    available = {Kind.SECRET: {"bad": "1", "good": "1", "new": "1"}}
    subscription = Subscription()
    subscription.receive(Request(kind=Kind.SECRET, subscribe=("bad", "good")))
    (both,) = subscription.responses(available)
    assert subscription.receive(Request(kind=Kind.SECRET, nonce=both.nonce, error="no")) is None
    subscription.receive(Request(kind=Kind.SECRET, subscribe=("new",)))
    told: list[tuple[str, ...]] = []
    refused: list[str] = []
    while responses := subscription.responses(available):
        (response,) = responses
        told.append(response.changed)
        error = "no" if "bad" in response.changed else ""
        rejection = subscription.receive(Request(kind=Kind.SECRET, nonce=response.nonce, error=error))
        refused += rejection.names if rejection is not None else ()
    assert told == [("bad",), ("good",), ("new",)]
    assert refused == ["bad"]


def test_what_nobody_speaks_of_for_now_stays() -> None:
    subscription = Subscription(lambda name: name == "kept")
    subscription.receive(Request(kind=Kind.LISTENER, versions={"kept": "1", "gone": "1"}))
    assert [each.removed for each in subscription.responses({})] == [("gone",)]
