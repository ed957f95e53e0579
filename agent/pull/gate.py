"""Which images this node lets run: by digest alone, where it says so, and none that its scanner finds too much in.

Owns DATA/roots/HEX/scan.json, what the scanner found before an image's first start here. The scanner is the operator's:
any command that prints what trivy, grype, or `{"findings": [{"id", "package", "severity"}]}` print.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from weakref import WeakValueDictionary

import msgspec

from agent.pull import programs
from agent.pull.complaints import PullError
from agent.pull.image import UnpackedImage, name_of, pinned
from outrider.log import Log
from outrider.model.job import MIB, Image, ImageKind, Value

_SHOWN_MAX = 10
_WRITTEN_BYTES_MAX = 4096 * MIB  # a scanner's own database among it


class Severity(IntEnum):
    UNKNOWN = 0
    NEGLIGIBLE = 1
    LOW = 2
    MEDIUM = 3
    HIGH = 4
    CRITICAL = 5


class ImagePolicy(Value, frozen=True, kw_only=True):
    """`scan`: a command in which `{root}` is where the image's files are. `refuse`: from this severity on."""

    require_digest: bool = False
    scan: Annotated[tuple[str, ...], msgspec.Meta(max_length=64)] = ()
    refuse: Literal["negligible", "low", "medium", "high", "critical"] = "high"


class Finding(Value, frozen=True, kw_only=True):
    id: str
    package: str = ""
    severity: str = "unknown"


class Verdict(Value, frozen=True, kw_only=True):
    scanner: str  # a hash of the command: another one looks again
    at_s: float
    findings: tuple[Finding, ...] = ()


class Gate:
    def __init__(self, policy: ImagePolicy, log: Log) -> None:
        self._policy = policy
        self._scanner = hashlib.sha256("\0".join(policy.scan).encode()).hexdigest()
        self._log = log
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def asked(self, image: Image) -> None:
        """Before anything is pulled. Raises PullError."""
        if self._policy.require_digest and image.kind is ImageKind.OCI and not pinned(image):
            message = (
                "this node takes images by their digest alone: write NAME@sha256:DIGEST (`skopeo inspect` tells it)"
            )
            raise PullError(message, retry=False)

    async def unpacked(self, image: Image, found: UnpackedImage, told: Callable[[str], None]) -> None:
        """Before it is started. Raises PullError with what is wrong with it."""
        if not self._policy.scan:
            return
        async with self._locks.setdefault(found.digest, asyncio.Lock()):
            verdict = await self._verdict(image, found, told)
        limit = Severity[self._policy.refuse.upper()]
        over = [finding for finding in verdict.findings if _severity(finding) >= limit]
        if over:
            over.sort(key=_severity, reverse=True)
            shown = ", ".join(f"{one.id} in {one.package} ({one.severity})" for one in over[:_SHOWN_MAX])
            more = f" and {len(over) - _SHOWN_MAX} more" if len(over) > _SHOWN_MAX else ""
            raise PullError(f"the node's scanner refuses it: {shown}{more}", retry=False)

    async def _verdict(self, image: Image, found: UnpackedImage, told: Callable[[str], None]) -> Verdict:
        path = Path(found.root).parent / "scan.json"
        kept = await asyncio.to_thread(_read, path)
        if kept is not None and kept.scanner == self._scanner:
            return kept
        told(f"scanning {name_of(image)}")
        argv = tuple(word.replace("{root}", found.root) for word in self._policy.scan)
        done = await programs.run(argv, directory=path.parent, bytes_max=_WRITTEN_BYTES_MAX)
        try:
            findings = tuple(_findings(msgspec.json.decode(done.stdout)))
        except (msgspec.DecodeError, AttributeError, TypeError, KeyError) as error:
            said = " ".join((done.stderr or str(error)).split())[-300:]
            raise PullError(f"the node's scanner {argv[0]} ended with {done.code}: {said}", retry=True) from error
        verdict = Verdict(scanner=self._scanner, at_s=time.time(), findings=findings)
        await asyncio.to_thread(_write, path, verdict)
        self._log.info("image scanned", image=name_of(image), digest=found.digest, findings=len(findings))
        return verdict


def _severity(finding: Finding) -> Severity:
    return Severity.__members__.get(finding.severity.upper(), Severity.UNKNOWN)


def _findings(said: Any) -> Iterator[Finding]:
    """As trivy, grype, or anybody else tells them. Raises KeyError, TypeError or AttributeError for what is none."""
    if "Results" in said:
        for result in said["Results"] or ():
            for each in result.get("Vulnerabilities") or ():
                yield Finding(id=each["VulnerabilityID"], package=each["PkgName"], severity=each["Severity"])
    elif "matches" in said:
        for each in said["matches"]:
            what = each["vulnerability"]
            yield Finding(id=what["id"], package=each["artifact"]["name"], severity=what["severity"])
    else:
        for each in said["findings"]:
            yield Finding(id=each["id"], package=each.get("package", ""), severity=each.get("severity", "unknown"))


def _read(path: Path) -> Verdict | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Verdict)
    except (OSError, msgspec.DecodeError):
        return None


def _write(path: Path, verdict: Verdict) -> None:
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_bytes(msgspec.json.encode(verdict))
    unfinished.replace(path)
