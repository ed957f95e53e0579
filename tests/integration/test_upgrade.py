"""An upgrade of every host between two built versions, while requests go through the mesh."""

import pytest

from bench.deploy import UPGRADE_HOSTS, outrider, upgrade_under_load
from tests.integration.ssh_hosts import SshHosts

pytestmark = pytest.mark.deep


@pytest.mark.timeout(1800)
def test_an_upgrade_fails_no_request_and_restarts_no_workload() -> None:
    with SshHosts(UPGRADE_HOSTS) as hosts:
        done, failed, lost = upgrade_under_load(hosts)
        assert done > 100
        assert failed == 0
        assert not lost
        versions = outrider(hosts, "node", "status", "h1")
        assert "0.1.0.1" in versions
