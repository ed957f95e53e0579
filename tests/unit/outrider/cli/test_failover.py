"""Several controllers behind one address list: a call finds the one that leads, and is never made twice by mistake."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from outrider.cli.address import Address, find
from outrider.cli.client import Fleet
from outrider.cli.failover import FailoverChannel
from outrider.errors import InputError, PeerError, RefusedError
from outrider.v1 import operator_pb2
from tests.integration.processes import free_port


class Controller:
    """A server of which each test says how it answers."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers: Callable[[grpc.ServicerContext], None] = lambda _context: None
        self.port = free_port()
        self.server: grpc.Server | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.server = grpc.server(ThreadPoolExecutor(4))
        self.server.add_generic_rpc_handlers((_Handlers(self),))
        assert self.server.add_insecure_port(self.target)
        self.server.start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop(None).wait()


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = details.method.rpartition("/")[2]

        def one(_request: bytes, context: grpc.ServicerContext) -> bytes:
            self._controller.calls.append(name)
            self._controller.answers(context)
            return b""

        def many(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            yield operator_pb2.JobStatus(next_launch_s=self._controller.port).SerializeToString()
            one(request, context)

        if name == "WatchJob":
            return grpc.unary_stream_rpc_method_handler(many)
        return grpc.unary_unary_rpc_method_handler(one)


def nobody_leads(context: grpc.ServicerContext) -> None:
    context.set_trailing_metadata((("outrider-code", "no-leader"),))
    context.abort(grpc.StatusCode.UNAVAILABLE, "no controller leads at the moment")


def breaks_off(context: grpc.ServicerContext) -> None:
    """As a controller that dies while it works at it."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "recvmsg: Connection reset by peer")


def refuses(context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.NOT_FOUND, "no job named x")


@pytest.fixture
def controllers() -> Iterator[tuple[Controller, Controller]]:
    pair = (Controller(), Controller())
    yield pair
    for controller in pair:
        controller.stop()


@contextlib.contextmanager
def fleet(*controllers: Controller, patience_s: float = 20.0) -> Iterator[Fleet]:
    targets = tuple(controller.target for controller in controllers)
    with FailoverChannel(targets, grpc.insecure_channel, patience_s=patience_s) as channel:
        yield Fleet(Address(target=",".join(targets)), channel)


def submit(one: Fleet) -> None:
    one.call(one.stub.SubmitJob, operator_pb2.SubmitJobRequest())


def list_jobs(one: Fleet) -> None:
    one.call(one.stub.ListJobs, operator_pb2.ListJobsRequest())


def test_one_that_is_away_is_passed_over_and_not_asked_again(controllers: tuple[Controller, Controller]) -> None:
    away, leader = controllers
    leader.start()
    with fleet(away, leader) as one:
        submit(one)
        away.start()
        submit(one)
    assert (away.calls, leader.calls) == ([], ["SubmitJob"] * 2)


def test_where_nobody_leads_it_asks_until_somebody_does(controllers: tuple[Controller, Controller]) -> None:
    first, second = controllers
    first.answers = nobody_leads

    def elected(context: grpc.ServicerContext) -> None:
        if len(second.calls) < 3:
            nobody_leads(context)

    second.answers = elected
    first.start()
    second.start()
    with fleet(first, second) as one:
        submit(one)
    assert (len(first.calls), len(second.calls)) == (3, 3)


def test_a_write_that_broke_off_is_not_made_again_and_a_read_is(controllers: tuple[Controller, Controller]) -> None:
    first, second = controllers
    first.answers = breaks_off
    first.start()
    second.start()
    with fleet(first, second) as one:
        with pytest.raises(PeerError, match="broke off"):
            submit(one)
        assert (first.calls, second.calls) == (["SubmitJob"], [])
        list_jobs(one)
    assert (first.calls, second.calls) == (["SubmitJob", "ListJobs"], ["ListJobs"])


def test_a_refusal_is_the_answer(controllers: tuple[Controller, Controller]) -> None:
    first, second = controllers
    first.answers = refuses
    first.start()
    second.start()
    with fleet(first, second) as one, pytest.raises(RefusedError, match="no job named x"):
        list_jobs(one)
    assert second.calls == []


def test_what_is_watched_whole_is_watched_on(controllers: tuple[Controller, Controller]) -> None:
    first, second = controllers
    first.answers = breaks_off
    second.answers = refuses
    first.start()
    second.start()
    with fleet(first, second) as one:
        watched = one.stream(one.stub.WatchJob, operator_pb2.GetJobRequest())
        assert [next(watched).next_launch_s, next(watched).next_launch_s] == [first.port, second.port]
        with pytest.raises(RefusedError, match="no job named x"):
            next(watched)


def test_patience_ends_with_what_the_last_one_said(controllers: tuple[Controller, Controller]) -> None:
    first, second = controllers
    second.answers = nobody_leads
    second.start()
    with fleet(second, patience_s=0.3) as one, pytest.raises(PeerError, match="no controller leads"):
        submit(one)
    with fleet(first, patience_s=0.3) as one, pytest.raises(PeerError, match="no answer within 2 s"):
        submit(one)


@pytest.mark.parametrize("named", ["a:1,,b:2", "a:1,unix:/x", ",a:1", "a:1, ", "a:1,a:1", "a,b:2"])
def test_a_list_with_a_mistake_is_refused(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_ADDRESS", named)
    monkeypatch.setenv("OUTRIDER_TOKEN", "x")
    with pytest.raises(InputError, match="HOST:PORT"):
        find()


def test_a_list_is_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_ADDRESS", "c1:7071, c2:7071,[::1]:7071")
    monkeypatch.setenv("OUTRIDER_TOKEN", "x")
    assert find().targets == ("c1:7071", "c2:7071", "[::1]:7071")
