"""Jobs' traffic rules and permissions against the embedded catalog and a real Consul: kept there, compiled, told."""

import pytest

from controller.core.mesh_intent import Interests, OwnedTraffic
from controller.entries import ROUTER, SPLITTER, TRAFFIC_KINDS, Entry, Split
from controller.mesh.mesh import Mesh
from outrider.errors import RefusedError
from outrider.ids import JobName, NodeId
from outrider.model.job import Protocol
from outrider.model.mesh import Action
from outrider.model.traffic import HttpMatch, Leg, Permission, Route, Subset, Traffic, Verdict
from tests.integration import test_mesh
from tests.integration.processes import until
from tests.integration.test_mesh import API, DB, WEB, RealRecord, Record, running

record = test_mesh.record  # the fixture


async def test_a_jobs_traffic_comes_to_stand_as_entries_and_to_its_callers_and_goes_with_it(record: Record) -> None:
    v2 = Leg(service=API, subset="v2")
    traffic = Traffic(
        subsets=(Subset(name="v2", meta={"version": "2"}),),
        split=(Leg(service=API, weight=9000), Leg(service=API, subset="v2", weight=1000)),
        routes=(Route(match=HttpMatch(path_prefix="/v2"), legs=(v2,), timeout_s=2.0),),
        timeout_s=90.0,
    )
    owned = OwnedTraffic(service=API, protocol=Protocol.HTTP, job=JobName("shop"), traffic=traffic)

    def prepare(mesh: Mesh) -> None:
        mesh.set_interests(NodeId("n1"), Interests(called=frozenset({API}), placed=frozenset({WEB})))

    async with running(record, prepare) as one:
        one.connect(NodeId("n1"))
        one.mesh.set_traffic((owned,))

        def legs() -> list[tuple[Leg, ...]]:
            found = one._services.get((NodeId("n1"), API))
            return [route.legs for route in found.traffic.routes] if found is not None else []

        await until(lambda: legs()[:1] == [(v2,)] and len(legs()) == 3, "the job's routes")
        _, found = await one.consul.watch_entries(ROUTER, 0)
        index = found[0]
        one.mesh._writer.check_entries()
        one.mesh.set_traffic((owned,))
        # By hand, with Consul's own tools: it wins at once, and the job does not write over it.
        await one.consul.put_entry(Entry(kind=SPLITTER, name=API, splits=(Split(weight=100, service_subset="v2"),)))
        await until(lambda: legs()[-1:] == [(v2,)], "the split by hand")
        _, found = await one.consul.watch_entries(ROUTER, 0)
        assert found[0] == index, "what stands as wanted is not written"
        one.mesh.set_traffic(())
        await until(lambda: len(legs()) == 1, "the job's routes gone")
        left = [entry for kind in TRAFFIC_KINDS for entry in (await one.consul.watch_entries(kind, 0))[1]]
        assert SPLITTER in {entry.kind for entry in left}
        assert ROUTER not in {entry.kind for entry in left}


async def test_permissions_are_kept_or_refused_by_the_version(record: Record) -> None:
    permissions = (Permission(action=Verdict.ALLOW, match=HttpMatch(path_prefix="/public", methods=("GET",))),)
    async with running(record) as one:
        await until(lambda: one.mesh.leading, "leading")
        if isinstance(record, RealRecord):
            with pytest.raises(RefusedError, match=r"Consul 1\.8\.7 has no intentions by method, path or header"):
                await one.mesh.create_intention(WEB, API, Action.DENY, permissions=permissions)
            assert not [each for each in await one.mesh.intentions() if each.source == WEB]
            return
        made = await one.mesh.create_intention(WEB, API, Action.DENY, permissions=permissions)
        assert (made.action, made.permissions) == (Action.DENY, permissions)
        allowed, decided_by = await one.mesh.check(WEB, API)
        assert allowed
        assert decided_by == made
        with pytest.raises(RefusedError, match="service db speaks tcp"):
            await one.mesh.create_intention(WEB, DB, Action.DENY, permissions=permissions)
