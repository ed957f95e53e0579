"""What a job wishes of its nodes, from the job file's lines."""

from pathlib import Path

from outrider.jobspec.reader import parse_job
from outrider.model.job import Affinity, Constraint, Operator, Packing, Spread, SpreadTarget

FILE = Path("shop.yaml")
JOB = """\
job: shop
pool: gpu
placement: pack
constraints: [distinct host, meta.rack is not set]
affinities: [{prefer: meta.disk = ssd, weight: -60}]
spread:
  - {attribute: meta.zone, weight: 80, targets: {a: 70, b: 30}}
groups:
  web:
    constraints:
      - node.kernel version >= 5.10, < 7
      - meta.tags contains  any  a, b
      - distinct meta.rack at most 2
    network: {ports: {http: {dynamic: true}}}
    tasks:
      main: {command: [serve], resources: {devices: {gpu: 2, kvm: 1}}}
"""


def test_every_wish_is_read() -> None:
    job = parse_job(JOB.encode(), FILE)
    assert (job.pool, job.placement) == ("gpu", Packing.PACK)
    assert job.constraints == (
        Constraint(attribute="node.id", operator=Operator.DISTINCT, value="1"),
        Constraint(attribute="meta.rack", operator=Operator.IS_NOT_SET),
    )
    ssd = Constraint(attribute="meta.disk", operator=Operator.EQUAL, value="ssd")
    assert job.affinities == (Affinity(prefer=ssd, weight=-60),)
    targets = (SpreadTarget(value="a", percent=70), SpreadTarget(value="b", percent=30))
    assert job.spread == (Spread(attribute="meta.zone", weight=80, targets=targets),)
    (group,) = job.groups
    assert group.constraints == (
        Constraint(attribute="node.kernel", operator=Operator.VERSION, value=">= 5.10, < 7"),
        Constraint(attribute="meta.tags", operator=Operator.CONTAINS_ANY, value="a, b"),
        Constraint(attribute="meta.rack", operator=Operator.DISTINCT, value="2"),
    )
    assert group.network.ports[0].dynamic
    assert group.tasks[0].resources.devices == {"gpu": 2, "kvm": 1}
