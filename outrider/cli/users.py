"""`outrider user`: people and programs that may use the fleet, their roles, and their client certificates."""

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="For scripts.")]


@app.command()
def ls(json: Json = False) -> None:
    """All users and their roles."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.access import User
    from outrider.v1 import access_pb2

    with connect() as fleet:
        found = fleet.call(fleet.access.ListUsers, access_pb2.ListUsersRequest()).users
    users = [codec.from_wire(user, User) for user in found]
    if json:
        output.print_json(users)
        return
    output.print_table(("USER", "ROLES"), ((user.name, ", ".join(user.roles) or "none") for user in users))


@app.command(name="set")
def set_(
    name: str, role: Annotated[list[str] | None, typer.Option(help="One of theirs; may be given often.")] = None
) -> None:
    """Make a user, or give one exactly these roles. Without a role they may do nothing."""
    from outrider import codec
    from outrider.cli.client import connect
    from outrider.model.access import User
    from outrider.v1 import access_pb2

    user = User(name=name, roles=tuple(role or ()))
    with connect() as fleet:
        request = access_pb2.SetUserRequest(user=codec.to_wire(user, access_pb2.User))
        answer = fleet.call(fleet.access.SetUser, request)
    print(f"user {name}: {'set' if answer.changed else 'it is so already'}")


@app.command()
def delete(name: str) -> None:
    """Delete a user: their tokens and certificates are worth nothing from here on."""
    from outrider.cli.client import connect
    from outrider.v1 import access_pb2

    with connect() as fleet:
        fleet.call(fleet.access.DeleteUser, access_pb2.DeleteUserRequest(name=name))
    print(f"user {name}: deleted")


@app.command()
def certificate(
    name: str,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where NAME.crt, NAME.key and NAME.ca go.")] = Path(),
) -> None:
    """Make a key here, and get a client certificate for it. The key never leaves this machine."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from outrider.cli.client import connect
    from outrider.errors import InputError
    from outrider.v1 import access_pb2

    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = request.public_bytes(serialization.Encoding.PEM).decode()
    with connect() as fleet:
        issued = fleet.call(fleet.access.IssueCertificate, access_pb2.IssueCertificateRequest(user=name, csr_pem=pem))
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    files = {
        "ca": issued.ca_pem.encode(),
        "crt": issued.certificate_pem.encode(),
        "key": key_pem,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for suffix, content in files.items():
            path = out / f"{name}.{suffix}"
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
    except OSError as error:
        raise InputError(f"--out: {out}: {error.strerror}") from error
    until = dt.datetime.fromtimestamp(issued.expires_at_s, dt.UTC)
    print(f"user {name}: certificate until {until:%Y-%m-%d %H:%M} UTC")
    for variable, suffix in (("OUTRIDER_CA", "ca"), ("OUTRIDER_CERT", "crt"), ("OUTRIDER_KEY", "key")):
        print(f"export {variable}={(out / f'{name}.{suffix}').absolute()}")
