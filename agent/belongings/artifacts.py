"""Artifacts: fetched once, checked, kept in a cache of bounded size while an allocation needs them.

Owns DATA/artifacts (laid out as `agent.pull.cache` says, by what an artifact becomes) and DATA/partial, where an
interrupted download goes on. The work is done by `agent.belongings.fetching`, and by skopeo for registries.
"""

import asyncio
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from weakref import WeakValueDictionary

from agent.pull import cache as caches
from agent.pull import programs
from agent.pull.cache import Cache
from agent.pull.complaints import PullError
from agent.pull.image import UnpackedImage
from agent.pull.puller import Puller
from outrider.ids import AllocId
from outrider.log import Log
from outrider.model.belongings import Artifact
from outrider.model.job import MIB, Value

ARTIFACTS = "/artifacts"  # inside
_PARTIAL_S = 24 * 3600.0  # after which an interrupted download is not gone on with
_FETCHES_MAX = 3
Told = Callable[[str], None]


class KeptArtifact(Value, frozen=True, kw_only=True):
    """One that is here. `path`: below /artifacts; `source`: a file or a directory of this node; `digest`: of it."""

    path: str
    source: str
    digest: str


class Artifacts:
    def __init__(self, *, data: Path, bytes_max: int, puller: Puller, log: Log) -> None:
        self._cache = Cache(data / "artifacts", bytes_max=bytes_max)
        self._partial = data / "partial"
        self._puller = puller
        self._log = log
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._turns = asyncio.Semaphore(_FETCHES_MAX)

    def open(self, known: Collection[AllocId]) -> None:
        """Takes over what an earlier agent left. Raises HostError."""
        self._cache.open(known)
        self._partial.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._partial.iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _PARTIAL_S:
                    path.unlink()

    async def keep(self, alloc: AllocId, artifact: Artifact, told: Told) -> None:
        """It is here, and stays until `release`. Raises PullError, and OSError where the cache cannot be used."""
        digest = _digest(artifact)
        async with self._locks.setdefault(digest, asyncio.Lock()):
            while not self._cache.hold(alloc, digest, digest):
                async with self._turns:
                    await self._fetch(artifact, digest, told)

    def release(self, alloc: AllocId) -> None:
        self._cache.release(alloc)

    def kept(self, artifact: Artifact) -> KeptArtifact:
        """As a guest's disk is made of it."""
        return KeptArtifact(path=artifact.path, source=str(self.path(artifact)), digest=_digest(artifact))

    def path(self, artifact: Artifact) -> Path:
        """Where its file, or its directory, is."""
        root = Path(self._cache.root_of(_digest(artifact)))
        return root if artifact.unpack else root / "file"

    async def _fetch(self, artifact: Artifact, digest: str, told: Told) -> None:
        told(f"fetching {artifact.source}")
        partial, scratch = self._partial / artifact.sha256, self._cache.scratch()

        def written(count: int) -> None:
            if count >= MIB:
                told(f"fetching {artifact.source}, {count // MIB} MiB so far")

        try:
            source = artifact.source
            if source.startswith("oci:"):
                blob = await self._puller.fetch_blob(source.removeprefix("oci:"), scratch, written)
                await asyncio.to_thread(shutil.move, blob, partial)
                source = ""
            done = await programs.run(
                (
                    *(sys.executable, "-m", "agent.belongings.fetching"),
                    *(source, artifact.sha256, str(partial), str(scratch / "root")),
                    *("tree" if artifact.unpack else "file", f"{artifact.mode:o}", str(self._cache.bytes_max)),
                ),
                directory=scratch,
                bytes_max=2 * self._cache.bytes_max,
                written=written,
            )
            if done.code != 0:
                said = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
                raise PullError(said, retry=done.code == os.EX_TEMPFAIL)
            await self._publish(scratch, digest)
        finally:
            await asyncio.to_thread(caches.removed, (scratch,))

    async def _publish(self, scratch: Path, digest: str) -> None:
        final = self._cache.scratch()
        (scratch / "root").rename(final / "root")
        size_bytes = await asyncio.to_thread(caches.size_of, final / "root")
        self._cache.publish(final, UnpackedImage(digest=digest, root=self._cache.root_of(digest)), size_bytes)
        await asyncio.to_thread(self._cache.make_durable, digest)
        evicted = self._cache.evict(bytes_max=self._cache.bytes_max, keep=digest)
        await asyncio.to_thread(caches.removed, evicted)
        self._log.info("artifact fetched", digest=digest, bytes=size_bytes)


def _digest(artifact: Artifact) -> str:
    """Of what it becomes: one archive may be wanted as a file too."""
    form = "tree" if artifact.unpack else f"{artifact.mode:o}"
    return f"sha256:{hashlib.sha256(f'{form} {artifact.sha256}'.encode()).hexdigest()}"
