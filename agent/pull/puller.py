"""Fetches images into the cache: each once, however many ask for it, in an order that leaves nothing half done.

resolve the reference -> is its digest there? -> skopeo fetches its blobs -> `layers` unpacks them -> one rename.
A tag that means nothing here yet is not resolved before: what skopeo fetched says which image it is.
Tasks: one for each image under way, in the agent's TaskGroup, ended when nobody waits for it any more.
"""

import asyncio
import os
import platform
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from agent.pull import cache as caches
from agent.pull import image as images
from agent.pull import programs
from agent.pull.cache import Cache
from agent.pull.complaints import PullError, judged, not_unpacked
from agent.pull.gate import Gate
from agent.pull.image import Configuration, Manifest, UnpackedImage
from agent.sandbox.beneath import open_beneath
from outrider.errors import HostError
from outrider.log import Log
from outrider.model.job import MIB, Image, ImageKind, PullPolicy, Value

_PULLS_MAX = 3
_ACCOUNTS_BYTES_MAX = MIB
_RESERVE_BYTES = 1024 * MIB  # with less of the disk free, what nobody needs goes first
_POLICY = Path("/etc/containers/policy.json")
_BLOBS = "blobs"  # below the scratch: as skopeo fetched them

Told = Callable[[str], None]


class Registries(Value, frozen=True, kw_only=True):
    """How this node speaks to registries. `certificates`: HOST:PORT/ca.crt, as /etc/containers/certs.d has them."""

    auth_file: Path | None = None
    certificates: Path | None = None


class _Pull:
    """One under way, and who listens."""

    def __init__(self) -> None:
        self.listeners: list[Told] = []
        self.task: asyncio.Task[UnpackedImage | PullError]

    def told(self, message: str) -> None:
        for listener in self.listeners:
            listener(message)


class Puller:
    def __init__(self, *, cache: Cache, registries: Registries, gate: Gate, tasks: asyncio.TaskGroup, log: Log) -> None:
        self._cache = cache
        self._registries = registries
        self._gate = gate
        self._tasks = tasks
        self._log = log
        self._under_way: dict[Image, _Pull] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by digest
        self._turns = asyncio.Semaphore(_PULLS_MAX)

    async def fetch(self, image: Image, told: Told) -> UnpackedImage:
        """The image, unpacked on this node. `told` hears what is going on where that takes time. Raises PullError."""
        self._gate.asked(image)
        found = await self._found(image, told)
        await self._gate.unpacked(image, found, told)
        return found

    async def _found(self, image: Image, told: Told) -> UnpackedImage:
        known = self._known(image)
        if known is not None:
            return known
        pull = self._under_way.get(image)
        if pull is None:
            pull = self._under_way[image] = _Pull()
            pull.task = self._tasks.create_task(self._outcome(image, pull), name=f"pull-{image.reference}")
        pull.listeners.append(told)
        try:
            outcome = await asyncio.shield(pull.task)
        finally:
            pull.listeners.remove(told)
            if not pull.listeners:
                pull.task.cancel()
                if self._under_way.get(image) is pull:
                    del self._under_way[image]
        if isinstance(outcome, PullError):
            raise PullError(str(outcome), retry=outcome.retry)
        return outcome

    def _known(self, image: Image) -> UnpackedImage | None:
        """What needs no asking: the node has it, and nobody may mean another by that name."""
        digest = images.pinned(image)
        if not digest and image.kind is ImageKind.OCI and image.pull is not PullPolicy.ALWAYS:
            digest = self._cache.meaning(images.name_of(image))
        return self._cache.find(digest)

    async def _outcome(self, image: Image, pull: _Pull) -> UnpackedImage | PullError:
        """Its error is a value: one raised here would end the agent."""
        if image.pull is PullPolicy.NEVER:
            return PullError("it is not on this node, and the job says `pull: never`", retry=False)
        try:
            async with self._turns:
                return await self._pulled(image, pull.told)
        except PullError as error:
            self._log.warning("image not pulled", image=images.name_of(image), reason=str(error), again=error.retry)
            return error
        except HostError as error:
            return PullError(str(error), retry=True)
        except OSError as error:
            return PullError(f"the node's cache of images: {error.strerror}", retry=True)

    async def _pulled(self, image: Image, told: Told) -> UnpackedImage:
        name = images.name_of(image)
        scratch = self._cache.scratch()
        try:
            digest = images.pinned(image)
            if not digest and (image.kind is not ImageKind.OCI or self._cache.meaning(name)):
                digest = await self._resolved(image, scratch)
            if digest:
                async with self._lock(digest):
                    found = self._cache.find(digest) or await self._made(image, digest, scratch, told)
            else:
                found = await self._made(image, "", scratch, told)
            if image.kind is ImageKind.OCI:
                self._cache.remember(name, found.digest)
            return found
        finally:
            await asyncio.to_thread(caches.removed, (scratch,))

    async def _resolved(self, image: Image, scratch: Path) -> str:
        access = self._access(image, nobody="--no-creds", certificates="--cert-dir")
        argv = (*self._skopeo(scratch), "inspect", "--raw", *access, _source(image))
        done = await programs.run(argv, directory=scratch, bytes_max=self._cache.bytes_max)
        if done.code != 0:
            raise judged(done.stderr)
        # What was fetched by its tag is known by the manifest for this architecture, of those that the tag may mean.
        known = (digest for digest in images.listed(done.stdout) if self._cache.find(digest) is not None)
        return next(known, images.digest_of(done.stdout))

    async def fetch_blob(self, reference: str, scratch: Path, written: Callable[[int], None]) -> Path:
        """The one blob of something in a registry that is no image, below `scratch`. Raises PullError."""
        image = Image(kind=ImageKind.OCI, reference=reference)
        layers = _manifest(await self._copied(image, "", scratch, written)).layers
        if len(layers) != 1:
            raise PullError(f"it has {len(layers)} layers, and an artifact is one blob", retry=False)
        return scratch / _BLOBS / _blob_name(layers[0].digest)

    async def _made(self, image: Image, known: str, scratch: Path, told: Told) -> UnpackedImage:
        """`known`: its digest, whose lock is held; "" for whatever the reference means now."""
        (scratch / _BLOBS).mkdir()  # before either program: both want it, and skopeo would make it
        # What unpacks is started beside, and waits: its own start takes as long as a small image's unpacking.
        layers: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        unpacking = self._tasks.create_task(self._unpacked(layers, scratch), name=f"unpack-{image.reference}")
        try:
            raw = await self._fetched(image, known, scratch, told)
            digest = known or images.digest_of(raw)
            async with nullcontext() if known else self._lock(digest):
                found = self._cache.find(digest)  # it may be known by another name
                if found is not None:
                    return found
                manifest = _manifest(raw)
                configuration = images.read(_blob(scratch, manifest.config.digest), Configuration, "configuration")
                # Judged before it is unpacked: another architecture's is not worth the disk.
                images.check_platform(configuration, platform.machine())
                told(f"unpacking {images.name_of(image)}")
                layers.set_result("".join(f"{_blob_name(layer.digest)}\n" for layer in manifest.layers))
                wrong = await unpacking
                if wrong is not None:
                    raise wrong
                return await self._published(configuration, digest, scratch)
        finally:
            unpacking.cancel()
            await asyncio.wait({unpacking})

    async def _fetched(self, image: Image, digest: str, scratch: Path, told: Told) -> bytes:
        """Its manifest; the blobs are there then."""
        name = images.name_of(image)
        told(f"pulling {name}")
        if shutil.disk_usage(scratch).free < _RESERVE_BYTES:
            await asyncio.to_thread(caches.removed, self._cache.evict(bytes_max=0))

        def written(count: int) -> None:
            if count >= MIB:
                told(f"pulling {name}, {count // MIB} MiB so far")

        return await self._copied(image, digest, scratch, written)

    async def _copied(self, image: Image, digest: str, scratch: Path, written: Callable[[int], None]) -> bytes:
        access = self._access(image, nobody="--src-no-creds", certificates="--src-cert-dir")
        blobs = scratch / _BLOBS
        argv = (*self._skopeo(scratch), "copy", "-q", *access, _source(image, digest), f"dir:{blobs}")
        done = await programs.run(argv, directory=scratch, bytes_max=self._cache.bytes_max, written=written)
        if done.code != 0:
            raise judged(done.stderr)
        return (blobs / "manifest.json").read_bytes()

    async def _unpacked(self, layers: asyncio.Future[str], scratch: Path) -> PullError | None:
        """What was wrong, as a value: one raised here would end the agent."""
        blobs, root, bytes_max = scratch / _BLOBS, scratch / "root", self._cache.bytes_max
        argv = (sys.executable, "-m", "agent.pull.layers", str(blobs), str(root), str(bytes_max))
        try:
            done = await programs.run(argv, directory=scratch, bytes_max=bytes_max, told=layers)
        except PullError as error:
            return error
        except OSError as error:
            return PullError(f"the node's cache of images: {error.strerror}", retry=True)
        return not_unpacked(done.stderr, retry=done.code != os.EX_DATAERR) if done.code != 0 else None

    async def _published(self, configuration: Configuration, digest: str, scratch: Path) -> UnpackedImage:
        root = scratch / "root"
        unpacked = images.unpacked(
            configuration,
            digest=digest,
            root=self._cache.root_of(digest),
            passwd=_account_file(root, "/etc/passwd"),
            group=_account_file(root, "/etc/group"),
        )
        size_bytes = await asyncio.to_thread(caches.size_of, root)
        if size_bytes > self._cache.bytes_max:
            raise programs.too_large(self._cache.bytes_max)
        final = self._cache.scratch()
        root.rename(final / "root")
        self._cache.publish(final, unpacked, size_bytes)
        self._log.info("image unpacked", digest=digest, bytes=size_bytes)
        self._tasks.create_task(asyncio.to_thread(self._cache.make_durable, digest), name=f"durable-{digest[:19]}")
        evicted = self._cache.evict(bytes_max=self._cache.bytes_max, keep=digest)
        await asyncio.to_thread(caches.removed, evicted)
        return unpacked

    def _lock(self, digest: str) -> asyncio.Lock:
        return self._locks.setdefault(digest, asyncio.Lock())

    def _skopeo(self, scratch: Path) -> tuple[str, ...]:
        # Where the operator has a policy (signatures, trusted registries), it holds.
        policy = ("--policy", str(_POLICY)) if _POLICY.exists() else ("--insecure-policy",)
        return ("skopeo", *policy, "--tmpdir", str(scratch))

    def _access(self, image: Image, *, nobody: str, certificates: str) -> tuple[str, ...]:
        """What skopeo's commands call by different names: being nobody, and the directory with the registry's CA."""
        if image.kind is not ImageKind.OCI:
            return ()
        known = self._registries
        arguments = [nobody] if known.auth_file is None else ["--authfile", str(known.auth_file)]
        if known.certificates is not None and (known.certificates / images.registry_of(image)).is_dir():
            arguments += [certificates, str(known.certificates / images.registry_of(image))]
        return tuple(arguments)


def _source(image: Image, digest: str = "") -> str:
    """As skopeo names it. In a registry by its digest: the tag may have moved since it was resolved."""
    match image.kind:
        case ImageKind.OCI:
            digest = digest or images.pinned(image)
            if not digest:
                return f"docker://{image.reference}"
            name = image.reference.partition("@")[0]
            registry, _, path = name.partition("/")
            return f"docker://{registry}/{path.partition(':')[0]}@{digest}"
        case ImageKind.OCI_LAYOUT:
            return f"oci:{image.reference}"
        case _:
            return f"docker-archive:{image.reference}"


def _manifest(raw: bytes) -> Manifest:
    return images.read(raw, Manifest, "manifest")


def _blob(scratch: Path, digest: str) -> bytes:
    return (scratch / _BLOBS / _blob_name(digest)).read_bytes()


def _blob_name(digest: str) -> str:
    """As skopeo calls its file."""
    algorithm, _, name = digest.partition(":")
    if algorithm != "sha256" or not (name.isascii() and name.isalnum()):
        raise PullError(f"it speaks of a digest that this node does not know: {digest[:80]!r}", retry=False)
    return name


def _account_file(root: Path, path: str) -> str:
    """A file that an image's author wrote: links stay within, a pipe is not waited for, and there is an end to it."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            descriptor = open_beneath(directory, path, os.O_RDONLY | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                return file.read(_ACCOUNTS_BYTES_MAX).decode(errors="replace")
    finally:
        os.close(directory)
    return ""
