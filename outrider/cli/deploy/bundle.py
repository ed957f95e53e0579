"""The bundle: Outrider and all it needs as wheels in one file, made from what runs here. No registry is asked.

A wheel is a distribution's files by its RECORD (https://packaging.python.org/specifications/recording-installed-packages/).
Owns the bundle's form, and the cache of bundles; never touches a host.
"""

import hashlib
import io
import json
import marshal
import os
import platform
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path, PurePosixPath

from outrider import __version__
from outrider.errors import HostError, InputError
from outrider.model.job import Value

OWN = "outrider"
OWN_PACKAGES = ("outrider", "agent", "controller", "sidecar")
MANIFEST = "manifest.json"
_ID_CHARS = 12
_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^]]*\])?[^;]*(;(?P<marker>.*))?$")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file: the same content makes the same bundle
_PROGRAMS = ("agent.app", "controller.app", "outrider.cli.main")
_UNUSED = {"__pycache__", "tests"}
_HARDLY_USED = {"xds-protos"}  # 1,800 modules, a third of all files, of which a tenth is ever loaded
_SKIPPED = {"INSTALLER", "REQUESTED", "direct_url.json", "RECORD"}


class Bundle(Value, frozen=True, kw_only=True):
    """One file, for hosts with this Python and this machine."""

    path: Path
    id: str  # VERSION-HASH: what it holds, by content
    version: str
    python: str  # "3.11"
    machine: str  # "x86_64"


def make_bundle(cache: Path, *, source: Path | None = None) -> Bundle:
    """The bundle of what runs here, from `cache` where it is there. `source`: a checkout whose Outrider it is.

    Raises HostError where a file is missing or cannot be written, InputError where `source` is none.
    """
    root, version = _own_source(source)
    try:
        own, others = _own_files(root, version), _closure()
        digest = hashlib.sha256(json.dumps([_content(own), *map(_recorded, others)]).encode()).hexdigest()
        bundle = Bundle(
            path=cache / f"{OWN}-{version}-{digest[:_ID_CHARS]}.tar",
            id=f"{version}-{digest[:_ID_CHARS]}",
            version=version,
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            machine=platform.machine(),
        )
        if not bundle.path.exists():
            started = _started(root)
            own |= _compiled({name: root / name for name in own}, own, started)
            wheels = {f"{OWN}-{version}-py3-none-any.whl": _zip(own, {}, f"{OWN}-{version}.dist-info")}
            with ThreadPoolExecutor(thread_name_prefix="wheel") as pool:  # it is the packing that takes long
                wheels.update(pool.map(partial(make_wheel, compiled=started), others))
            _write(bundle, {name: hashlib.sha256(wheels[name]).hexdigest() for name in sorted(wheels)}, wheels)
    except OSError as error:
        raise HostError("bundle", step=f"read what is installed here: {error}") from error
    return bundle


def _content(files: dict[str, bytes]) -> list[tuple[str, str]]:
    return [(name, hashlib.sha256(content).hexdigest()) for name, content in sorted(files.items())]


def _recorded(dist: Distribution) -> str:
    """A distribution's content by the list of hashes that it came with."""
    return hashlib.sha256((dist.read_text("RECORD") or f"{dist.metadata['Name']} {dist.version}").encode()).hexdigest()


def _write(bundle: Bundle, hashes: dict[str, str], wheels: dict[str, bytes]) -> None:
    manifest = {"id": bundle.id, "version": bundle.version, "python": bundle.python, "machine": bundle.machine}
    unfinished = bundle.path.with_suffix(f".partial-{os.getpid()}")
    try:
        bundle.path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(unfinished, "w") as tar:
            _add(tar, MANIFEST, json.dumps({**manifest, "wheels": hashes}).encode())
            for name in hashes:
                _add(tar, name, wheels[name])
        unfinished.replace(bundle.path)
    except OSError as error:
        raise HostError(str(bundle.path), step=f"write the bundle: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))


def _own_source(source: Path | None) -> tuple[Path, str]:
    """Where the own packages are, and their version."""
    if source is None:
        return Path(__file__).parents[3], __version__
    text = source / OWN / "__init__.py"
    match = re.search(r'__version__ = "([^"]+)"', text.read_text() if text.exists() else "")
    if match is None:
        raise InputError(f"--source: {source} is no checkout of Outrider")
    return source, match[1]


def _own_files(root: Path, version: str) -> dict[str, bytes]:
    files = {
        str(path.relative_to(root)): path.read_bytes()
        for package in OWN_PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    info = f"{OWN}-{version}.dist-info"
    requirements = "".join(f"Requires-Dist: {name}\n" for name in _requirements(distribution(OWN)))
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {OWN}\nVersion: {version}\n{requirements}".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: outrider\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\noutrider = outrider.cli.main:main\n"
    return files


def _closure() -> list[Distribution]:
    """All that Outrider needs, itself left out, by name."""
    found: dict[str, Distribution] = {}
    waiting = list(_requirements(distribution(OWN)))
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError as error:
            raise HostError(
                "bundle", step=f"find {name}, which Outrider needs", hint="install Outrider anew"
            ) from error
        waiting.extend(_requirements(found[name]))
    return [found[name] for name in sorted(found)]


def _requirements(dist: Distribution) -> Iterator[str]:
    """Names that are needed here: neither an extra's nor another platform's."""
    for text in dist.requires or ():
        match = _REQUIREMENT.match(text)
        if match is not None and _applies(match["marker"] or ""):
            yield match["name"]


def _applies(marker: str) -> bool:
    """As far as is needed: an extra's never, others where what they need is installed here."""
    if "extra" in marker:
        return False
    if not marker:
        return True
    from packaging.markers import Marker

    return Marker(marker).evaluate()


def make_wheel(dist: Distribution, *, compiled: frozenset[str] = frozenset()) -> tuple[str, bytes]:
    """The distribution as a wheel again, without its tests: its name and content.

    `compiled`: files of modules whose bytecode goes with them; of what is large and hardly used they alone are taken.
    """
    chosen = compiled if compiled and _normal(dist.metadata["Name"]) in _HARDLY_USED else None
    name, version = dist.metadata["Name"].replace("-", "_"), dist.version
    told = (dist.read_text("WHEEL") or "").splitlines()
    tags = [line.removeprefix("Tag:").strip().split("-") for line in told if line.startswith("Tag:")]
    tag = "-".join(".".join(dict.fromkeys(parts)) for parts in zip(*tags or [["py3", "none", "any"]], strict=True))
    files: dict[str, bytes] = {}
    modes: dict[str, int] = {}
    paths: dict[str, Path] = {}
    for entry in dist.files or ():
        if entry.parts[0] == ".." or _UNUSED & set(entry.parts) or entry.suffix == ".pyi" or entry.name in _SKIPPED:
            continue  # scripts beside the library, what nobody runs, what the interpreter made or the installer did
        path = Path(str(entry.locate()))
        if chosen is not None and path.suffix == ".py" and str(path) not in chosen:
            continue
        files[str(entry)] = path.read_bytes()
        modes[str(entry)] = path.stat().st_mode & 0o755
        paths[str(entry)] = path
    files |= _compiled(paths, files, compiled)
    info = next(part for part in (entry.split("/")[0] for entry in files) if part.endswith(".dist-info"))
    return f"{name}-{version}-{tag}.whl", _zip(files, modes, info)


def _started(root: Path) -> frozenset[str]:
    """Files of the modules that the programs have loaded once they run. Raises HostError where one cannot start."""
    loads = f"import sys, {', '.join(_PROGRAMS)}"
    tells = "print(*(getattr(each, '__file__', '') for each in sys.modules.values()), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", f"{loads}; {tells}"], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise HostError("bundle", step=f"start what is to be packed: {done.stderr.strip()[-400:]}")
    return frozenset(done.stdout.splitlines())


def _compiled(paths: Mapping[str, Path], sources: Mapping[str, bytes], chosen: frozenset[str]) -> dict[str, bytes]:
    """Bytecode that is taken without a look at its source (PEP 552): else each host compiles the same at first.

    Of the chosen files alone: of the rest most are never loaded, and a file costs a host more than it saves.
    """
    found: dict[str, bytes] = {}
    for name, path in paths.items():
        if path.suffix != ".py" or str(path) not in chosen:
            continue
        code = SourceFileLoader(name, str(path)).get_code(name)
        header = MAGIC_NUMBER + (1).to_bytes(4, "little") + source_hash(sources[name])
        file = f"__pycache__/{path.stem}.{sys.implementation.cache_tag}.pyc"
        found[str(PurePosixPath(name).parent / file)] = header + marshal.dumps(code)
    return found


def _zip(files: dict[str, bytes], modes: dict[str, int], info: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        record = "".join(f"{name},sha256={_hash(data)},{len(data)}\n" for name, data in sorted(files.items()))
        everything = {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}
        for name, data in sorted(everything.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = (stat.S_IFREG | modes.get(name, 0o644)) << 16  # pip reads no mode without the kind
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return content.getvalue()


def _hash(data: bytes) -> str:
    from base64 import urlsafe_b64encode

    return urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
