"""More than the controller can take: what it does not take it refuses with a reason, what it took is there, and it
answers others meanwhile."""

import asyncio
import contextlib
from collections import Counter

import grpc.aio
import msgspec
import pytest

from controller.engine import EVENTS_MAX
from outrider import codec
from outrider.cli.failover import NOT_BEGUN
from outrider.ids import JobName
from outrider.model.fleet import JobStatus
from outrider.model.job import Job
from outrider.v1 import job_pb2, operator_pb2, operator_pb2_grpc
from tests.integration.controllers import Controller, controller, web_job
from tests.integration.processes import until

__all__ = ["controller"]
pytestmark = [pytest.mark.deep, pytest.mark.timeout(300)]
CALLS = EVENTS_MAX + 2000  # at once: more than the queue of events holds
NAMES = 4
CALL_S = 120.0
RSS_MB_MAX = 1024
# From the queue of events; from a call that took too long; from gRPC, which begins no more than some thousand calls.
REASONS = ("overloaded; try again", "look before you repeat it", NOT_BEGUN)


def version(name: str, count: int) -> Job:
    """Of a job with a service of its own; each `count` is another version."""
    group = msgspec.structs.replace(web_job().groups[0], services=(), count=count)
    return msgspec.structs.replace(web_job(), name=JobName(name), groups=(group,))


async def submit(stub: "operator_pb2_grpc.OperatorServiceAsyncStub", job: Job) -> int | str:
    """The version that was acknowledged, or the code and the words of the refusal."""
    request = operator_pb2.SubmitJobRequest(job=codec.to_wire(job, job_pb2.Job))
    try:
        return int((await stub.SubmitJob(request, timeout=CALL_S)).version)
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"


async def answers_others(stub: "operator_pb2_grpc.OperatorServiceAsyncStub") -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await stub.ListNodes(operator_pb2.ListNodesRequest(), timeout=CALL_S)
        return True
    return False


async def test_a_flood_of_jobs_is_taken_or_refused_with_a_reason(controller: Controller) -> None:
    async with controller.operator() as stub:
        calls = [submit(stub, version(f"j{number % NAMES}", 1 + number % 7)) for number in range(CALLS)]
        flood = asyncio.gather(*calls)
        await until(lambda: answers_others(stub), "somebody else's question is answered meanwhile", CALL_S)
        answers = list(zip((f"j{number % NAMES}" for number in range(CALLS)), await flood, strict=True))
        for reason in Counter(answer for _, answer in answers if isinstance(answer, str)):
            assert reason.startswith("UNAVAILABLE: ")
            assert any(words in reason for words in REASONS), reason
        assert controller.rss_mb() < RSS_MB_MAX
        taken = {name: [one for of, one in answers if of == name and isinstance(one, int)] for name, _ in answers}
        for name, versions in taken.items():
            assert versions, "some were taken"
            message = await stub.GetJob(operator_pb2.GetJobRequest(job=name), timeout=CALL_S)
            newest = codec.from_wire(message, JobStatus).job.version
            assert newest >= max(versions), "what was acknowledged is there"
            after = await submit(stub, version(name, 9))
            assert isinstance(after, int), after
            assert after > newest, "and the next is taken as ever"
