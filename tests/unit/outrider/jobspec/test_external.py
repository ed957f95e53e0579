"""`external:` of a group's network: what is read, what it implies, and what is wrong with it."""

from pathlib import Path

import pytest

from outrider.codec import from_wire, to_wire
from outrider.ids import ServiceName
from outrider.jobspec.reader import JobFileError, parse_job
from outrider.model.external import External, ExternalPort, ExternalTls
from outrider.model.job import Job
from outrider.v1 import job_pb2
from tests.integration.certificates import Authority


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "ca.pem").write_text(Authority("x", "dc1").certificate_pem)
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    (tmp_path / "empty.pem").write_text("\n")
    (tmp_path / "cut.pem").write_text("-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----\n")
    (tmp_path / "binary.pem").write_bytes(b"\xff\xfe")
    return tmp_path


def job(external: str, services: str = "[{name: web, upstreams: [api]}]") -> bytes:
    return (
        f"job: shop\ngroups:\n  web:\n    services: {services}\n    tasks: {{t: {{command: [x]}}}}\n"
        f"    network:\n      external: {external}\n"
    ).encode()


def read(external: str, directory: Path) -> Job:
    return parse_job(job(external), directory / "job.yaml")


def test_hosts_ports_and_who_speaks_tls(directory: Path) -> None:
    text = (
        "{payments: {hosts: [API.Payments.example], ports: [443, {port: 80, to: 443}], tls: {ca: ca.pem}}, "
        "mail: {hosts: [203.0.113.7, 203.0.113.8], ports: [25]}, "
        "old: {hosts: [10.0.0.9], ports: [8443], tls: {server_name: Old.example}}, new: {hosts: [n.example], "
        "ports: [1], tls: {}}}"
    )
    read_job = read(text, directory)
    both = (ExternalPort(port=443, to=443), ExternalPort(port=80, to=443))
    tls = ExternalTls(server_name="api.payments.example", ca_pem=(directory / "ca.pem").read_text())
    assert read_job.groups[0].network.external == (
        External(name=ServiceName("payments"), hosts=("api.payments.example",), ports=both, tls=tls),
        External(name=ServiceName("mail"), hosts=("203.0.113.7", "203.0.113.8"), ports=(ExternalPort(port=25, to=25),)),
        External(
            name=ServiceName("old"),
            hosts=("10.0.0.9",),
            ports=(ExternalPort(port=8443, to=8443),),
            tls=ExternalTls(server_name="old.example"),
        ),
        External(
            name=ServiceName("new"),
            hosts=("n.example",),
            ports=(ExternalPort(port=1, to=1),),
            tls=ExternalTls(server_name="n.example"),
        ),
    )
    assert from_wire(to_wire(read_job, job_pb2.Job), Job) == read_job


@pytest.mark.parametrize(
    ("external", "told"),
    [
        ("{pay: {ports: [443]}}", "external.pay.hosts: missing; for example `hosts: [api.example.org]`"),
        ("{pay: {hosts: [a.example]}}", "external.pay.ports: missing; for example `ports: [443]`"),
        ("{pay: {hosts: [a.example], port: [443]}}", "external.pay.port: unknown key; did you mean 'ports'?"),
        ("{pay: {hosts: [], ports: [443]}}", "pay.hosts: 0 hosts; from 1 to 16"),
        ("{pay: {hosts: [a.example], ports: []}}", "pay.ports: 0 ports; from 1 to 16"),
        (
            "{pay: {hosts: [a.example], ports: [https]}}",
            "pay.ports[0]: expected a port's number, or {port: 80, to: 443}",
        ),
        ("{pay: {hosts: [a.example], ports: [70000]}}", "pay.ports[0]: 70000 is not within 1 and 65535"),
        ("{pay: {hosts: [a.example], ports: [{port: 80, to: 0}]}}", "pay.ports[0]: 0 is not within 1 and 65535"),
        ("{pay: {hosts: [a.example], ports: [80, {port: 80, to: 443}]}}", "pay.ports[1]: port 80 stands here twice"),
        ('{pay: {hosts: ["*.a.example"], ports: [443]}}', "hosts[0]: '*.a.example' names no one host"),
        ('{pay: {hosts: ["https://a.example"], ports: [443]}}', "hosts[0]: 'https://a.example' is no host"),
        ('{pay: {hosts: ["::1"], ports: [443]}}', "hosts[0]: '::1' is no host: a name, such as api.example.org, or"),
        ("{pay: {hosts: [1.2.3], ports: [443]}}", "hosts[0]: '1.2.3' is no IPv4 address"),
        ("{pay: {hosts: [127.0.0.1], ports: [443]}}", "hosts[0]: 127.0.0.1 is nowhere outside"),
        ("{pay: {hosts: [198.18.1.0], ports: [443]}}", "hosts[0]: 198.18.1.0 is nowhere outside"),
        (
            "{pay: {hosts: [db.mesh], ports: [443]}}",
            "hosts[0]: 'db.mesh' is a name of the mesh; put it under `upstreams`",
        ),
        ("{pay: {hosts: [a.example, a.example], ports: [1]}}", "hosts[1]: 'a.example' is a host of pay already"),
        (
            "{pay: {hosts: [a.example], ports: [1]}, mail: {hosts: [a.example], ports: [2]}}",
            "mail.hosts[0]: 'a.example' is a host of pay already; put its ports together there",
        ),
        ("{api: {hosts: [a.example], ports: [1]}}", "external.api: api.mesh is an upstream of the group already"),
        ("{Pay: {hosts: [a.example], ports: [1]}}", "external.Pay: 'Pay' is no name"),
        ("{pay: {hosts: [10.0.0.1], ports: [1], tls: {}}}", "tls.server_name: missing: several hosts, or an address"),
        ("{pay: {hosts: [a.b, c.d], ports: [1], tls: {}}}", "tls.server_name: missing: several hosts, or an address"),
        ("{pay: {hosts: [a.b], ports: [1], tls: {server_name: 10.0.0.1}}}", "server_name: '10.0.0.1' is no name"),
        ("{pay: {hosts: [a.b], ports: [1], tls: {sni: a}}}", "tls.sni: unknown key; known are server_name, ca"),
        ("{pay: {hosts: [a.b], ports: [1], tls: {ca: no.pem}}}", "no.pem: cannot be read: No such file or directory"),
        ("{pay: {hosts: [a.b], ports: [1], tls: {ca: empty.pem}}}", "tls.ca: empty.pem: is empty"),
        ("{pay: {hosts: [a.b], ports: [1], tls: {ca: binary.pem}}}", "tls.ca: binary.pem: no PEM file"),
        ("{pay: {hosts: [a.b], ports: [1], tls: {ca: key.pem}}}", "tls.ca: holds a private key, which travels nowhere"),
        ("{pay: {hosts: [a.b], ports: [1], tls: {ca: cut.pem}}}", "tls.ca: holds a certificate that is cut or garbled"),
        ("[a.example]", "network.external: expected keys and values, found a list"),
    ],
)
def test_a_bad_external_service_says_what_is_wrong(external: str, told: str, directory: Path) -> None:
    with pytest.raises(JobFileError) as caught:
        read(external, directory)
    assert told in str(caught.value)
    assert "job.yaml:7:" in str(caught.value), "and where"


def test_without_a_service_there_is_no_sidecar_to_lead_there(directory: Path) -> None:
    with pytest.raises(JobFileError, match=r"network\.external: a sidecar leads there, and a group without services"):
        parse_job(job("{pay: {hosts: [a.example], ports: [443]}}", "[]"), directory / "job.yaml")
