"""The node's certificate renews itself, on the CA's own files."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.join import certificate_life_s, node_key
from agent.leaves import signing_request
from agent.renewal import Renew, Renewal
from agent.trust import Trusting, trusting
from controller.ca import FleetCa
from outrider.errors import InputError, PeerError
from outrider.ids import NodeId
from outrider.log import Log
from outrider.tls import Identity, IdentityKind, TlsFiles
from tests.integration.processes import until

N1 = NodeId("n1")
IDENTITY = Identity(kind=IdentityKind.NODE, name=N1, cluster="dev")


def joined(ca: FleetCa, directory: Path) -> TlsFiles:
    files = TlsFiles(ca=directory / "ca.crt", certificate=directory / "node.crt", key=directory / "node.key")
    csr = signing_request(node_key(files.key), IDENTITY.uri)
    files.ca.write_bytes(ca.roots_pem)
    files.certificate.write_bytes(ca.issue_node(csr.encode(), N1).pem)
    return files


def renewal_of(files: TlsFiles, renew: Renew, changed: Callable[[Trusting], None]) -> Renewal:
    rng = random.Random(1)  # noqa: S311 - jitter
    return Renewal(files=files, identity=IDENTITY, renew=renew, changed=changed, log=Log("test"), rng=rng)


@pytest.mark.parametrize("away", [False, True], ids=["at once", "after a refusal"])
async def test_a_certificate_past_half_its_life_is_renewed(
    tmp_path: Path, away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.renewal._RETRY_S", 0.01)
    ca = FleetCa(tmp_path / "ca", "dev", node_valid_s=2)  # five minutes old from the start: long due
    files = joined(ca, tmp_path)
    longer = FleetCa(tmp_path / "ca", "dev", node_valid_s=86_400)
    refusals = 1 if away else 0

    async def renew(csr_pem: str) -> str:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise PeerError("no controller is connected")
        return longer.issue_node(csr_pem.encode(), N1).pem.decode()

    renewal = renewal_of(files, renew, lambda _: None)
    task = asyncio.create_task(renewal.run())
    try:
        before_s = renewal.expires_at_s
        await until(lambda: renewal.expires_at_s != before_s, "the certificate is another")
    finally:
        task.cancel()
    since_s, until_s = certificate_life_s(files.certificate)
    assert until_s - since_s > 86_000
    assert renewal.expires_at_s == until_s


async def test_a_change_of_the_fleets_ca_is_taken_up_at_once_and_told(tmp_path: Path) -> None:
    ca = FleetCa(tmp_path / "ca", "dev")
    files = joined(ca, tmp_path)
    told: list[Trusting] = []
    issued = 0

    async def renew(csr_pem: str) -> str:
        nonlocal issued
        issued += 1
        return ca.issue_node(csr_pem.encode(), N1).pem.decode()

    renewal = renewal_of(files, renew, told.append)
    task = asyncio.create_task(renewal.run())
    try:
        before = ca.sha256
        ca.rotate()
        renewal.tell(ca.roots, ca.sha256)
        both = Trusting(roots_sha256=(ca.sha256, before), issuer_sha256=ca.sha256)
        await until(lambda: both in told, "the certificate is of the new CA, and both are trusted")
        ca.retire()
        renewal.tell(ca.roots, ca.sha256)
        alone = Trusting(roots_sha256=(ca.sha256,), issuer_sha256=ca.sha256)
        await until(lambda: alone in told, "the new CA alone is trusted")
        assert trusting(files) == alone
        assert issued == 1, "the end of the change asks for no certificate"
        with pytest.raises(InputError, match="no certificate"):
            renewal.tell(("garbage",), ca.sha256)
        with pytest.raises(InputError, match="none of them"):
            renewal.tell(ca.roots, before)
        assert trusting(files) == alone
    finally:
        task.cancel()
