"""This node's share of the machine, opened once by whoever has it: numbers are claimed, nothing is started."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from agent.claims import UID_BLOCKS, UID_RANGES, Claim, Owner, claim, uid_first
from agent.config import Config
from agent.network.namespaces import AllocationNetworks
from agent.network.plan import BLOCKS
from agent.sandbox.runtime import SandboxRuntime
from agent.store import Loaded, Store
from agent.uids import Uids
from outrider.log import Log


@dataclass(frozen=True, kw_only=True)
class Host:
    """This node's share of the machine: claimed numbers, and what works with them."""

    block: int
    store: Store
    loaded: Loaded
    uids: Uids
    runtime: SandboxRuntime
    networks: AllocationNetworks
    claims: list[Claim]  # let go of at the end, and kept; a purge takes them out and gives them back


@contextlib.asynccontextmanager
async def open_host(config: Config, log: Log) -> AsyncIterator[Host]:
    """Raises HostError where another agent of this node runs, or the directories cannot be used."""
    store = Store(config.data, config.node)
    config.run.mkdir(mode=0o711, parents=True, exist_ok=True)
    owner = Owner(fleet=config.cluster, node=config.node, data_directory=str(config.data.absolute()))
    claims: list[Claim] = []
    try:
        claims.append(uid_block := claim("uids", UID_BLOCKS, owner=owner))
        claims.append(address_block := claim("addresses", BLOCKS, owner=owner))
        loaded = store.load()
        for path in loaded.damaged:
            log.error("record damaged", set_aside=str(path))
        uids = Uids(first=uid_first(uid_block.number, 0), ranges=UID_RANGES)
        uids.load(store.directories())
        runtime = SandboxRuntime(
            run_directory=config.run / "sandboxes",
            cgroup=f"outrider/{config.cluster}/{config.node}",
            log=Log("sandbox", node=config.node),
        )
        networks = AllocationNetworks(run_directory=config.run, node_address=config.address, block=address_block.number)
        try:
            yield Host(
                block=address_block.number,
                store=store,
                loaded=loaded,
                uids=uids,
                runtime=runtime,
                networks=networks,
                claims=claims,
            )
        finally:
            await networks.close()
    finally:
        for held in claims:
            held.close()
