"""A sandbox's OCI configuration says what the spec says, and walls off the rest."""

from typing import Any

import msgspec
import pytest

from agent.sandbox import oci, seccomp
from agent.sandbox.spec import DirectoryRoot, HostRoot, Limits, Mount, SandboxSpec, Tmpfs
from outrider.model.job import MIB

SPEC = SandboxSpec(
    id="alloc.task",
    argv=("python3", "app.py"),
    root=HostRoot(),
    network_namespace="/run/x/net",
    uid_first=1 << 26,
    limits=Limits(cpu_millis=250, memory_bytes=64 * MIB, pids_max=32),
    directory="/data/task",
    env={"A": "1"},
    cwd="/task",
)


def config(spec: SandboxSpec = SPEC, seccomp_filter: bytes | None = None) -> dict[str, Any]:
    values = oci.config(spec, cgroup="outrider/f/n/alloc.task", init="/usr/bin/init", seccomp_filter=seccomp_filter)
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(values))
    return decoded


def changed(**values: Any) -> SandboxSpec:
    return msgspec.structs.replace(SPEC, **values)


def targets(spec: SandboxSpec) -> list[str]:
    return [mount["destination"] for mount in config(spec)["mounts"]]


def test_process_is_an_unprivileged_user_behind_an_init() -> None:
    process = config()["process"]
    assert process["args"] == ["/.init", "--", "python3", "app.py"]
    assert process["user"] == {"uid": 1000, "gid": 1000}
    assert process["noNewPrivileges"] is True
    assert set(map(tuple, process["capabilities"].values())) == {()}
    assert (process["env"], process["cwd"], process["terminal"]) == (["A=1"], "/task", False)


def test_root_is_no_user_of_a_sandbox() -> None:
    with pytest.raises(AssertionError, match="never root"):
        config(changed(user=0))


def test_every_namespace_is_its_own_but_the_network_which_is_joined() -> None:
    namespaces = {entry["type"]: entry.get("path") for entry in config()["linux"]["namespaces"]}
    assert namespaces == {
        **dict.fromkeys(("user", "pid", "mount", "uts", "ipc", "cgroup")),
        "network": "/run/x/net",
    }


def test_uids_map_to_the_sandboxs_own_range() -> None:
    linux = config()["linux"]
    assert linux["uidMappings"] == linux["gidMappings"] == [{"containerID": 0, "hostID": 1 << 26, "size": 65_536}]


def test_root_is_read_only_and_the_hosts_sys_is_never_bound() -> None:
    values = config()
    assert values["root"] == {"path": "rootfs", "readonly": True}
    (sys,) = (mount for mount in values["mounts"] if mount["destination"] == "/sys")
    assert sys["type"] == "tmpfs"
    assert "ro" in sys["options"]
    assert all(mount["source"] != "/sys" for mount in values["mounts"])


def test_a_sysfs_that_the_agent_prepared_takes_the_place_of_the_empty_one() -> None:
    spec = changed(mounts=(Mount(source="/run/x/sys", target="/sys"),))
    assert [mount["source"] for mount in config(spec)["mounts"] if mount["destination"] == "/sys"] == ["/run/x/sys"]


def test_binds_are_read_only_unless_asked_otherwise() -> None:
    spec = changed(mounts=(Mount(source="/a", target="/a"), Mount(source="/b", target="/b", read_only=False)))
    options = {mount["destination"]: mount["options"] for mount in config(spec)["mounts"] if mount["type"] == "bind"}
    assert [at for at, flags in options.items() if "ro" not in flags] == ["/b"]
    assert all("nosuid" in flags for flags in options.values())


def test_inner_mounts_come_after_those_that_hold_them() -> None:
    spec = changed(
        mounts=(Mount(source="/deep", target="/task/a/b"), Mount(source="/task", target="/task")),
        tmpfs=(Tmpfs(target="/var", size_bytes=MIB),),
    )
    order = targets(spec)
    assert order.index("/var") < order.index("/task") < order.index("/task/a/b")


def test_an_image_sees_nothing_of_the_host_but_the_init() -> None:
    values = config(changed(root=DirectoryRoot(path="/images/x")))
    assert [mount["source"] for mount in values["mounts"] if mount["type"] == "bind"] == ["/usr/bin/init"]


def test_limits_leave_no_swap_to_grow_into() -> None:
    resources = config()["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 * MIB, "swap": 64 * MIB}
    assert resources["cpu"] == {"shares": 256}
    assert resources["pids"] == {"limit": 32}


@pytest.mark.parametrize(("millis", "quota"), [(200, 20_000), (2_500, 250_000), (1, 1_000)])
def test_quota_only_where_asked(millis: int, quota: int) -> None:
    limits = Limits(cpu_millis=1, cpu_max_millis=millis, memory_bytes=MIB, pids_max=1)
    assert config(changed(limits=limits))["linux"]["resources"]["cpu"] == {
        "shares": 2,
        "period": 100_000,
        "quota": quota,
    }


def test_compiled_filter_travels_as_an_annotation() -> None:
    assert config(seccomp_filter=b"\x01")["annotations"] == {"run.oci.seccomp_bpf_data": "AQ=="}
    assert config()["annotations"] == {}


def test_seccomp_denies_by_default_and_lists_no_call_twice() -> None:
    profile: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(seccomp.profile()))
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed, refused = seccomp.ALLOWED.split(), seccomp.REFUSED.split()
    assert len({*allowed, *refused}) == len(allowed) + len(refused)
    free = {
        name
        for rule in profile["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule
        for name in rule["names"]
    }
    assert free & {"clone", "clone3", "socket", "personality", "unshare", "mount", "ptrace", "bpf", "keyctl"} == set()
