"""Two hops of mTLS beside HAProxy's and nginx's, each proxy one worker, interleaved in one run.

Client -> caller's proxy -> callee's proxy -> nginx, over loopback. Every proxy verifies its peer's chain, the caller's
also its name; so does HAProxy's callee, nginx's knows chains alone. Sidecars log each request as they always do, the
peers do not. CPU is that of the two proxies, from /proc; latency is at 1,000 requests a second.
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median

from bench.figure import emit
from outrider.ids import AllocId
from outrider.model.job import Protocol
from outrider.model.mesh import Action
from sidecar.access_log import Config, inbound_log, outbound_log
from sidecar.bootstrap import envoy_binary
from tests.integration.certificates import Authority
from tests.integration.sidecar_mesh import Mesh, calling, endpoint, free_port, served

ROUNDS = 3
SECONDS = 2
_CONNECTIONS = 32
_LARGE_BYTES = 4 << 20
_NAMES = {
    str(Protocol.TCP): (AllocId("00000000a1"), AllocId("00000000b1")),
    str(Protocol.HTTP): (AllocId("00000000a2"), AllocId("00000000b2")),
    "near": (AllocId("00000000a3"), AllocId("00000000b3")),
}
# Of each connection, so that all together ask about 1,000 times a second.
_PACED = f"function delay() return {_CONNECTIONS} end"
_TIMEOUTS = "".join(f"  timeout {side} 1m\n" for side in ("connect", "client", "server"))
_LATENCY = re.compile(r"(50|99)%\s+([\d.]+)(us|ms|s)")
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


Way = tuple[str, tuple[int, ...]]  # a URL, and the processes of the proxies behind it
_OURS, _DIRECT = "Outrider", "direct"


class Load:
    """What one run of wrk saw, and the proxies' CPU meanwhile."""

    def __init__(self, output: str, cpu_s: float) -> None:
        found = re.search(r"(\d+) requests in", output)
        assert found is not None, output
        assert "Non-2xx" not in output, output
        self.requests = int(found[1])
        self.cpu_us = cpu_s * 1e6 / self.requests
        self.ms = {int(share): float(text) * _MILLISECONDS[unit] for share, text, unit in _LATENCY.findall(output)}


_Loads = dict[str, list[Load]]


def run() -> None:
    asyncio.run(_run())


async def _run() -> None:
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        origin = stack.enter_context(_origin(directory))
        mesh = await stack.enter_async_context(Mesh())
        for protocol, name in ((Protocol.TCP, "l4"), (Protocol.HTTP, "http")):
            certificates = _Certificates(directory / name)
            ways = {
                _OURS: await _sidecars(mesh, protocol, origin),
                "HAProxy": await stack.enter_async_context(_haproxies(certificates, protocol, origin)),
                "nginx": await stack.enter_async_context(_nginxes(certificates, protocol, origin)),
            }
            await _compare(name, (f"http://127.0.0.1:{origin}/", ()), ways)
        await _compare_on_one_host(
            await _sidecars(mesh, Protocol.TCP, origin, name="near"),
            await stack.enter_async_context(_haproxies(_Certificates(directory / "near"), Protocol.TCP, origin)),
            await stack.enter_async_context(_unix_pair(directory, origin)),
        )


async def _compare_on_one_host(ours: Way, haproxy: Way, unix: Way) -> None:
    """Sidecars of one host dial each other; and what a Unix socket without TLS between them would cost instead."""
    loads: _Loads = {who: [] for who in (_OURS, "HAProxy", "unix")}
    for _ in range(ROUNDS):
        for who, way in ((_OURS, ours), ("HAProxy", haproxy), ("unix", unix)):
            loads[who].append(await _load(way))
    cpu_us = {who: median(load.cpu_us for load in of_who) for who, of_who in loads.items()}
    emit("mesh.l4_same_host_cpu_us", cpu_us[_OURS], "us", peer="HAProxy", peer_value=cpu_us["HAProxy"])
    emit("mesh.l4_unix_cpu_us", cpu_us["unix"], "us", peer="the sidecars' own way", peer_value=cpu_us[_OURS])


async def _compare(name: str, direct: Way, ways: Mapping[str, Way]) -> None:
    full: _Loads = {who: [] for who in (*ways, _DIRECT)}
    paced: _Loads = {who: [] for who in full}
    large: _Loads = {who: [] for who in full}
    fresh: _Loads = {who: [] for who in full}
    for _ in range(ROUNDS):
        for who, way in {**ways, _DIRECT: direct}.items():
            full[who].append(await _load(way))
            paced[who].append(await _load(way, script=_PACED))
            large[who].append(await _load(way, path="large", connections=4))
            fresh[who].append(await _load(way, header="connection: close"))
    _tell(f"mesh.{name}_cpu_us", full, "us", lambda load: load.cpu_us)
    _tell(f"mesh.{name}_requests_per_s", full, "1/s", lambda load: load.requests / SECONDS)
    for share in (50, 99):
        base_ms = median(load.ms[share] for load in paced[_DIRECT])
        _tell(f"mesh.{name}_added_ms_p{share}", paced, "ms", partial(_added_ms, share, base_ms))
    _tell(f"mesh.{name}_mb_per_s", large, "MB/s", lambda load: load.requests * _LARGE_BYTES / SECONDS / 1e6)
    if name == "l4":
        _tell("mesh.connections_per_s", fresh, "1/s", lambda load: load.requests / SECONDS)


def _added_ms(share: int, base_ms: float, load: Load) -> float:
    return load.ms[share] - base_ms


def _tell(figure: str, loads: _Loads, unit: str, of: Callable[[Load], float]) -> None:
    """HAProxy is the peer of the figure; nginx's, and none's, stand beside it under names of their own."""
    values = {who: median(map(of, of_who)) for who, of_who in loads.items()}
    emit(figure, values[_OURS], unit, peer="HAProxy", peer_value=values["HAProxy"])
    emit(f"{figure}.nginx", values[_OURS], unit, peer="nginx", peer_value=values["nginx"])
    if not figure.endswith("cpu_us") and "added" not in figure:
        emit(f"{figure}.direct", values[_OURS], unit, peer=_DIRECT, peer_value=values[_DIRECT])


async def _load(
    way: Way, *, path: str = "", script: str = "", header: str = "", connections: int = _CONNECTIONS
) -> Load:
    url, proxies = way
    options = ["--header", header] if header else []
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        options += ["--script", file.name] if script else []
        before_s = sum(map(_cpu_s, proxies))
        process = await asyncio.create_subprocess_exec(
            *("wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{SECONDS}s", "--latency"),
            *(*options, url + path),
            stdout=subprocess.PIPE,
        )
        output, _ = await process.communicate()
        return Load(output.decode(), sum(map(_cpu_s, proxies)) - before_s)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _sidecars(mesh: Mesh, protocol: Protocol, origin: int, name: str = "") -> Way:
    """The caller's address, and the processes of both sidecars."""
    called, caller = f"callee-{name or protocol}", f"caller-{name or protocol}"
    server, client = _NAMES[name or protocol]
    spec = mesh.spec(server, served(called, origin, protocol))
    service = mesh.service(called, protocol, endpoint(spec))
    mesh.intend(called, (caller, Action.ALLOW))
    mesh.publish()
    await mesh.start(spec, mesh.spec(client, calling(caller, (called, None))))
    # The harness's shell, unshare and setpriv exec one another: its process is Envoy.
    return f"http://{service.virtual_address}:15001/", tuple(mesh.envoys[alloc].pid for alloc in (server, client))


@contextlib.asynccontextmanager
async def _unix_pair(directory: Path, origin: int) -> AsyncIterator[Way]:
    """Two Envoys as the sidecars' are, with their logs; between them a Unix socket, no TLS, and no rules."""
    front = free_port()
    middle: Config = {"pipe": {"path": str(directory / "middle.sock")}}
    at_front, at_origin = _socket_address(front), _socket_address(origin)
    words = {}
    for name, listens, calls, log in (
        ("callee", middle, at_origin, inbound_log("callee", http=False)[:1]),
        ("caller", at_front, middle, outbound_log("caller", "callee", http=False)),
    ):
        path = directory / f"unix-{name}.json"
        path.write_text(json.dumps(_static(listens, calls, log)))
        options = ("--concurrency", "1", "--disable-hot-restart", "--log-level", "error")
        words[name] = (str(envoy_binary()), "-c", str(path), "--file-flush-interval-msec", "500", *options)
    with (directory / "unix.log").open("ab") as log_file:
        async with _running(words, front, output=log_file.fileno()) as pids:
            yield f"http://127.0.0.1:{front}/", pids


def _socket_address(port: int) -> Config:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _static(listens: Config, calls: Config, log: list[Config]) -> Config:
    """A bootstrap configuration: connections from one address to another."""
    proxy = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "tcp",
        "cluster": "to",
        "access_log": log,
    }
    endpoint = {"lb_endpoints": [{"endpoint": {"address": calls}}]}
    cluster = {"name": "to", "type": "STATIC", "load_assignment": {"cluster_name": "to", "endpoints": [endpoint]}}
    filters = [{"name": "tcp", "typed_config": proxy}]
    listener = {"name": "from", "address": listens, "filter_chains": [{"filters": filters}]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


@contextlib.contextmanager
def _origin(directory: Path) -> Iterator[int]:
    port = free_port()
    (directory / "large").write_bytes(os.urandom(_LARGE_BYTES))
    configuration = directory / "origin.conf"
    configuration.write_text(f"""{_nginx_head(directory, "origin")}
http {{
  access_log off; keepalive_requests 1000000000; sendfile on;
  server {{
    listen 127.0.0.1:{port} backlog=4096; root {directory};
    location = / {{ return 200 "{"x" * 100}"; }}
  }}
}}
""")
    process = subprocess.Popen(["nginx", "-p", str(directory), "-c", str(configuration)])
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


class _Certificates:
    """Of the peers' two proxies, and the roots that both trust."""

    def __init__(self, base: Path) -> None:
        self.directory = base
        base.mkdir()
        authority = Authority("bench.consul", "dc1")
        self.roots = base / "roots.pem"
        self.roots.write_text(authority.certificate_pem)
        for name in ("caller", "callee"):
            leaf = authority.leaf(name)
            self.of(name).write_text(leaf.certificate_pem + leaf.key_pem)

    def of(self, name: str) -> Path:
        return self.directory / f"{name}.pem"


def _nginx_head(directory: Path, name: str) -> str:
    return f"""
daemon off; worker_processes 1; pid {directory}/{name}.pid; error_log /dev/null; user root;
events {{ worker_connections 4096; }}
"""


@contextlib.asynccontextmanager
async def _nginxes(certificates: _Certificates, protocol: Protocol, origin: int) -> AsyncIterator[Way]:
    front, middle = free_port(), free_port()
    kind = "http" if protocol is Protocol.HTTP else "stream"
    keep = "keepalive 64; keepalive_requests 1000000000;" if kind == "http" else ""
    headers = 'proxy_http_version 1.1; proxy_set_header connection "";' if kind == "http" else ""
    common = "access_log off; keepalive_requests 1000000000;" if kind == "http" else ""

    def passing(to: str, tls: str) -> str:
        if kind == "stream":
            return f"proxy_pass {to}; {tls}"
        return f"location / {{ proxy_pass http{'s' if tls else ''}://{to}; {headers} {tls} }}"

    own, caller, roots = certificates.of("callee"), certificates.of("caller"), certificates.roots
    accept = (
        f"ssl_certificate {own}; ssl_certificate_key {own}; ssl_client_certificate {roots}; ssl_verify_client on; "
        "ssl_session_cache shared:s:1m;"
    )
    dial = (
        f"proxy_ssl_certificate {caller}; proxy_ssl_certificate_key {caller}; proxy_ssl_trusted_certificate {roots}; "
        "proxy_ssl_verify on; proxy_ssl_name callee; proxy_ssl_session_reuse on;"
    )
    if kind == "stream":
        dial = f"proxy_ssl on; {dial}"
    files = {
        "callee": f"upstream work {{ server 127.0.0.1:{origin}; {keep} }}"
        f"server {{ listen 127.0.0.1:{middle} ssl backlog=4096; {accept} {passing('work', '')} }}",
        "caller": f"upstream peer {{ server 127.0.0.1:{middle}; {keep} }}"
        f"server {{ listen 127.0.0.1:{front} backlog=4096; {passing('peer', dial)} }}",
    }
    words = {}
    for name, text in files.items():
        path = certificates.directory / f"nginx-{name}.conf"
        modules = "" if kind == "http" else "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\n"
        head = _nginx_head(certificates.directory, name)
        path.write_text(f"{modules}{head}{kind} {{ {common} {text} }}\n")
        words[name] = ("nginx", "-p", str(certificates.directory), "-c", str(path))
    async with _running(words, front) as pids:
        # The master does nothing; each has one worker.
        yield f"http://127.0.0.1:{front}/", tuple(child for pid in pids for child in _children(pid))


@contextlib.asynccontextmanager
async def _haproxies(certificates: _Certificates, protocol: Protocol, origin: int) -> AsyncIterator[Way]:
    """A pair that does what the sidecars do: mutual TLS, session resumption, the peer's chain and name verified."""
    mode = "http" if protocol is Protocol.HTTP else "tcp"
    front, middle = free_port(), free_port()
    own, caller, roots = certificates.of("callee"), certificates.of("caller"), certificates.roots
    files = {
        "callee": f"""
frontend in
  bind 127.0.0.1:{middle} ssl crt {own} ca-file {roots} verify required
  {"http-request deny" if mode == "http" else "tcp-request content reject"} unless {{ ssl_c_s_dn(cn) caller }}
  default_backend work
backend work
  server origin 127.0.0.1:{origin}
""",
        "caller": f"""
frontend in
  bind 127.0.0.1:{front}
  default_backend peer
backend peer
  server callee 127.0.0.1:{middle} ssl crt {caller} ca-file {roots} verify required verifyhost callee
""",
    }
    words = {}
    for name, text in files.items():
        path = certificates.directory / f"haproxy-{name}.cfg"
        path.write_text(f"global\n  nbthread 1\ndefaults\n  mode {mode}\n{_TIMEOUTS}{text}")
        words[name] = ("haproxy", "-db", "-f", str(path))
    async with _running(words, front) as pids:
        yield f"http://127.0.0.1:{front}/", pids


@contextlib.asynccontextmanager
async def _running(
    words: Mapping[str, tuple[str, ...]], front: int, output: int | None = None
) -> AsyncIterator[tuple[int, ...]]:
    processes = [await asyncio.create_subprocess_exec(*each, stdout=output) for each in words.values()]
    try:
        async with asyncio.timeout(10):
            while not await _accepts(front):  # noqa: ASYNC110 - a program tells nobody when it listens
                await asyncio.sleep(0.01)
        yield tuple(process.pid for process in processes)
    finally:
        for process in processes:
            process.terminate()
            await process.wait()


def _children(pid: int) -> tuple[int, ...]:
    return tuple(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


async def _accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
