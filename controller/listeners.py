"""The controller's gRPC listeners. Nothing listens without TLS but the operator's unix socket, its owner's alone."""

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio

from controller.rpc import SERVER_OPTIONS
from outrider.config import host_port
from outrider.errors import ConfigError, HostError

STOP_GRACE_S = 0.5

Register = Callable[[grpc.aio.Server], None]


@contextlib.asynccontextmanager
async def tls_listener(
    key: str, listen: str, credentials: grpc.ServerCredentials, register: Register
) -> AsyncIterator[str]:
    """Serve on `listen` and yield where it really is, host:port. `key` of the configuration is named in the error."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    register(server)
    try:
        port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"{key}: {listen} cannot be bound; is the port taken, or the address not this host's?"
        ) from error
    await server.start()
    try:
        yield f"{host_port(listen)[0]}:{port}"
    finally:
        await server.stop(STOP_GRACE_S)


@contextlib.asynccontextmanager
async def socket_listener(path: Path, register: Register) -> AsyncIterator[str]:
    """Serve on a unix socket of mode 0600; one that a dead controller left is replaced."""
    _clear(path)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    register(server)
    umask = os.umask(0o177)  # the socket is born closed to others; nothing else of this process runs meanwhile
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise HostError(str(path), step="bind the operator's socket", hint="check operator_socket") from error
    finally:
        os.umask(umask)
    await server.start()
    try:
        yield str(path)
    finally:
        await server.stop(STOP_GRACE_S)
        _remove(path)


def _clear(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
                probe.connect(str(path))
                raise ConfigError(
                    f"operator_socket: another controller listens on {path}; stop it, or name another path"
                )
            path.unlink()
    except OSError as error:
        raise HostError(str(path), step=f"prepare the operator's socket: {error}") from error


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
