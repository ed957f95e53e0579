"""A dev fleet of its own for a benchmark, and a warm channel to it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

from outrider import codec
from outrider.model.job import Job
from outrider.v1 import allocation_pb2, fleet_pb2, job_pb2, operator_pb2
from outrider.v1.operator_pb2_grpc import OperatorServiceStub

_DEADLINE_S = 60.0
_ENDED = {allocation_pb2.ALLOC_STATUS_COMPLETE, allocation_pb2.ALLOC_STATUS_FAILED, allocation_pb2.ALLOC_STATUS_LOST}


class Fleet:
    """What benchmarks do to a fleet; each call has a deadline."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._channel = grpc.insecure_channel(f"unix:/run/outrider/{name}/operator.sock")
        self.operator = OperatorServiceStub(self._channel)

    def submit(self, job: Job) -> None:
        request = operator_pb2.SubmitJobRequest(job=codec.to_wire(job, job_pb2.Job))
        self.operator.SubmitJob(request, timeout=_DEADLINE_S)

    def stop(self, job: str) -> None:
        """Stops it and waits until nothing of it runs."""
        self.operator.StopJob(operator_pb2.StopJobRequest(job=job), timeout=_DEADLINE_S)
        for status in self.operator.WatchJob(operator_pb2.GetJobRequest(job=job), timeout=_DEADLINE_S):
            if all(_ended(allocation) for allocation in status.allocations):
                return

    def healthy(self, job: str, count: int, deadline_s: float = _DEADLINE_S) -> list[str]:
        """Waits until `count` allocations of the job are healthy, and names them."""
        for status in self.operator.WatchJob(operator_pb2.GetJobRequest(job=job), timeout=deadline_s):
            names = [found.id for found in status.allocations if found.healthy and not _ended(found)]
            if len(names) >= count:
                return names
        raise RuntimeError(f"the fleet stopped telling of {job} before {count} were healthy")

    def logs(self, alloc: str, *, follow: bool = False) -> Iterator[str]:
        """The lines of the allocation's only task, from its first on."""
        request = fleet_pb2.LogsRequest(alloc=alloc, tail_lines=-1, follow=follow)
        rest = b""
        for frame in self.operator.Logs(request, timeout=_DEADLINE_S * 10):
            rest += frame.stdout + frame.stderr
            *lines, rest = rest.split(b"\n")
            yield from (line.decode() for line in lines)


def _ended(allocation: allocation_pb2.Allocation) -> bool:
    return allocation.status in _ENDED


@contextlib.contextmanager
def dev_fleet(nodes: int, agent_config: Path | None = None) -> Iterator[Fleet]:
    """A fresh fleet; nothing of it is left afterwards. `agent_config`: more keys for its agents."""
    name = f"bench{os.getpid()}"
    command = [str(Path(sys.executable).with_name("outrider")), "dev"]
    more = ["--agent-config", str(agent_config)] if agent_config is not None else []
    subprocess.run([*command, "--name", name, "--nodes", str(nodes), "--detach", *more], check=True, stdout=sys.stderr)
    try:
        yield Fleet(name)
    finally:
        subprocess.run([*command, "down", "--name", name], check=True, stdout=sys.stderr)
