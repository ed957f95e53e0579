"""`python -m agent --config FILE`: exits 64 for bad configuration, 71 when the host refuses, 0 on SIGTERM.

SIGTERM and SIGKILL alike leave the workloads running: the next agent takes them over. `--purge` removes them.
"""

import argparse
import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

from agent import hybrid
from agent.config import Config
from outrider import log
from outrider.config import load
from outrider.errors import OutriderError

_PURGE_S = 120


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m agent", description="The agent of one Outrider node.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="configuration, YAML")
    parser.add_argument("--purge", action="store_true", help="stop and remove everything of this node, then exit")
    parser.add_argument("--purge-inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, Config)
        log.configure(config.log)
        if arguments.purge:
            return _purge(config, arguments.config)
        # First of all, before any thread: on hybrid hosts this process is replaced by itself, elsewhere.
        config.run.mkdir(mode=0o711, parents=True, exist_ok=True)
        hybrid.enter(config.run, [sys.executable, "-m", "agent", *sys.argv[1:]])
        asyncio.run(_purge_inside(config) if arguments.purge_inside else _run(config))
    except OutriderError as error:
        return _explain(error)
    except BaseExceptionGroup as group:
        ours, others = group.split(OutriderError)
        if ours is None or others is not None:
            raise
        return _explain(_first(ours))
    return 0


async def _run(config: Config) -> None:
    from agent.app import run  # noqa: PLC0415 - gRPC's threads must not be there when `hybrid.enter` runs

    await run(config)


async def _purge_inside(config: Config) -> None:
    from agent.purge import purge  # noqa: PLC0415 - as above

    await purge(config)


def _purge(config: Config, path: Path) -> int:
    """By a process of its own, as the mount namespace can only be let go from outside."""
    done = subprocess.run(
        [sys.executable, "-m", "agent", "--config", str(path), "--purge-inside"], timeout=_PURGE_S, check=False
    )
    if done.returncode == 0:
        hybrid.remove(config.run)
        shutil.rmtree(config.run, ignore_errors=True)
    return done.returncode


def _first(group: BaseExceptionGroup[OutriderError]) -> OutriderError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _explain(error: OutriderError) -> int:
    print(f"agent: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
