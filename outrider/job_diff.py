"""What differs between two versions of a job, leaf by leaf, in the job file's words. Pure: values in, values out."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from enum import Enum

import msgspec

from outrider.model.job import MIB, Job, Value

_GIB = 1024 * MIB
# A list of these is told by what its items are called, not by where they stand.
_NAMES = ("name", "path", "service", "attribute")
_SHOWN_CHARS_MAX = 120
# Where the model's word is not the job file's with its unit.
_KEYS = {"count_min": "min", "count_max": "max", "pids_max": "pids"}
_UNITS = ("_bytes", "_millis", "_s")


class Change(Value, frozen=True, kw_only=True):
    """One leaf. `old` or `new` is None where it is not there."""

    path: str  # groups.web.tasks.server.resources.memory
    old: str | None = None
    new: str | None = None

    def __str__(self) -> str:
        if self.old is None:
            return f"+ {self.path}: {self.new}"
        if self.new is None:
            return f"- {self.path}: {self.old}"
        return f"~ {self.path}: {self.old} -> {self.new}"


class _Leaf(Value, frozen=True, kw_only=True):
    text: str
    default: bool  # of no interest where all around it is new, or goes


def diff(old: Job | None, new: Job | None) -> tuple[Change, ...]:
    """In the order of the newer job's parts; None is no job at all. () where they are the same."""
    before = _leaves(old) if old is not None else {}
    after = _leaves(new) if new is not None else {}
    return tuple(_changes(before, after))


def _changes(before: Mapping[str, _Leaf], after: Mapping[str, _Leaf]) -> Iterator[Change]:
    for path, leaf in after.items():
        was = before.get(path)
        if was is None and not leaf.default:
            yield Change(path=path, new=leaf.text)
        elif was is not None and was.text != leaf.text:
            yield Change(path=path, old=was.text, new=leaf.text)
    for path, leaf in before.items():
        if path not in after and not leaf.default:
            yield Change(path=path, old=leaf.text)


def _leaves(job: Job) -> dict[str, _Leaf]:
    found: dict[str, _Leaf] = {}
    _gather(job, _Place(path="", field="", name="name", default=False), found)
    return found


class _Place(Value, frozen=True, kw_only=True):
    path: str
    field: str  # the model's, with its unit
    name: str = ""  # the field of a struct that is in the path already
    default: bool


def _gather(value: object, place: _Place, found: dict[str, _Leaf]) -> None:
    match value:
        case None:
            pass
        case msgspec.Struct():
            _gather_fields(value, place, found)
        case Mapping():
            for key, inner in value.items():
                _gather(inner, _Place(path=f"{place.path}.{key}", field="", default=place.default), found)
        case tuple() if any(isinstance(item, msgspec.Struct) for item in value):
            names = [_naming(item) for item in value]
            for index, (item, (field, name)) in enumerate(zip(value, names, strict=True)):
                shown = name if names.count((field, name)) == 1 and name else f"{name}[{index}]"
                at = _Place(path=f"{place.path}.{shown}", field="", name=field, default=place.default)
                _gather(item, at, found)
        case _:
            found[place.path] = _Leaf(text=_text(place.field, value), default=place.default)


def _gather_fields(value: msgspec.Struct, place: _Place, found: dict[str, _Leaf]) -> None:
    before = len(found)
    for field in msgspec.structs.fields(type(value)):
        inner = getattr(value, field.name)
        if field.name != place.name:
            is_default = field.default is not msgspec.NODEFAULT and inner == field.default
            at = _Place(path=_inside(place.path, field.name), field=field.name, default=place.default or is_default)
            _gather(inner, at, found)
    if place.path and all(leaf.default for leaf in list(found.values())[before:]):
        found[place.path] = _Leaf(text="as by default", default=place.default)  # it is there, and says nothing


def _inside(path: str, field: str) -> str:
    key = _KEYS.get(field, field)
    for unit in _UNITS:
        key = key.removesuffix(unit)
    return f"{path}.{key}".removeprefix(".")


def _naming(item: object) -> tuple[str, str]:
    """The field that tells it from its neighbours, and what it says."""
    return next(((name, str(getattr(item, name))) for name in _NAMES if getattr(item, name, None)), ("", ""))


def _text(field: str, value: object) -> str:
    match value:
        case bytes():
            return f"{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()[:12]}"
        case bool():
            return "true" if value else "false"
        case Enum():
            return str(value.value)
        case int() if field == "mode":
            return f"{value:o}"
        case int() | float():
            return _number(field, value)
        case _:
            text = json.dumps(value, ensure_ascii=False)
            shown = text[:_SHOWN_CHARS_MAX]
            return text if shown == text else f"{shown}... of {len(text)} characters"


def _number(field: str, value: float) -> str:
    if field.endswith("_s"):
        return f"{value * 1000:g}ms" if 0 < value < 1 else f"{value:g}s"
    if field.endswith("_bytes"):
        whole, unit = (_GIB, "Gi") if value >= _GIB and value % _GIB == 0 else (MIB, "Mi")
        return f"{value / whole:g}{unit}"
    return f"{value:g}m" if field.endswith("_millis") else f"{value:g}"
