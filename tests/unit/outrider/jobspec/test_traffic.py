"""`traffic:` of a service: what is read, and what is refused, where."""

import textwrap
from pathlib import Path

import pytest

from outrider.jobspec.reader import JobFileError, parse_job
from outrider.model.job import Service
from outrider.model.traffic import Balancing, Leg, Sticky

GOOD = """
meta: {version: "2"}
traffic:
  subsets: {v1: {version: "1"}, v2: {version: "2"}}
  split: {/v1: 90, /v2: 10%}
  routes:
    - {prefix: /v2/, to: /v2, rewrite: /, timeout: 2s, retries: {attempts: 2, statuses: [503]}}
    - {headers: {x-canary: {present: true}}, to: next/blue}
  failover: [backup]
  sticky: {cookie: cart, ttl: 1h}
  limits: {requests: 100}
  outliers: {errors: 3}
  retry_budget: 20%
  mirror: {to: shadow, percent: 5}
  fault: {abort: 503, percent: 0.5, header: x-chaos}
  rate: {requests: 100, burst: 200}
"""


JOB = """
job: shop
groups:
  api:
    network: {{ports: {{http: {{}}}}}}
    services:
      - name: api
        port: http
        protocol: {protocol}
{more}
    tasks: {{server: {{command: [x]}}}}
"""


def service_of(more: str, protocol: str = "http") -> Service:
    text = JOB.format(protocol=protocol, more=textwrap.indent(more, "        "))
    return parse_job(text.encode(), Path("job.yaml")).groups[0].services[0]


def errors(more: str, protocol: str = "http") -> list[str]:
    with pytest.raises(JobFileError) as refused:
        service_of(more, protocol)
    return str(refused.value).splitlines()


def test_all_keys_are_read() -> None:
    service = service_of(GOOD)
    traffic = service.traffic
    assert traffic is not None
    assert service.meta == {"version": "2"}
    assert traffic.split == (
        Leg(service="api", subset="v1", weight=9000),
        Leg(service="api", subset="v2", weight=1000),
    )
    assert traffic.routes[0].retries.statuses == (503,)
    assert traffic.routes[1].legs == (Leg(service="next", subset="blue"),)
    assert (traffic.policy.balance, traffic.policy.sticky) == (
        Balancing.RING_HASH,
        Sticky(cookie="cart", ttl_s=3600.0),
    )
    assert traffic.policy.budget_percent == 20
    assert traffic.fault is not None
    assert traffic.fault.percent == 0.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("split: {/v1: 50, other: 40}", "the service has no subset 'v1'"),
        ("split: {a: 50, b: 40}", "add up to 90 %, not to 100 %"),
        ("routes: [{prefix: /, to: a}, {path: /x, to: b}]", "is never taken: routes[0] takes all that it matches"),
        ("routes: [{path: x, to: a}]", "a path begins with /"),
        ("routes: [{path: /x, prefix: /y, to: a}]", "give one of path, prefix and regex"),
        ("routes: [{regex: '(', to: a}]", "no regular expression"),
        ("routes: [{path: /x, to: Not_a_name}]", "is not the name of a service"),
        ("sticky: {cookie: a, header: b}", "expected exactly one of cookie, header and source"),
        ("{sticky: {cookie: a}, balance: random}", "sticky needs ring-hash or maglev"),
        ("retries: {statuses: [200]}", "no status of an error"),
        ("fault: {percent: 5}", "expected delay or abort"),
        ("rate: {requests: 0}", "expected 1 to 10000000"),
        ("splits: {}", "unknown key; did you mean 'split'?"),
    ],
)
def test_what_is_wrong_is_told(text: str, told: str) -> None:
    assert any(told in error for error in errors(f"traffic: {text}" if text[0] == "{" else f"traffic: {{{text}}}"))


def test_requests_are_not_routed_where_there_are_none() -> None:
    assert any("say `protocol: http`" in error for error in errors("traffic: {timeout: 1s}", protocol="tcp"))
