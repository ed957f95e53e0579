"""`python -m outrider.cli.dev.supervisor NAME`: keeps a dev fleet running until SIGTERM, then removes it.

Tasks: one for each program, which starts it again when it ends. Programs die with the supervisor; workloads do not.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from outrider import log
from outrider.cli.dev import namespaces, programs, removal
from outrider.cli.dev.layout import CONTROL_ADDRESS, PROMETHEUS_PORT, Layout, find
from outrider.errors import HostError, OutriderError
from outrider.log import Log

_POLL_S = 0.05
_CONTROLLER_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_RESTART_DELAY_S = 0.5

_log = Log("dev")


async def supervise(layout: Layout) -> None:
    """Until SIGTERM or SIGINT; afterwards the programs have ended, the workloads not."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    running = asyncio.create_task(_run_all(layout), name="programs")
    stopping = asyncio.create_task(stopped.wait(), name="stop-signal")
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def _run_all(layout: Layout) -> None:
    (layout.run / "lost").mkdir(exist_ok=True)
    layout.log("x").parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    namespaces.create(layout)
    control = layout.control_namespace
    controller = _python("controller", programs.write_controller(layout))
    async with asyncio.TaskGroup() as group:
        group.create_task(_keep(layout, "controller", control, controller), name="controller")
        await _controller_is_up(layout)
        if shutil.which("mosquitto"):
            command = ["mosquitto", "-c", str(programs.write_broker(layout))]
            group.create_task(_keep(layout, "mosquitto", control, command), name="mosquitto")
        for node in layout.nodes:
            command = _python("agent", programs.write_agent(layout, node))
            group.create_task(_keep(layout, node, layout.namespace(node), command, layout.lost(node)), name=node)
        if shutil.which("prometheus"):
            command = _prometheus(layout, programs.write_prometheus(layout))
            group.create_task(_keep(layout, "prometheus", control, command), name="prometheus")
        _log.info("all started", fleet=layout.name, nodes=len(layout.nodes))


async def _controller_is_up(layout: Layout) -> None:
    """It has made its CA, and answers."""
    join_token = layout.join_token
    try:
        async with asyncio.timeout(_CONTROLLER_TIMEOUT_S):
            await _until(lambda: layout.operator_socket.is_socket() and join_token.exists())
    except TimeoutError as error:
        raise HostError("controller", step=f"start within {_CONTROLLER_TIMEOUT_S:g} s", hint="see its log") from error


async def _keep(layout: Layout, name: str, namespace: Path, command: Sequence[str], held: Path | None = None) -> None:
    """Starts a program, and again when it ends, but not while `held` exists: `dev kill` keeps its node down."""
    # The program dies with its supervisor: there is nobody left to stop it.
    words = [*namespaces.inside(namespace), "setpriv", "--pdeathsig", "KILL", "--", *command]
    while True:
        with layout.log(name).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, cwd="/"
            )
        try:
            code = await process.wait()
        finally:
            await _end(process)
        _log.warning("program ended, starting it again", program=name, exit_code=code)
        await asyncio.sleep(_RESTART_DELAY_S)
        if held is not None:
            await _until(lambda: not held.exists())


async def _until(condition: Callable[[], bool]) -> None:
    """Other programs' files bring no event: look again and again."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(_POLL_S)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def _python(module: str, config: Path) -> list[str]:
    return [sys.executable, "-m", module, "--config", str(config)]


def _prometheus(layout: Layout, config: Path) -> list[str]:
    return [
        "nice", "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={layout.data / 'prometheus'}",
        f"--web.listen-address={CONTROL_ADDRESS}:{PROMETHEUS_PORT}",
        "--log.level=warn",
    ]  # fmt: skip


def main() -> int:
    log.configure("info")
    layout = find(sys.argv[1])
    if layout is None:
        print(f"dev: no fleet {sys.argv[1]!r} is to be started", file=sys.stderr)
        return 64
    layout.supervisor.write_text(str(os.getpid()))
    code = 0
    try:
        asyncio.run(supervise(layout))
    except BaseExceptionGroup as group:
        print(f"dev: {'; '.join(map(str, group.exceptions))}", file=sys.stderr)
        code = 1
    except OutriderError as error:
        print(f"dev: {error}", file=sys.stderr)
        code = error.exit_code
    if code == 0:
        removal.remove(layout)
    return code


if __name__ == "__main__":
    sys.exit(main())
