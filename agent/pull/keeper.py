"""Which images and artifacts each allocation needs, until it is cleaned: asks, keeps, and tells the core how that goes.

Tasks: one for each allocation that waits, and one that tells of its progress, in the agent's TaskGroup. Queue: the
core's; of progress it is told the newest alone, and at most once in a second.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from agent.belongings.artifacts import Artifacts
from agent.core.events import ImagesFailed, ImagesOnTheirWay, ImagesReady
from agent.pull.cache import Cache
from agent.pull.complaints import PullError
from agent.pull.image import UnpackedImage, name_of
from agent.pull.puller import Puller, Told
from outrider.errors import HostError
from outrider.ids import AllocId, TaskName
from outrider.model.allocation import Assignment
from outrider.model.job import PULLED, Image

_PROGRESS_S = 1.0

T = TypeVar("T")

Tell = Callable[[ImagesOnTheirWay | ImagesReady | ImagesFailed], Awaitable[None]]


class Keeper:
    def __init__(
        self, *, cache: Cache, puller: Puller, artifacts: Artifacts, tell: Tell, tasks: asyncio.TaskGroup
    ) -> None:
        self._cache = cache
        self._puller = puller
        self._artifacts = artifacts
        self._tell = tell
        self._tasks = tasks
        self._waiting: dict[AllocId, asyncio.Task[None]] = {}

    def begin(self, assignment: Assignment) -> None:
        """Its images are there, and kept, when the core hears `ImagesReady`."""
        alloc = assignment.alloc
        self._waiting[alloc] = self._tasks.create_task(self._gather(assignment), name=f"{alloc}-images")

    def unpacked(self, alloc: AllocId, image: Image) -> UnpackedImage | None:
        """None where it needs none, or has none."""
        return self._cache.held(alloc, name_of(image)) if image.kind in PULLED else None

    async def release(self, alloc: AllocId) -> None:
        """It needs them no more; nothing runs of it. Raises HostError where the cache cannot note that."""
        waiting = self._waiting.pop(alloc, None)
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        try:
            self._cache.release(alloc)
            self._artifacts.release(alloc)
        except OSError as error:
            raise HostError("cache of images", step=f"release: {error.strerror}") from error

    async def _gather(self, assignment: Assignment) -> None:
        alloc = assignment.alloc
        wanted = {name_of(task.image): task.image for task in assignment.group.tasks if task.image.kind in PULLED}
        for name, image in wanted.items():
            try:
                while self._cache.held(alloc, name) is None:
                    unpacked = await self._telling(alloc, partial(self._puller.fetch, image))
                    self._cache.hold(alloc, name, unpacked.digest)  # else it went just now: once more
            except OSError as error:
                message = f"image {name}: the node's cache: {error.strerror}"
                await self._tell(ImagesFailed(alloc=alloc, message=message, retry=True))
                return
            except PullError as error:
                await self._tell(ImagesFailed(alloc=alloc, message=f"image {name}: {error}", retry=error.retry))
                return
        for artifact in (artifact for task in assignment.group.tasks for artifact in task.artifacts):
            try:
                await self._telling(alloc, partial(self._artifacts.keep, alloc, artifact))
            except OSError as error:
                message = f"artifact {artifact.path}: the node's cache: {error.strerror}"
                await self._tell(ImagesFailed(alloc=alloc, message=message, retry=True))
                return
            except PullError as error:
                message = f"artifact {artifact.path}, {artifact.source}: {error}"
                await self._tell(ImagesFailed(alloc=alloc, message=message, retry=error.retry))
                return
        await self._tell(ImagesReady(alloc=alloc, exposed=self._exposed(assignment)))

    def _exposed(self, assignment: Assignment) -> dict[TaskName, tuple[int, ...]]:
        images = {task.name: self.unpacked(assignment.alloc, task.image) for task in assignment.group.tasks}
        return {name: image.ports for name, image in images.items() if image is not None}

    async def _telling(self, alloc: AllocId, work: Callable[[Told], Awaitable[T]]) -> T:
        """What `work` brings; what it says meanwhile goes to the core."""
        newest, changed = [""], asyncio.Event()

        def told(message: str) -> None:
            newest[0] = message
            changed.set()

        async def forward() -> None:
            while True:
                await changed.wait()
                changed.clear()
                await self._tell(ImagesOnTheirWay(alloc=alloc, message=newest[0]))
                await asyncio.sleep(_PROGRESS_S)

        forwarding = self._tasks.create_task(forward(), name=f"{alloc}-progress")
        try:
            return await work(told)
        finally:
            forwarding.cancel()
