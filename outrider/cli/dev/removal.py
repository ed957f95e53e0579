"""Removes all that a dev fleet has on this machine, whatever state it is in. Safe to run again."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from outrider.cli.dev import namespaces
from outrider.cli.dev.layout import Layout
from outrider.errors import HostError
from outrider.ids import NodeId

_PURGE_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 10.0
_POLL_S = 0.02
_CGROUPS = Path("/sys/fs/cgroup")


def remove(layout: Layout) -> None:
    """Its supervisor is gone, or is the caller. Raises HostError with what could not be removed."""
    end(pid for path in _namespaces(layout) for pid in namespaces.processes(path))
    failures = _purge(layout)
    end(pid for node in layout.nodes for pid in sandboxes(layout, node))
    end(pid for path in _namespaces(layout) for pid in namespaces.processes(path))
    namespaces.remove(layout)
    for directory in [*_CGROUPS.glob(f"*/outrider/{layout.name}"), _CGROUPS / "outrider" / layout.name]:
        _remove_cgroup(directory)
    shutil.rmtree(layout.data, ignore_errors=True)
    shutil.rmtree(layout.run, ignore_errors=True)
    left = [str(path) for path in (layout.data, layout.run) if path.exists()]
    if left:
        raise HostError(f"fleet {layout.name}", step=f"remove {', '.join(left)}", hint="; ".join(failures))


def end(pids: Iterable[int]) -> None:
    """SIGKILL to each, and wait until all are gone."""
    ended = [pid for pid in pids if pid != os.getpid()]
    for pid in ended:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _END_TIMEOUT_S
    while any(alive(pid) for pid in ended) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def sandboxes(layout: Layout, node: NodeId) -> Iterator[int]:
    """Ids of the processes in the node's cgroups, and of those that watch over them."""
    subtree = f"outrider/{layout.name}/{node}"
    for pattern in (f"*/{subtree}/**/cgroup.procs", f"{subtree}/**/cgroup.procs"):
        for path in _CGROUPS.glob(pattern):
            with contextlib.suppress(OSError):  # removed meanwhile
                yield from map(int, path.read_text().split())
    own = f"{layout.run / node}/".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if Path(os.fsdecode(words[0])).name == "conmon" and any(word.startswith(own) for word in words):
                    yield int(entry.name)


def _purge(layout: Layout) -> list[str]:
    """Every agent removes what is its node's; all at once. What they could not do is told, not raised."""
    running = {}
    for node in layout.nodes:
        config, namespace = layout.config(f"{node}.yaml"), layout.namespace(node)
        if config.exists() and namespace.exists():
            command = [*namespaces.inside(namespace), sys.executable, "-m", "agent", "--config", str(config), "--purge"]
            running[node] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/"
            )
    failures = []
    for node, process in running.items():
        try:
            _, said = process.communicate(timeout=_PURGE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
        if process.returncode:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            failures.append(f"{node}: purge ended with {process.returncode}: {''.join(last)}")
            print(f"dev: {failures[-1]}", file=sys.stderr)
    return failures


def _namespaces(layout: Layout) -> list[Path]:
    return [layout.control_namespace, *map(layout.namespace, layout.nodes)]


def _remove_cgroup(directory: Path) -> None:
    """Deepest first: a cgroup goes only when it is empty."""
    for path in sorted(directory.glob("**/"), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
