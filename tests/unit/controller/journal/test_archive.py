"""A snapshot as a file: what was packed comes back; what is none, damaged, another's or a bomb is refused by name."""

import hashlib
import zlib

import msgspec
import pytest

from controller.core.records import EpochBegun, JobStopped, Record
from controller.journal.archive import Header, pack, unpack
from outrider.errors import InputError
from outrider.ids import JobName

RECORDS: tuple[Record, ...] = (EpochBegun(epoch=3, salt=7), JobStopped(job=JobName("shop")))


def packed() -> bytes:
    return pack(RECORDS, cluster="test", saved_at_s=5.0)


def test_what_was_packed_comes_back() -> None:
    header, records = unpack(packed(), cluster="test")
    assert tuple(records) == RECORDS
    assert (header.records, header.saved_at_s) == (2, 5.0)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no snapshot"),
        (b"x" * 10_000, "no snapshot"),
        (b"{}\nrest", "no snapshot"),
        (packed()[:-1], "damaged"),
        (packed()[:-1] + b"?", "damaged"),
    ],
)
def test_what_is_none_is_refused(content: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        unpack(content, cluster="test")


def test_another_fleets_is_refused() -> None:
    with pytest.raises(InputError, match="is of fleet 'test', and this is fleet other"):
        unpack(packed(), cluster="other")


def reheaded(body: bytes, **changes: object) -> bytes:
    header = Header(format=1, cluster="test", saved_at_s=0.0, records=2, sha256=hashlib.sha256(body).hexdigest())
    return msgspec.json.encode(msgspec.structs.replace(header, **changes)) + b"\n" + body


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(InputError, match="upgrade it"):
        unpack(reheaded(b"", format=2), cluster="test")


def test_a_bomb_is_refused() -> None:
    deflater = zlib.compressobj(9)
    megabyte = b"\0" * 1024 * 1024
    body = b"".join(deflater.compress(megabyte) for _ in range(1100)) + deflater.flush()
    with pytest.raises(InputError, match="unpacks to more than 1024 MiB"):
        unpack(reheaded(body), cluster="test")


def test_records_of_another_shape_are_refused() -> None:
    body = zlib.compress(msgspec.msgpack.encode([{"type": "FromTheFuture"}]))
    with pytest.raises(InputError, match="newer Outrider"):
        unpack(reheaded(body), cluster="test")
