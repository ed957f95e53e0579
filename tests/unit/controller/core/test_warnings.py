"""What a submission is warned of: services that nobody provides, wherever they are named."""

import msgspec

from controller.core.submit import job_warnings
from outrider.model.traffic import Leg, Mirror, Route, Traffic
from tests.scenarios.world import World, group, job, node, service


def test_a_target_of_traffic_that_nobody_provides_is_told_wherever_it_stands() -> None:
    world = World()
    world.join(node("n1"))
    world.submit(job("next", group(services=[service("next")])))
    traffic = Traffic(
        split=(Leg(service="web", weight=9000), Leg(service="next", weight=500), Leg(service="split", weight=500)),
        routes=(Route(legs=(Leg(service="routed"), Leg(service="routed", subset="v2"))),),
        failover=(Leg(service="backup"),),
        mirror=Mirror(to=Leg(service="shadow")),
    )
    led = msgspec.structs.replace(service("web"), traffic=traffic)
    wanted = job("shop", group(services=[led]))
    warnings = job_warnings(world.state, wanted)
    assert [warning.split("'")[1] for warning in warnings] == ["split", "routed", "backup", "shadow"]
    assert warnings[0] == "group web: service web: nobody provides 'split' yet, to which its traffic leads"
