"""`python -m controller --config FILE`: exits 64 for bad configuration, 74 when the journal fails, 0 on SIGTERM."""

import argparse
import asyncio
import sys
from pathlib import Path

from controller.app import run
from controller.config import Config, JournalKind, with_journal
from outrider import log
from outrider.config import load
from outrider.errors import OutriderError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m controller", description="The controller of an Outrider fleet.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="configuration, YAML")
    parser.add_argument("--journal", choices=tuple(JournalKind), help="instead of what the configuration says")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, Config)
        if arguments.journal is not None:
            config = with_journal(config, JournalKind(arguments.journal))
        log.configure(config.log)
        asyncio.run(run(config))
    except OutriderError as error:
        return _explain(error)
    except BaseExceptionGroup as group:
        ours, others = group.split(OutriderError)
        if ours is None or others is not None:
            raise
        return _explain(_first(ours))
    return 0


def _first(group: BaseExceptionGroup[OutriderError]) -> OutriderError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _explain(error: OutriderError) -> int:
    print(f"controller: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
