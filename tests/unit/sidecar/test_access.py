"""Intentions as Envoy's ordered rules, and what counts as a revocation."""

from outrider.ids import ServiceName
from outrider.model.mesh import Action, Intention, TrustRoots, spiffe_id
from sidecar.core.access import AccessHistory, access_rules, allowed, refused_by, remember, revokes

API = ServiceName("api")
ROOTS = TrustRoots(datacenter="dc1", trust_domain="mesh.consul", certificates_pem=("root",))
WEB = spiffe_id("mesh.consul", "dc1", ServiceName("web"))
ADMIN = spiffe_id("mesh.consul", "dc1", ServiceName("admin"))


def _intention(source: str, action: Action) -> Intention:
    return Intention(source=source, destination="api", action=action, id=f"id:{source}")


def test_an_exact_intention_wins_over_the_wildcard_below_it() -> None:
    rules = access_rules(API, (_intention("web", Action.ALLOW), _intention("*", Action.DENY)), ROOTS)
    assert allowed(rules, WEB)
    assert not allowed(rules, ADMIN)


def test_without_any_intention_nobody_may_call() -> None:
    assert not allowed(access_rules(API, (), ROOTS), WEB)


def test_the_record_of_a_refusal_leads_back_to_its_intention() -> None:
    rule = access_rules(API, (_intention("web", Action.DENY),), ROOTS)[0]
    assert refused_by(rule.name) == ("deny:web->api:id:web", "id:web")


def test_a_refusal_by_default_deny_names_no_intention() -> None:
    assert refused_by("default-deny") == ("", "")


def test_a_grant_revokes_nothing_and_a_revocation_raises_the_revision() -> None:
    closed = access_rules(API, (_intention("*", Action.DENY),), ROOTS)
    opened = access_rules(API, (_intention("web", Action.ALLOW), _intention("*", Action.DENY)), ROOTS)
    history: dict[ServiceName, AccessHistory] = {}
    for rules, revision in ((closed, 0), (opened, 0), (opened, 0), (closed, 1), (closed, 1), (opened, 1)):
        history = remember(history, {API: rules})
        assert history[API].revision == revision


def test_a_service_of_which_nothing_is_known_keeps_its_rules() -> None:
    opened = access_rules(API, (_intention("web", Action.ALLOW),), ROOTS)
    history = remember({}, {API: opened})
    assert remember(history, {}) == history
    assert remember(history, {API: ()})[API] == AccessHistory(rules=(), revision=1)


def test_denying_all_others_revokes_even_though_no_named_service_loses() -> None:
    everyone = access_rules(API, (_intention("*", Action.ALLOW),), ROOTS)
    only_web = access_rules(API, (_intention("web", Action.ALLOW),), ROOTS)
    assert revokes(everyone, only_web)
    assert not revokes(only_web, everyone)
