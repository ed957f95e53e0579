"""The node's certificate renews itself, on the CA's own files."""

import asyncio
import random
from pathlib import Path

import pytest

from agent.join import certificate_life_s, node_key
from agent.leaves import signing_request
from agent.renewal import Renewal
from controller.ca import FleetCa
from outrider.errors import PeerError
from outrider.ids import NodeId
from outrider.log import Log
from outrider.tls import Identity, IdentityKind, TlsFiles
from tests.integration.processes import until

N1 = NodeId("n1")
IDENTITY = Identity(kind=IdentityKind.NODE, name=N1, cluster="dev")


@pytest.mark.parametrize("away", [False, True], ids=["at once", "after a refusal"])
async def test_a_certificate_past_half_its_life_is_renewed(
    tmp_path: Path, away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.renewal._RETRY_S", 0.01)
    ca = FleetCa(tmp_path / "ca", "dev", node_valid_s=2)  # five minutes old from the start: long due
    files = TlsFiles(ca=tmp_path / "ca.crt", certificate=tmp_path / "node.crt", key=tmp_path / "node.key")
    csr = signing_request(node_key(files.key), IDENTITY.uri)
    files.certificate.write_bytes(ca.issue_node(csr.encode(), N1).pem)
    longer = FleetCa(tmp_path / "ca", "dev", node_valid_s=86_400)
    refusals = 1 if away else 0

    async def renew(csr_pem: str) -> str:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise PeerError("no controller is connected")
        return longer.issue_node(csr_pem.encode(), N1).pem.decode()

    renewal = Renewal(files=files, identity=IDENTITY, renew=renew, log=Log("test"), rng=random.Random(1))  # noqa: S311 - jitter
    task = asyncio.create_task(renewal.run())
    try:
        before_s = renewal.expires_at_s
        await until(lambda: renewal.expires_at_s != before_s, "the certificate is another")
    finally:
        task.cancel()
    since_s, until_s = certificate_life_s(files.certificate)
    assert until_s - since_s > 86_000
    assert renewal.expires_at_s == until_s
