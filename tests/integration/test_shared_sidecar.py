"""Allocations of a node that share one sidecar: whose identity is whose, what disturbs whom, and how long it lives."""
# ruff: noqa: ASYNC240 - a test may block its own loop

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from agent.held import SHARED_SIDECAR
from outrider.ids import AllocId, GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.allocation import AllocStatus, Assignment
from outrider.model.job import Check, CheckKind, File, Group, Network, Port, RestartPolicy, Service, Task, Upstream
from outrider.model.job import Protocol as MeshProtocol
from outrider.model.mesh import (
    PUBLIC_PORT,
    Action,
    Endpoint,
    Intention,
    MeshService,
    ServiceIntentions,
    listener_address,
    virtual_address,
)
from outrider.model.sidecar import SidecarKind
from outrider.v1 import fleet_pb2, insight_pb2
from tests.integration.agent_fleet import TRUST_DOMAIN, AgentFleet, fleet
from tests.integration.network_lab import node
from tests.integration.processes import comm, until

__all__ = ["fleet", "node"]
pytestmark = pytest.mark.host

API, WEB, THIEF, LATE = (AllocId(f"00000000{tail}") for tail in ("a1", "b1", "c1", "d1"))
SERVER = b"""
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")
        while self.path == "/stream":
            self.wfile.write(b"tick\\n")
            time.sleep(0.02)
    def log_message(self, *arguments): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
CALL = """
import sys, urllib.error, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1], timeout=8) as answer:
        for piece in iter(lambda: answer.read1(100), b""):
            print(piece.decode(), end="", flush=True)
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
print("ended")
"""
LOAD = """
import http.client, itertools, json, threading, time
lock, totals = threading.Lock(), {"done": 0, "failed": []}
def ask(connection):
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        body = answer.read()
        return "" if (answer.status, body) == (200, b"ok") else f"{answer.status} {body}"
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
def call(kept):
    connection = None
    while True:
        if connection is None or not kept:
            connection = http.client.HTTPConnection("api.mesh", timeout=10)
        failure = ask(connection)
        if failure or not kept:
            connection.close()
            connection = None
        with lock:
            totals["done"] += 1
            totals["failed"] += [failure] if failure else []
for kept in (True, True, False, False):
    threading.Thread(target=call, args=(kept,), daemon=True).start()
while True:
    time.sleep(0.05)
    with lock:
        print(json.dumps(totals), flush=True)
"""
REACH = """
import json, socket, sys
def reached(source, address, port):
    try:
        with socket.socket() as opened:
            opened.settimeout(1)
            opened.bind((source, 0))
            opened.connect((address, port))
            opened.send(b"GET / HTTP/1.0\\r\\n\\r\\n")
            return opened.recv(100).decode()
    except OSError:
        return ""
print(json.dumps([reached(*each) for each in json.loads(sys.argv[1])]))
"""


def copy(name: str, alloc: AllocId, sidecar: SidecarKind = SidecarKind.SHARED) -> Assignment:
    """One that serves, if it is the api; the others call it."""
    serves = name == "api"
    service = Service(
        name=ServiceName(name),
        port=PortName("http") if serves else None,
        protocol=MeshProtocol.HTTP,
        check=Check(kind=CheckKind.HTTP, path="/", interval_s=0.5) if serves else None,
        upstreams=() if serves else (Upstream(service=ServiceName("api")),),
    )
    command = ("python3", "-u", "${task.dir}/app.py", "${port.http}") if serves else ("sleep", "600")
    task = Task(
        name=TaskName("work"),
        command=(*command, f"marked-{alloc}") if serves else command,
        files=(File(path="app.py", content=SERVER),),
        kill_timeout_s=2.0,
    )
    group = Group(
        name=GroupName(name),
        tasks=(task,),
        network=Network(ports=(Port(name=PortName("http")),) if serves else ()),
        services=(service,),
        restart=RestartPolicy(delay_s=0.1),
        sidecar=sidecar,
    )
    ports = {service.name: 20000 + int(alloc, 16) % 1000} if serves else {}
    return Assignment(alloc=alloc, job=JobName(name), job_version=1, group=group, index=0, mesh_ports=ports)


def mesh(fleet: AgentFleet, *callers: str) -> None:
    """As the controller would tell of it: where the api is, and who may call it."""
    controller = fleet.controller
    endpoints = tuple(
        Endpoint(
            id=alloc,
            node=fleet.run.name,
            address="192.0.2.99",
            port=1,
            local_address=controller.reports[alloc].local_address,
            local_port=PUBLIC_PORT,
            healthy=controller.passing(alloc),
            alloc=alloc,
            outrider=True,
        )
        for alloc in (API, LATE)
        if alloc in controller.reports and controller.reports[alloc].checks
    )
    address = virtual_address(0)
    api = MeshService(name=ServiceName("api"), virtual_address=address, protocol=MeshProtocol.HTTP, endpoints=endpoints)
    allowed = tuple(
        Intention(source=name, destination="api", action=Action.ALLOW, precedence=9, id=name) for name in callers
    )
    controller.mesh(api, intentions=(ServiceIntentions(service=ServiceName("api"), intentions=allowed),))


async def ran(fleet: AgentFleet, alloc: AllocId, script: str, *words: str) -> str:
    request = fleet_pb2.ExecRequest(alloc=alloc, command=["python3", "-uc", script, *words])
    output, _ = await fleet.controller.tunnelled(fleet.controller.open_tunnel(exec=request))
    return output.decode()


async def called(fleet: AgentFleet, alloc: AllocId) -> str:
    return await ran(fleet, alloc, CALL, "http://api.mesh")


class Stream:
    """A long answer, as its reader sees it."""

    def __init__(self, fleet: AgentFleet, alloc: AllocId) -> None:
        command = ["python3", "-uc", CALL, "http://api.mesh/stream"]
        self._controller = fleet.controller
        self._tunnel = fleet.controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=alloc, command=command))

    async def goes_on(self) -> None:
        """What was said until now, and then more."""
        frames = self._controller.tunnels[self._tunnel]
        while not frames.empty():
            frames.get_nowait()
        async with asyncio.timeout(20):
            for _ in range(3):
                frame = await frames.get()
                assert frame is not None, "its tunnel broke off"
                assert frame.WhichOneof("frame") != "end", frame
                assert b"ended" not in frame.stdout, frame


class Load:
    """Calls from one allocation, some on connections of their own, some on ones that stay; none is made twice."""

    def __init__(self, fleet: AgentFleet, alloc: AllocId) -> None:
        request = fleet_pb2.ExecRequest(alloc=alloc, command=["python3", "-uc", LOAD])
        self._frames = fleet.controller.tunnels[fleet.controller.open_tunnel(exec=request)]
        self._said = b""
        self.done = 0
        self.failed: list[str] = []

    async def goes_on(self) -> None:
        """Some more are made, from now on."""
        while not self._frames.empty():
            self._heard(self._frames.get_nowait())
        enough = self.done + 50
        async with asyncio.timeout(60):
            while self.done < enough:
                self._heard(await self._frames.get())

    def _heard(self, frame: fleet_pb2.TunnelFrame | None) -> None:
        assert frame is not None, "its tunnel broke off"
        assert frame.WhichOneof("frame") != "end", frame
        *lines, self._said = (self._said + frame.stdout).split(b"\n")
        for line in lines:
            totals = json.loads(line)
            self.done, self.failed = totals["done"], totals["failed"]


async def started(fleet: AgentFleet, *assignments: Assignment) -> None:
    controller = fleet.controller
    controller.assign(*assignments)

    def up(each: Assignment) -> bool:
        checked = each.group.services[0].check is not None
        runs = controller.status(each.alloc) is AllocStatus.RUNNING
        return runs and (not checked or controller.passing(each.alloc))

    await until(lambda: all(map(up, assignments)), "all run")


async def three(fleet: AgentFleet) -> None:
    await fleet.start()
    mesh(fleet)
    await started(fleet, copy("api", API), copy("web", WEB), copy("thief", THIEF))
    mesh(fleet, "web")
    await until_called(fleet, WEB)


async def until_called(fleet: AgentFleet, alloc: AllocId, answer: str = "okended\n") -> None:
    """What is told to sidecars is there a moment later."""

    async def answered() -> bool:
        return answer in await called(fleet, alloc)

    await until(answered, f"{alloc} hears {answer}", timeout_s=40.0)


def envoys(fleet: AgentFleet) -> list[int]:
    return [pid for pid in fleet.workload_pids("/run/outrider/envoy") if comm(pid) == "envoy"]


async def sidecar_log(fleet: AgentFleet, alloc: AllocId, wanted: str) -> list[dict[str, str]]:
    """Once something is in it: Envoy writes it out now and then."""
    async with asyncio.timeout(20):
        while True:
            request = fleet_pb2.LogsRequest(alloc=alloc, task="sidecar", tail_lines=50)
            output, _ = await fleet.controller.tunnelled(fleet.controller.open_tunnel(logs=request))
            if wanted in output.decode():
                return [json.loads(line) for line in output.decode().splitlines()]
            await asyncio.sleep(0.05)


async def test_each_has_its_own_name_in_one_process_and_reaches_what_is_its_own(fleet: AgentFleet) -> None:
    await three(fleet)
    (envoy,) = envoys(fleet)
    facts = dict(line.split(":\t", 1) for line in Path(f"/proc/{envoy}/status").read_text().splitlines())
    assert int(facts["CapEff"], 16) == int(facts["CapBnd"], 16) == 0
    assert int(facts["Uid"].split()[0]) > 65_536
    thief = f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/thief"
    await until_called(fleet, THIEF, f"403 outrider: {thief} may not call service api")
    api, own = (fleet.controller.reports[alloc].local_address for alloc in (API, THIEF))
    attempts = [
        *((source, api, port) for source in (own, "0.0.0.0") for port in (8080, PUBLIC_PORT)),
        *(("0.0.0.0", listener_address(api, to), 15001) for to in (virtual_address(0), None)),
        (own, listener_address(api), PUBLIC_PORT),
        *((source, virtual_address(0), 80) for source in (api, "127.0.0.9", "198.18.0.1")),
    ]
    assert json.loads(await ran(fleet, THIEF, REACH, json.dumps(attempts))) == [""] * len(attempts)
    for alloc, seen in ((API, {"web", "thief"}), (WEB, {"web"}), (THIEF, {"thief"})):
        lines = await sidecar_log(fleet, alloc, "svc/thief" if alloc == API else '"code":')
        assert {line["alloc"] for line in lines} == {alloc}
        if alloc == API:
            await until_logged(fleet, seen)
        else:
            assert {line["service"] for line in lines} == seen


async def until_logged(fleet: AgentFleet, callers: set[str]) -> None:
    async with asyncio.timeout(20):
        while True:
            lines = await sidecar_log(fleet, API, "svc/")
            if callers <= {str(line.get("caller", "")).rpartition("/")[2] for line in lines}:
                return


async def test_what_changes_for_one_disturbs_no_other(fleet: AgentFleet) -> None:
    await three(fleet)
    controller = fleet.controller
    stream = Stream(fleet, WEB)
    await stream.goes_on()
    await started(fleet, copy("api", LATE))
    mesh(fleet, "web", "thief")
    await until_called(fleet, THIEF)
    await stream.goes_on()
    pairs = await figures(fleet)
    assert all(pair.connections_active for pair in pairs if pair.source == "web")
    assert {pair.alloc for pair in pairs} == {WEB, THIEF}
    controller.assign(removed=(THIEF, LATE))
    await until(lambda: not any((fleet.run / "netns" / alloc).exists() for alloc in (THIEF, LATE)), "both are gone")
    mesh(fleet, "web", "thief")
    await stream.goes_on()
    await until_called(fleet, WEB)
    assert len(envoys(fleet)) == 1


@pytest.mark.deep
@pytest.mark.timeout(400)
async def test_what_becomes_of_a_neighbour_fails_no_call(fleet: AgentFleet) -> None:
    await three(fleet)
    load = Load(fleet, WEB)
    await load.goes_on()
    for number in range(5):
        neighbour = AllocId(f"00000000e{number}")
        await started(fleet, copy("thief", neighbour))
        await load.goes_on()
        mesh(fleet, "web", "thief")
        await until_called(fleet, neighbour)
        await load.goes_on()
        mesh(fleet, "web")
        await until_called(fleet, neighbour, "403 outrider: ")
        await load.goes_on()
        fleet.controller.assign(removed=(neighbour,))
        await until(lambda each=neighbour: not (fleet.run / "netns" / each).exists(), "it is gone")
        await load.goes_on()
    assert load.failed == []
    assert len(envoys(fleet)) == 1


async def figures(fleet: AgentFleet) -> list[insight_pb2.PairFigures]:
    query = insight_pb2.MeshQuery(figures=insight_pb2.FiguresQuery(over_s=0.1))
    tunnel = fleet.controller.open_tunnel(mesh=query)
    found = []
    async with asyncio.timeout(20):
        while (frame := await fleet.controller.tunnels[tunnel].get()) is not None:
            if frame.WhichOneof("frame") == "end":
                break
            found.append(frame.mesh.pair)
    return found


async def test_a_tap_shows_the_requests_of_the_one_that_was_asked_for(fleet: AgentFleet) -> None:
    await three(fleet)
    mesh(fleet, "web", "thief")
    await until_called(fleet, THIEF)
    tapped = fleet.controller.open_tunnel(mesh=tap(WEB, "web"))
    # What is asked for is in force a moment later: both call until one of the calls was told.
    async with asyncio.timeout(60):
        while fleet.controller.tunnels[tapped].empty():
            assert await called(fleet, THIEF) == await called(fleet, WEB) == "okended\n"
    told = fleet.controller.tunnels[tapped]
    for _ in range(told.qsize()):
        frame = told.get_nowait()
        assert frame is not None, "its tunnel broke off"
        call = frame.mesh.call
        assert (call.alloc, call.source, call.destination) == (WEB, "web", "api"), frame
        assert (call.method, call.path, call.status) == ("GET", "/", 200), frame
    _, end = await fleet.controller.tunnelled(fleet.controller.open_tunnel(mesh=tap(THIEF, "thief")))
    assert "somebody looks at the requests of an allocation of this node's shared sidecar already" in end.error


def tap(alloc: AllocId, source: str) -> insight_pb2.MeshQuery:
    query = insight_pb2.TapQuery(alloc=alloc, source=source, destination="api", percent=100)
    return insight_pb2.MeshQuery(tap=query)


async def test_it_outlives_its_agent_comes_back_when_killed_and_ends_with_the_last(fleet: AgentFleet) -> None:
    await three(fleet)
    controller = fleet.controller
    (envoy,), stream = envoys(fleet), Stream(fleet, WEB)
    await stream.goes_on()
    fleet.kill()
    await fleet.start()
    mesh(fleet, "web")
    await until_called(fleet, WEB)
    assert envoys(fleet) == [envoy], "it was taken over"
    assert [controller.reports[alloc].tasks[0].restarts for alloc in (API, WEB, THIEF)] == [0, 0, 0]
    works = fleet.workload_pids(f"marked-{API}")
    os.kill(envoy, signal.SIGKILL)
    await until(lambda: not controller.passing(API), "seen")
    await until(lambda: controller.passing(API), "another serves")
    await until_called(fleet, WEB)
    assert fleet.workload_pids(f"marked-{API}") == works, "the workload ran on"
    assert envoy not in envoys(fleet)
    assert len(envoys(fleet)) == 1
    controller.assign(full=True)
    await until(lambda: not envoys(fleet), "it ended")
    await until(lambda: "ors" not in fleet.shell("ip -o link"), "and so did its namespace")
    await until(lambda: not list((fleet.run / "envoy" / "sidecars").iterdir()), "and its files")
    await until(lambda: not list((fleet.data / "allocations").iterdir()), "all are forgotten: an id may come again")
    # One of whose allocation nothing is known any more.
    await started(fleet, copy("web", WEB))
    fleet.kill()
    (fleet.data / "allocations" / WEB / "state.json").unlink()
    await fleet.start()
    controller.assign(full=True)
    await until(lambda: not envoys(fleet), "it ended")
    await until(
        lambda: SHARED_SIDECAR not in fleet.shell(f"ls {fleet.run}/sandboxes/crun"), "and nothing of it is left"
    )
