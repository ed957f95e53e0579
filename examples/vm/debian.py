"""Builds a whole Debian below .cache/guest: systemd, cloud-init, the cloud kernel, nothing of ours in it.

`python -m examples.vm.debian` prints the folder, with vmlinuz, initrd and disk.qcow2. What is there already for the
same kernel and this file is kept. Needs root, mmdebstrap, mke2fs and qemu-img; packages come from where apt has its
own.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from examples.vm.guest import CACHE, kernel_package, run
from outrider.errors import HostError

SUITE = "bookworm"
# Of a few, as a Debian for virtual machines has them; the guest agent is for `outrider exec` and `vm cp`.
PACKAGES = ("systemd-sysv", "udev", "dbus", "cloud-init", "initramfs-tools", "ifupdown", "isc-dhcp-client", "iproute2")
AGENT = "qemu-guest-agent"
KERNEL_ARGUMENTS = "root=/dev/vda rw quiet"
_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
_DISK_MIB = 1024
_MAKE_S = 1200.0


def build() -> Path:
    """Raises HostError."""
    kernel = kernel_package()
    digest = hashlib.sha256(kernel.encode() + Path(__file__).read_bytes()).hexdigest()[:16]
    done = CACHE / f"debian-{digest}"
    if done.is_dir():
        return done
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        work = Path(name)
        tree, made, raw = work / "tree", work / "made", work / "raw"
        made.mkdir()
        _bootstrap(tree, kernel)
        for source, target in (("vmlinuz", "vmlinuz"), ("initrd.img", "initrd")):
            shutil.copyfile(next((tree / "boot").glob(f"{source}-*")), made / target)
            (made / target).chmod(0o644)
        with raw.open("wb") as file:
            file.truncate(_DISK_MIB << 20)
        run("mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", str(tree), str(raw))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(made / "disk.qcow2"))
        made.chmod(0o755)
        if not done.is_dir():
            made.rename(done)
    return done


def _bootstrap(tree: Path, kernel: str) -> None:
    sources = next((path for path in _SOURCES if path.exists()), None)
    if sources is None:
        raise HostError("/etc/apt", step="find Debian's sources", hint=f"one of {', '.join(map(str, _SOURCES))}")
    argv = ["mmdebstrap", "--quiet", "--variant=minbase", "--mode=root"]
    argv += [f"--include={','.join((*PACKAGES, AGENT, kernel))}", '--aptopt=APT::Install-Recommends "false"']
    argv += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    run(*argv, SUITE, str(tree), str(sources), timeout_s=_MAKE_S)


if __name__ == "__main__":
    print(build())
