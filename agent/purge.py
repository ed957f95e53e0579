"""Takes everything of this node off the host: sandboxes, networks, mounts, control groups, claims, records, sockets.

The certificate and the key stay: the node has not left its fleet. Refuses while the node's agent runs.
"""

import shutil

from agent.app import open_host
from agent.config import Config
from agent.drivers import task_directory
from outrider.log import Log


async def purge(config: Config) -> None:
    """Raises HostError where the node's agent still runs, or the host refuses."""
    log = Log("agent", node=config.node)
    async with open_host(config, log) as host:
        await host.runtime.remove_all()
        await host.networks.reap(())
        task_directory.remove(config.run / "tasks")
        shutil.rmtree(config.data / "allocations", ignore_errors=True)
        shutil.rmtree(config.data / "dns", ignore_errors=True)
        for name in ("agent.json", "kvm.json"):
            (config.data / name).unlink(missing_ok=True)
        for claim in host.claims:
            claim.release()
    log.info("purged")
