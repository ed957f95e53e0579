"""Protobuf messages <-> model values, by field name: the two mirror each other, and a test compares them.

Owns the translation alone. Malformed input raises InputError with the path of the field.
"""

import collections.abc
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import Any, TypeVar

import msgspec
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from outrider.errors import InputError

S = TypeVar("S", bound=msgspec.Struct)
M = TypeVar("M", bound=Message)


def to_wire(value: msgspec.Struct, message: type[M], **made: Message) -> M:
    """`value` as a protobuf message of the mirroring type. `made`: fields that are messages already."""
    out = message()
    for name, _optional, put, _get in _fields(type(value), message.DESCRIPTOR):
        field = getattr(value, name)
        if name in made:
            getattr(out, name).CopyFrom(made[name])
        elif field is not None:
            put(out, field)
    return out


def from_wire(message: Message, kind: type[S]) -> S:
    """`message` as a value of `kind`. Raises InputError where an enum or a required part is missing."""
    values: dict[str, Any] = {}
    nullable = _nullable(kind)
    for name, optional, _put, get in _fields(kind, message.DESCRIPTOR):
        if optional and not message.HasField(name):
            if name in nullable:
                values[name] = None
            continue
        try:
            values[name] = get(message)
        except _UnspecifiedError:
            continue  # the model's default holds, or its constructor objects below
        except InputError as error:
            raise InputError(f"{name}.{error}") from error
    try:
        return kind(**values)
    except TypeError as error:
        raise InputError(f"{message.DESCRIPTOR.name}: {error}") from error


class _UnspecifiedError(Exception):
    """An enum's zero: nobody said anything."""


_Put = Callable[[Any, Any], None]
_Get = Callable[[Any], Any]


@cache
def _fields(kind: type[msgspec.Struct], descriptor: Descriptor) -> tuple[tuple[str, bool, _Put, _Get], ...]:
    hints = typing.get_type_hints(kind)
    plans = []
    for name in kind.__struct_fields__:
        field = descriptor.fields_by_name[name]
        annotation, optional = _without_none(hints[name])
        plans.append((name, optional or _is_message(field), *_converters(name, annotation, field)))
    return tuple(plans)


@cache
def _nullable(kind: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(name for name, hint in typing.get_type_hints(kind).items() if _without_none(hint)[1])


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        (inner,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
        return inner, True
    return annotation, False


def _is_message(field: FieldDescriptor) -> bool:
    return not field.is_repeated and field.message_type is not None


def _converters(name: str, annotation: Any, field: FieldDescriptor) -> tuple[_Put, _Get]:
    origin = typing.get_origin(annotation)
    if origin in (collections.abc.Mapping, dict):
        return (
            lambda out, value: getattr(out, name).update(value),
            lambda message: dict(getattr(message, name)),
        )
    if origin is tuple:
        put, get = _element(typing.get_args(annotation)[0], field)
        return (
            lambda out, value: getattr(out, name).extend([put(item) for item in value]),
            lambda message: tuple(get(item) for item in getattr(message, name)),
        )
    put, get = _element(annotation, field)
    if field.message_type is not None:
        return (
            lambda out, value: getattr(out, name).CopyFrom(put(value)),
            lambda message: get(getattr(message, name)),
        )
    return (
        lambda out, value: setattr(out, name, put(value)),
        lambda message: get(getattr(message, name)),
    )


def _element(annotation: Any, field: FieldDescriptor) -> tuple[_Get, _Get]:
    kind = _plain(annotation)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enum(kind, field)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        assert field.message_type is not None, f"{field.name} mirrors a value, so it is a message"
        message = GetMessageClass(field.message_type)
        return (lambda value: to_wire(value, message)), (lambda item: from_wire(item, kind))
    return _same, _same


def _plain(annotation: Any) -> Any:
    while hasattr(annotation, "__supertype__"):  # NewType
        annotation = annotation.__supertype__
    return annotation


def _same(value: Any) -> Any:
    return value


def _enum(kind: type[Enum], field: FieldDescriptor) -> tuple[_Get, _Get]:
    enum = field.enum_type
    assert enum is not None, f"{field.name} mirrors an enum"
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    numbers: Mapping[Enum, int] = {member: enum.values_by_name[prefix + member.name].number for member in kind}
    members = {number: member for member, number in numbers.items()}

    def get(number: int) -> Enum:
        if number == 0:
            raise _UnspecifiedError
        if number not in members:
            raise InputError(f"{field.name}: {number} is no value of {enum.name}")
        return members[number]

    return numbers.__getitem__, get
