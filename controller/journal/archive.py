"""A snapshot as one file: a line of JSON that says what it is, then the records, packed. Owns the format.

    {"format": 1, "cluster": ..., "saved_at_s": ..., "records": N, "sha256": of all that follows}\n
    zlib of msgpack of the list of records

The same file restores a fleet whose journal is in SQLite or in Consul: that is how one moves to the other.
"""

import hashlib
import zlib
from collections.abc import Sequence
from typing import Final

import msgspec

from controller.core.records import Record
from outrider.errors import InputError
from outrider.model.job import MIB, Value

FORMAT: Final = 1
HEADER_BYTES_MAX: Final = 4096
BYTES_MAX: Final = 1024 * MIB  # unpacked: what no fleet has, and a bomb would


class Header(Value, frozen=True, kw_only=True):
    format: int
    cluster: str
    saved_at_s: float
    records: int
    sha256: str


def pack(records: Sequence[Record], *, cluster: str, saved_at_s: float) -> bytes:
    body = zlib.compress(msgspec.msgpack.encode(records), 6)
    header = Header(
        format=FORMAT,
        cluster=cluster,
        saved_at_s=saved_at_s,
        records=len(records),
        sha256=hashlib.sha256(body).hexdigest(),
    )
    return msgspec.json.encode(header) + b"\n" + body


def unpack(content: bytes, *, cluster: str) -> tuple[Header, list[Record]]:
    """Raises InputError, which says what is wrong with the file and what to do."""
    line, found, body = content[:HEADER_BYTES_MAX].partition(b"\n")
    if not found:
        raise InputError("this is no snapshot of a fleet: its first line does not say so")
    body = content[len(line) + 1 :]
    try:
        header = msgspec.json.decode(line, type=Header)
    except msgspec.MsgspecError as error:
        raise InputError(f"this is no snapshot of a fleet: {error}") from error
    if header.format > FORMAT:
        raise InputError(f"the snapshot has format {header.format}, and this controller knows {FORMAT}: upgrade it")
    if header.cluster != cluster:
        raise InputError(f"the snapshot is of fleet {header.cluster[:80]!r}, and this is fleet {cluster}")
    if hashlib.sha256(body).hexdigest() != header.sha256:
        raise InputError("the snapshot is damaged: its checksum does not hold; take another copy of it")
    return header, _records(body, header)


def _records(body: bytes, header: Header) -> list[Record]:
    try:
        inflater = zlib.decompressobj()
        packed = inflater.decompress(body, BYTES_MAX)
        if inflater.unconsumed_tail:
            raise InputError(f"the snapshot unpacks to more than {BYTES_MAX // MIB} MiB: it is none of a fleet's")
        records = msgspec.msgpack.decode(packed, type=list[Record])
    except (zlib.error, msgspec.MsgspecError) as error:
        raise InputError(f"the snapshot cannot be read ({error}); was it made by a newer Outrider?") from error
    if len(records) != header.records:
        raise InputError(f"the snapshot says {header.records} records and has {len(records)}")
    return records
