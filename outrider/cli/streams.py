"""Logs and exec: bytes between the terminal and an allocation.

Threads: one that reads standard input while a command runs; one for each allocation whose logs are followed.
"""

import contextlib
import io
import os
import queue
import shutil
import signal
import sys
import termios
import threading
import tty as terminal
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from outrider import codec
from outrider.cli import output
from outrider.cli.client import STREAM_TIMEOUT_S, Fleet
from outrider.errors import OutriderError, PeerError, RefusedError
from outrider.model.allocation import TERMINAL, Allocation
from outrider.v1 import fleet_pb2, operator_pb2

_CHUNK_BYTES = 32 * 1024
_FILE_CHUNK_BYTES = 256 * 1024
_LEAVE = b"\x1d"  # Ctrl-]: telnet's, and virsh's
_FRAMES_MAX = 16  # typed ahead; then the terminal, or the pipe, waits


def logs_request(
    alloc: str, *, task: str, follow: bool, tail_lines: int, stdout: bool, stderr: bool
) -> fleet_pb2.LogsRequest:
    stream = fleet_pb2.LOG_STREAM_UNSPECIFIED
    if stdout != stderr:
        stream = fleet_pb2.LOG_STREAM_STDOUT if stdout else fleet_pb2.LOG_STREAM_STDERR
    return fleet_pb2.LogsRequest(alloc=alloc, task=task, stream=stream, tail_lines=tail_lines, follow=follow)


def copy_logs(fleet: Fleet, request: fleet_pb2.LogsRequest) -> None:
    """All that `request` asks for, to standard output and standard error."""
    for frame in fleet.stream(fleet.stub.Logs, request):
        _copy(frame)


def copy_job_logs(fleet: Fleet, job: str, request: fleet_pb2.LogsRequest) -> None:
    """The same of each allocation of `job`, its lines marked; with `follow`, of those to come too, until Ctrl-C."""
    if not request.follow:
        listed = fleet.call(fleet.stub.ListAllocations, operator_pb2.ListAllocationsRequest(job=job, terminal=True))
        if not listed.allocations:
            fleet.call(fleet.stub.GetJob, operator_pb2.GetJobRequest(job=job))  # says so where there is no such job
        for message in listed.allocations:
            if message.HasField("node"):
                _copy_marked(fleet, codec.from_wire(message, Allocation), request, threading.Event())
        return
    followed: set[str] = set()
    ending = threading.Event()
    try:
        for status in fleet.stream(fleet.stub.WatchJob, operator_pb2.GetJobRequest(job=job)):
            for message in status.allocations:
                allocation = codec.from_wire(message, Allocation)
                begun = allocation.report is not None and bool(allocation.report.tasks)
                if begun and allocation.id not in followed:
                    followed.add(allocation.id)
                    arguments = (fleet, allocation, request, ending)
                    name = f"logs-{allocation.id}"
                    threading.Thread(target=_copy_marked, args=arguments, name=name, daemon=True).start()
    finally:
        ending.set()


def sit_at_console(fleet: Fleet, target: str) -> None:
    """Until Ctrl-], the end of the input, or the guest's. Raises RefusedError where there is no console."""
    with_tty = sys.stdin.isatty() and sys.stdout.isatty()
    if with_tty:
        output.say("at the console; Ctrl-] leaves it\r")
    start = fleet_pb2.ExecRequest(alloc=allocation_of(fleet, target), console=True, tty=with_tty)
    _converse(fleet, start, f"{target}: console")


def execute(fleet: Fleet, target: str, *, task: str, command: Sequence[str], tty: bool | None) -> int:
    """Runs `command` in `target` and gives its exit code. Raises RefusedError where it could not be run."""
    with_tty = tty if tty is not None else sys.stdin.isatty() and sys.stdout.isatty()
    size = shutil.get_terminal_size()
    start = fleet_pb2.ExecRequest(
        alloc=allocation_of(fleet, target),
        task=task,
        command=command,
        tty=with_tty,
        rows=size.lines,
        columns=size.columns,
    )
    return _converse(fleet, start, " ".join(command))


def operate(
    fleet: Fleet,
    verb: fleet_pb2.VmVerb.ValueType,
    snapshot: str,
    *,
    alloc: str = "",
    node: str = "",
    source: BinaryIO | None = None,
) -> str:
    """What the node says of an operation on a vm, or on a snapshot. `source`: what it is given."""
    said = io.BytesIO()
    operate_into(fleet, said, verb, snapshot, alloc=alloc, node=node, source=source)
    return said.getvalue().decode()


def operate_into(
    fleet: Fleet,
    target: BinaryIO,
    verb: fleet_pb2.VmVerb.ValueType,
    snapshot: str,
    *,
    alloc: str = "",
    node: str = "",
    path: str = "",
    source: BinaryIO | None = None,
) -> None:
    """The same, what it gives into `target`. Raises RefusedError with what the node objects to."""
    command = fleet_pb2.VmCommand(verb=verb, snapshot=snapshot, path=path)
    start = fleet_pb2.ExecRequest(alloc=alloc, node=node, vm=command)
    _converse(fleet, start, snapshot or path or node, source=source or io.BytesIO(), target=target)


def _converse(
    fleet: Fleet,
    start: fleet_pb2.ExecRequest,
    what: str,
    *,
    source: BinaryIO | None = None,
    target: BinaryIO | None = None,
) -> int:
    """Its exit code. `source` and `target` instead of standard input and output."""
    frames: queue.Queue[operator_pb2.ExecFrame | None] = queue.Queue(_FRAMES_MAX)
    frames.put(operator_pb2.ExecFrame(start=start))
    leave = _LEAVE if start.console and start.tty else b""
    arguments = (frames, leave, source)
    reader = threading.Thread(target=_read_input, args=arguments, name="exec-stdin", daemon=True)
    with _raw_terminal(frames) if start.tty else contextlib.nullcontext():
        reader.start()
        for frame in fleet.stream(fleet.stub.Exec, iter(frames.get, None), STREAM_TIMEOUT_S):
            if frame.HasField("end"):
                if frame.end.error:
                    raise RefusedError("exec-failed", f"{what}: {frame.end.error}")
                return frame.end.exit_code
            if target is not None and frame.HasField("stdout"):
                target.write(frame.stdout)
            else:
                _copy(frame)
    raise PeerError(f"{start.alloc}: broke off before its end")


def allocation_of(fleet: Fleet, target: str) -> str:
    """The one running allocation whose id begins with `target`, else the first that runs of the job `target`."""
    found = fleet.call(fleet.stub.ListAllocations, operator_pb2.ListAllocationsRequest()).allocations
    if any(each.id.startswith(target) for each in found):
        return target  # whether it is the only one is the fleet's to say
    running = [each for each in (codec.from_wire(message, Allocation) for message in found) if each.job == target]
    ready = sorted(
        (each for each in running if each.node and each.status not in TERMINAL),
        key=lambda each: (not each.healthy, each.group, each.index),
    )
    if not ready:
        raise RefusedError("not-found", f"no allocation {target!r} runs, nor a job of that name; `outrider alloc ls`")
    return ready[0].id


def _copy(frame: fleet_pb2.TunnelFrame) -> None:
    match frame.WhichOneof("frame"):
        case "stdout":
            _write(sys.stdout.buffer, frame.stdout)
        case "stderr":
            _write(sys.stderr.buffer, frame.stderr)
        case "end" if frame.end.error:
            raise RefusedError("logs-failed", frame.end.error)


def _copy_marked(fleet: Fleet, allocation: Allocation, request: fleet_pb2.LogsRequest, ending: threading.Event) -> None:
    mark = f"{allocation.group}[{allocation.index}] ".encode()
    own = fleet_pb2.LogsRequest()
    own.CopyFrom(request)
    own.alloc = allocation.id
    rest = {"stdout": b"", "stderr": b""}
    try:
        for frame in fleet.stream(fleet.stub.Logs, own):
            kind = frame.WhichOneof("frame")
            if kind != "stdout" and kind != "stderr":  # noqa: PLR1714 - so that mypy follows
                _copy(frame)
                continue
            text = rest[kind] + (frame.stdout if kind == "stdout" else frame.stderr)
            whole, newline, rest[kind] = text.rpartition(b"\n")
            _write_lines(kind, mark, whole + newline)
        for name, text in rest.items():
            _write_lines(name, mark, text + b"\n" if text else b"")
    except OutriderError as error:
        # One allocation's logs may be gone with its node: say so, and go on with the others.
        if not ending.is_set():
            output.say(f"{mark.decode()}{error}")


def _write_lines(kind: str, mark: bytes, text: bytes) -> None:
    marked = b"".join(mark + line for line in text.splitlines(keepends=True))
    if marked:
        _write(sys.stdout.buffer if kind == "stdout" else sys.stderr.buffer, marked)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()


def _read_input(frames: "queue.Queue[operator_pb2.ExecFrame | None]", leave: bytes, source: BinaryIO | None) -> None:
    """Until its end, or `leave` is typed."""
    while data := source.read(_FILE_CHUNK_BYTES) if source else os.read(sys.stdin.fileno(), _CHUNK_BYTES):
        if leave and leave in data:
            break
        frames.put(operator_pb2.ExecFrame(stdin=data))
    frames.put(operator_pb2.ExecFrame(stdin_closed=True))


@contextlib.contextmanager
def _raw_terminal(frames: "queue.Queue[operator_pb2.ExecFrame | None]") -> Iterator[None]:
    """Keys go to the command as they are, Ctrl-C too; the window's size follows."""

    def resize(_number: int, _frame: object) -> None:
        size = shutil.get_terminal_size()
        told = fleet_pb2.TerminalSize(rows=size.lines, columns=size.columns)
        with contextlib.suppress(queue.Full):  # the next change tells again
            frames.put_nowait(operator_pb2.ExecFrame(resize=told))

    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    resized = signal.signal(signal.SIGWINCH, resize)
    terminal.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, resized)
