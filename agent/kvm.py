"""Whether KVM works here: only a guest that really booted tells (a software KVM opens, then dies in stock kernels).

The verdict is kept below the data directory, by kernel and QEMU version: one test for each, at idle priority, after
the node joined. The guest is the host's own kernel without a root: its panic at the end of the boot is the proof.
"""

import asyncio
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from outrider.model.job import Value

WORKS = "works"
# Real hardware takes one or two, even at idle priority rarely ten. A software KVM takes longer, and dies later on.
_BOOT_S = 20.0
# Printed at the very end of a boot that found no root to mount: the guest ran all of its own start.
_BOOTED = (b"VFS: Unable to mount root fs", b"No working init found", b"end Kernel panic - not syncing: VFS")
_MEMORY_MIB = 256
_OUTPUT_BYTES_MAX = 1 << 20


class _Verdict(Value, frozen=True, kw_only=True):
    kernel: str
    qemu: str
    kvm: str


def known_verdict(data: Path, qemu_version: str) -> str:
    """What is known without a test: "" where one is needed."""
    if not qemu_version:
        return "qemu is not installed"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not there, or closed to the agent"
    try:
        verdict = msgspec.json.decode((data / "kvm.json").read_bytes(), type=_Verdict)
    except (OSError, msgspec.DecodeError):
        return ""
    fits = (verdict.kernel, verdict.qemu) == (platform.release(), qemu_version)
    return verdict.kvm if fits else ""


async def probe(data: Path, qemu_version: str) -> str:
    """Boot a guest; "works", or why not. Takes seconds to a minute. Kept for the next start of the agent."""
    kernel = _newest_kernel()
    if kernel is None:
        return "not tested: there is no kernel below /boot to boot a guest with"  # not kept: one may be installed
    try:
        async with asyncio.timeout(_BOOT_S):
            verdict = await _boot(kernel)
    except TimeoutError:
        return f"a guest did not boot within {_BOOT_S:g} s"  # not kept: the host may have been busy
    path = data / "kvm.json"
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(msgspec.json.encode(_Verdict(kernel=platform.release(), qemu=qemu_version, kvm=verdict)))
    unfinished.replace(path)
    return verdict


def _newest_kernel() -> Path | None:
    return max(Path("/boot").glob("vmlinuz-*"), default=None)


async def _boot(kernel: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *_arguments(kernel),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None, "it is a pipe"
    seen = b""
    try:
        while data := await process.stdout.read(4096):
            seen = (seen + data)[-_OUTPUT_BYTES_MAX:]
            if any(proof in seen for proof in _BOOTED):
                return WORKS
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    last = seen.decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
    return f"a guest died while booting: {last[0][:200]}"


def _arguments(kernel: Path) -> Sequence[str]:
    # nice and ionice: at idle priority, so that no workload waits for it.
    idle = ["nice", "-n", "19"] + (["ionice", "-c", "3"] if shutil.which("ionice") else [])
    return [
        *idle,
        *("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", str(_MEMORY_MIB), "-nodefaults", "-nographic"),
        *("-no-user-config", "-no-reboot", "-serial", "stdio", "-monitor", "none", "-net", "none"),
        *("-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"),
    ]
