"""`gateway:` of a service: what is read, what it implies, and what is wrong with it."""

from pathlib import Path

import pytest

from outrider.ids import PortName, SecretName, ServiceName
from outrider.jobspec.reader import JobFileError, parse_job
from outrider.model.gateway import GatewayListener, GatewayRoute
from outrider.model.job import Upstream


def test_without_a_task_there_is_nothing_to_check() -> None:
    with pytest.raises(JobFileError, match=r"services\[0\]: the group has no task that could serve, or be checked"):
        parse_job((job("[{port: db, to: db}]") + "        check: {tcp: true}\n").encode(), Path("job.yaml"))


def job(gateway: str, ports: str = "{https: {static: 8443}, db: {static: 5433}, inner: {}}") -> str:
    return (
        f"job: edge\ngroups:\n  edge:\n    network: {{ports: {ports}}}\n    services:\n      - name: edge\n"
        f"        upstreams: [web]\n        gateway: {gateway}\n"
    )


def test_a_gateway_needs_no_task_and_calls_what_it_lets_callers_to() -> None:
    text = (
        "[{port: https, tls: {secret: edge-tls}, routes: [{host: Shop.Example, to: web}, "
        '{host: "*.shop.example", prefix: /api/, to: api}]}, {port: db, to: db}]'
    )
    (group,) = parse_job(job(text).encode(), Path("job.yaml")).groups
    assert group.tasks == ()
    (service,) = group.services
    assert service.upstreams == tuple(Upstream(service=ServiceName(name)) for name in ("web", "api", "db"))
    web, api = (
        GatewayRoute(to=ServiceName("web"), host="shop.example"),
        GatewayRoute(to=ServiceName("api"), host="*.shop.example", prefix="/api/"),
    )
    assert service.gateway == (
        GatewayListener(port=PortName("https"), routes=(web, api), secret=SecretName("edge-tls")),
        GatewayListener(port=PortName("db"), to=ServiceName("db")),
    )


@pytest.mark.parametrize(
    ("gateway", "told"),
    [
        ("[{to: db}]", "gateway[0].port: missing"),
        ("[{port: htps, to: db}]", "gateway[0].port: the group has no port 'htps'; did you mean 'https'?"),
        ("[{port: inner, to: db}]", "gateway[0].port: port inner is not published: give it `static: NUMBER`"),
        ("[{port: db}]", "gateway[0]: give either `to`, for connections as they are, or `routes`, for requests"),
        ("[{port: db, to: db, routes: [{to: web}]}]", "gateway[0]: give either `to`"),
        ("[{port: db, to: db}, {port: db, to: web}]", "gateway[1].port: port db has a listener already"),
        ("[{port: db, to: DB}]", "gateway[0].to: 'DB' is no name"),
        ("[{port: db, routes: [{to: web}, {to: api}]}]", "routes[1]: overlaps routes[0]: the same host and prefix"),
        ('[{port: db, routes: [{host: "a.*", to: web}]}]', "routes[0].host: 'a.*' is no host"),
        ("[{port: db, routes: [{prefix: api, to: web}]}]", "routes[0].prefix: 'api' is no path"),
        ('[{port: db, routes: [{prefix: "/a?b", to: web}]}]', "routes[0].prefix: '/a?b' is no path"),
        ("[{port: db, routes: [{host: a.example}]}]", "routes[0].to: missing"),
        ("[{port: db, to: db, tls: {file: x.pem}}]", "tls.file: unknown key"),
        ("[{port: db, to: db, tls: {}}]", "tls.secret: missing"),
    ],
)
def test_a_bad_gateway_says_what_is_wrong(gateway: str, told: str) -> None:
    with pytest.raises(JobFileError) as caught:
        parse_job(job(gateway).encode(), Path("job.yaml"))
    assert told in str(caught.value)
