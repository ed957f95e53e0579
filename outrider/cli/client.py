"""A connection to a fleet's OperatorService, with deadlines, and errors as people and scripts need them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar, cast

import grpc
import msgspec
from google.protobuf.message import Message

from outrider.cli.address import Address, find
from outrider.cli.failover import NOT_BEGUN, FailoverChannel
from outrider.errors import InputError, OutriderError, PeerError, RefusedError
from outrider.pinned import pinned_ca
from outrider.tls import CONTROLLER_NAME, TlsFiles
from outrider.tokens import parse_token
from outrider.v1.access_pb2_grpc import AccessServiceStub
from outrider.v1.archive_pb2_grpc import ArchiveServiceStub
from outrider.v1.insight_pb2_grpc import InsightServiceStub
from outrider.v1.operator_pb2_grpc import OperatorServiceStub
from outrider.v1.stores_pb2_grpc import StoreServiceStub

CALL_TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 7 * 24 * 3600.0  # a person watches; keepalive notices a peer that is away
_CODE_METADATA = "outrider-code"
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", -1),
)

M = TypeVar("M", bound=Message)


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


class Fleet:
    """The fleet's operations. Use `connect()`."""

    def __init__(self, address: Address, channel: grpc.Channel) -> None:
        self.address = address
        self.stub = OperatorServiceStub(channel)
        self.stores = StoreServiceStub(channel)
        self.archive = ArchiveServiceStub(channel)
        self.access = AccessServiceStub(channel)
        self.insight = InsightServiceStub(channel)

    def call(
        self, method: Callable[..., M], request: Message | Iterator[Message], timeout_s: float = CALL_TIMEOUT_S
    ) -> M:
        """One answer. Raises PeerError, RefusedError or InputError."""
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._meaning(error) from error

    def stream(
        self,
        method: Callable[..., Iterable[M]],
        request: Message | Iterator[Message],
        timeout_s: float = STREAM_TIMEOUT_S,
    ) -> Iterator[M]:
        """Answers until the fleet ends them, or the caller closes the iterator. Raises as `call` does."""
        call = method(request, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._meaning(error) from error
        finally:
            cast("_Cancellable", call).cancel()

    def _meaning(self, error: grpc.RpcError) -> OutriderError:
        call = cast("grpc.Call", cast("object", error))  # what a call raises is the call
        details = call.details() or ""
        stable = {item[0]: item[1] for item in call.trailing_metadata() or ()}.get(_CODE_METADATA, "")
        code = stable.decode() if isinstance(stable, bytes) else stable
        match call.code():
            case grpc.StatusCode.UNAVAILABLE:
                return PeerError(details if code else f"{self.address.target}: {_unavailable(details)}")
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return PeerError(f"{self.address.target}: no answer in time; `outrider node ls` shows who is away")
            case _ if code == "bad-input":
                return InputError(details)
            case status:
                return RefusedError(code or status.name.lower().replace("_", "-"), details)


@contextlib.contextmanager
def connect() -> Iterator[Fleet]:
    """The fleet that the user means."""
    address = find()
    with open_channel(address) as channel:
        yield Fleet(address, channel)


def open_channel(address: Address) -> grpc.Channel:
    if len(address.targets) > 1:
        found = FailoverChannel(address.targets, lambda target: _open(msgspec.structs.replace(address, target=target)))
        return cast("grpc.Channel", found)
    return _open(address)


def _open(address: Address) -> grpc.Channel:
    if address.tls is None and not address.token:
        return grpc.insecure_channel(address.target, options=_OPTIONS)
    files = address.tls
    if files is not None:
        credentials = grpc.ssl_channel_credentials(_read(files, "ca"), _read(files, "key"), _read(files, "certificate"))
    else:
        credentials = _token_credentials(address)
    # The fleet's CA signs no other with this name: whoever trusts it need not know the controller's addresses.
    options = (*_OPTIONS, ("grpc.ssl_target_name_override", CONTROLLER_NAME))
    return grpc.secure_channel(address.target, credentials, options=options)


def _token_credentials(address: Address) -> grpc.ChannelCredentials:
    """The token says by which CA its fleet is known: no other server is ever shown it."""
    authority = pinned_ca(address.target, parse_token(address.token).ca_sha256)
    return grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(authority.encode()), grpc.access_token_call_credentials(address.token)
    )


def _read(files: TlsFiles, part: str) -> bytes:
    path = getattr(files, part)
    try:
        return bytes(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _unavailable(details: str) -> str:
    """What gRPC says of it, and what it means for who asked."""
    if NOT_BEGUN in details:
        return "the controller is overloaded; try again in a while"
    if "failed to connect" in details.lower():
        return f"no answer ({_short(details)}); is the controller running, and the certificate this fleet's?"
    return (
        f"the connection broke off ({_short(details)}): what was asked may have been done or not; look, then ask again"
    )


def _short(details: str) -> str:
    """gRPC's long story, its last and most telling part."""
    return details.rsplit(": ", 1)[-1][:200]
