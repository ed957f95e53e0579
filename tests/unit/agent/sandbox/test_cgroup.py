"""Control groups of all three kinds, read from trees as the kernel would show them."""

from pathlib import Path

import pytest

from agent.sandbox.cgroup import Cgroups, Version, detect, keyed
from agent.sandbox.spec import Usage


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    group = tmp_path / "outrider/f/n/a.t"
    group.mkdir(parents=True)
    (group / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    (group / "memory.current").write_text("5000\n")
    (group / "memory.stat").write_text("anon 10\ninactive_file 1000\n")
    (group / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    return tmp_path


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    memory, cpu = tmp_path / "memory/outrider/f/n/a.t", tmp_path / "cpuacct/outrider/f/n/a.t"
    for group in (memory, cpu):
        group.mkdir(parents=True)
    (cpu / "cpuacct.usage").write_text("2500000000\n")
    (memory / "memory.usage_in_bytes").write_text("700\n")
    (memory / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 900\n")
    (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    return tmp_path


def test_version_2_is_read_from_its_one_tree(v2: Path) -> None:
    groups = Cgroups(v2)
    assert groups.version is Version.V2
    assert groups.usage("outrider/f/n/a.t") == Usage(cpu_s=1.5, memory_bytes=4000, oom_kills=2)
    assert groups.oom_kills("outrider/f/n/a.t") == 2
    assert groups.children("outrider/f/n") == {"a.t"}


def test_version_1_is_read_from_a_tree_for_each_controller(v1: Path) -> None:
    groups = Cgroups(v1)
    assert groups.version is Version.V1
    assert groups.usage("outrider/f/n/a.t") == Usage(cpu_s=2.5, memory_bytes=0, oom_kills=1)
    assert groups.children("outrider/f/n") == {"a.t"}


def test_hybrid_is_told_by_the_tree_mounted_beside(v1: Path) -> None:
    (v1 / "unified").mkdir()
    assert detect(v1) is Version.V1
    (v1 / "unified/cgroup.procs").touch()
    assert detect(v1) is Version.HYBRID


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_hugepages_are_limited_size_by_size_where_they_are_counted(kind: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(kind)
    Cgroups(root).limit_hugepages("outrider/f/n/a.t", {2 << 20: 4 << 20})  # nothing counts them: nothing happens
    group = root / ("" if kind == "v2" else "hugetlb") / "outrider/f/n/a.t"
    group.mkdir(parents=True, exist_ok=True)
    ending = "max" if kind == "v2" else "limit_in_bytes"
    for name in ("2MB", "2MB.rsvd", "1GB", "64KB"):
        (group / f"hugetlb.{name}.{ending}").write_text("max\n")
    (group / "hugetlb.2MB.events").write_text("max 0\n")
    Cgroups(root).limit_hugepages("outrider/f/n/a.t", {2 << 20: 4 << 20, 64 << 10: 64 << 10})
    said = {path.name.removesuffix(f".{ending}"): path.read_text() for path in group.glob(f"hugetlb.*.{ending}")}
    few, none = f"{4 << 20}\n", "0\n"
    assert said == {"hugetlb.2MB": few, "hugetlb.2MB.rsvd": few, "hugetlb.1GB": none, "hugetlb.64KB": f"{64 << 10}\n"}


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_group_that_is_gone_used_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    groups = Cgroups(request.getfixturevalue(kind))
    assert groups.usage("outrider/f/n/gone") == Usage(cpu_s=0, memory_bytes=0, oom_kills=0)
    groups.remove("outrider/f/n/gone")


def test_removal_takes_all_trees_and_what_crun_left_where_none_is_mounted(tmp_path: Path) -> None:
    for tree in ("cpu", "memory"):
        (tmp_path / tree / "o/a/inner").mkdir(parents=True)
    (tmp_path / "unified/o/a").mkdir(parents=True)
    (tmp_path / "unified/o/a/cgroup.procs").write_text("1\n")  # a plain file: nobody is to be killed for it
    Cgroups(tmp_path).remove("o/a")
    assert [str(path) for path in tmp_path.rglob("a")] == []
    assert (tmp_path / "cpu/o").is_dir()


def test_parents_go_too_unless_another_uses_them(tmp_path: Path) -> None:
    (tmp_path / "cpu/o/f/mine").mkdir(parents=True)
    (tmp_path / "cpu/o/other").mkdir()
    (tmp_path / "unified/o/f/mine").mkdir(parents=True)
    Cgroups(tmp_path).remove_with_empty_parents("o/f/mine")
    assert [path.name for path in (tmp_path / "cpu/o").iterdir()] == ["other"]
    assert not (tmp_path / "unified/o").exists()


def test_keyed_finds_whole_names_only() -> None:
    assert keyed("oom 3\noom_kill 7\n", "oom_kill") == 7
    assert keyed("oom 3\n", "oom_kill") == 0
