"""Prepares what a sandbox sees as its root: an empty tree of mount points, those laid over a directory, or an unpacked
image under a layer of the sandbox's own.

Owns the bundle's `rootfs` and `skeleton`. Never follows a link inside an image: what it writes, it writes into
directories that it has just made itself.
"""

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path, PurePosixPath

from agent.sandbox import hugepages, idmap, mounts
from agent.sandbox.oci import DEVICES, HOST_DIRECTORIES, HUGEPAGES, INIT
from agent.sandbox.spec import UID_RANGE, DirectoryRoot, HostRoot, ImageRoot, SandboxSpec, StartError
from outrider.errors import HostError
from outrider.model.hugepages import page_name

_DEVICES_BYTES = 65_536
_MERGED_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Small files a libc, a resolver or TLS reads; everything else of the host's /etc stays out of sight.
_COPIED = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/openssl.cnf",
)
_IMAGE, _WRITABLE = "image", "writable"  # an overlay's layers, mounted here while it is put together
_NSSWITCH = "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n"


def prepare(spec: SandboxSpec, bundle: Path) -> None:
    """Make `bundle/rootfs`. Raises StartError where the image is not there."""
    rootfs = bundle / "rootfs"
    rootfs.mkdir(mode=0o755, parents=True)
    bundle.chmod(0o755)  # the sandbox's own uid must be able to pass; its parents decide who else can
    if spec.devices:
        _make_devices(bundle / DEVICES, spec)
    for page in spec.limits.hugepages:
        _mount_hugepages(bundle, page, spec)
    match spec.root:
        case HostRoot():
            _make_mount_points(rootfs, spec)
            _pick_host(rootfs, spec)
        case DirectoryRoot(path=path):
            image = Path(path)
            if not image.is_dir():
                raise StartError(f"image directory {path} is not there on this node")
            skeleton = bundle / "skeleton"
            skeleton.mkdir(mode=0o755)
            _make_mount_points(skeleton, spec)
            mounts.mount_overlay(rootfs, layers=(str(skeleton), path))
        case ImageRoot(path=path, writable_bytes=writable_bytes):
            _mount_image(bundle, Path(path), writable_bytes, spec.uid_first)


def remove(bundle: Path) -> None:
    """Unmount and remove the bundle; gone already is fine."""
    for name in (DEVICES, "rootfs", _IMAGE, _WRITABLE):
        mounts.unmount(bundle / name)
    for path in bundle.glob(f"{HUGEPAGES}*"):
        mounts.unmount(path)
    with suppress(FileNotFoundError):
        shutil.rmtree(bundle)


def _mount_image(bundle: Path, image: Path, writable_bytes: int, uid_first: int) -> None:
    """The overlay keeps its layers to itself: once it is mounted, both are taken off their places.

    crun makes the mount points: in here it owns what the image's root owns, and it resolves links within the root.
    """
    lower, upper = bundle / _IMAGE, bundle / _WRITABLE
    for directory in (lower, upper):
        directory.mkdir(mode=0o700)
    try:
        idmap.bind(image, lower, uid_first=uid_first, uids=UID_RANGE)
        mounts.mount_tmpfs(upper, size_bytes=writable_bytes, uid=0, mode=0o700)
        (upper / "work").mkdir()
        # The root of the tree is the upper layer's: it must have the image's owner and mode.
        top, given = upper / "top", lower.stat()
        top.mkdir()
        os.chown(top, given.st_uid, given.st_gid)
        top.chmod(given.st_mode & 0o7777)
        mounts.mount_overlay(bundle / "rootfs", layers=(str(lower),), upper=top, work=upper / "work")
    finally:
        mounts.unmount(upper)
        mounts.unmount(lower)


def _make_mount_points(tree: Path, spec: SandboxSpec) -> None:
    directories = ["/proc", "/dev", "/sys", *(tmpfs.target for tmpfs in spec.tmpfs)]
    files = [INIT]
    for mount in spec.mounts:
        if not Path(mount.source).exists():
            raise StartError(f"what should be mounted at {mount.target} is not there on this node: {mount.source}")
        (directories if Path(mount.source).is_dir() else files).append(mount.target)
    if isinstance(spec.root, HostRoot):
        directories += HOST_DIRECTORIES
    covered = [PurePosixPath(target) for target in directories if target != "/"]
    for target in sorted(directories):
        _inside(tree, target).mkdir(parents=True, exist_ok=True)
    for target in files:
        # Below another mount, the point must exist there; this tree is covered at that place.
        if not any(parent in covered for parent in PurePosixPath(target).parents):
            point = _inside(tree, target)
            point.parent.mkdir(parents=True, exist_ok=True)
            point.touch()


def _make_devices(directory: Path, spec: SandboxSpec) -> None:
    """Nodes that the sandbox's user may open: the host's own are closed to it, and stay so."""
    directory.mkdir(mode=0o755)
    mounts.mount_tmpfs(directory, size_bytes=_DEVICES_BYTES, uid=0, mode=0o755, devices=True)
    for device in spec.devices:
        node = directory / device.name
        node.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(device.major, device.minor))
            os.chown(node, spec.uid_first + spec.user, spec.uid_first + spec.user)
        except OSError as error:
            raise HostError(f"/dev/{device.name}", step=f"make a node of it for {spec.id}: {error.strerror}") from error


def _mount_hugepages(bundle: Path, page: int, spec: SandboxSpec) -> None:
    """Promised to this task by the scheduler; somebody outside of the fleet may have taken them all the same."""
    wanted, free = spec.limits.hugepages[page], hugepages.free_bytes(page)
    name = f"{HUGEPAGES}{page_name(page)}"
    if free < wanted:
        step = f"{wanted // page} pages are wanted, {free // page} are free"
        raise HostError(name, step=step, hint="does something outside of the fleet use them?")
    directory = bundle / name
    directory.mkdir(mode=0o700)
    mounts.mount_hugetlbfs(directory, page_bytes=page, size_bytes=wanted, uid=spec.uid_first + spec.user)


def _inside(tree: Path, target: str) -> Path:
    path = PurePosixPath(target)
    if not path.is_absolute() or ".." in path.parts:
        raise StartError(f"mount target {target!r} is not an absolute path without '..'")
    return tree / path.relative_to("/")


def _pick_host(rootfs: Path, spec: SandboxSpec) -> None:
    for name in _MERGED_LINKS:
        if Path("/usr", name).is_dir():
            (rootfs / name).symlink_to(f"usr/{name}")
    for source in _COPIED:
        with suppress(FileNotFoundError):
            shutil.copyfile(source, rootfs / source.removeprefix("/"))
    etc = rootfs / "etc"
    etc.joinpath("passwd").write_text(
        f"root:x:0:0:root:/:/usr/sbin/nologin\nuser:x:{spec.user}:{spec.user}:user:/:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
    )
    etc.joinpath("group").write_text(f"root:x:0:\nuser:x:{spec.user}:\nnogroup:x:65534:\n")
    etc.joinpath("nsswitch.conf").write_text(_NSSWITCH)
    hosts = etc / "hosts"
    if not any(mount.target == "/etc/hosts" for mount in spec.mounts):
        hosts.write_text(f"127.0.0.1 localhost {spec.hostname}\n")
