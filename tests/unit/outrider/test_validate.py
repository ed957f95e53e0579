"""A job is checked again wherever it comes in: each mistake is named by where it stands."""

import msgspec
import pytest

from outrider.ids import GroupName, JobName, PortName, ServiceName, TaskName
from outrider.model.external import External, ExternalPort
from outrider.model.gateway import GatewayListener
from outrider.model.job import (
    MIB,
    Check,
    CheckKind,
    DisconnectPolicy,
    Driver,
    File,
    Group,
    Image,
    ImageKind,
    Isolation,
    Job,
    JobType,
    Network,
    Port,
    PullPolicy,
    ReschedulePolicy,
    Resources,
    RestartPolicy,
    Service,
    Survivor,
    Task,
    UpdatePolicy,
    Upstream,
)
from outrider.model.sidecar import SidecarKind
from outrider.validate import FILES_BYTES_MAX, problems

TASK = Task(name=TaskName("server"), command=("sleep", "1"))
OWN = msgspec.structs.replace(TASK, isolation=Isolation.VM, image=Image(kind=ImageKind.DIR, reference="/srv/root"))
OWN_TOO = msgspec.structs.replace(OWN, name=TaskName("other"))
PULLED = msgspec.structs.replace(TASK, image=Image(kind=ImageKind.OCI, reference="registry.test/app:1"))
HTTP = Port(name=PortName("http"))
OF_IMAGE = Port(name=PortName("http"), from_image=True)
GROUP = Group(
    name=GroupName("web"),
    tasks=(TASK,),
    network=Network(ports=(HTTP,)),
    services=(
        Service(
            name=ServiceName("web"),
            port=PortName("http"),
            check=Check(kind=CheckKind.HTTP, path="/healthz"),
            upstreams=(Upstream(service=ServiceName("api"), port=9001),),
            allow=(ServiceName("*"),),
        ),
    ),
)
JOB = Job(name=JobName("shop"), groups=(GROUP,))
PAY = External(name=ServiceName("pay"), hosts=("pay.test",), ports=(ExternalPort(port=443, to=443),))
OUTSIDE = Network(ports=(HTTP,), external=(PAY,))
GATE = Service(name=ServiceName("web"), gateway=(GatewayListener(port=PortName("http"), to=ServiceName("api")),))


def _with(value: msgspec.Struct, **changes: object) -> Job:
    """JOB with `value`, which stands in it, changed."""
    changed = msgspec.structs.replace(value, **changes)
    match changed:
        case Job():
            return changed
        case Group():
            return msgspec.structs.replace(JOB, groups=(changed,))
        case Task():
            return _with(GROUP, tasks=(changed,))
        case Service():
            return _with(GROUP, services=(changed,))
    raise AssertionError(value)


def test_a_good_job_has_no_problem() -> None:
    assert problems(JOB) == ()


@pytest.mark.parametrize(
    ("job", "where"),
    [
        (_with(JOB, name="Shop"), "job"),
        (_with(JOB, priority=0), "priority"),
        (_with(JOB, namespace="Team A"), "namespace"),
        (_with(JOB, groups=()), "groups"),
        (_with(JOB, groups=(GROUP, GROUP)), "groups.web"),
        (_with(_with(GROUP, count=2), type=JobType.SYSTEM), "groups.web.count"),
        (_with(GROUP, count=-1), "groups.web.count"),
        (_with(TASK, isolation=Isolation.VM), "groups.web.tasks.server.image"),
        (_with(TASK, isolation=Isolation.VM, driver=Driver.VM), "groups.web.tasks.server.isolation"),
        (_with(OWN, resources=Resources(memory_bytes=64 * MIB)), "groups.web.tasks.server.resources.memory"),
        (_with(GROUP, tasks=(OWN, OWN_TOO)), "groups.web.tasks"),
        (_with(GROUP, tasks=()), "groups.web.tasks"),
        (_with(GROUP, update=UpdatePolicy(max_parallel=0)), "groups.web.update.max_parallel"),
        (_with(GROUP, update=UpdatePolicy(min_healthy_s=9e9)), "groups.web.update.min_healthy"),
        (_with(GROUP, restart=RestartPolicy(delay_s=float("nan"))), "groups.web.restart.delay"),
        (_with(GROUP, reschedule=ReschedulePolicy(attempts=-1)), "groups.web.reschedule.attempts"),
        (_with(GROUP, reschedule=ReschedulePolicy(delay_s=9, delay_max_s=1)), "groups.web.reschedule.delay_max"),
        (_with(GROUP, update=UpdatePolicy(auto_promote=True)), "groups.web.update.auto_promote"),
        (_with(GROUP, update=UpdatePolicy(blue_green=True, canary=1)), "groups.web.update.canary"),
        (_with(GROUP, update=UpdatePolicy(progress_deadline_s=60)), "groups.web.update.progress_deadline"),
        (_with(_with(GROUP, update=UpdatePolicy(canary=1)), type=JobType.BATCH), "groups.web.update.canary"),
        (
            _with(_with(GROUP, update=UpdatePolicy(blue_green=True)), type=JobType.SYSTEM),
            "groups.web.update.blue_green",
        ),
        (
            _with(_with(GROUP, disconnect=DisconnectPolicy(replace_after_s=1)), type=JobType.BATCH),
            "groups.web.disconnect.replace_after",
        ),
        (
            _with(GROUP, disconnect=DisconnectPolicy(lost_after_s=5, replace_after_s=5)),
            "groups.web.disconnect.replace_after",
        ),
        (_with(GROUP, disconnect=DisconnectPolicy(lost_after_s=-1)), "groups.web.disconnect.lost_after"),
        (_with(GROUP, disconnect=DisconnectPolicy(stop_after_s=1)), "groups.web.disconnect.stop_after"),
        (
            _with(GROUP, disconnect=DisconnectPolicy(stop_after_s=10, replace_after_s=5)),
            "groups.web.disconnect.replace_after",
        ),
        (
            _with(GROUP, disconnect=DisconnectPolicy(stop_after_s=10, lost_after_s=20)),
            "groups.web.disconnect.lost_after",
        ),
        (
            _with(GROUP, update=UpdatePolicy(canary=1), disconnect=DisconnectPolicy(stop_after_s=10)),
            "groups.web.update.canary",
        ),
        (_with(GROUP, disconnect=DisconnectPolicy(survivor=Survivor.HEALTHY)), "groups.web.disconnect.survivor"),
        (_with(GROUP, network=Network(ports=(HTTP, HTTP))), "groups.web.network.ports.http"),
        (_with(GROUP, network=Network(ports=(HTTP,), egress=("::/0",))), "groups.web.network.egress[0]"),
        (
            _with(GROUP, network=Network(ports=(Port(name=PortName("http"), to=15001),))),
            "groups.web.network.ports.http",
        ),
        (_with(GROUP, network=Network(ports=(Port(name=PortName("http"), static=70000),))), "groups.web.network.ports"),
        (_with(GROUP, network=Network(ports=(OF_IMAGE,))), "groups.web.network.ports.http.to"),
        (
            _with(
                GROUP, network=Network(ports=(OF_IMAGE, msgspec.structs.replace(OF_IMAGE, name="b"))), tasks=(PULLED,)
            ),
            "groups.web.network.ports.b.to",
        ),
        (
            _with(GROUP, network=Network(ports=(msgspec.structs.replace(OF_IMAGE, to=80),)), tasks=(PULLED,)),
            "groups.web.network.ports.http.to",
        ),
        (_with(TASK, name="sidecar"), "groups.web.tasks.sidecar"),
        (_with(TASK, command=()), "groups.web.tasks.server.command"),
        (_with(TASK, command=("a\0b",)), "groups.web.tasks.server.command[0]"),
        (_with(TASK, driver=Driver.VM), "groups.web.tasks.server.image"),
        (_with(TASK, image=Image(kind=ImageKind.OCI)), "groups.web.tasks.server.image"),
        *(
            (_with(TASK, image=Image(kind=ImageKind.OCI, reference=reference)), "groups.web.tasks.server.image")
            for reference in (
                "nginx:1",
                "library/nginx",
                "r.test/A",
                "r.test/a b",
                "r.test/a@sha256:1",
                "-o/x",
                "r.test",
            )
        ),
        (_with(TASK, image=Image(pull=PullPolicy.ALWAYS)), "groups.web.tasks.server.image.pull"),
        (_with(TASK, args=("x",)), "groups.web.tasks.server.args"),
        (_with(TASK, user=0), "groups.web.tasks.server.user"),
        (_with(TASK, user=70000), "groups.web.tasks.server.user"),
        (_with(TASK, workdir="app"), "groups.web.tasks.server.workdir"),
        (_with(TASK, files=(File(path="../x", content=b""),)), "groups.web.tasks.server.files.../x"),
        (_with(TASK, files=(File(path="/x", content=b""),)), "groups.web.tasks.server.files./x"),
        (_with(TASK, files=(File(path="x", content=b"", mode=0o4755),)), "groups.web.tasks.server.files.x"),
        (_with(TASK, files=(File(path="x", content=bytes(FILES_BYTES_MAX + 1)),)), "groups.web.tasks.server.files"),
        (_with(TASK, env={"A=B": ""}), "groups.web.tasks.server.env.A=B"),
        (_with(TASK, resources=Resources(cpu_millis=0)), "groups.web.tasks.server.resources.cpu"),
        (_with(TASK, resources=Resources(cpu_max_millis=50)), "groups.web.tasks.server.resources.cpu_max"),
        *(
            (_with(TASK, resources=Resources(hugepages=wrong)), "groups.web.tasks.server.resources.hugepages")
            for wrong in ({"2M": 2 * MIB}, {"3Mi": 3 * MIB}, {"2048Ki": 2 * MIB}, {"2Mi": MIB}, {"2Mi": 0}, {"": MIB})
        ),
        (
            _with(OWN, resources=Resources(memory_bytes=256 * MIB, hugepages={"2Mi": 2 * MIB})),
            "groups.web.tasks.server.resources.hugepages",
        ),
        (_with(TASK, kill_signal="SIGNOPE"), "groups.web.tasks.server.kill_signal"),
        (_with(GROUP.services[0], port="grpc"), "groups.web.services[0].port"),
        (_with(GROUP.services[0], port=None), "groups.web.services[0].allow"),
        (_with(GROUP.services[0], allow=("A B",)), "groups.web.services[0].allow[0]"),
        (_with(GROUP.services[0], check=Check(kind=CheckKind.HTTP, path="x")), "groups.web.services[0].check"),
        (_with(GROUP.services[0], check=Check(kind=CheckKind.COMMAND)), "groups.web.services[0].check"),
        (
            _with(GROUP.services[0], upstreams=(Upstream(service=ServiceName("api"), port=8080),)),
            "groups.web.services[0].upstreams[0].port",
        ),
        (_with(GROUP, services=(GROUP.services[0],) * 2), "groups.web.services.web"),
        (_with(GROUP, services=(), sidecar=SidecarKind.SHARED), "groups.web.sidecar"),
        (_with(GROUP, tasks=(OWN,), sidecar=SidecarKind.SHARED), "groups.web.sidecar"),
        (_with(GROUP, sidecar=SidecarKind.SHARED), "groups.web.services[0].upstreams[0].port"),
        (_with(GROUP, network=OUTSIDE, sidecar=SidecarKind.SHARED), "groups.web.network.external"),
        (_with(GROUP, services=(GATE,), sidecar=SidecarKind.SHARED), "groups.web.services[0].gateway"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_named_where_it_stands(job: Job, where: str) -> None:
    assert any(problem.where.startswith(where) for problem in problems(job)), problems(job)
