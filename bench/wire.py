"""One gRPC call with streams both ways, as bytes over TLS: what a simulated agent needs of HTTP/2, and no more.

A whole gRPC client costs as much for each message as the controller that is measured; this costs a tenth. Owns one
socket, which never blocks; who polls it calls `go_on`. Sent are a few bytes a second: no window ever fills, so that
the peer's is not counted, and ours is opened as wide as there is.
"""

import select
import socket
import ssl
import struct
from collections.abc import Iterator

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_WINDOW_MAX = 2**31 - 1
_WINDOW_FIRST = 65_535
_INITIAL_WINDOW_SIZE = 4
_STREAM = 1
_FRAME_HEAD, _MESSAGE_HEAD = 9, 5
_READ_BYTES = 65_536


class EndedError(Exception):
    """The call or its connection is over."""


class Wire:
    """Dials at once. The call is made when TLS stands; what is sent before waits for that."""

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext, server_name: str, method: str) -> None:
        raw = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.connect_ex(target)
        self._raw: socket.socket = raw
        self._tls, self._server_name = tls, server_name
        self._socket: ssl.SSLSocket | None = None
        self._handshaking = True
        self._out = bytearray(_opening(method))
        self._frames = bytearray()
        self._messages = bytearray()

    def fileno(self) -> int:
        return (self._socket or self._raw).fileno()

    def close(self) -> None:
        (self._socket or self._raw).close()

    def send(self, message: bytes) -> None:
        """Raises EndedError."""
        body = struct.pack(">BI", 0, len(message)) + message
        self._out += _frame(_DATA, 0, _STREAM, body)
        if not self._handshaking:
            self._flush()

    @property
    def wants(self) -> int:
        """What to poll for."""
        if self._socket is None:
            return select.EPOLLOUT
        return select.EPOLLIN | (select.EPOLLOUT if self._out and not self._handshaking else 0)

    def go_on(self) -> Iterator[bytes]:
        """The messages that came. Raises EndedError."""
        try:
            if self._socket is None:
                # Not before the connection stands: OpenSSL takes "not yet" for an end.
                self._raw.getpeername()
                self._socket = self._tls.wrap_socket(
                    self._raw, server_hostname=self._server_name, do_handshake_on_connect=False
                )
            if self._handshaking:
                self._socket.do_handshake()
                self._handshaking = False
            self._flush()
            self._read()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            raise EndedError(str(error)) from error
        yield from self._take()

    def _flush(self) -> None:
        assert self._socket is not None
        try:
            while self._out:
                sent = self._socket.send(self._out)
                del self._out[:sent]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            raise EndedError(str(error)) from error

    def _read(self) -> None:
        assert self._socket is not None
        while True:
            got = self._socket.recv(_READ_BYTES)
            if not got:
                raise EndedError("closed")
            self._frames += got

    def _take(self) -> Iterator[bytes]:
        frames, at = self._frames, 0
        while len(frames) - at >= _FRAME_HEAD:
            size = int.from_bytes(frames[at : at + 3], "big")
            end = at + _FRAME_HEAD + size
            if len(frames) < end:
                break
            self._frame_came(frames[at + 3], frames[at + 4], bytes(frames[at + _FRAME_HEAD : end]))
            at = end
        del frames[:at]
        self._flush()
        messages = self._messages
        while len(messages) >= _MESSAGE_HEAD:
            end = _MESSAGE_HEAD + int.from_bytes(messages[1:_MESSAGE_HEAD], "big")
            if len(messages) < end:
                return
            message = bytes(messages[_MESSAGE_HEAD:end])
            del messages[:end]
            yield message

    def _frame_came(self, kind: int, flags: int, body: bytes) -> None:
        if kind == _DATA:
            self._messages += body  # gRPC pads none
        elif kind == _SETTINGS and not flags & _ACK:
            self._out += _frame(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and not flags & _ACK:
            self._out += _frame(_PING, _ACK, 0, body)
        if kind in (_RESET, _GOAWAY) or (kind in (_HEADERS, _DATA) and flags & _END_STREAM):
            raise EndedError("the server ended the call")


def _opening(method: str) -> bytes:
    settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, _WINDOW_MAX)
    window = struct.pack(">I", _WINDOW_MAX - _WINDOW_FIRST)
    return b"".join(
        (
            _PREFACE,
            _frame(_SETTINGS, 0, 0, settings),
            _frame(_WINDOW, 0, 0, window),
            _frame(_HEADERS, _END_HEADERS, _STREAM, _header_block(method)),
        )
    )


def _header_block(method: str) -> bytes:
    """HPACK without a table of our own: two fields of the static table, the others in full."""
    post, https = b"\x83", b"\x87"
    path, authority, content_type = b"\x04", b"\x01", b"\x0f\x10"  # names of the static table: 4, 1, 31
    return b"".join(
        (
            post,
            https,
            path + _text(method),
            authority + _text("fleet"),
            content_type + _text("application/grpc"),
            b"\x00" + _text("te") + _text("trailers"),
        )
    )


def _text(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()  # below 127 bytes: one byte tells


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + body
