"""The agent as it runs: joined, told what to run, killed, started again, purged. Only its controller is not real."""
# ruff: noqa: ASYNC240 - a test may block its own loop

import json
import os
import signal
from pathlib import Path

import pytest

from outrider.ids import AllocId, GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.allocation import AllocStatus, Assignment, Desired, TaskStatus
from outrider.model.job import (
    MIB,
    Check,
    CheckKind,
    DisconnectPolicy,
    File,
    Group,
    Network,
    Port,
    Resources,
    RestartPolicy,
    Service,
    Task,
)
from outrider.model.job import Protocol as MeshProtocol
from outrider.v1 import fleet_pb2
from tests.integration.agent_fleet import AgentFleet, fleet
from tests.integration.network_lab import node
from tests.integration.processes import comm, until

__all__ = ["fleet", "node"]
pytestmark = pytest.mark.host

WEB, TAKER, BATCH = AllocId("00000000a1"), AllocId("00000000a2"), AllocId("00000000b1")
SERVER = b"""
import http.server, sys
print("serving", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "2"); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *arguments): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def web(alloc: AllocId = WEB, desired: Desired = Desired.RUN) -> Assignment:
    """An HTTP server behind a sidecar."""
    service = Service(
        name=ServiceName("web"),
        port=PortName("http"),
        protocol=MeshProtocol.HTTP,
        check=Check(kind=CheckKind.HTTP, path="/", interval_s=0.5),
    )
    group = Group(
        name=GroupName("web"),
        tasks=(
            Task(
                name=TaskName("server"),
                command=("python3", "-u", "${task.dir}/app.py", "${port.http}", f"marked-{alloc}"),
                files=(File(path="app.py", content=SERVER),),
                kill_timeout_s=2.0,
            ),
        ),
        network=Network(ports=(Port(name=PortName("http")),)),
        services=(service,),
        restart=RestartPolicy(delay_s=0.1),
    )
    return Assignment(
        alloc=alloc,
        job=JobName("shop"),
        job_version=1,
        group=group,
        index=0,
        desired=desired,
        mesh_ports={ServiceName("web"): 20001 if alloc == WEB else 20002},
    )


def script(
    alloc: AllocId, text: str, *, batch: bool = True, memory: int = 64 * MIB, stop_after_s: float | None = None
) -> Assignment:
    """A shell script without a sidecar."""
    task = Task(name=TaskName("work"), command=("sh", "-c", text), resources=Resources(memory_bytes=memory))
    group = Group(
        name=GroupName("work"),
        tasks=(task,),
        restart=RestartPolicy(attempts=0),
        disconnect=DisconnectPolicy(stop_after_s=stop_after_s),
    )
    return Assignment(alloc=alloc, job=JobName("job"), job_version=1, group=group, index=0, batch=batch)


async def running(fleet: AgentFleet, alloc: AllocId = WEB) -> None:
    controller = fleet.controller
    await until(lambda: controller.status(alloc) is AllocStatus.RUNNING and controller.passing(alloc), f"{alloc} runs")


async def test_a_workload_starts_behind_its_sidecar_and_stops_before_it(fleet: AgentFleet) -> None:
    controller = fleet.controller
    await fleet.start()
    controller.mesh()
    generation = controller.assign(web(), full=True)
    await running(fleet)
    await until(lambda: controller.applied == generation, "acknowledged")
    assert controller.leaves["web"] == 1
    assert len(fleet.workload_pids(f"marked-{WEB}")) >= 1
    controller.assign(web(desired=Desired.STOP))
    await until(lambda: controller.status(WEB) is AllocStatus.COMPLETE, "stopped")
    expected = [AllocStatus.STARTING, AllocStatus.RUNNING, AllocStatus.STOPPING, AllocStatus.COMPLETE]
    assert told(fleet, WEB) == expected
    assert not fleet.workload_pids(f"marked-{WEB}")
    await until(lambda: "or00" not in fleet.shell("ip -o link"), "its veth is gone")
    controller.assign(full=True)
    await until(lambda: not (fleet.data / "allocations" / WEB).exists(), "forgotten, logs and all")


async def test_a_killed_agent_takes_over_what_runs(fleet: AgentFleet) -> None:
    controller = fleet.controller
    await fleet.start()
    controller.mesh()
    controller.assign(web(), full=True)
    await running(fleet)
    before = (
        fleet.workload_pids(f"marked-{WEB}"),
        envoys(fleet),
        fleet.workload_pids("agent.network.dns"),
    )
    controller.assign(script(BATCH, "sleep 1; exit 0"))
    await until(lambda: AllocStatus.RUNNING in told(fleet, BATCH), "batch runs")
    record = fleet.data / "allocations" / WEB / "state.json"
    await until(lambda: json.loads(record.read_bytes())["passing"] == ["web"], "its health is on disk")
    fleet.kill(signal.SIGKILL)
    await fleet.start()
    first = {report.alloc: report for report in controller.hellos[-1].reports}
    assert first[WEB].checks[0].passing, "an agent's restart is no reason to leave load balancing"
    controller.mesh()
    controller.assign(web(), script(BATCH, "sleep 1; exit 0"), full=True)
    await until(lambda: controller.status(BATCH) is AllocStatus.COMPLETE, "work that ended is seen to have ended")
    assert before == (
        fleet.workload_pids(f"marked-{WEB}"),
        envoys(fleet),
        fleet.workload_pids("agent.network.dns"),
    )
    await running(fleet)
    assert controller.reports[WEB].tasks[0].restarts == 0
    # A batch that ended is not run again by a third agent.
    fleet.kill(signal.SIGTERM)
    await fleet.start()
    assert controller.status(BATCH) is AllocStatus.COMPLETE
    assert controller.status(WEB) is AllocStatus.RUNNING


async def test_a_killed_workload_and_a_killed_sidecar_come_back(fleet: AgentFleet) -> None:
    controller = fleet.controller
    await fleet.start()
    controller.mesh()
    controller.assign(web(), full=True)
    await running(fleet)
    (pid,) = innermost(fleet, f"marked-{WEB}")
    os.kill(pid, signal.SIGKILL)
    await until(lambda: controller.reports[WEB].tasks[0].restarts == 1 and controller.passing(WEB), "restarted")
    assert any("killed by SIGKILL" in report.tasks[0].message for report in controller.history if report.tasks)
    pids = innermost(fleet, f"marked-{WEB}")
    (envoy,) = envoys(fleet)
    os.kill(envoy, signal.SIGKILL)
    await until(lambda: not controller.passing(WEB), "seen")
    await until(lambda: controller.passing(WEB), "a new sidecar serves")
    assert innermost(fleet, f"marked-{WEB}") == pids, "the workload ran on"


async def test_the_next_workload_takes_the_spare_sidecar(fleet: AgentFleet) -> None:
    controller = fleet.controller
    await fleet.start()
    controller.mesh()
    controller.assign(web(), full=True)
    await running(fleet)
    await until(lambda: envoys(fleet, spare=True) != [], "the node keeps one more than it needs")
    spare = envoys(fleet, spare=True)
    controller.assign(web(TAKER))
    await running(fleet, TAKER)
    assert (fleet.data / "allocations" / TAKER / "sidecar" / "log").exists()
    await until(lambda: len(envoys(fleet, spare=True)) == 2, "and another")
    (unused,) = set(envoys(fleet, spare=True)) - set(spare)
    fleet.kill(signal.SIGKILL)
    await fleet.start()
    controller.mesh()
    controller.assign(web(), web(TAKER), full=True)
    await until(lambda: unused not in envoys(fleet, spare=True), "nobody knows any more what the unused one was for")
    await running(fleet, TAKER)
    assert set(spare) <= set(envoys(fleet, spare=True)), "the taken one serves all the while"
    os.kill(*spare, signal.SIGKILL)
    await until(lambda: not controller.passing(TAKER), "seen")
    await running(fleet, TAKER)
    controller.assign(full=True)
    await until(lambda: not fleet.workload_pids("/run/outrider/envoy"), "with the last sidecar goes the spare")
    await until(lambda: not any((fleet.data / "allocations").iterdir()), "forgotten")
    await until(lambda: not any((fleet.data / "spares").iterdir()), "nothing of it is left")
    left = [path for kind in ("netns", "envoy/sidecars", "envoy/state") for path in (fleet.run / kind).iterdir()]
    assert [path.name for path in left] == ["isolated"], "the responder's"


async def test_failures_are_named(fleet: AgentFleet) -> None:
    controller = fleet.controller
    await fleet.start()
    hog = "python3 -c 'x = bytearray(200_000_000)'"
    controller.assign(
        script(AllocId("00000000c1"), "echo some last words; exit 3"),
        script(AllocId("00000000c2"), hog, batch=False, memory=32 * MIB),
        script(AllocId("00000000c3"), "exit 0"),
        full=True,
    )
    ids = [AllocId(f"00000000c{number}") for number in (1, 2, 3)]
    ended = {AllocStatus.FAILED, AllocStatus.COMPLETE}
    await until(lambda: all(controller.status(alloc) in ended for alloc in ids), "all ended")
    failed, oom, complete = (controller.reports[alloc] for alloc in ids)
    assert "work exited with code 3" in failed.message
    assert "some last words" in failed.log_tail
    assert failed.tasks[0].exit_code == 3
    assert "killed by the kernel: memory limit 32.0 MiB reached" in oom.message
    assert oom.tasks[0].oom_killed
    assert (complete.status, complete.tasks[0].status) == (AllocStatus.COMPLETE, TaskStatus.EXITED)
    # What ended is still there to be read, until the controller has heard.
    tunnel = controller.open_tunnel(logs=fleet_pb2.LogsRequest(alloc=ids[0], tail_lines=-1))
    assert await controller.tunnelled(tunnel) == (b"some last words\n", fleet_pb2.TunnelEnd())


async def test_logs_are_followed_and_programs_run_beside_the_workload(fleet: AgentFleet) -> None:
    controller = fleet.controller
    await fleet.start()
    alloc = AllocId("00000000d1")
    controller.assign(script(alloc, "echo ready; exec sleep 600", batch=False), full=True)
    await until(lambda: controller.status(alloc) is AllocStatus.RUNNING, "runs")
    following = controller.open_tunnel(logs=fleet_pb2.LogsRequest(alloc=alloc, tail_lines=-1, follow=True))
    command = ("sh", "-c", "read line; echo got $line; exit 5")
    tunnel = controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=alloc, command=command))
    controller.tunnel_inputs[tunnel].put_nowait(fleet_pb2.TunnelFrame(stdin=b"this\n"))
    assert await controller.tunnelled(tunnel) == (b"got this\n", fleet_pb2.TunnelEnd(exit_code=5))
    tunnel = controller.open_tunnel(exec=fleet_pb2.ExecRequest(alloc=alloc, task="nosuch", command=["true"]))
    _, end = await controller.tunnelled(tunnel)
    assert "no task 'nosuch'" in end.error
    first = await controller.tunnels[following].get()
    assert first is not None
    assert first.stdout == b"ready\n"
    controller.assign(full=True)
    assert (await controller.tunnelled(following))[0] == b""


async def test_the_controller_away_changes_nothing_and_its_return_is_noticed(fleet: AgentFleet) -> None:
    controller = fleet.controller
    await fleet.start()
    alloc = AllocId("00000000e1")
    controller.assign(script(alloc, f"sleep 600; : marked-{alloc}", batch=False), full=True)
    await until(lambda: controller.status(alloc) is AllocStatus.RUNNING, "runs")
    pids = await shell(fleet, alloc)
    known = len(controller.hellos)
    controller.silent = True
    await until(lambda: len(controller.hellos) > known, "silence is noticed, and another session begun")
    controller.protocol = 9
    newer = "expected Welcome of protocol 1: controller and agent are of different versions"
    await until(lambda: newer in fleet.log(), "a controller of another version is refused by name")
    assert controller.status(alloc) is AllocStatus.RUNNING
    assert await shell(fleet, alloc) == pids


async def test_what_must_never_run_twice_stops_itself_without_a_controller(fleet: AgentFleet) -> None:
    controller, alone, other = fleet.controller, AllocId("00000000f1"), AllocId("00000000f2")
    await fleet.start()
    controller.assign(
        script(alone, f"sleep 600; : marked-{alone}", batch=False, stop_after_s=2.0),
        script(other, f"sleep 600; : marked-{other}", batch=False),
        full=True,
    )
    await until(lambda: all(controller.status(one) is AllocStatus.RUNNING for one in (alone, other)), "both run")
    pids = await shell(fleet, other)
    controller.away = True
    await until(lambda: not fleet.workload_pids(f"marked-{alone}"), "it stops itself")
    assert await shell(fleet, other) == pids, "the other runs on, for as long as it takes"
    controller.away = False
    await until(lambda: controller.status(alone) is AllocStatus.FAILED, "which is told once somebody is there")
    assert "it must never run twice, and no controller was heard" in controller.reports[alone].message


async def test_purging_leaves_nothing_on_the_host(fleet: AgentFleet) -> None:
    controller = fleet.controller
    await fleet.start()
    controller.mesh()
    controller.assign(web(), full=True)
    await running(fleet)
    fleet.kill(signal.SIGTERM)
    assert fleet.workload_pids(f"marked-{WEB}"), "SIGTERM ends the agent alone"
    name = fleet.run.name
    fleet.purge()
    assert not fleet.workload_pids(f"marked-{WEB}")
    assert not fleet.processes()
    assert not fleet.run.exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/outrider/test/{name}"))
    assert name not in Path("/proc/self/mounts").read_text()
    assert not any(name in path.read_text() for path in Path("/run/outrider/claims").glob("*.json"))
    assert fleet.shell("nft list ruleset") == ""
    await until(lambda: "or00" not in fleet.shell("ip -o link"), "no veth is left")


def told(fleet: AgentFleet, alloc: AllocId) -> list[AllocStatus]:
    """What the controller heard of it, each status once."""
    return list(dict.fromkeys(report.status for report in fleet.controller.history if report.alloc == alloc))


async def shell(fleet: AgentFleet, alloc: AllocId) -> list[int]:
    """A script's own process, which its init begins a moment after it runs itself; a child is a shell at first."""
    pids: list[int] = []

    def alone() -> bool:
        pids[:] = [pid for pid in fleet.workload_pids(f"marked-{alloc}") if comm(pid) == "sh"]
        return len(pids) == 1

    await until(alone, "its own process")
    return pids


def innermost(fleet: AgentFleet, needle: str) -> list[int]:
    """The workload's own process: neither its init nor a monitor."""
    return [pid for pid in fleet.workload_pids(needle) if comm(pid).startswith("python3")]


def envoys(fleet: AgentFleet, *, spare: bool = False) -> list[int]:
    """Those that allocations were started with; or those that were started for whoever would come."""
    return [
        pid for pid in fleet.workload_pids("/run/outrider/envoy") if comm(pid) == "envoy" and _is_spare(pid) is spare
    ]


def _is_spare(pid: int) -> bool | None:
    try:
        return "spare-" in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return None
