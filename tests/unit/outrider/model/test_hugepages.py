"""Hugepages by the names of their sizes, and as what they are counted."""

import pytest

from outrider.ids import GroupName, TaskName
from outrider.model.hugepages import counted, page_bytes, page_name
from outrider.model.job import MIB, Group, Resources, Task
from outrider.model.node import Fingerprint, Hugepages, countable
from outrider.model.reservation import group_resources


@pytest.mark.parametrize(
    ("name", "size"), [("64Ki", 64 << 10), ("2Mi", 2 << 20), ("512Mi", 512 << 20), ("1Gi", 1 << 30)]
)
def test_a_size_has_one_name(name: str, size: int) -> None:
    assert (page_bytes(name), page_name(size)) == (size, name)


@pytest.mark.parametrize("name", ["", "2", "2M", "2MB", "2mi", "0Mi", "02Mi", "3Mi", "2048Ki", "2Mi\n", "99999Gi"])
def test_what_is_no_size_is_none(name: str) -> None:
    assert page_bytes(name) is None


def test_a_group_takes_the_pages_of_its_tasks_and_a_node_has_those_of_its_pools() -> None:
    resources = Resources(devices={"gpu": 1}, hugepages={"2Mi": 5 * MIB, "1Gi": 1024 * MIB})
    tasks = tuple(Task(name=TaskName(name), resources=resources) for name in "ab")
    need = group_resources(Group(name=GroupName("g"), tasks=tasks))
    assert need.devices == {"gpu": 2, "hugepages-2Mi": 6, "hugepages-1Gi": 2}
    assert counted({}) == {}
    pools = (Hugepages(page="2Mi", total=8, free=3),)
    found = Fingerprint(cpu_millis=1, memory_bytes=1, disk_bytes=1, devices={"gpu": 1}, hugepages=pools)
    assert countable(found) == {"gpu": 1, "hugepages-2Mi": 8}
