"""A real registry on loopback, with TLS and a password, and images to put into it, made of nothing but bytes."""

import asyncio
import base64
import contextlib
import gzip
import hashlib
import io
import json
import ssl
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import yaml
import zstandard
from aiohttp import web

from controller.ca import FleetCa
from tests.integration.processes import free_port, listening, program

# Of "s3cret", by bcrypt: all that the registry takes.
_PASSWORD_FILE = "tester:$2b$05$abcdefghijklmnopqrstuuLK7U1u6pVRmL7L1BBM2aS35PSZnDXlK\n"
_CREDENTIALS = "tester:s3cret"
BUSYBOX = Path("/bin/busybox")


def entry(name: str, content: bytes = b"", **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    """A file of a layer; `changes` make it anything else that tar knows."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def layer(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def shell_layer(*more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Enough to run a shell script."""
    link = entry("bin/sh", type=tarfile.SYMTYPE, linkname="busybox")
    return layer(entry("bin/busybox", BUSYBOX.read_bytes(), mode=0o755), link, *more)


def layout(
    directory: Path, *layers: bytes, architecture: str = "amd64", packed: str = "gzip", **settings: object
) -> Path:
    """An OCI image layout with one image, tagged `image`."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True)

    def pack(data: bytes) -> bytes:
        return zstandard.compress(data, 1) if packed == "zstd" else gzip.compress(data, 1, mtime=0)

    def blob(data: bytes, kind: str) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{name}", "size": len(data)}

    config = {
        "architecture": architecture,
        "os": "linux",
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(each).hexdigest()}" for each in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": [blob(pack(each), f"layer.v1.tar+{packed}") for each in layers],
    }
    tagged = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    tagged["annotations"] = {"org.opencontainers.image.ref.name": "image"}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [tagged]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return directory


def digest_of(made: Path) -> str:
    digest: str = json.loads((made / "index.json").read_text())["manifests"][0]["digest"]
    return digest


class Registry:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.log = directory / "registry.log"
        self.certificates = directory / "certificates"
        self.auth_file = directory / "auth.json"
        trusted = self.certificates / self.host
        trusted.mkdir(parents=True)
        authority = FleetCa(directory / "ca", "registry")
        self.files = authority.issue_server(["127.0.0.1"])
        (trusted / "ca.crt").write_bytes(authority.roots_pem)
        credentials = base64.b64encode(_CREDENTIALS.encode()).decode()
        self.auth_file.write_text(json.dumps({"auths": {self.host: {"auth": credentials}}}))
        (directory / "htpasswd").write_text(_PASSWORD_FILE)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        tls = {"certificate": str(self.files.certificate), "key": str(self.files.key)}
        config = {
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": str(self.directory / "storage")}},
            "http": {"addr": self.host, "tls": tls},
            "auth": {"htpasswd": {"realm": "tests", "path": str(self.directory / "htpasswd")}},
        }
        path = self.directory / "registry.yml"
        path.write_text(yaml.safe_dump(config))
        async with program("docker-registry", "serve", path, log=self.log):
            await listening(self.port)
            yield

    @contextlib.asynccontextmanager
    async def odd(self, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
        """Another one under the same certificate, which answers as the test says. Its host and port."""
        application, host = web.Application(), f"127.0.0.1:{(port := free_port())}"
        application.router.add_route("*", "/{path:.*}", answer)
        (self.certificates / host).symlink_to(self.certificates / self.host)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.files.certificate, self.files.key)
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
            yield host
        finally:
            await runner.cleanup()

    async def push(self, made: Path, name: str) -> str:
        """Its reference, for a job."""
        process = await asyncio.create_subprocess_exec(
            *("skopeo", "--insecure-policy", "copy", "-q", "--authfile", str(self.auth_file)),
            *("--dest-cert-dir", str(self.certificates / self.host)),
            *(f"oci:{made}:image", f"docker://{self.host}/{name}"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, complaints = await process.communicate()
        assert process.returncode == 0, complaints.decode()
        return f"{self.host}/{name}"

    def fetched(self, name: str) -> int:
        """How many blobs of `name` were asked for."""
        lines = self.log.read_text().splitlines()
        return sum(f'"GET /v2/{name}/blobs/' in line and '" 200 ' in line for line in lines)
