"""Reads typed fields out of a document's tree and collects what is wrong instead of stopping at the first.

Owns faults and positions. A field that cannot be read gets its default, so that the rest is judged too.
"""

import difflib
from collections.abc import Callable, Collection, Iterator
from enum import StrEnum
from typing import NamedTuple, TypeVar

from outrider.jobspec.document import Mapping, Mark, Node, Scalar, Sequence
from outrider.model.job import Value

Path = tuple[str | int, ...]
T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


class Fault(Value, frozen=True, kw_only=True):
    mark: Mark
    path: Path
    message: str


class Asked(NamedTuple):
    """How the reader looks at a key. `kind`: "" where it reads the value by itself."""

    kind: str = ""
    default: object = None


class Faults:
    """What is wrong with one file so far, where its parts stand, and which keys the reader looked for."""

    def __init__(self) -> None:
        self.found: list[Fault] = []
        self.asked: dict[Path, dict[str, Asked]] = {}
        self.required: set[Path] = set()
        self._marks: dict[Path, Mark] = {}

    def add(self, path: Path, message: str, mark: Mark | None = None) -> None:
        self.found.append(Fault(mark=mark or self.mark(path), path=path, message=message))

    def place(self, path: Path, mark: Mark) -> None:
        self._marks.setdefault(path, mark)

    def mark(self, path: Path) -> Mark:
        """Where `path` stands, or the nearest part around it that does."""
        while path and path not in self._marks:
            path = path[:-1]
        return self._marks.get(path, Mark())

    def told(self, path: Path) -> bool:
        """Whether something is known to be wrong with `path`, what is around it, or all that is in it."""
        return any(path[: len(fault.path)] == fault.path for fault in self.found)


def suggestion(word: str, known: Collection[str]) -> str:
    """The end of an error about `word`."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}"


class Fields:
    """A mapping whose keys are known beforehand."""

    def __init__(self, node: Node, path: Path, faults: Faults, known: Collection[str]) -> None:
        self._faults = faults
        self.path = path
        self._values: dict[str, Node] = {}
        self._asked = faults.asked.setdefault(path, {})
        self._asked.update((key, Asked()) for key in known if key not in self._asked)
        for key, value in named(node, path, faults):
            if key in known:
                self._values[key] = value
            else:
                faults.add((*path, key), f"unknown key; {suggestion(key, known)}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def node(self, key: str) -> Node | None:
        """None where it is absent, or has no value (which is a fault)."""
        value = self._values.get(key)
        if isinstance(value, Scalar) and value.empty:
            self.fault(key, "has no value; give one, or leave the key out")
            return None
        return value

    def required(self, key: str, example: str) -> Node | None:
        self._faults.required.add((*self.path, key))
        if key not in self._values:
            self.fault(key, f"missing; for example `{key}: {example}`")
        return self.node(key)

    def fault(self, key: str, message: str) -> None:
        self._faults.add((*self.path, key), message)

    def text(self, key: str, default: str) -> str:
        self._asked[key] = Asked("text", default)
        return self._scalar(key, _as_text, default)

    def integer(self, key: str, default: int) -> int:
        self._asked[key] = Asked("whole number", default)
        return self._scalar(key, _as_integer, default)

    def flag(self, key: str, *, default: bool) -> bool:
        self._asked[key] = Asked("`true` or `false`", default)
        return self._scalar(key, _as_flag, default)

    def quantity(self, key: str, read: Callable[[str], T], default: T) -> T:
        self._asked[key] = Asked(read.__name__, default)
        return self._scalar(key, lambda scalar: read(scalar.text), default)

    def choice(self, key: str, kind: type[E], default: E) -> E:
        def read(scalar: Scalar) -> E:
            names = [str(member) for member in kind]
            if scalar.text not in names:
                raise ValueError(f"{scalar.text[:80]!r} is none of {', '.join(names)}{_near(scalar.text, names)}")
            return kind(scalar.text)

        self._asked[key] = Asked(" ".join(f"`{member}`" for member in kind), default)
        return self._scalar(key, read, default)

    def texts(self, key: str, hint: str = "") -> tuple[str, ...]:
        """A list of words. `hint` follows the error where it is none."""
        self._asked[key] = Asked("list of texts", ())
        value = self.node(key)
        if value is None:
            return ()
        return tuple(
            text
            for path, item in listed(value, (*self.path, key), self._faults, hint)
            if (text := text_of(item, path, self._faults)) is not None
        )

    def _scalar(self, key: str, read: Callable[[Scalar], T], default: T) -> T:
        value = self.node(key)
        if value is None:
            return default
        if not isinstance(value, Scalar):
            self.fault(key, f"expected one value, found {_noun(value)}")
            return default
        try:
            return read(value)
        except ValueError as error:
            self._faults.add((*self.path, key), str(error), value.mark)
            return default


def named(node: Node, path: Path, faults: Faults) -> Iterator[tuple[str, Node]]:
    """The entries of a mapping, each once; anything else is a fault and has none."""
    faults.place(path, node.mark)
    if not isinstance(node, Mapping):
        faults.add(path, f"expected keys and values, found {_noun(node)}", node.mark)
        return
    seen: dict[str, Mark] = {}
    for key, value in node.entries:
        if key.text in seen:
            first = seen[key.text]
            faults.add((*path, key.text), f"stands here twice; first in line {first.line}", key.mark)
            continue
        seen[key.text] = key.mark
        faults.place((*path, key.text), key.mark)
        yield key.text, value


def listed(node: Node, path: Path, faults: Faults, hint: str = "") -> Iterator[tuple[Path, Node]]:
    """The items of a list with their paths; anything else is a fault and has none."""
    if not isinstance(node, Sequence):
        faults.add(path, f"expected a list, found {_noun(node)}{hint and '; ' + hint}", node.mark)
        return
    for index, item in enumerate(node.items):
        faults.place((*path, index), item.mark)
        yield (*path, index), item


def text_of(node: Node, path: Path, faults: Faults) -> str | None:
    """One word, as written; None (and a fault) where it is something else."""
    if not isinstance(node, Scalar):
        faults.add(path, f"expected a text, found {_noun(node)}", node.mark)
        return None
    if node.empty:
        faults.add(path, 'has no value; write "" for an empty text', node.mark)
        return None
    return node.text


def _as_text(scalar: Scalar) -> str:
    return scalar.text


def _as_integer(scalar: Scalar) -> int:
    text = scalar.text.removeprefix("-")
    if not (scalar.plain and text.isascii() and text.isdigit() and len(text) <= 12):
        raise ValueError(f"{scalar.text[:80]!r} is no whole number")
    return int(scalar.text)


def _as_flag(scalar: Scalar) -> bool:
    if not (scalar.plain and scalar.text in {"true", "false"}):
        raise ValueError(f"{scalar.text[:80]!r} is neither true nor false")
    return scalar.text == "true"


def _near(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _noun(node: Node) -> str:
    match node:
        case Scalar():
            return f"{node.text[:40]!r}"
        case Sequence():
            return "a list"
        case Mapping():
            return "keys and values"
