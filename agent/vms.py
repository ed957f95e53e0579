"""Virtual machines on this node: their files, their emulators' conversations, whether they booted, why they ended.

Owns DATA/images and each guest's own directory; the emulator itself is a sandbox like any other. Starts no task.
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from agent import qmp, seed
from agent.belongings.memory import guest_memory
from agent.drivers.microvm import EXIT, ended
from agent.drivers.process import Place
from agent.drivers.vm import MACHINE, OVERLAY, QMP, SEED, SHUTDOWN_TRACE, TRACE, GuestImages, guest_spec
from agent.guest_states import GuestPlace, GuestStates, Origin
from agent.images import Images, disk_format
from agent.migration import Offer
from agent.network.guest import TAP
from agent.sandbox import process
from agent.sandbox.spec import INNER_USER, SandboxSpec, StartError
from agent.snapshots import IMAGES, FileSum, Manifest
from outrider.clock import wall_s
from outrider.errors import HostError, RefusedError
from outrider.ids import AllocId
from outrider.model.allocation import Assignment
from outrider.model.job import MIB, GuestFile, Task, has_seed

_QEMU_IMG_S = 30.0
_BOOT_POLL_S = 0.25
_TRACE_BYTES_MAX = 65_536
_POWERED_OFF = f"{SHUTDOWN_TRACE} reason=6\n".encode()  # guest-shutdown of QEMU's ShutdownCause


class Vms:
    """`run`: the node's; `kvm` tells whether the node's self-test has booted a guest with it."""

    def __init__(self, *, run: Path, images: Images, states: GuestStates, kvm: Callable[[], bool]) -> None:
        self._run = run
        self._images = images
        self._states = states
        self._kvm = kvm
        self._busy: set[Path] = set()  # guests whose state is being kept or put back

    async def prepare(self, assignment: Assignment, task: Task, place: Place) -> tuple[SandboxSpec, str]:
        """Files fetched and checked, the overlay made unless an earlier run left one. With the snapshot to go on from.

        Raises StartError where job or image are at fault, HostError where this host is.
        """
        directory, owner = Path(place.task_directory), place.uid_first + INNER_USER
        where = self.place(assignment.alloc, task, Path(place.directory))
        snapshot = self._states.wanted(task, where.sandbox)
        if snapshot:
            await self._states.check(snapshot, task, where.sandbox)
            await asyncio.to_thread(self._take_images, snapshot)
        images = await asyncio.to_thread(self._fetch, task)
        ready = make_ready(directory, owner)
        if snapshot:
            await self._states.lay_out(snapshot, where, owner)
        elif not ready and images.disk:
            await make_overlay(directory / OVERLAY, task.resources.disk_bytes, images.disk_format, owner)
        if has_seed(task) and not snapshot:
            await seed.make(where.memory / SEED, assignment, task, place.files, owner)
        self._states.begin(where.sandbox, waits=bool(snapshot))
        return guest_spec(assignment, task, place, images, kvm=self._kvm(), waits=bool(snapshot)), snapshot

    def place(self, alloc: AllocId, task: Task, sandbox: Path) -> GuestPlace:
        memory = guest_memory(self._run, alloc, task.name)
        return GuestPlace(directory=guest_directory(sandbox), sandbox=sandbox, memory=memory)

    async def take_up(self, snapshot: str, place: GuestPlace) -> None:
        """The emulator at `place`, which was started, goes on from `snapshot`. Raises StartError."""
        await self._states.take_up(snapshot, place)

    async def keep(self, snapshot: str, assignment: Assignment, task: Task, sandbox: Path) -> Manifest:
        """The guest that runs, as a snapshot; it runs on. Raises RefusedError or HostError."""
        place = self.place(assignment.alloc, task, sandbox)
        with self.alone_with(place.directory):
            images = await asyncio.to_thread(self._fetch, task)
            return await self._states.take(snapshot, assignment, task, place, images, kvm=self._kvm())

    async def plan_return(self, snapshot: str, task: Task, sandbox: Path) -> None:
        """The next start goes on from `snapshot`. Raises RefusedError where it could not."""
        manifest = self._states.fitting(snapshot, task)
        await asyncio.to_thread(self._states.snapshots.check, manifest)
        self._states.want(snapshot, sandbox)

    def waits(self, sandbox: Path) -> bool:
        """Whether its emulator was started for a state that it has not got yet."""
        return self._states.waits(sandbox)

    def was_taken_up(self, sandbox: Path) -> bool:
        """Whether its guest once went on from elsewhere: since then it starts from its own disk."""
        return self._states.was_taken_up(sandbox)

    def settled(self, sandbox: Path) -> Callable[[], None]:
        return lambda: self._states.settle(sandbox)

    async def offer(
        self, task: Task, place: GuestPlace, identity: str, version: str
    ) -> tuple[Offer, Mapping[str, Path]]:
        """The guest that runs at `place` under QEMU `version`, and where its images are, by checksum."""
        images = await asyncio.to_thread(self._fetch, task)
        roles = {role: Path(path) for role in ("disk", "kernel", "initrd") if (path := getattr(images, role))}
        origin = self._states.origin()
        offer = Offer(
            qemu=version,
            machine=MACHINE,
            accelerator=origin.accelerator,
            processor=origin.processor,
            identity=identity,
            images={role: FileSum(sha256=path.name, size_bytes=path.stat().st_size) for role, path in roles.items()},
            seed=(place.memory / SEED).exists(),
        )
        return offer, {path.name: path for path in roles.values()}

    def lacking(self, offer: Offer, task: Task) -> tuple[FileSum, ...]:
        """Images of the offered guest that are not on this node. Raises StartError where it could not run here.

        Blocks: what the job names is copied into the cache.
        """
        origin = Origin(qemu=offer.qemu, accelerator=offer.accelerator, processor=offer.processor)
        reasons = self._states.foreign(origin)
        if offer.machine != MACHINE:
            reasons.append(f"it is a {offer.machine}, and this node makes {MACHINE}")
        if reasons:
            raise StartError(f"the guest cannot go on here: {'; '.join(reasons)}")
        lacking = []
        for role, file in _files(task).items():
            if role not in offer.images or offer.images[role].sha256 != file.sha256:
                raise StartError(f"the guest that comes has another {role} than the job says")
            try:
                self._images.fetch(file)
            except StartError:
                lacking.append(offer.images[role])
        return tuple(lacking)

    async def keep_image(self, expected: FileSum, blocks: AsyncIterator[bytes]) -> None:
        """Into the node's cache, if it is what it should be. Raises StartError or HostError."""
        try:
            descriptor, unfinished = self._images.begin(expected.size_bytes)
            try:
                found, size = hashlib.sha256(), 0
                with os.fdopen(descriptor, "wb") as file:
                    async for block in blocks:
                        found.update(block)
                        size += len(block)
                        if size > expected.size_bytes:
                            break
                        await asyncio.to_thread(file.write, block)
                if FileSum(sha256=found.hexdigest(), size_bytes=size) != expected:
                    raise StartError(f"what came is not the image {expected.sha256}")
                self._images.keep(unfinished, expected.sha256)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise HostError("images", step=f"keep {expected.sha256}: {error.strerror}") from error

    async def prepare_arrival(self, assignment: Assignment, task: Task, place: Place, offer: Offer) -> SandboxSpec:
        """An emulator that waits for the guest, and an empty overlay for what it wrote."""
        directory, owner = Path(place.task_directory), place.uid_first + INNER_USER
        images = await asyncio.to_thread(self._fetch, task)
        make_ready(directory, owner)
        (directory / OVERLAY).unlink(missing_ok=True)
        if images.disk:
            await make_overlay(directory / OVERLAY, task.resources.disk_bytes, images.disk_format, owner)
        self._states.begin(Path(place.directory), waits=True)
        return guest_spec(assignment, task, place, images, kvm=self._kvm(), waits=True, identity=offer.identity)

    def keep_seed(self, place: Place, content: bytes) -> None:
        path, owner = Path(place.memory) / SEED, place.uid_first + INNER_USER
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)
        os.chown(path, owner, owner)

    def is_busy(self, directory: Path) -> bool:
        """Whether its emulator's control socket is somebody's already."""
        return directory in self._busy

    @contextmanager
    def alone_with(self, directory: Path) -> Iterator[None]:
        """Raises RefusedError where somebody else keeps, puts back or moves this guest."""
        if directory in self._busy:
            raise RefusedError("busy", "the guest's state is being kept, put back or moved already; wait for that")
        self._busy.add(directory)
        try:
            yield
        finally:
            self._busy.discard(directory)

    def _take_images(self, snapshot: str) -> None:
        """What the snapshot was made on may be nowhere else on this node."""
        manifest = self._states.snapshots.manifest(snapshot)
        kept = self._states.snapshots.path(snapshot) / IMAGES
        for each in manifest.images.values():
            self._images.take(kept / each.sha256, each.sha256)

    def _fetch(self, task: Task) -> GuestImages:
        image = task.image
        paths = {name: str(self._images.fetch(file)) for name, file in _files(task).items()}
        if "disk" not in paths:
            return GuestImages(**paths)
        kind, size = disk_format(Path(paths["disk"]), image.reference)
        if size > task.resources.disk_bytes:
            asked = f"`resources: {{disk: {-(-size // MIB)}Mi}}` or more"
            raise StartError(
                f"{image.reference} is a disk of {size} bytes, more than the job reserves: ask for {asked}"
            )
        return GuestImages(**paths, disk_format=kind)


def _files(task: Task) -> dict[str, GuestFile]:
    image = task.image
    disk = GuestFile(reference=image.reference, sha256=image.sha256) if image.reference else None
    files = {"disk": disk, "kernel": image.kernel, "initrd": image.initrd}
    return {role: file for role, file in files.items() if file is not None}


def guest_directory(sandbox: Path) -> Path:
    """The disk and the sockets of a guest whose sandbox's directory is `sandbox`. No task's name has a dot."""
    return sandbox.with_name(f"{sandbox.name}.vm")


async def wake(directory: Path) -> None:
    """A guest that an agent left paused, in the middle of keeping its state, runs on."""
    with suppress(HostError):  # it ends just now, or somebody speaks with it
        await qmp.resume(directory / QMP)


async def press_power_button(directory: Path) -> None:
    """Ask the guest to end. Raises HostError where its emulator does not answer."""
    await qmp.power_down(directory / QMP)


async def booted(pid: int, *, packets: int, until_s: float) -> bool:
    """Waits until the guest whose emulator is `pid` sent more than `packets`; False where it did not, until then."""
    while packets_sent(pid) <= packets:
        if wall_s() > until_s:
            return False
        await asyncio.sleep(_BOOT_POLL_S)  # nobody tells of an interface's first packet
    return True


def packets_sent(pid: int) -> int:
    """By the guests before it on the same link too. 0 where it has ended: whoever watches it tells."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    except OSError:
        return 0
    figures = [line.split() for line in lines if line.strip().startswith(f"{TAP}:")]
    return int(figures[0][2]) if figures else 0


def bad_end(directory: Path) -> str:
    """Why a guest ended that left its emulator well, where that was no orderly end; "" where it was, or is no guest.

    QEMU traces who asks for its end, and a guest's power off is one of those; a reset it turns into an end untraced.
    """
    if not directory.is_dir():
        return ""
    return "" if _POWERED_OFF in _read(directory / TRACE) else "the guest panicked, or reset itself"


def told_end(directory: Path) -> tuple[int, bool]:
    """How a process with a kernel of its own ended: its code, and whether for want of memory. Else (0, False)."""
    text = _read(directory / EXIT).decode(errors="replace")
    return ended(text) or (0, False)


def _read(path: Path) -> bytes:
    """The emulator could have put anything there: no link is followed, nothing is waited for."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(_TRACE_BYTES_MAX) or b""
    return b""


def remove_guest(directory: Path) -> None:
    """The guest's own directory: its disk is thrown away with it."""
    shutil.rmtree(directory, ignore_errors=True)


def make_ready(directory: Path, owner: int) -> bool:
    """Whether an earlier run left its disk. What else it left goes: sockets, traces, a disk half made."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(directory, owner, owner)
    for path in directory.iterdir():
        if path.name != OVERLAY:
            path.unlink()
    return (directory / OVERLAY).exists()


async def make_overlay(path: Path, size_bytes: int, base_format: str, owner: int) -> None:
    """A disk of `size_bytes` for the emulator's host uid `owner`, over a base. Raises HostError."""
    unfinished = path.with_suffix(".new")
    # -u: the base is not opened. It was looked at already, and the emulator is told of it by hand.
    argv = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", base_format, "-b", "base"]
    done = await process.run([*argv, str(unfinished), str(size_bytes)], timeout_s=_QEMU_IMG_S)
    if done.code != 0:
        raise HostError("qemu-img", step=f"make a disk: {done.output.strip()}")
    os.chown(unfinished, owner, owner)
    unfinished.rename(path)
