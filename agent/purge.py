"""Takes everything of this node off the host: sandboxes, networks, mounts, control groups, claims, records, sockets.

The certificate and the key stay, for the node has not left its fleet, and its volumes. Refuses while its agent runs.
"""

import contextlib
import shutil

from agent.belongings import memory, volumes
from agent.belongings.mounted import Mounted
from agent.belongings.sticky import StickyDisks
from agent.config import Config
from agent.drivers import task_directory
from agent.host import open_host
from agent.sandbox.cgroup import ROOT
from outrider.log import Log


async def purge(config: Config) -> None:
    """Raises HostError where the node's agent still runs, or the host refuses."""
    log = Log("agent", node=config.node)
    async with open_host(config, log) as host:
        await host.runtime.remove_all()
        await host.networks.reap(())
        task_directory.remove(config.run / "tasks")
        memory.remove(config.run / "belongings")
        Mounted(config.run).remove_all()
        StickyDisks(config.run).remove_all()
        volumes.remove_mounts(config.run)
        shutil.rmtree(config.run / "devices", ignore_errors=True)
        shutil.rmtree(config.data / "allocations", ignore_errors=True)
        for name in ("ended", "dns", "spares", "sidecar", "roots", "artifacts", "partial"):
            shutil.rmtree(config.data / name, ignore_errors=True)
        for name in ("agent.json", "kvm.json"):
            (config.data / name).unlink(missing_ok=True)
        _remove_groups(config.cluster)
        while host.claims:
            host.claims.pop().release()
    log.info("purged")


def _remove_groups(cluster: str) -> None:
    """The control groups above the node's, on v1 and v2 hosts: gone with the last node of their fleet, and of all."""
    for name in (f"outrider/{cluster}", "outrider"):
        for path in (ROOT / name, *ROOT.glob(f"*/{name}")):
            with contextlib.suppress(OSError):  # in use by others, or not there
                path.rmdir()
