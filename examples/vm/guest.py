"""Builds the example's guest below .cache/guest: Debian's cloud kernel, an initrd, a disk, and the job file to run it.

`python -m examples.vm.guest` prints the folder. What is there already for the same kernel and sources is kept. Needs
apt-get, ldd, dpkg-deb, lz4, mke2fs and qemu-img; nothing is installed. Root is needed only where apt's lists are stale.
"""

import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from agent.drivers import microvm
from outrider import initrd
from outrider.errors import HostError

_HERE = Path(__file__).parent
CACHE = _HERE.parent.parent / ".cache" / "guest"
_KERNEL = "linux-image-cloud-amd64"
_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "button", "evdev", "isofs", "virtio_console", "virtio_balloon")
_DISK_BYTES = 32 * 1024 * 1024
_AGENT = "usr/sbin/qemu-ga"
_BUSYBOX = "bin/busybox"  # static: alone, in both


def main() -> None:
    print(build())


def build() -> Path:
    """The folder with vmlinux, modules, initrd, disk.qcow2, vm.yaml, busybox and qemu-ga. Raises HostError."""
    package = kernel_package()
    sources = b"".join(path.read_bytes() for path in sorted(_HERE.glob("*")) if path.is_file())
    digest = hashlib.sha256(package.encode() + sources).hexdigest()[:16]
    done = CACHE / digest
    if done.is_dir():
        return done
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        work = Path(name)
        made = work / "made"
        made.mkdir()
        for each in (package, "busybox-static", "qemu-guest-agent"):
            _download(each, work)
        _kernel(work / "root", made / "vmlinux")
        _initrd(work / "root", made)
        shutil.copyfile(work / "root" / _BUSYBOX, made / "busybox")
        shutil.copyfile(work / "root" / _AGENT, made / "qemu-ga")
        agent = _with_libraries(_AGENT, work / "root" / _AGENT)
        make_disk(_scripts(), {_BUSYBOX: made / "busybox", **agent}, made / "disk.qcow2")
        _job(made, done)
        made.chmod(0o755)
        if not done.is_dir():
            made.rename(done)
    return done


def kernel_package() -> str:
    for line in _with_fresh_lists("apt-cache", "depends", _KERNEL).splitlines():
        if line.strip().startswith("Depends: linux-image-"):
            return line.split()[1]
    raise HostError(_KERNEL, step="no such Debian package")


def _download(package: str, work: Path) -> None:
    _with_fresh_lists("apt-get", "-q", "download", package, directory=work)
    (archive,) = work.glob(f"{package}_*.deb")
    run("dpkg-deb", "-x", str(archive), str(work / "root"))


def _kernel(root: Path, target: Path) -> None:
    """The ELF kernel inside vmlinuz: QEMU enters it directly (PVH), so that nothing is unpacked under emulation."""
    (image,) = (root / "boot").glob("vmlinuz-*")
    data = image.read_bytes()
    # Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length. The last word is the size unpacked.
    setup = (data[0x1F1] or 4) + 1
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = setup * 512 + offset
    payload = target.with_suffix(".lz4")
    payload.write_bytes(data[start : start + length - 4])
    run("lz4", "-q", "-d", "-f", str(payload), str(target))
    payload.unlink()


def _initrd(root: Path, made: Path) -> None:
    """And the modules, as a node's `guest:` names them."""
    modules = {path.name.removesuffix(".ko"): path for path in root.glob("lib/modules/*/kernel/**/*.ko")}
    order = initrd.loading_order(modules, (*_MODULES, *microvm.MODULES))
    (made / "modules").mkdir()
    for name in order:
        shutil.copyfile(modules[name], made / "modules" / f"{name}.ko")
    wanted = initrd.loading_order(modules, _MODULES)
    load = "".join(f"insmod /{name}.ko\n" for name in wanted)
    init = (_HERE / "initrd.sh").read_text().replace("@modules@\n", load)
    entries = [initrd.directory(name) for name in ("dev", "proc", "root", "bin")]
    entries.append(initrd.regular(_BUSYBOX, (root / _BUSYBOX).read_bytes(), mode=0o755))
    entries.append(initrd.regular("init", init.encode(), mode=0o755))
    entries += [initrd.regular(f"{name}.ko", modules[name].read_bytes()) for name in wanted]
    (made / "initrd").write_bytes(initrd.archive(entries))


def _with_libraries(inside: str, program: Path) -> dict[str, Path]:
    """A program and the libraries that it needs, which QEMU needs too: path inside -> file here."""
    libraries = re.findall(r"(/lib\S+) \(0x", run("ldd", str(program)))
    return {inside: program, **{path.removeprefix("/"): Path(path) for path in libraries}}


def make_disk(scripts: Mapping[str, str], programs: Mapping[str, Path], target: Path) -> None:
    """A disk with `programs` (path inside -> file here) and `scripts` (path inside -> text), for the initrd to boot.

    Busybox must be one of the first, `init` one of the second.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        tree, raw = work / "tree", work / "raw"
        for each in ("bin", "dev", "proc", "sys", "tmp", "etc", "mnt"):
            (tree / each).mkdir(parents=True)
        for inside, source in programs.items():
            (tree / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, tree / inside)
        for inside, text in scripts.items():
            (tree / inside).parent.mkdir(parents=True, exist_ok=True)
            (tree / inside).write_text(text)
        for inside in (*programs, *scripts):
            (tree / inside).chmod(0o755)
        with raw.open("wb") as file:
            file.truncate(_DISK_BYTES)
        run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", str(tree), str(raw))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(target))


def _scripts() -> dict[str, str]:
    sources = {
        "init": "init.sh",
        "lease": "lease.sh",
        "etc/acpi/PWRF/00000080": "power.sh",
        "www/cgi-bin/api": "api.sh",
    }
    texts = {inside: (_HERE / source).read_text() for inside, source in sources.items()}
    return {**texts, "www/index.html": "an empty house\n"}


def _job(made: Path, done: Path) -> None:
    """vm.yaml with the paths and checksums of what was built."""
    text = (_HERE / "vm.yaml").read_text()
    for name in ("vmlinux", "initrd", "disk.qcow2"):
        checksum = hashlib.sha256((made / name).read_bytes()).hexdigest()
        text = text.replace(f"@{name}@", str(done / name)).replace(f"@{name}.sha256@", checksum)
    (made / "vm.yaml").write_text(text)
    for name in ("api.html", "guest.html"):
        shutil.copyfile(_HERE / name, made / name)


def _with_fresh_lists(*argv: str, directory: Path | None = None) -> str:
    """Once more where apt's lists are absent, or name what the archive no longer has. That takes root."""
    try:
        return run(*argv, directory=directory)
    except HostError:
        run("apt-get", "-q", "update")
        return run(*argv, directory=directory)


def run(*argv: str, directory: Path | None = None, timeout_s: float = 300) -> str:
    """What a program says. Raises HostError where it is absent, or fails."""
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            argv, check=False, capture_output=True, text=True, cwd=directory, timeout=timeout_s, env=environment
        )
    except FileNotFoundError as error:
        raise HostError(argv[0], step="not installed", hint="scripts/setup test installs it") from error
    if done.returncode != 0:
        raise HostError(argv[0], step=" ".join(argv[1:]), hint=done.stderr.strip()[-500:])
    return done.stdout


if __name__ == "__main__":
    main()
