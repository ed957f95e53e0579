"""What a controller that takes charge reads of a whole catalog: service by service, where nodes are more than those."""

from controller.mesh.consul_adapter import ConsulAdapter
from controller.mesh.mesh import Mesh
from controller.mesh.shapes import (
    CatalogNode,
    CatalogNodeServices,
    ConsulCheck,
    ConsulService,
    Txn,
    TxnCheck,
    TxnNode,
    TxnService,
)
from tests.integration import test_mesh
from tests.integration.processes import until
from tests.integration.test_mesh import Record, Running, instance, node, running

record = test_mesh.record  # the fixture


async def test_a_controller_started_again_repairs_what_was_changed_meanwhile(record: Record) -> None:
    names = [f"n{number}" for number in range(6)]

    def all_of_them(mesh: Mesh) -> None:
        for name in names:
            mesh.set_node(node(name, instance(f"a-{name}")))

    async with running(record, all_of_them) as one:
        for name in names:
            await until(lambda name=name: is_whole(one, name), f"{name} is registered")
        before = {name: await one.consul.node(f"test-{name}") for name in names}

    by_hand = ConsulAdapter(record.url)
    service = ConsulService(id="a-n1-api-proxy", service="api-sidecar-proxy")
    silent = ConsulCheck(node="test-n2", check_id="outrider-node", name="Outrider node", status="critical")
    more = ConsulCheck(node="test-n3", check_id="more", name="more", status="passing")
    answer = await by_hand.transact(
        [
            Txn(service=TxnService(verb="delete", node="test-n1", service=service)),
            Txn(check=TxnCheck(verb="set", check=silent)),
            Txn(check=TxnCheck(verb="set", check=more)),
            Txn(node=TxnNode(verb="delete", node=CatalogNode(node="test-n4", address="10.0.0.1"))),
        ]
    )
    await by_hand.close()
    assert not answer.errors

    async with running(record, all_of_them) as again:
        for name in names:
            await until(lambda name=name: is_as(again, name, before[name]), f"{name} is as it was")


async def is_whole(one: Running, name: str) -> bool:
    """Its check comes last."""
    _, checks = await one.consul.node(f"test-{name}")
    return "outrider-node" in {check.check_id for check in checks}


async def is_as(one: Running, name: str, before: tuple[CatalogNodeServices | None, list[ConsulCheck]]) -> bool:
    services, checks = await one.consul.node(f"test-{name}")
    by_id = sorted(checks, key=lambda check: check.check_id)
    return (services, by_id) == (before[0], sorted(before[1], key=lambda check: check.check_id))
