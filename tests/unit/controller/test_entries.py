"""Config entries compiled: what calls of a service come to, as Consul's discovery chain has it."""

import msgspec
import pytest

from controller.core.mesh_intent import OwnedTraffic
from controller.entries import (
    DEFAULTS,
    RESOLVER,
    ROUTER,
    SPLITTER,
    Entries,
    Entry,
    compiled,
    go_duration,
    go_duration_s,
    keyed,
    problem,
    rate_of,
    subsets_of,
)
from controller.mesh.owned_entries import owned_entries, plan_entries
from outrider.ids import JobName, ServiceName
from outrider.model.job import Protocol
from outrider.model.traffic import (
    Balancing,
    Failover,
    HttpFault,
    HttpMatch,
    Leg,
    Mirror,
    Policy,
    RateLimit,
    Retries,
    Route,
    ServiceTraffic,
    Sticky,
    Subset,
    Traffic,
)

API = ServiceName("api")


def entries(*bodies: dict[str, object]) -> Entries:
    """As Consul's JSON has them."""
    return keyed(msgspec.convert(body, Entry) for body in bodies)


def test_a_service_that_nobody_says_anything_of_is_called_itself() -> None:
    assert compiled({}, "api") == ServiceTraffic()


def test_a_split_goes_through_other_services_splits_and_adds_up() -> None:
    found = entries(
        {"Kind": SPLITTER, "Name": "api", "Splits": [{"Weight": 33.34}, {"Weight": 66.66, "Service": "next"}]},
        {"Kind": SPLITTER, "Name": "next", "Splits": [{"Weight": 50, "ServiceSubset": "a"}, {"Weight": 50}]},
    )
    (route,) = compiled(found, "api").routes
    assert route.legs == (
        Leg(service="api", weight=3334),
        Leg(service="next", subset="a", weight=3333),
        Leg(service="next", weight=3333),
    )


def test_a_router_is_asked_in_order_and_its_rest_goes_to_the_service() -> None:
    match = {"HTTP": {"PathPrefix": "/v2", "Header": [{"Name": "x", "Present": True}], "Methods": ["GET"]}}
    to = {"ServiceSubset": "v2", "PrefixRewrite": "/", "RequestTimeout": "1m30s", "NumRetries": 2}
    found = entries(
        {"Kind": ROUTER, "Name": "api", "Routes": [{"Match": match, "Destination": to}]},
        {"Kind": RESOLVER, "Name": "api", "DefaultSubset": "v1"},
    )
    first, rest = compiled(found, "api").routes
    assert (first.match.path_prefix, first.match.methods, first.match.headers[0].present) == ("/v2", ("GET",), True)
    assert (first.legs, first.timeout_s, first.retries.attempts) == ((Leg(service="api", subset="v2"),), 90.0, 2)
    assert rest == Route(legs=(Leg(service="api", subset="v1"),))


def test_a_circle_of_redirects_or_splits_ends() -> None:
    circle = entries(
        {"Kind": RESOLVER, "Name": "a", "Redirect": {"Service": "b"}},
        {"Kind": RESOLVER, "Name": "b", "Redirect": {"Service": "a"}},
        {"Kind": SPLITTER, "Name": "c", "Splits": [{"Weight": 100, "Service": "d"}]},
        {"Kind": SPLITTER, "Name": "d", "Splits": [{"Weight": 100, "Service": "c"}]},
    )
    assert compiled(circle, "a").target is None
    assert len(compiled(circle, "c").routes) <= 1


def test_consuls_load_balancer_and_failover_are_read() -> None:
    policies = [{"Field": "cookie", "FieldValue": "cart", "CookieConfig": {"TTL": "1h0m0s"}}]
    found = entries(
        {
            "Kind": RESOLVER,
            "Name": "api",
            "ConnectTimeout": "2s",
            "LoadBalancer": {"Policy": "maglev", "HashPolicies": policies},
            "Failover": {"*": {"Service": "backup"}},
            "Subsets": {"v1": {"Filter": 'Service.Meta.version == v1 and Service.Meta.zone == "a"'}},
        }
    )
    traffic = compiled(found, "api")
    assert traffic.policy == Policy(
        balance=Balancing.MAGLEV, sticky=Sticky(cookie="cart", ttl_s=3600.0), connect_timeout_s=2.0
    )
    backup = (Leg(service="backup"),)
    assert traffic.failovers == (Failover(subset="", to=backup), Failover(subset="v1", to=backup))
    assert subsets_of(found, "api", {"version": "v1", "zone": "a"}) == ("v1",)
    assert subsets_of(found, "api", {"version": "v1"}) == ()


def test_a_filter_that_is_not_understood_is_told_and_chooses_nobody() -> None:
    found = entries({"Kind": RESOLVER, "Name": "api", "Subsets": {"v1": {"Filter": "Service.Tags contains v1"}}})
    assert "Service.Meta.KEY == VALUE" in problem(found[RESOLVER, "api"])
    assert subsets_of(found, "api", {}) == ()


def test_a_job_gets_back_what_its_entries_say() -> None:
    v1, v2 = Leg(service="api", subset="v1", weight=9000), Leg(service="api", subset="v2", weight=1000)
    traffic = Traffic(
        subsets=(Subset(name="v1", meta={"version": "1"}), Subset(name="v2", meta={"version": "2"})),
        split=(v1, v2),
        routes=(Route(match=HttpMatch(path_exact="/x"), legs=(Leg(service="other"),)),),
        timeout_s=1.5,
        retries=Retries(attempts=2, connect_failure=True, statuses=(503,)),
        policy=Policy(balance=Balancing.RANDOM),
        mirror=Mirror(to=Leg(service="shadow"), percent=10),
        fault=HttpFault(abort=503, percent=1),
        rate=RateLimit(requests=5),
    )
    owned = OwnedTraffic(service=API, protocol=Protocol.HTTP, job=JobName("shop"), traffic=traffic)
    wanted = owned_entries(owned, "c", {ServiceName("other"): Protocol.HTTP})
    found = keyed(msgspec.json.decode(msgspec.json.encode(one), type=Entry) for one in wanted)
    back = compiled(found, "api")
    assert [route.legs for route in back.routes] == [(Leg(service="other"),), (v1, v2), (v1, v2)]
    assert (back.routes[1].timeout_s, back.routes[1].retries) == (1.5, traffic.retries)
    assert (back.policy, back.mirror, back.fault) == (traffic.policy, traffic.mirror, traffic.fault)
    assert rate_of(found, "api") == traffic.rate
    assert subsets_of(found, "api", {"version": "2"}) == ("v2",)
    assert not plan_entries(wanted, found.values(), "c").put
    order = [one.kind for one in plan_entries(wanted, (), "c").put]
    assert order == [DEFAULTS, DEFAULTS, RESOLVER, SPLITTER, ROUTER]
    assert [kind for kind, _ in plan_entries((), found.values(), "c").delete] == order[::-1]


def test_an_entry_by_hand_wins_and_stays() -> None:
    owned = OwnedTraffic(service=API, protocol=Protocol.HTTP, job=JobName("shop"), traffic=Traffic(timeout_s=1.0))
    wanted = owned_entries(owned, "c", {})
    by_hand = Entry(kind=ROUTER, name="api")
    plan = plan_entries(wanted, [by_hand], "c")
    assert [one.kind for one in plan.put] == [DEFAULTS]
    assert plan_entries((), [by_hand], "c").delete == ()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "250ms"), (1.5, "1.5s"), (60, "1m0s"), (5400, "1h30m0s"), (0, "")]
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text
    assert go_duration_s(text) == seconds
