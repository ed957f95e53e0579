"""Structured logs: one event a line, JSON or for a terminal. Never given a secret; long values are cut."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from outrider.errors import InputError
from outrider.tokens import without_tokens

LEVELS = ("debug", "info", "warning", "error")
_VALUE_CHARS_MAX = 2000


class Log:
    """`Log("agent").info("placed", alloc=id)`: an event's name, then its values."""

    def __init__(self, component: str, **bound: Any) -> None:
        self._logger = logging.getLogger(f"outrider.{component}")
        self._bound = bound

    def bind(self, **values: Any) -> "Log":
        bound = Log("")
        bound._logger, bound._bound = self._logger, {**self._bound, **values}
        return bound

    def debug(self, event: str, **values: Any) -> None:
        self._write(logging.DEBUG, event, values)

    def info(self, event: str, **values: Any) -> None:
        self._write(logging.INFO, event, values)

    def warning(self, event: str, **values: Any) -> None:
        self._write(logging.WARNING, event, values)

    def error(self, event: str, **values: Any) -> None:
        self._write(logging.ERROR, event, values)

    def _write(self, level: int, event: str, values: dict[str, Any]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={"values": {**self._bound, **values}})


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values = getattr(record, "values", {})
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "component": record.name.removeprefix("outrider."),
            "event": record.getMessage(),
            **{name: _printable(value) for name, value in values.items()},
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _printable(value: Any) -> Any:
    if isinstance(value, int | float | bool | None):
        return value
    text = without_tokens(str(value))
    return text if len(text) <= _VALUE_CHARS_MAX else text[:_VALUE_CHARS_MAX] + "..."


def set_level(level: str) -> None:
    """From here on, in this process. Raises InputError where it is none of LEVELS."""
    if level not in LEVELS:
        raise InputError(f"log level {level[:20]!r}: one of {', '.join(LEVELS)}")
    logging.getLogger("outrider").setLevel(level.upper())


def configure(level: str = "info") -> None:
    """Log to standard error from here on. `level`: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger("outrider")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
