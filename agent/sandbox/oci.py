"""A SandboxSpec as the OCI runtime's config.json (runtime-spec 1.0.2), as plain values.

Pure: owns what a sandbox may see and do. Never touches the host; `rootfs` prepares what is mounted here.
"""

import base64
from collections.abc import Mapping, Sequence

from agent.sandbox import seccomp
from agent.sandbox.json_values import Json
from agent.sandbox.spec import UID_RANGE, Device, HostRoot, ImageRoot, Limits, Mount, SandboxSpec, Tmpfs
from outrider.model.hugepages import counted_as, page_name

# What of the host's /etc a picked root shows live; `rootfs` copies or writes the rest of its /etc.
HOST_DIRECTORIES = ("/usr", "/etc/alternatives", "/etc/ssl/certs")
# The first process of every sandbox, bound here in every root. Without one a program that sets no handler for SIGTERM
# could not be stopped by it (the kernel shields a pid namespace's first process), and nobody would reap orphans.
INIT = "/.init"
DEVICES, HUGEPAGES = "devices", counted_as("")  # names in the bundle; the latter before a page's size

_DEV_BYTES = 65_536
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the target inside, a private one
_CPU_PERIOD_US = 100_000
_CPU_QUOTA_US_MIN = 1_000  # the kernel's own
_CPU_SHARES_MIN = 2

_MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
)
_READ_ONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def config(
    spec: SandboxSpec, *, cgroup: str, init: str, seccomp_filter: bytes | None, bundle: str = ""
) -> dict[str, Json]:
    """`cgroup`: the sandbox's own group as a path from the hierarchy's root. `init`: the host's path of `INIT`.

    `bundle` is where `rootfs` made the nodes of `spec.devices`, and what has its hugepages.
    `seccomp_filter` is the profile as crun compiled it once: to compile it takes longer than all the rest of a start.
    """
    mapping: Json = [{"containerID": 0, "hostID": spec.uid_first, "size": UID_RANGE}]
    return {
        "ociVersion": "1.0.2",
        "process": {
            **process((INIT, "--", *spec.argv), spec.env, spec.cwd, spec.user, spec.group),
            **_privileges(spec),
        },
        "root": {"path": "rootfs", "readonly": not isinstance(spec.root, ImageRoot)},
        "hostname": spec.hostname,
        "mounts": [
            *_mounts(spec, init),
            *(_device(device, f"{bundle}/{DEVICES}") for device in spec.devices),
            *(_hugepages(f"{HUGEPAGES}{page_name(page)}", bundle) for page in spec.limits.hugepages),
        ],
        "annotations": _compiled(seccomp_filter),
        "linux": {
            "uidMappings": mapping,
            "gidMappings": mapping,
            "namespaces": [
                *({"type": kind} for kind in ("user", "pid", "mount", "uts", "ipc", "cgroup")),
                {"type": "network", "path": spec.network_namespace},
            ],
            "cgroupsPath": f"/{cgroup}",
            "resources": _resources(spec.limits, spec.devices),
            "seccomp": seccomp.profile(),
            "maskedPaths": _MASKED_PATHS,
            "readonlyPaths": _READ_ONLY_PATHS,
        },
    }


def process(
    argv: Sequence[str], env: Mapping[str, str], cwd: str, user: int, group: int, *, tty: bool = False
) -> dict[str, Json]:
    """The `process` part: the workload's own, and that of an exec beside it. Never uid 0, never a capability."""
    assert user != 0, "a sandbox's process is never root, not even inside"
    return {
        "terminal": tty,
        "user": {"uid": user, "gid": group},
        "args": [*argv],
        "env": [f"{name}={value}" for name, value in env.items()],
        "cwd": cwd,
        "noNewPrivileges": True,
        "capabilities": {name: [] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")},
        "umask": 0o022,
    }


def _privileges(spec: SandboxSpec) -> dict[str, Json]:
    """What the workload has and an exec beside it has not."""
    given: dict[str, Json] = {}
    if spec.capabilities:
        names = [f"CAP_{name}" for name in spec.capabilities]
        # All five, or a user other than root would lose them at its first exec.
        kinds = ("bounding", "effective", "inheritable", "permitted", "ambient")
        given["capabilities"] = dict.fromkeys(kinds, names)
    if spec.limits.ulimits:
        given["rlimits"] = [
            {"type": f"RLIMIT_{name.upper()}", "soft": value, "hard": value}
            for name, value in sorted(spec.limits.ulimits.items())
        ]
    return given


def _compiled(seccomp_filter: bytes | None) -> dict[str, Json]:
    if seccomp_filter is None:
        return {}
    return {"run.oci.seccomp_bpf_data": base64.b64encode(seccomp_filter).decode()}


def _mounts(spec: SandboxSpec, init: str) -> list[Json]:
    targets = {mount.target for mount in spec.mounts}
    mounts: list[Json] = [
        _special("/proc", "proc", "proc"),
        _special("/dev", "tmpfs", "tmpfs", "noexec", "strictatime", "mode=755", f"size={_DEV_BYTES}"),
        _special("/dev/pts", "devpts", "devpts", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
        _special(_SHARED_MEMORY, "tmpfs", "tmpfs", "noexec", "mode=1777", f"size={spec.limits.shm_bytes}"),
    ]
    if "/sys" not in targets:
        # crun would bind the host's own here: the namespace was not made inside this user namespace (DESIGN, 8).
        mounts.append(_special("/sys", "tmpfs", "tmpfs", "noexec", "ro", "mode=555", "size=4096"))
    if isinstance(spec.root, HostRoot):
        mounts += [_bind(Mount(source=path, target=path)) for path in HOST_DIRECTORIES]
    mounts += [_tmpfs(tmpfs) for tmpfs in spec.tmpfs]
    # Shallow targets first: a mount must not cover one made before it.
    mounts += [_bind(mount) for mount in sorted(spec.mounts, key=lambda mount: mount.target.count("/"))]
    mounts.append(_bind(Mount(source=init, target=INIT)))
    return mounts


def _special(target: str, kind: str, source: str, *options: str) -> Json:
    return {"destination": target, "type": kind, "source": source, "options": ["nosuid", *options]}


def _bind(mount: Mount) -> Json:
    options = ["rbind", "nosuid", "nodev", *(["ro"] if mount.read_only else ["rw"])]
    return {"destination": mount.target, "type": "bind", "source": mount.source, "options": options}


def _device(device: Device, directory: str) -> Json:
    source = f"{directory}/{device.name}"
    # Without "nodev", or the node would open nothing.
    return {"destination": f"/dev/{device.name}", "type": "bind", "source": source, "options": ["bind", "nosuid", "rw"]}


def _hugepages(name: str, bundle: str) -> Json:
    options = ["bind", "nosuid", "nodev", "rw"]
    return {"destination": f"/dev/{name}", "type": "bind", "source": f"{bundle}/{name}", "options": options}


def _tmpfs(tmpfs: Tmpfs) -> Json:
    return _special(tmpfs.target, "tmpfs", "tmpfs", "nodev", f"mode={tmpfs.mode:o}", f"size={tmpfs.size_bytes}")


def _resources(limits: Limits, devices: Sequence[Device]) -> dict[str, Json]:
    cpu: dict[str, Json] = {"shares": max(_CPU_SHARES_MIN, limits.cpu_millis * 1024 // 1000)}
    if limits.cpu_max_millis is not None:
        cpu["period"] = _CPU_PERIOD_US
        cpu["quota"] = max(_CPU_QUOTA_US_MIN, limits.cpu_max_millis * _CPU_PERIOD_US // 1000)
    return {
        "cpu": cpu,
        # `swap` is memory and swap together: equal to memory, it leaves none to swap out to.
        "memory": {"limit": limits.memory_bytes, "swap": limits.memory_bytes},
        "pids": {"limit": limits.pids_max},
        "devices": [
            {"allow": False, "access": "rwm"},
            *(
                {"allow": True, "type": "c", "major": device.major, "minor": device.minor, "access": "rw"}
                for device in devices
            ),
        ],
    }
