"""Intentions as ordered access rules, and when a change of them takes a right away. Never talks to Envoy."""

from collections.abc import Mapping

from outrider.ids import ServiceName
from outrider.model.job import Value
from outrider.model.mesh import Action, Intention, TrustRoots, spiffe_id
from outrider.model.traffic import Permission, Verdict

ANYONE = "*"
DEFAULT_DENY = "default-deny"  # the name Envoy records where no intention matched


class AccessRule(Value, frozen=True, kw_only=True):
    """First match decides, as Consul's precedence does: intentions arrive sorted by it."""

    name: str
    source: str  # a SPIFFE id, or ANYONE: every service of the datacenter
    action: Action  # with permissions: of what none of them matches
    permissions: tuple[Permission, ...] = ()  # mean nothing on a connection without requests


def access_rules(service: ServiceName, intentions: tuple[Intention, ...], roots: TrustRoots) -> tuple[AccessRule, ...]:
    """The rules of `service`. `intentions` are those that match it as destination, highest precedence first.

    What no rule matches is denied: default deny holds even before the first intention is known.
    """
    return tuple(
        AccessRule(
            name=rule_name(service, intention),
            source=ANYONE if intention.source == ANYONE else _source_spiffe(intention, roots),
            action=Action.DENY if intention.permissions else intention.action,
            permissions=intention.permissions,
        )
        for intention in intentions
    )


def rule_name(service: ServiceName, intention: Intention) -> str:
    """What Envoy's own record of a refusal says: readable, and `refused_by` finds the intention in it."""
    kind = "http" if intention.permissions else intention.action
    return f"{kind}:{intention.source}->{intention.destination or service}:{intention.id}"


def refused_by(rule: str) -> tuple[str, str]:
    """(rule, intention id) for ObservedRefusal, from the policy name in Envoy's record; ("", "") by default deny."""
    if rule == DEFAULT_DENY or rule.count(":") < 2:
        return "", ""
    return rule, rule.split(":", 2)[2]


def allowed(rules: tuple[AccessRule, ...], source_spiffe: str) -> bool:
    """Whether `rules` let `source_spiffe`, a service of the datacenter, call."""
    rule = _deciding(rules, source_spiffe)
    return rule is not None and (rule.action is Action.ALLOW or _grants(rule) != frozenset())


def revokes(before: tuple[AccessRule, ...], after: tuple[AccessRule, ...]) -> bool:
    """Whether somebody who could call under `before` cannot under `after`.

    Sources that neither names are all alike: one nobody can be called stands for them.
    """
    sources = {rule.source for rule in before + after} - {ANYONE} | {""}
    return any(_loses(before, after, source) for source in sources)


class AccessHistory(Value, frozen=True, kw_only=True):
    """A service's rules as last served, and how often a change of them revoked. Survives the agent, not the sidecar."""

    rules: tuple[AccessRule, ...] = ()
    revision: int = 0


def remember(
    history: Mapping[ServiceName, AccessHistory], rules: Mapping[ServiceName, tuple[AccessRule, ...]]
) -> dict[ServiceName, AccessHistory]:
    """`history` brought up to date with `rules`: a revocation raises the service's revision, a grant does not.

    A service that `rules` leaves out keeps what it had: nothing is known of it, which takes nothing away.
    """
    updated = dict(history)
    for service, now in rules.items():
        past = history.get(service, AccessHistory())
        updated[service] = AccessHistory(rules=now, revision=past.revision + revokes(past.rules, now))
    return updated


def _deciding(rules: tuple[AccessRule, ...], source_spiffe: str) -> AccessRule | None:
    return next((rule for rule in rules if rule.source in (ANYONE, source_spiffe)), None)


def _grants(rule: AccessRule) -> frozenset[Permission]:
    return frozenset(one for one in rule.permissions if one.action is Verdict.ALLOW)


def _loses(before: tuple[AccessRule, ...], after: tuple[AccessRule, ...], source: str) -> bool:
    """With permissions a right may go in part: one that is no longer granted, or a denial that was not there."""
    old, new = _deciding(before, source), _deciding(after, source)
    if not allowed(before, source):
        return False
    assert old is not None
    if new is None or not allowed(after, source):
        return True
    if new.action is Action.ALLOW:
        return False
    if old.action is Action.ALLOW:
        return True
    denials = frozenset(new.permissions) - _grants(new) - frozenset(old.permissions)
    return bool(denials) or not _grants(old) <= _grants(new)


def _source_spiffe(intention: Intention, roots: TrustRoots) -> str:
    return spiffe_id(roots.trust_domain, roots.datacenter, ServiceName(intention.source))
