"""What makes a task's belongings impossible. Pure: `outrider.validate` asks here.

Owns limits and names within one task. Never judges whether the fleet has what is named: that is the controller's.
"""

import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

from outrider.ids import SecretName, is_name
from outrider.model.belongings import OnChange, SecretUse, Template
from outrider.model.job import Driver, Resources, Task, is_guest

LIST_MAX = 64
ULIMITS = frozenset({"core", "cpu", "fsize", "memlock", "msgqueue", "nofile", "nproc", "rttime", "sigpending", "stack"})
# Those that mean something within a user namespace, and do not open the way to all others.
CAPABILITIES = frozenset(
    {
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "NET_BIND_SERVICE",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SYS_CHROOT",
    }
)
_NICE_MAX, _IO_WEIGHT_MAX = 19, 1000
ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
TEMPLATES_CHARS_MAX = 1024 * 1024
_SPLAY_S_MAX = 3600.0
_PATH_CHARS_MAX = 255
_SECRET_NAMED = re.compile(r"(\$?)\$\{secret\.([^}]*)\}")
_STICKY_BYTES_MIN = 65_536
_SOURCES = ("https://", "http://", "file:/", "oci:")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_TAKEN = ("/proc", "/sys", "/dev", "/secrets", "/artifacts", "/templates", "/task", "/.init")
_ROOTS = frozenset({PurePosixPath("/"), PurePosixPath("/usr"), PurePosixPath("/etc")})

Path = tuple[str | int, ...]
Wrong = tuple[Path, str]


def wrong_belongings(task: Task) -> Iterator[Wrong]:
    """Where in `task`, and what is wrong there."""
    yield from _secrets(task)
    yield from _volumes(task)
    yield from _sticky(task)
    yield from _artifacts(task)
    yield from _templates(task)
    yield from _limits(task)


def is_inner_path(text: str) -> bool:
    """Whether it names a file below a directory, and nothing else."""
    path = PurePosixPath(text)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in text


def _secrets(task: Task) -> Iterator[Wrong]:
    yield from _secrets_in_text(task)
    if not task.secrets:
        return
    if len(task.secrets) > LIST_MAX:
        yield ("secrets",), f"{len(task.secrets)} of them; at most {LIST_MAX}"
    for use in task.secrets:
        for at, text in (*_secret(use), *_in_guest(task, use)):
            yield ("secrets", use.name, *at), text
    for key, taken in (
        ("env", Counter((*task.env, *(use.env for use in task.secrets if use.env)))),
        ("file", Counter(use.file for use in task.secrets if use.file)),
    ):
        for use in task.secrets:
            if taken[getattr(use, key)] > 1:
                yield ("secrets", use.name, key), f"{getattr(use, key)} is given twice; take another"


def _secrets_in_text(task: Task) -> Iterator[Wrong]:
    """`${secret.NAME}`: of a secret that the task has, in its environment alone."""
    uses = {use.name: use for use in task.secrets}
    for key, text in task.env.items():
        for name in _secrets_named(text):
            use = uses.get(SecretName(name))
            if use is None:
                yield ("env", key), f"it speaks of secret {name[:80]!r}, which is not among the task's secrets: add it"
            elif use.on_change in (OnChange.SIGNAL, OnChange.NONE):
                yield ("secrets", name, "on_change"), f"env {key} has it, and {use.on_change} cannot change that: roll"
    for words in ("command", "args"):
        for at, word in enumerate(getattr(task, words)):
            if _secrets_named(word):
                yield (words, at), "whoever lists processes sees a secret that stands here; put it into env"


def _secrets_named(text: str) -> list[str]:
    return [match[2] for match in _SECRET_NAMED.finditer(text) if not match[1]]


def _volumes(task: Task) -> Iterator[Wrong]:
    if len(task.volumes) > LIST_MAX:
        yield ("volumes",), f"{len(task.volumes)} of them; at most {LIST_MAX}"
    named = Counter(use.volume for use in task.volumes)
    for use in task.volumes:
        at: Path = ("volumes", use.target)
        if not is_name(use.volume):
            yield at, f"{use.volume[:80]!r} is no volume's name; lower-case letters, digits and dashes, at most 63"
        elif named[use.volume] > 1:
            yield at, f"volume {use.volume} is given twice; once is enough"
        if task.driver is Driver.VM:
            continue  # where the guest mounts its disk is its own matter
        yield from _target(at, use.target)


def _sticky(task: Task) -> Iterator[Wrong]:
    if task.sticky and is_guest(task):
        yield ("sticky",), "a guest's disk goes with its allocation; give it a volume"
    if len(task.sticky) > LIST_MAX:
        yield ("sticky",), f"{len(task.sticky)} of them; at most {LIST_MAX}"
    mounted = {use.target for use in task.volumes}
    for disk in task.sticky:
        at: Path = ("sticky", disk.target)
        yield from _target(at, disk.target)
        if disk.target in mounted:
            yield at, "a volume is there already; take another path"
        if disk.size_bytes < _STICKY_BYTES_MIN:
            yield at, f"{disk.size_bytes} bytes; a disk has at least {_STICKY_BYTES_MIN}"


def _target(at: Path, target: str) -> Iterator[Wrong]:
    path = PurePosixPath(target)
    if not path.is_absolute() or ".." in path.parts or "\0" in target or len(target) > _PATH_CHARS_MAX:
        yield at, f"expected a whole path inside, from / on, without .., of at most {_PATH_CHARS_MAX} characters"
    elif (
        any(path == PurePosixPath(taken) or PurePosixPath(taken) in path.parents for taken in _TAKEN) or path in _ROOTS
    ):
        yield at, f"{target} is not to be covered; mount it elsewhere, such as /data"


def _artifacts(task: Task) -> Iterator[Wrong]:
    if task.artifacts and task.driver is Driver.VM:
        message = "a vm could not move with them: a disk of them is another on each node; put them on its disk"
        yield ("artifacts",), f"{message}, or fetch them inside"
    if len(task.artifacts) > LIST_MAX:
        yield ("artifacts",), f"{len(task.artifacts)} of them; at most {LIST_MAX}"
    paths = [PurePosixPath(artifact.path) for artifact in task.artifacts]
    for artifact in task.artifacts:
        at: Path = ("artifacts", artifact.path)
        if not is_inner_path(artifact.path) or len(artifact.path) > _PATH_CHARS_MAX:
            yield at, f"expected a path below /artifacts, without .., of at most {_PATH_CHARS_MAX} characters"
        elif any(other in PurePosixPath(artifact.path).parents for other in paths):
            yield at, "lies within another artifact; give it a path beside it"
        if not artifact.source.startswith(_SOURCES) or any(ord(letter) <= 32 for letter in artifact.source):
            yield (*at, "source"), f"{artifact.source[:80]!r} is no source; expected one of {', '.join(_SOURCES)}..."
        if not _SHA256.match(artifact.sha256):
            yield (*at, "sha256"), "expected 64 hexadecimal digits in lower case: sha256sum prints them"


def _templates(task: Task) -> Iterator[Wrong]:
    if len(task.templates) > LIST_MAX:
        yield ("templates",), f"{len(task.templates)} of them; at most {LIST_MAX}"
    size = sum(len(template.content) for template in task.templates)
    if size > TEMPLATES_CHARS_MAX:
        yield ("templates",), f"{size} characters in all; at most {TEMPLATES_CHARS_MAX}"
    for template in task.templates:
        for at, text in (*_template(template), *_in_guest(task, template)):
            yield ("templates", template.path, *at), text


def _template(template: Template) -> Iterator[Wrong]:
    if not is_inner_path(template.path) or len(template.path) > _PATH_CHARS_MAX:
        yield (), f"expected a path below /templates, without .., of at most {_PATH_CHARS_MAX} characters"
    if template.on_change is OnChange.ROLL:
        yield ("on_change",), "what a template says changes on each node by itself; choose restart, signal or none"
    if not 0 <= template.splay_s <= _SPLAY_S_MAX:
        yield ("splay",), f"{template.splay_s:g} s is not within 0 and {_SPLAY_S_MAX:g} s"
    yield from wrong_signal(template.signal)


def _in_guest(task: Task, use: SecretUse | Template) -> Iterator[Wrong]:
    """A vm finds them on a disk as it boots: what it does with them is its own matter, and nobody in there is told."""
    if task.driver is not Driver.VM:
        return
    if isinstance(use, SecretUse) and use.env:
        yield ("env",), "a vm brings its own environment: give it a file"
    if use.on_change is OnChange.SIGNAL:
        yield ("on_change",), "no signal reaches what runs in a vm: choose restart, or none for its next start"
    if task.image.start_from:
        yield (), "a vm that goes on from a snapshot does not look for it: leave start_from out, or this"


def _guest_limits(task: Task) -> Iterator[Wrong]:
    if not is_guest(task):
        return
    for key, name in (("shm_bytes", "shm"), ("nice", "nice"), ("ulimits", "ulimits")):
        if getattr(task.resources, key) != getattr(Resources(), key):
            yield ("resources", name), "of processes; a vm's guest has its own"
    if task.capabilities:
        yield ("capabilities",), "of processes; a vm's guest has all of its own"


def _limits(task: Task) -> Iterator[Wrong]:
    resources = task.resources
    default = Resources()
    yield from _guest_limits(task)
    if not 0 <= resources.nice <= _NICE_MAX:
        yield ("resources", "nice"), f"{resources.nice} is not within 0 and {_NICE_MAX}: a task can only yield"
    if not 0 <= resources.io_weight <= _IO_WEIGHT_MAX:
        yield ("resources", "io_weight"), f"{resources.io_weight} is not within 1 and {_IO_WEIGHT_MAX}"
    if not 0 < resources.shm_bytes <= max(resources.memory_bytes, default.shm_bytes):
        yield ("resources", "shm"), f"{resources.shm_bytes} bytes; it has some, and no more than the task's memory"
    for name, value in resources.ulimits.items():
        if name not in ULIMITS:
            yield ("resources", "ulimits", name), f"no such limit; known are {', '.join(sorted(ULIMITS))}"
        if value < 0:
            yield ("resources", "ulimits", name), f"{value} is no limit"
    for at, name in enumerate(task.capabilities):
        if name not in CAPABILITIES:
            yield ("capabilities", at), f"{name[:40]!r} is none that a task can have: {', '.join(sorted(CAPABILITIES))}"


def _secret(use: SecretUse) -> Iterator[Wrong]:
    if not is_name(use.name):
        yield (), f"{use.name[:80]!r} is no secret's name; lower-case letters, digits and dashes, at most 63"
    if use.env and not ENV_NAME.match(use.env):
        yield ("env",), "a variable's name is letters, digits and underscores"
    if use.file and (not is_inner_path(use.file) or len(use.file) > _PATH_CHARS_MAX):
        yield ("file",), f"expected a path below /secrets, without .., of at most {_PATH_CHARS_MAX} characters"
    if use.version is not None and use.version < 1:
        yield ("version",), f"{use.version} is no version; the first is 1"
    if use.env and use.on_change in (OnChange.SIGNAL, OnChange.NONE):
        message = f"{use.on_change} cannot change the environment of what runs: give a file, or roll, or restart"
        yield ("on_change",), message
    yield from wrong_signal(use.signal)


def wrong_signal(name: str) -> Iterator[Wrong]:
    if name not in signal.Signals.__members__:
        yield ("signal",), f"{name!r} is no signal; for example SIGHUP"
