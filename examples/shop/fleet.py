"""What the demo asks of the fleet: the same calls as the command line makes, their answers as values."""

import json
import os
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from outrider import codec
from outrider.cli.client import Fleet
from outrider.cli.dev.layout import CONTROL_ADDRESS, PROMETHEUS_PORT, Layout
from outrider.cli.dev.namespaces import inside
from outrider.errors import PeerError, RefusedError
from outrider.jobspec.reader import read_job
from outrider.model.allocation import Allocation
from outrider.model.fleet import JobStatus
from outrider.model.job import Value
from outrider.model.mesh import Action, Intention, ObservedRefusal
from outrider.v1 import fleet_pb2, job_pb2, mesh_pb2, operator_pb2

_EXEC_TIMEOUT_S = 60.0
_LOGS_TIMEOUT_S = 15.0
_QUERY = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


class Visits(Value, frozen=True, kw_only=True):
    """What came of one run of shopper.py; `web` and `api` are allocations -> visits that they served."""

    asked: int
    web: Mapping[str, int]
    api: Mapping[str, int]
    failures: Mapping[str, int]
    visits_first: int
    visits_last: int
    visits_distinct: int
    seconds: float


def read_visits(line: str) -> Visits:
    """shopper.py's last line."""
    return msgspec.json.decode(line, type=Visits)


class ShopFleet:
    """A dev fleet, as the demo uses it."""

    def __init__(self, layout: Layout, fleet: Fleet) -> None:
        self._layout = layout
        self._fleet = fleet
        self._stub = fleet.stub

    def run(self, file: Path) -> None:
        """Submits the job in `file`; waits until its rollout has succeeded. Raises RefusedError."""
        job = read_job(file)
        request = operator_pb2.SubmitJobRequest(job=codec.to_wire(job, job_pb2.Job))
        self._fleet.call(self._stub.SubmitJob, request)
        for message in self._fleet.stream(self._stub.WatchJob, operator_pb2.GetJobRequest(job=job.name), 90.0):
            status = codec.from_wire(message, JobStatus)
            if status.rollout == "successful":
                return
            if status.rollout != "running":
                raise RefusedError("rollout-failed", f"job {job.name}: {status.rollout_reason}")

    def allocations(self, job: str, group: str) -> list[Allocation]:
        request = operator_pb2.ListAllocationsRequest(job=job)
        found = self._fleet.call(self._stub.ListAllocations, request).allocations
        every = [codec.from_wire(message, Allocation) for message in found]
        return sorted((each for each in every if each.group == group), key=lambda each: each.index)

    def exec(self, job: str, *command: str) -> Iterator[str]:
        """Lines that the command says, in the job's first allocation. Raises RefusedError where it fails."""
        alloc = self.allocations(job, job)[0].id
        frames = [
            operator_pb2.ExecFrame(start=fleet_pb2.ExecRequest(alloc=alloc, command=command)),
            operator_pb2.ExecFrame(stdin_closed=True),
        ]
        rest, wrong = b"", b""
        for frame in self._fleet.stream(self._stub.Exec, iter(frames), _EXEC_TIMEOUT_S):
            wrong += frame.stderr
            *lines, rest = (rest + frame.stdout).split(b"\n")
            yield from (line.decode() for line in lines)
            if frame.HasField("end") and (frame.end.error or frame.end.exit_code):
                said = frame.end.error or wrong.decode(errors="replace")
                raise RefusedError("exec-failed", f"{' '.join(command)}: {said}")

    def sidecar_log(self, alloc: Allocation) -> list[dict[str, object]]:
        """What the allocation's Envoy said of requests and connections, oldest first."""
        request = fleet_pb2.LogsRequest(
            alloc=alloc.id, task="sidecar", stream=fleet_pb2.LOG_STREAM_STDOUT, tail_lines=5000
        )
        text = b"".join(frame.stdout for frame in self._fleet.stream(self._stub.Logs, request, _LOGS_TIMEOUT_S))
        return [json.loads(line) for line in text.splitlines() if line.startswith(b"{")]

    def intentions(self) -> list[Intention]:
        found = self._fleet.call(self._stub.ListIntentions, operator_pb2.ListIntentionsRequest()).intentions
        return [codec.from_wire(message, Intention) for message in found]

    def create_intention(self, source: str, destination: str, action: Action, description: str) -> Intention:
        wanted = Intention(source=source, destination=destination, action=action, description=description)
        request = operator_pb2.CreateIntentionRequest(intention=codec.to_wire(wanted, mesh_pb2.Intention))
        return codec.from_wire(self._fleet.call(self._stub.CreateIntention, request), Intention)

    def delete_intention(self, source: str, destination: str) -> None:
        request = operator_pb2.DeleteIntentionRequest(source=source, destination=destination)
        self._fleet.call(self._stub.DeleteIntention, request)

    def refusals(self, source: str, destination: str) -> list[ObservedRefusal]:
        """What sidecars of `destination` really refused of `source`, newest first."""
        request = operator_pb2.CheckIntentionRequest(source=source, destination=destination)
        answer = self._fleet.call(self._stub.CheckIntention, request)
        return [codec.from_wire(refusal, ObservedRefusal) for refusal in answer.refusals]

    def kill_workload(self, alloc: Allocation) -> int:
        """SIGKILL to the allocation's workload; its sidecar stays. The process id that was."""
        wanted = f"OUTRIDER_ALLOC_ID={alloc.id}".encode()
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
            except OSError:  # ended meanwhile
                continue
            if wanted in words:
                os.kill(int(entry.name), 9)
                return int(entry.name)
        raise PeerError(f"allocation {alloc.id}: no process of it runs on this machine")

    def figures(self, query: str) -> dict[tuple[str, ...], float]:
        """Prometheus' answer to `query`: its labels' values, in order of their names -> the figure."""
        url = f"http://{CONTROL_ADDRESS}:{PROMETHEUS_PORT}/api/v1/query?query={urllib.parse.quote(query)}"
        command = [*inside(self._layout.control_namespace), sys.executable, "-c", _QUERY, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode:
            raise PeerError(f"Prometheus: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout)["data"]["result"]
        return {tuple(value for _, value in sorted(row["metric"].items())): float(row["value"][1]) for row in found}
