"""The mesh on a real Consul that asks for a token and speaks TLS alone: with the documented policy, and without one."""

import asyncio
import contextlib
import json
import random
import ssl
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.leaves import Leaves, signing_request
from controller.ca import FleetCa
from controller.config import ConsulConfig
from controller.consul_access import client_tls, token
from controller.core.mesh_intent import Interests, OwnedIntention, OwnedTraffic
from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.issuer import ConsulIssuer
from controller.mesh.mesh import Mesh
from outrider.errors import OutriderError
from outrider.ids import AllocId, JobName
from outrider.log import Log
from outrider.model.job import Protocol
from outrider.model.mesh import Leaf
from outrider.model.traffic import Leg, Traffic
from outrider.tls import TlsFiles
from tests.integration.consul import RealConsul
from tests.integration.processes import free_port, until
from tests.integration.test_mesh import API, CLUSTER, N2, SERVICES, WEB, Running, instance, node

pytestmark = pytest.mark.host

DOCUMENT = Path(__file__).parents[2] / "docs/OPERATIONS.md"


class Secured:
    """A Consul of this test's own, and the master's token for it."""

    def __init__(self, directory: Path, files: TlsFiles) -> None:
        self._directory, self._files = directory, files
        self._program = RealConsul(directory).program
        self._master = str(uuid.uuid4())
        self._https = free_port()
        self._process: asyncio.subprocess.Process | None = None
        self.url = f"https://127.0.0.1:{self._https}"

    async def start(self) -> None:
        tokens = {"master": self._master, "agent": self._master}
        files = self._files
        config = {
            "acl": {"enabled": True, "default_policy": "deny", "tokens": tokens},
            "ca_file": str(files.ca),
            "cert_file": str(files.certificate),
            "key_file": str(files.key),
            "verify_incoming_https": True,
            "ports": {"http": -1, "https": self._https, "dns": -1, "grpc": -1, "server": free_port()}
            | {"serf_lan": free_port(), "serf_wan": free_port()},
        }
        path = self._directory / "consul.json"
        path.write_text(json.dumps(config))
        words = [self._program, "agent", "-dev", "-node", "real", "-bind", "127.0.0.1", "-client", "127.0.0.1"]
        with (self._directory / "consul.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *words, "-config-file", str(path), stdout=log, stderr=log
            )
        await until(self._leads, "Consul has a leader and its ACLs", 60)

    async def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    async def policy(self, rules: str) -> str:
        """A token that may do what `rules` say."""
        await self._call("PUT", "acl/policy", {"Name": "outrider", "Rules": rules})
        made = await self._call("PUT", "acl/token", {"Policies": [{"Name": "outrider"}]})
        return str(made["SecretID"])

    async def new_root(self) -> None:
        """Another key is another root, which the old one signs crosswise."""
        key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        config = {"Provider": "consul", "Config": {"PrivateKey": key.decode(), "RootCert": ""}}
        await self._call("PUT", "connect/ca/configuration", config)

    async def _leads(self) -> bool:
        try:
            return bool(await self._call("GET", "acl/policies")) and bool(await self._call("GET", "connect/ca/roots"))
        except (aiohttp.ClientError, AssertionError):
            return False

    async def _call(self, method: str, path: str, body: object = None) -> dict[str, str]:
        context = ssl.create_default_context(cafile=self._files.ca)
        context.load_cert_chain(self._files.certificate, self._files.key)
        async with (
            aiohttp.ClientSession(headers={"X-Consul-Token": self._master}) as session,
            session.request(method, f"{self.url}/v1/{path}", json=body, ssl=context) as answer,
        ):
            assert answer.status == 200, await answer.text()
            found: dict[str, str] = json.loads(await answer.text() or "null")
            return found


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[tuple[Secured, TlsFiles]]:
    files = FleetCa(tmp_path / "ca", CLUSTER).issue_server(["127.0.0.1", "localhost"])
    consul = Secured(tmp_path, files)
    try:
        await consul.start()
        yield consul, files
    finally:
        await consul.stop()


@contextlib.asynccontextmanager
async def running(url: str, secret: str, files: TlsFiles, directory: Path) -> AsyncIterator[Running]:
    """As the controller is wired, from its configuration on."""
    (directory / "token").write_text(secret + "\n")
    config = ConsulConfig(
        url=url, token_file=directory / "token", ca_file=files.ca, cert_file=files.certificate, key_file=files.key
    )
    consul = ConsulAdapter(config.url, token=token(config), tls=client_tls(config))
    mesh = Mesh(consul=consul, issuer=ConsulIssuer(consul), cluster=CLUSTER, adopt_intentions=False, log=Log("mesh"))
    mesh.set_services(SERVICES)
    mesh.set_interests(N2, Interests(called=frozenset({API}), placed=frozenset({WEB})))
    task = asyncio.create_task(mesh.run(), name="mesh")
    try:
        yield Running(mesh, consul)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, OutriderError):
            await task
        await consul.close()


def documented_policy() -> str:
    """As docs/OPERATIONS.md has it, word by word."""
    text = DOCUMENT.read_text()
    begin = text.index("```hcl\n") + len("```hcl\n")
    return text[begin : text.index("```", begin)].replace("CLUSTER", CLUSTER)


async def test_the_documented_policy_is_enough_for_all_that_the_mesh_does(
    secured: tuple[Secured, TlsFiles], tmp_path: Path
) -> None:
    consul, files = secured
    secret = await consul.policy(documented_policy())
    async with running(consul.url, secret, files, tmp_path) as one:
        one.connect(N2)
        one.mesh.set_node(node("n1", instance("a1")))
        await until(lambda: one.healthy(N2, API) == {"a1-api"}, "a1 is registered, and healthy", 30)
        one.mesh.set_intentions((OwnedIntention(source=WEB, destination=API, job=JobName("shop")),))
        split = Traffic(split=(Leg(service=API, weight=5000), Leg(service=WEB, weight=5000)))
        one.mesh.set_traffic((OwnedTraffic(service=API, protocol=Protocol.HTTP, job=JobName("shop"), traffic=split),))

        async def allowed() -> bool:
            return (await one.mesh.check(WEB, API))[0]

        await until(allowed, "the job's intention", 30)

        def is_split() -> bool:
            found = one.mesh.service(API)
            return found is not None and found.traffic.routes != ()

        await until(is_split, "the job's split", 30)
        assert not (await one.mesh.check(API, WEB))[0], "its ACLs deny by default: no intention had to be adopted"
        request = signing_request(ec.generate_private_key(ec.SECP256R1()), "spiffe://unused")
        leaf, (old,) = await one.mesh.issue(API, request), one.mesh.roots().certificates_pem
        assert issued_by(leaf, old)
        assert not leaf.superseded
        await consul.new_root()
        await until(lambda: len(one.mesh.roots().certificates_pem) == 2, "the new root is known", 30)
        new, kept = one.mesh.roots().certificates_pem
        assert kept == old
        leaf = await one.mesh.issue(API, request)  # Consul's agent takes up to half a minute for another
        assert (issued_by(leaf, old), issued_by(leaf, new)) == (leaf.superseded, not leaf.superseded)


def issued_by(leaf: Leaf, root_pem: str) -> bool:
    certificate = x509.load_pem_x509_certificate(leaf.certificate_pem.encode())
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(root_pem.encode()))
    except (ValueError, InvalidSignature):
        return False
    return True


@pytest.mark.deep
async def test_the_leaves_of_what_runs_follow_a_new_root_within_a_minute(
    secured: tuple[Secured, TlsFiles], tmp_path: Path
) -> None:
    consul, files = secured
    secret = await consul.policy(documented_policy())
    given: list[Leaf] = []

    def of(root_pem: str) -> set[str]:
        return {leaf.service for leaf in given if issued_by(leaf, root_pem)}

    async with running(consul.url, secret, files, tmp_path) as one, asyncio.TaskGroup() as group:
        leaves = Leaves(issue=one.mesh.issue, give=given.append, log=Log("leaves"), rng=random.Random(1))  # noqa: S311 - jitter
        await until(lambda: len(one.mesh.roots().certificates_pem) == 1, "the root is known", 30)
        (old,) = one.mesh.roots().certificates_pem
        leaves.set_roots(one.mesh.roots())
        leaves.acquire(AllocId("a1"), (API, WEB), group)
        await until(lambda: of(old) == {API, WEB}, "both have leaves", 30)
        assert not any(leaf.superseded for leaf in given)

        await consul.new_root()
        await until(lambda: len(one.mesh.roots().certificates_pem) == 2, "the new root is known", 30)
        leaves.set_roots(one.mesh.roots())
        new, _ = one.mesh.roots().certificates_pem
        await until(lambda: of(new) == {API, WEB}, "both have leaves of the new root", 120)
        leaves.release(AllocId("a1"))


async def test_without_a_token_or_a_certificate_nothing_is_taken_charge_of_and_it_is_said(
    secured: tuple[Secured, TlsFiles], tmp_path: Path
) -> None:
    consul, files = secured
    async with running(consul.url, str(uuid.uuid4()), files, tmp_path) as one:
        with pytest.raises(OutriderError, match=r"ACL not found|Permission denied"):
            await one.mesh.intentions()
        assert not one.mesh.leading
    config = ConsulConfig(url=consul.url, ca_file=files.ca)
    stranger = ConsulAdapter(config.url, tls=client_tls(config))
    with pytest.raises(OutriderError):
        await stranger.probe()
    await stranger.close()
