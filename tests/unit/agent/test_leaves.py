"""When a service's certificate is asked for again."""

import asyncio
import random

from agent.leaves import Leaves
from outrider.clock import wall_s
from outrider.ids import AllocId, ServiceName
from outrider.log import Log
from outrider.model.mesh import Leaf, TrustRoots

API = ServiceName("api")
ALLOC = AllocId("00000000a1")
ROOTS = TrustRoots(datacenter="dc1", trust_domain="trust", certificates_pem=("first",))


async def test_a_leaf_of_a_ca_that_made_way_is_used_and_asked_for_again_until_there_is_another() -> None:
    given: list[Leaf] = []
    enough = asyncio.Event()

    async def issue(service: ServiceName, _csr: str) -> Leaf:
        number = len(given)
        return Leaf(
            service=service,
            certificate_pem=f"leaf {number}",
            key_pem="key",
            expires_at_s=wall_s() + 3600,
            serial=str(number),
            superseded=number < 3,
        )

    def give(leaf: Leaf) -> None:
        given.append(leaf)
        if not leaf.superseded:
            enough.set()

    leaves = Leaves(issue=issue, give=give, log=Log("leaves"), rng=random.Random(1))  # noqa: S311 - jitter
    leaves.set_roots(ROOTS)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        leaves.acquire(ALLOC, (API,), group)
        await enough.wait()
        assert [leaf.serial for leaf in given] == ["0", "1", "2", "3"]
        assert leaves.expiries()[API] == given[-1].expires_at_s
        leaves.release(ALLOC)
