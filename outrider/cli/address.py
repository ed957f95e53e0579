"""Finds the fleet to talk to. Owns the rules of `--address`; opens no channel."""

import os
from pathlib import Path

from outrider.config import host_port
from outrider.errors import InputError, PeerError
from outrider.model.job import Value
from outrider.tls import TlsFiles

RUN_DIRECTORY = Path("/run/outrider")
_SOCKET = "operator.sock"


class Address(Value, frozen=True, kw_only=True):
    target: str  # as gRPC takes it; or several, with commas between them
    tls: TlsFiles | None = None  # a user's certificate
    token: str = ""  # a user's, instead of a certificate
    # Neither: a unix socket, whose mode says who may open it.

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.target.split(","))


def find() -> Address:
    """The fleet that OUTRIDER_ADDRESS names, else the one dev fleet that runs here. Raises InputError, PeerError."""
    named = os.environ.get("OUTRIDER_ADDRESS", "")
    if named.startswith("unix:"):
        if not Path(named.removeprefix("unix:")).is_socket():
            raise PeerError(f"{named}: no such socket; is the fleet running? `outrider dev status` tells")
        return Address(target=named)
    if named and (token := _token()):
        return Address(target=_controllers(named), token=token)
    if named:
        return Address(target=_controllers(named), tls=_tls())
    found = sorted(path for path in RUN_DIRECTORY.glob(f"*/{_SOCKET}") if path.is_socket())
    if not found:
        raise PeerError(
            "no fleet runs on this machine and none is named; start one with `outrider dev`, "
            "or say where it is: `outrider --address HOST:PORT ...`"
        )
    if len(found) > 1:
        choices = "\n".join(f"  outrider --address unix:{path} ..." for path in found)
        raise InputError(f"{len(found)} fleets run here; say which:\n{choices}")
    return Address(target=f"unix:{found[0]}")


def _controllers(named: str) -> str:
    """One or several of the fleet's controllers. Raises InputError."""
    if "," not in named:
        return named
    targets = [target.strip() for target in named.split(",")]
    for target in targets:
        try:
            host_port(target)
        except ValueError as error:
            raise InputError(f"address {named!r}: {error}; several are HOST:PORT,HOST:PORT") from error
        if targets.count(target) > 1 or target.startswith("unix:"):
            raise InputError(f"address {named!r}: {target}: each of several is another HOST:PORT")
    return ",".join(targets)


def _token() -> str:
    """OUTRIDER_TOKEN, or what is in the file OUTRIDER_TOKEN_FILE; "" where neither is set."""
    path = os.environ.get("OUTRIDER_TOKEN_FILE", "")
    if not path:
        return os.environ.get("OUTRIDER_TOKEN", "")
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise InputError(f"OUTRIDER_TOKEN_FILE: {path} cannot be read: {error.strerror}") from error


def _tls() -> TlsFiles:
    names = ("OUTRIDER_CA", "OUTRIDER_CERT", "OUTRIDER_KEY")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not set; over the network a user shows a certificate, or a token: OUTRIDER_TOKEN"
        )
    ca, certificate, key = (Path(os.environ[name]) for name in names)
    return TlsFiles(ca=ca, certificate=certificate, key=key)
