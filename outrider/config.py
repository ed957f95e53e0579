"""A component's configuration: one YAML file -> one frozen value, loaded whole and checked before anything is bound.

Owns reading and the errors, which name file and key. Never fills in what a component's own struct does not say.
"""

import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from outrider.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)


def load(path: Path, kind: type[S]) -> S:
    """The content of `path` as a value of `kind`. Raises ConfigError with file and key.

    A `Path` in `kind` is written as a string. A struct's `__post_init__` may raise ValueError: it is told with its key.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the configuration's path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level")
    for problem in _unknown_keys(document, kind, ""):
        raise ConfigError(f"{path}: {problem}")
    try:
        return msgspec.convert(document, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_with_key(str(error))}") from error


def host_port(text: str) -> tuple[str, int]:
    """`HOST:PORT` in its parts; a host in brackets is an IPv6 address. Raises ValueError."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT, for example 127.0.0.1:7070")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _unknown_keys(document: dict[object, object], kind: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for key, value in document.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(hints))}"
            yield f"{prefix}{key}: unknown key; {hint}"
        elif isinstance(value, dict):
            for inner in _structs(hints[str(key)]):
                yield from _unknown_keys(value, inner, f"{prefix}{key}.")


def _structs(annotation: object) -> Iterator[type[msgspec.Struct]]:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            yield option


def _decode(kind: type, value: object) -> Any:
    if kind is Path:
        if isinstance(value, str) and value:
            return Path(value)
        raise ValueError("expected a path")
    raise NotImplementedError(kind)


def _with_key(message: str) -> str:
    """msgspec's "text - at `$.key`", the key first."""
    text, separator, where = message.rpartition(" - at `$.")
    return f"{where.removesuffix('`')}: {text}" if separator else message
