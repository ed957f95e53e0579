"""The journal in Consul's KV: records of one fleet, written by whoever holds its lock. Knows nothing of what they mean.

    outrider/CLUSTER/lock               the leader's session; its value says who that is
    outrider/CLUSTER/journal/head       which chunks are the journal: the one key that commits
    outrider/CLUSTER/journal/GGGGGGGG/NNNNNNNN    chunk N of generation G

Every transaction checks that the lock is still this session's, and replaces the head only where it is as expected. An
append that does not fit one transaction writes its chunks first, where nobody looks, and the head last. A snapshot
begins a new generation; the old one is removed in the transaction that makes the new one true. All calls block.
"""

import secrets
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

import msgspec

from controller.core.records import Record
from controller.journal import LeadershipLostError
from controller.journal.kv import OPERATIONS_MAX, VALUE_BYTES_MAX, ConsulKv, Operation
from outrider.errors import JournalError, PeerError
from outrider.model.job import MIB, Value

T = TypeVar("T")

FORMAT: Final = 1
# Consul keeps all of its KV in memory, on every server, and writes it whole when it compacts its own log.
BYTES_MAX: Final = 64 * MIB
_CHUNKS_DUE: Final = 1024
_BYTES_DUE: Final = 8 * MIB
_RECORDS_AT_ONCE: Final = 2_000  # of a snapshot: bounds what is packed at a time
_PATIENCE_S: Final = 30.0  # of an append, while Consul has no leader
_RETRY_S: Final = 0.1

_FRAME: Final = struct.Struct(">BI")  # whether it is an append's last chunk, CRC-32 of the rest
_OPERATION_BYTES: Final = 256  # key and JSON around a value, at most


class Head(Value, frozen=True, kw_only=True):
    format: int = FORMAT
    generation: int = 0
    chunks: int = 0
    bytes: int = 0
    bytes_base: int = 0  # of the snapshot alone
    nonce: str = ""  # tells a write whose answer was lost from one that never was


class ConsulJournal:
    def __init__(self, kv: ConsulKv, *, cluster: str, session: str) -> None:
        """`session` holds the cluster's lock; it ends by itself where this controller stops being able to write."""
        self._kv, self._session = kv, session
        self._lock_key = lock_key(cluster)
        self._prefix = f"{prefix(cluster)}/journal"
        self._head = Head()
        self._index = 0  # of the head's last change; 0: there is none yet
        self._closed = threading.Event()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[list[Record]] = msgspec.msgpack.Decoder(list[Record])

    def open(self) -> None:
        """Raises JournalError where the journal was written by a newer Outrider."""
        self._patiently(self._read_head)

    def load(self) -> Iterator[Record]:
        """Every record since the last snapshot, that one first. Raises JournalError for a damaged chunk."""
        packed = b""
        for number, value in self._patiently(self._read_chunks):
            last, rest = self._checked(number, value)
            packed += rest
            if last:
                try:
                    yield from self._decoder.decode(zlib.decompress(packed))
                except (msgspec.MsgspecError, zlib.error) as error:
                    raise self._damaged(number, str(error)) from error
                packed = b""

    def append(self, batch: Sequence[Record]) -> None:
        """All of them, kept by a majority of Consul's servers when this returns, or none. Raises JournalError."""
        if self._head.bytes > 2 * BYTES_MAX:
            raise JournalError(f"{self.refusal()}; twice the limit is the end of it")
        chunks = _chunks(self._encoder.encode(list(batch)))
        head = msgspec.structs.replace(
            self._head,
            chunks=self._head.chunks + len(chunks),
            bytes=self._head.bytes + sum(map(len, chunks)),
            nonce=secrets.token_hex(8),
        )
        self._write(head, chunks, first=self._head.chunks)

    def snapshot(self, records: Iterable[Record]) -> None:
        """Replace all that was appended so far by `records`."""
        generation, count, size = self._head.generation + 1, 0, 0
        # What a snapshot that was cut short left behind; nobody reads it.
        self._transact([self._guard(), Operation(verb="delete-tree", key=self._tree(generation))])
        batch: list[Record] = []
        for record in records:
            batch.append(record)
            if len(batch) >= _RECORDS_AT_ONCE:
                count, size = self._stage(generation, batch, count, size)
                batch = []
        if batch:
            count, size = self._stage(generation, batch, count, size)
        old = Operation(verb="delete-tree", key=self._tree(self._head.generation))
        head = Head(generation=generation, chunks=count, bytes=size, bytes_base=size, nonce=secrets.token_hex(8))
        self._commit(head, [old])

    def due(self) -> bool:
        head = self._head
        grown = head.bytes - head.bytes_base
        return head.chunks > _CHUNKS_DUE + head.bytes_base // VALUE_BYTES_MAX or grown > max(
            _BYTES_DUE, head.bytes_base
        )

    def refusal(self) -> str:
        if self._head.bytes <= BYTES_MAX:
            return ""
        return (
            f"the journal has {self._head.bytes // MIB} MiB in Consul, and its limit is {BYTES_MAX // MIB} MiB: "
            "stop jobs, send fewer and smaller files with them, or move to a journal in SQLite"
        )

    def close(self) -> None:
        """Safe from any thread: a call that waits for Consul gives up."""
        self._closed.set()
        self._kv.close()

    def _write(self, head: Head, chunks: Sequence[bytes], *, first: int) -> None:
        sets = [
            Operation(verb="set", key=self._chunk(head.generation, first + at), value=chunk)
            for at, chunk in enumerate(chunks)
        ]
        *early, last = _transactions(sets)
        for batch in early:
            self._transact([self._guard(), *batch])
        self._commit(head, last)

    def _stage(self, generation: int, batch: Sequence[Record], count: int, size: int) -> tuple[int, int]:
        """Write a part of a snapshot where nobody looks yet. The chunks and bytes so far."""
        chunks = _chunks(self._encoder.encode(list(batch)))
        sets = [
            Operation(verb="set", key=self._chunk(generation, count + at), value=chunk)
            for at, chunk in enumerate(chunks)
        ]
        for part in _transactions(sets):
            self._transact([self._guard(), *part])
        return count + len(chunks), size + sum(map(len, chunks))

    def _commit(self, head: Head, others: Sequence[Operation]) -> None:
        key = f"{self._prefix}/head"
        swap = Operation(verb="cas", key=key, value=msgspec.json.encode(head), index=self._index)

        def commit() -> int:
            try:
                pairs = self._kv.transact([self._guard(), swap, *others])
            except LeadershipLostError:
                # A try before, whose answer was lost, may have done it.
                found = self._kv.get(key)
                if found is None or msgspec.json.decode(found.value, type=Head).nonce != head.nonce:
                    raise
                return found.index
            return next(pair.index for pair in pairs if pair.key == key)

        self._index = self._patiently(commit)
        self._head = head

    def _transact(self, operations: Sequence[Operation]) -> None:
        self._patiently(lambda: self._kv.transact(operations))

    def _patiently(self, call: Callable[[], T]) -> T:
        """Again and again while Consul is in trouble, as long as this controller may still lead."""
        waited_s = 0.0
        while True:
            try:
                return call()
            except PeerError as error:
                waited_s += _RETRY_S
                if self._closed.wait(_RETRY_S) or waited_s > _PATIENCE_S:
                    raise LeadershipLostError(f"the journal's fate is not known: {error}") from error

    def _read_head(self) -> None:
        found = self._kv.get(f"{self._prefix}/head")
        if found is None:
            return
        try:
            head = msgspec.json.decode(found.value, type=Head)
        except msgspec.MsgspecError as error:
            raise JournalError(f"{found.key} in Consul is not a journal's head: {error}") from error
        if head.format > FORMAT:
            raise JournalError(
                f"{found.key} in Consul: format {head.format}, and this controller knows {FORMAT}; "
                "start the newer Outrider that wrote it"
            )
        self._head, self._index = head, found.index

    def _read_chunks(self) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        numbers = range(self._head.chunks)
        for at in range(0, len(numbers), OPERATIONS_MAX):
            wanted = numbers[at : at + OPERATIONS_MAX]
            keys = [self._chunk(self._head.generation, number) for number in wanted]
            pairs = self._kv.transact([Operation(verb="get", key=key) for key in keys])
            found.extend((number, pair.value) for number, pair in zip(wanted, pairs, strict=True))
        return found

    def _checked(self, number: int, value: bytes) -> tuple[bool, bytes]:
        if len(value) < _FRAME.size:
            raise self._damaged(number, "it is too short")
        last, checksum = _FRAME.unpack_from(value)
        rest = value[_FRAME.size :]
        if zlib.crc32(rest) != checksum:
            raise self._damaged(number, "its checksum does not hold")
        return bool(last), rest

    def _damaged(self, number: int, why: str) -> JournalError:
        key = self._chunk(self._head.generation, number)
        return JournalError(f"{key} in Consul is damaged: {why}; `outrider operator snapshot restore` has the way back")

    def _guard(self) -> Operation:
        return Operation(verb="check-session", key=self._lock_key, session=self._session)

    def _tree(self, generation: int) -> str:
        return f"{self._prefix}/{generation:08x}/"

    def _chunk(self, generation: int, number: int) -> str:
        return f"{self._tree(generation)}{number:08x}"


def prefix(cluster: str) -> str:
    return f"outrider/{cluster}"


def lock_key(cluster: str) -> str:
    return f"{prefix(cluster)}/lock"


def _chunks(content: bytes) -> list[bytes]:
    packed = zlib.compress(content, 1)
    size = VALUE_BYTES_MAX - _FRAME.size
    parts = [packed[at : at + size] for at in range(0, len(packed), size)]
    return [_FRAME.pack(at == len(parts) - 1, zlib.crc32(part)) + part for at, part in enumerate(parts)]


def _transactions(sets: Sequence[Operation]) -> list[list[Operation]]:
    """In order, each within Consul's limits, with room for the guard and the head."""
    batches: list[list[Operation]] = [[]]
    size = 0
    for operation in sets:
        cost = len(operation.value) + _OPERATION_BYTES
        if batches[-1] and (size + cost > VALUE_BYTES_MAX + _OPERATION_BYTES or len(batches[-1]) >= OPERATIONS_MAX - 2):
            batches.append([])
            size = 0
        batches[-1].append(operation)
        size += cost
    return batches
