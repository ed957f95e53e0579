"""YAML text -> a tree that remembers where each part stands. Knows nothing of jobs.

Owns what may be in the text at all: one document, no aliases, no tags, bounded size and depth.
Scalars stay as written: what `yes` or `010` means is the reader's to say, by what it expects there.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from outrider.model.job import Value

BYTES_MAX = 256 * 1024
DEPTH_MAX = 32

# libyaml's parser where PyYAML was built with it: twenty times faster, the same events.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Mark(Value, frozen=True, kw_only=True):
    """A place in the text, counted from 1."""

    line: int = 1
    column: int = 1


class Scalar(Value, frozen=True, kw_only=True):
    mark: Mark
    text: str
    plain: bool  # without quotes: may be a number, a truth value or nothing at all

    @property
    def empty(self) -> bool:
        return self.plain and self.text in {"", "~", "null"}


class Sequence(Value, frozen=True, kw_only=True):
    mark: Mark
    items: "tuple[Node, ...]"


class Mapping(Value, frozen=True, kw_only=True):
    mark: Mark
    entries: "tuple[tuple[Scalar, Node], ...]"  # as written: a key may stand there twice


Node = Scalar | Sequence | Mapping


class DocumentError(Exception):
    """The text is no document that could be a job."""

    def __init__(self, mark: Mark, message: str) -> None:
        super().__init__(message)
        self.mark = mark
        self.message = message


def parse(content: bytes) -> Node:
    """The one document in `content`. Raises DocumentError."""
    if len(content) > BYTES_MAX:
        raise DocumentError(Mark(), f"{len(content)} bytes; a job file has at most {BYTES_MAX}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = before.count(b"\n") + 1
        column = len(before) - (before.rfind(b"\n") + 1) + 1
        message = f"byte 0x{content[error.start]:02x} is no UTF-8; save the file as UTF-8"
        raise DocumentError(Mark(line=line, column=column), message) from error
    try:
        return _document(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text) from error
    except yaml.YAMLError as error:
        raise DocumentError(Mark(), f"is no YAML: {' '.join(str(error).split())}") from error


def _document(events: Iterator[Any]) -> Node:
    found: Node | None = None
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            if found is not None:
                raise DocumentError(_mark(event), "a second document begins here; write one job in a file")
        elif isinstance(event, yaml.NodeEvent):
            found = _node(event, events, 1)
    if found is None or (isinstance(found, Scalar) and found.empty):
        raise DocumentError(Mark(), "the file is empty; begin with `job: NAME`")
    return found


def _node(event: Any, events: Iterator[Any], depth: int) -> Node:
    mark = _mark(event)
    if isinstance(event, yaml.AliasEvent):
        raise DocumentError(mark, f"alias *{event.anchor}: aliases are not read here; write the value out")
    if depth > DEPTH_MAX:
        raise DocumentError(mark, f"nested more than {DEPTH_MAX} deep")
    if event.tag is not None:
        raise DocumentError(mark, f"tag {event.tag}: tags are not read here; write the plain value")
    if isinstance(event, yaml.ScalarEvent):
        return Scalar(mark=mark, text=event.value, plain=event.style in {None, ""})
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_node(event, events, depth + 1))
        return Sequence(mark=mark, items=tuple(items))
    entries = []
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _node(event, events, depth + 1)
        if not isinstance(key, Scalar):
            raise DocumentError(key.mark, "a key is a word, not a list or a mapping")
        entries.append((key, _node(next(events), events, depth + 1)))
    return Mapping(mark=mark, entries=tuple(entries))


def _mark(event: Any) -> Mark:
    return Mark(line=event.start_mark.line + 1, column=event.start_mark.column + 1)


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> DocumentError:
    where = error.problem_mark or error.context_mark
    mark = Mark(line=where.line + 1, column=where.column + 1) if where else Mark()
    lines = text.splitlines()
    line = lines[mark.line - 1] if mark.line <= len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return DocumentError(Mark(line=mark.line, column=line.index("\t") + 1), "a tab; YAML is indented with spaces")
    said = ", ".join(part for part in (error.context, error.problem) if part)
    return DocumentError(mark, f"is no YAML: {said}")
