"""Job files: what is read, and how each mistake is told."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import InputError
from outrider.jobspec.reader import JobFileError, parse_job, read_job
from outrider.model.job import (
    Check,
    CheckKind,
    DisconnectPolicy,
    Driver,
    GuestFile,
    Image,
    ImageKind,
    JobType,
    Protocol,
    PullPolicy,
    ReschedulePolicy,
    Resources,
    RestartPolicy,
    Survivor,
    UpdatePolicy,
)

ROOT = Path(__file__).parents[4]
FILE = Path("job.yaml")
SMALLEST = "job: a\ngroups: {g: {tasks: {t: {command: [x]}}}}\n"

WHOLE = (
    """
job: shop
namespace: team-a
type: batch
priority: 70
groups:
  web:
    count: 3
    update: {max_parallel: 2, min_healthy: 5s, healthy_deadline: 2m, progress_deadline: 10m, auto_revert: true}
    restart: {attempts: 5, interval: 1h, delay: 250ms, delay_max: 1m}
    reschedule: {attempts: 2, interval: 30m, delay: 1m, delay_max: 5m}
    disconnect: {lost_after: 10m}
    network: {ports: {http: {}, admin: {static: 9000}, grpc: {to: 50051}, plain: }, egress: [10.0.0.0/8]}
    services:
      - name: web
        port: http
        protocol: http
        check: {http: /healthz, interval: 2s, timeout: 500ms}
        upstreams: [api, {service: db, port: 9001}]
        allow: [ingress, "*"]
      - {name: health, port: grpc, protocol: grpc, check: {grpc: web.v1}}
      - {name: probe, port: admin, check: {tcp: true}}
      - {name: batch, check: {command: [test, -f, /tmp/ready]}}
    tasks:
      server:
        driver: process
        image: oci:registry.example/web:1.2
        command: [python3, -u, "${task.dir}/app.py"]
        env: {DEBUG: no, PORT: 080, EMPTY: ""}
        resources: {cpu: 200m, cpu_max: 1.5, memory: 64Mi, disk: 1G, pids: 32}
        kill_signal: SIGINT
        kill_timeout: 10s
  plain:
    tasks:
      pinned:
        image: {oci: "localhost:5000/team/app@sha256:@a@", pull: always}
        args: [--verbose]
        user: 33
        workdir: /srv
      archive: {image: "docker-archive:/srv/app.tar"}
  machine:
    tasks:
      disk:
        driver: vm
        image: {disk: /srv/db.qcow2, sha256: "@a@", boot_deadline: 30s}
        resources: {memory: 128Mi}
  direct:
    tasks:
      kernel:
        driver: vm
        image:
          {kernel: /srv/vmlinux, initrd: /srv/initrd, kernel_arguments: quiet, sha256: {kernel: "@b@", initrd: "@c@"}}
        resources: {memory: 256Mi}
""".replace("@a@", "a" * 64)
    .replace("@b@", "b" * 64)
    .replace("@c@", "c" * 64)
)


def faults(text: str) -> list[str]:
    with pytest.raises(JobFileError) as caught:
        parse_job(text.encode(), FILE)
    return str(caught.value).splitlines()


def in_task(text: str) -> str:
    return f"job: a\ngroups:\n  g:\n    tasks:\n      t:\n        command: [x]\n        {text}\n"


def in_group(text: str) -> str:
    return f"job: a\ngroups:\n  g:\n    tasks: {{t: {{command: [x]}}}}\n    {text}\n"


def test_canaries_and_stand_ins_are_read() -> None:
    update = "{canary: 2, auto_promote: true}"
    (group,) = parse_job(
        in_group(f"update: {update}\n    disconnect: {{lost_after: 1h, replace_after: 5s}}").encode(), FILE
    ).groups
    assert group.update == UpdatePolicy(canary=2, auto_promote=True)
    assert group.disconnect == DisconnectPolicy(lost_after_s=3600, replace_after_s=5)
    text = "update: {blue_green: true}\n    disconnect: {replace_after: 5s, survivor: healthy}"
    (group,) = parse_job(in_group(text).encode(), FILE).groups
    assert group.update == UpdatePolicy(blue_green=True)
    assert group.disconnect == DisconnectPolicy(replace_after_s=5, survivor=Survivor.HEALTHY)


def test_everything_that_a_job_can_say_is_read() -> None:
    job = parse_job(WHOLE.encode(), FILE)
    group, plain, machine, direct = job.groups
    assert (job.name, job.type, job.priority, group.count) == ("shop", JobType.BATCH, 70, 3)
    assert job.namespace == "team-a"
    assert group.update == UpdatePolicy(
        max_parallel=2, min_healthy_s=5, healthy_deadline_s=120, progress_deadline_s=600, auto_revert=True
    )
    assert group.restart == RestartPolicy(attempts=5, interval_s=3600, delay_s=0.25, delay_max_s=60)
    assert group.reschedule == ReschedulePolicy(attempts=2, interval_s=1800, delay_s=60, delay_max_s=300)
    assert group.disconnect == DisconnectPolicy(lost_after_s=600)
    assert [(port.name, port.static, port.to) for port in group.network.ports] == [
        ("http", None, None),
        ("admin", 9000, None),
        ("grpc", None, 50051),
        ("plain", None, None),
    ]
    assert group.network.egress == ("10.0.0.0/8",)
    web, health, probe, batch = group.services
    assert web.protocol is Protocol.HTTP
    assert web.check == Check(kind=CheckKind.HTTP, path="/healthz", interval_s=2, timeout_s=0.5)
    assert [(each.service, each.port) for each in web.upstreams] == [("api", None), ("db", 9001)]
    assert web.allow == ("ingress", "*")
    assert health.check == Check(kind=CheckKind.GRPC, path="web.v1")
    assert probe.check == Check(kind=CheckKind.TCP)
    assert batch.check == Check(kind=CheckKind.COMMAND, command=("test", "-f", "/tmp/ready"))  # noqa: S108
    (server,) = group.tasks
    assert (server.image.kind, server.image.reference) == (ImageKind.OCI, "registry.example/web:1.2")
    assert server.env == {"DEBUG": "no", "PORT": "080", "EMPTY": ""}, "as written: no truth values, no octal numbers"
    assert server.resources == Resources(
        cpu_millis=200, cpu_max_millis=1500, memory_bytes=64 << 20, disk_bytes=10**9, pids_max=32
    )
    assert (server.kill_signal, server.kill_timeout_s) == ("SIGINT", 10.0)
    pinned, archive = plain.tasks
    reference = f"localhost:5000/team/app@sha256:{'a' * 64}"
    assert pinned.image == Image(kind=ImageKind.OCI, reference=reference, pull=PullPolicy.ALWAYS)
    assert (pinned.command, pinned.args, pinned.user, pinned.workdir) == ((), ("--verbose",), 33, "/srv")
    assert archive.image == Image(kind=ImageKind.DOCKER_ARCHIVE, reference="/srv/app.tar")
    assert machine.tasks[0].driver is Driver.VM
    assert machine.tasks[0].image == Image(
        kind=ImageKind.DISK, reference="/srv/db.qcow2", sha256="a" * 64, boot_deadline_s=30.0
    )
    assert direct.tasks[0].image == Image(
        kind=ImageKind.DISK,
        kernel=GuestFile(reference="/srv/vmlinux", sha256="b" * 64),
        initrd=GuestFile(reference="/srv/initrd", sha256="c" * 64),
        kernel_arguments="quiet",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image: {disk: srv/d, sha256: x}", "expected a whole path on the node"),
        ("image: {disk: /srv/d}", "a disk needs its checksum"),
        ("image: {kernel: /k, sha256: {disk: x}}", "a kernel needs its checksum"),
        ("image: {sha256: x}", "disk: missing; for example"),
        ("image: {disk: /d, kernel_arguments: quiet, sha256: x}", "the disk's boot loader has them"),
        ("image: {disk: /d, sha256: {dick: x}}", "unknown key; did you mean 'disk'?"),
        ("env: {A: b}", "a vm brings its own; leave it out"),
        ("cloud_init: {user: Root!}", "'Root!' is no name of a user"),
        ("cloud_init: {ssh_keys: [hello]}", "expected a public key as ~/.ssh/id_ed25519.pub has it"),
        ("cloud_init: {files: {etc/motd: ./a}}", "expected a whole path inside"),
        ("cloud_init: {packages: [x]}", "packages"),
    ],
)
def test_a_guest_that_cannot_be_is_told_of(text: str, message: str, tmp_path: Path) -> None:
    given = f"job: a\ngroups: {{g: {{tasks: {{t: {{driver: vm, {text}}}}}}}}}\n"
    (tmp_path / "a").write_text("")
    with pytest.raises(JobFileError) as caught:
        parse_job(given.encode(), tmp_path / "job.yaml")
    assert message in str(caught.value)


def test_what_a_job_leaves_out_has_defaults() -> None:
    job = parse_job(SMALLEST.encode(), FILE)
    (group,) = job.groups
    assert (job.type, group.count, group.network.ports, group.tasks[0].image.kind) == (
        JobType.SERVICE,
        1,
        (),
        ImageKind.HOST,
    )


@pytest.mark.parametrize("name", ["shop", "shopper", "intruder"])
def test_the_examples_are_good(name: str) -> None:
    assert read_job(ROOT / f"examples/shop/{name}.yaml").name == name


@pytest.mark.parametrize(("egress", "networks"), [("allow", ("0.0.0.0/0",)), ("deny", ()), ("[]", ())])
def test_egress_has_words_for_all_and_none(egress: str, networks: tuple[str, ...]) -> None:
    job = parse_job(in_group(f"network: {{egress: {egress}}}").encode(), FILE)
    assert job.groups[0].network.egress == networks


def test_every_mistake_is_told_at_once_in_the_order_of_the_file() -> None:
    text = "jop: a\njob: A\ngroups:\n  g: {count: many, tasks: {t: {command: [x], resources: {cpu: 5x}}}}\n"
    assert [line.split(": ")[0] for line in faults(text)] == [
        "job.yaml:1:1",
        "job.yaml:2:1",
        "job.yaml:4:14",
        "job.yaml:4:63",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("job: a\ngruops: {}\n", "2:1: gruops: unknown key; did you mean 'groups'?"),
        ("groups: {}\n", "1:1: job: missing; for example `job: shop`"),
        (in_group("schedule: daily"), "5:5: groups.g.schedule: unknown key; did you mean 'reschedule'?"),
        (in_group("count: 3.5"), "5:12: groups.g.count: '3.5' is no whole number"),
        (in_group("count: '3'"), "5:12: groups.g.count: '3' is no whole number"),
        (in_group("count:"), "5:5: groups.g.count: has no value; give one, or leave the key out"),
        (in_group("count: 1\n    count: 2"), "6:5: groups.g.count: stands here twice; first in line 5"),
        (in_group("network: {ports: {a: {}, a: {}}}"), "5:30: groups.g.network.ports.a: stands here twice"),
        (in_group("network: {ports: {a: {static: 80}, b: {static: 80}}}"), "static port '80' stands here 2 times"),
        (in_group("network: {ports: {a: {to: img}}}"), "ports.a.to: 'img' is neither a port's number nor `image`"),
        (in_group("network: {ports: {a: {to: image}}}"), "no task of the group has an image of the kind that exposes"),
        (in_group("network: {egress: some}"), "'some' is neither deny, allow nor a list of networks"),
        (in_group("update: {min_healthy: 5}"), "the unit is missing (ms, s, m, h or d); did you mean 5s?"),
        (in_group("disconnect: {replace_after: 5s, survivor: newest}"), "none of original, replacement, healthy"),
        (in_group("update: {auto_revert: yes}"), "'yes' is neither true nor false"),
        (in_group("services: {name: web}"), "expected a list, found keys and values"),
        (in_group("services: [{name: web, port: htp}]\n    network: {ports: {http: }}"), "did you mean 'http'?"),
        (in_group("services: [{port: http}]\n    network: {ports: {http: }}"), "services[0].name: missing"),
        (in_group("services: [{name: a, check: {interval: 1s}}]"), "expected exactly one of http, tcp, grpc, command"),
        (in_group("services: [{name: a, check: {http: /, tcp: true}}]"), "found http and tcp"),
        (in_group("services: [{name: a, upstreams: [{port: 1}]}]"), "upstreams[0].service: missing"),
        (in_task("image: alpine"), "7:9: groups.g.tasks.t.image: 'alpine' is no image; expected host, oci:"),
        (in_task("image: {oci: r.test/a, pull: sometimes}"), "'sometimes' is none of if-absent, always, never"),
        (in_task("image: {oci: r.test/a, pul: never}"), "unknown key; did you mean 'pull'?"),
        (in_task("image: docker-archive:app.tar"), "is looked for on the node: give the whole path"),
        (in_task("image: dir:app"), "is looked for on the node: give the whole path"),
        (in_task("privileged: true"), "7:9: groups.g.tasks.t.privileged: unknown key"),
        (in_task("driver: vmm"), "'vmm' is none of process, vm; did you mean 'vm'?"),
        (in_task("resources: {memory: 64MB}"), "7:29: groups.g.tasks.t.resources.memory: '64MB' is not a size"),
        (in_task("resources: {memory: 64mi}"), "did you mean 64Mi?"),
        (in_task("resources: {cpu: 2 cores}"), "'2 cores' is not an amount of CPU, for example 200m"),
        (in_task("env: [A=1]"), "groups.g.tasks.t.env: expected keys and values, found a list"),
        (in_task("files: {a: ./nowhere}"), "nowhere: cannot be read: No such file or directory"),
        (in_task("files: {a: .}"), "no regular file"),
        ("job: a\ngroups: {g: {tasks: {t: {command: ls -l}}}}", "expected a list, found 'ls -l'; write [sh, -c, "),
        ("job: a\ngroups: {g: {}}", "groups.g.tasks: missing"),
        ("- job: a\n", "1:1: expected keys and values, found a list"),
        ("just words", "1:1: expected keys and values, found 'just words'"),
        ("", "1:1: the file is empty"),
        ("# nothing\n", "1:1: the file is empty"),
        ("job: a\n---\njob: b\n", "2:1: a second document begins here"),
        ("job: a\n\tgroups: {}\n", "2:1: a tab; YAML is indented with spaces"),
        ("job: [a\n", "is no YAML"),
        ("job: &x a\ngroups: *x\n", "2:9: alias *x: aliases are not read here"),
        ("job: !!python/object:os.system a\n", "tags are not read here"),
        ("? [a]\n: b\n", "a key is a word"),
        (f"job: {'[' * 40}{']' * 40}\n", "nested more than 32 deep"),
    ],
)  # fmt: skip
def test_a_mistake_says_what_where_and_what_to_do(text: str, told: str) -> None:
    assert any(told in line for line in faults(text)), faults(text)


def test_one_mistake_is_told_once() -> None:
    for text in (
        in_group("services: [{name: web, port: htp, check: {tcp: true}}]\n    network: {ports: {http: }}"),
        in_group("services: [{name: a, upstreams: [{port: 1}]}]"),
        in_task("resources: {memory: lots}"),
        "job: a\ngroups: []\n",
    ):
        assert len(faults(text)) == 1, faults(text)


def test_a_file_with_countless_mistakes_tells_the_first_fifty() -> None:
    lines = faults(SMALLEST + "".join(f"x{number}: 1\n" for number in range(200)))
    assert len(lines) == 51
    assert lines[-1].endswith("and 150 more")


def test_bytes_that_are_no_text_are_placed() -> None:
    with pytest.raises(JobFileError, match=r"job.yaml:2:2: byte 0xff is no UTF-8"):
        parse_job(b"job: a\n#\xff\n", FILE)


def test_a_huge_file_is_refused_before_it_is_read() -> None:
    with pytest.raises(JobFileError, match="at most 262144"):
        parse_job(b"#" * 300_000, FILE)


def test_a_missing_file_is_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_job(tmp_path / "none.yaml")


def test_files_travel_from_beside_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("print()")
    (tmp_path / "run.sh").write_text("exit")
    (tmp_path / "run.sh").chmod(0o755)
    (tmp_path / "job.yaml").write_text(in_task("files: {app.py: ./app.py, bin/run: run.sh}"))
    found = read_job(tmp_path / "job.yaml").groups[0].tasks[0].files
    assert [(file.path, file.content, file.mode) for file in found] == [
        ("app.py", b"print()", 0o644),
        ("bin/run", b"exit", 0o755),
    ]


def test_files_are_bounded_each_and_in_all(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * (256 * 1024 + 1))
    (tmp_path / "large").write_bytes(b"x" * (256 * 1024))
    with pytest.raises(JobFileError, match="at most 262144"):
        parse_job(in_task("files: {a: big}").encode(), tmp_path / "job.yaml")
    five = ", ".join(f"f{number}: large" for number in range(5))
    with pytest.raises(JobFileError, match="at most 1048576 bytes in all"):
        parse_job(in_task(f"files: {{{five}}}").encode(), tmp_path / "job.yaml")


WORDS = st.sampled_from(
    ["job", "groups", "g", "tasks", "command", "x", "count", "1", ":", "- ", "{", "}", "[", "]", ",", "\n", "  ", "&a",
     "*a", "!t", "#", '"', "services", "name", "network", "ports", "check", "http", "~", "\t", "---\n", "é"]
)  # fmt: skip


@given(st.one_of(st.lists(WORDS, max_size=40).map("".join).map(str.encode), st.binary(max_size=200)))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    with contextlib.suppress(JobFileError):
        parse_job(content, FILE)
