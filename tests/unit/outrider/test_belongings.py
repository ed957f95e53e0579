"""What a job file says of a task's belongings: what is read, and how each mistake is told."""

from pathlib import Path

import pytest

from outrider.ids import SecretName, VolumeName
from outrider.jobspec.reader import JobFileError, parse_job
from outrider.model.belongings import OnChange, SecretUse, StickyDisk, VolumeUse
from outrider.model.job import MIB, Task

A = f"{{source: 'https://x/t', sha256: {'0' * 64}}}"


def task(text: str, directory: Path = Path()) -> Task:
    content = f"job: a\ngroups: {{g: {{tasks: {{t: {{command: [x], {text}}}}}}}}}\n"
    return parse_job(content.encode(), directory / "job.yaml").groups[0].tasks[0]


def fault(text: str) -> str:
    with pytest.raises(JobFileError) as raised:
        task(text)
    return str(raised.value)


def test_a_secret_is_a_file_of_its_name_unless_it_says_otherwise() -> None:
    assert task(
        "secrets: {db: {}, key: API_KEY, both: {env: B, file: b/c, on_change: restart, version: 3}}"
    ).secrets == (
        SecretUse(name=SecretName("db"), file="db"),
        SecretUse(name=SecretName("key"), env="API_KEY"),
        SecretUse(name=SecretName("both"), env="B", file="b/c", on_change=OnChange.RESTART, version=3),
    )


def test_a_volume_is_named_alone_or_with_what_it_is_for() -> None:
    assert task("volumes: {/data: pg, /models: {volume: models, read_only: true}}").volumes == (
        VolumeUse(volume=VolumeName("pg"), target="/data"),
        VolumeUse(volume=VolumeName("models"), target="/models", read_only=True),
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("resources: {nice: -1}", "-1 is not within 0 and 19: a task can only yield"),
        ("resources: {io_weight: 1001}", "1001 is not within 1 and 1000"),
        ("resources: {shm: 1Gi}", "it has some, and no more than the task's memory"),
        ("resources: {ulimits: {files: 3}}", "no such limit; known are core, cpu"),
        ("capabilities: [SYS_ADMIN]", "'SYS_ADMIN' is none that a task can have: CHOWN"),
        ("templates: {a: {}}", "give either source, a file beside the job file, or content"),
        ("templates: {a: {source: absent.tmpl}}", "absent.tmpl: cannot be read"),
        ("templates: {../a: {content: x}}", "expected a path below /templates"),
        ("templates: {a: {content: x, on_change: roll}}", "choose restart, signal or none"),
        ("templates: {a: {content: x, splay: 2h}}", "is not within 0 and 3600 s"),
        ("artifacts: {t: {source: 'ftp://x'}}", "'ftp://x' is no source; expected one of https://"),
        ("artifacts: {t: {source: 'https://x/t'}}", "sha256: missing; for example `sha256: as sha256sum prints it`"),
        (f"artifacts: {{../t: {{source: 'https://x/t', sha256: {'0' * 64}}}}}", "expected a path below /artifacts"),
        (f"artifacts: {{t: {{source: 'https://x/t', sha256: {'0' * 63}}}}}", "expected 64 hexadecimal digits"),
        (f"artifacts: {{t: {A}, t/u: {A}}}", "artifacts.t/u: lies within another artifact"),
        ("volumes: {data: pg}", "volumes.data: expected a whole path inside, from / on"),
        ("volumes: {/a/../b: pg}", "without .."),
        ("volumes: {/proc/x: pg}", "/proc/x is not to be covered; mount it elsewhere"),
        ("volumes: {/: pg}", "/ is not to be covered"),
        ("volumes: {/a: pg, /b: pg}", "volume pg is given twice"),
        ("volumes: {/a: {read_only: true}}", "volume: missing; for example `volume: pgdata`"),
        ("volumes: {/a: Pg}", "'Pg' is no volume's name"),
        ("secrets: {db: {file: ../x}}", "secrets.db.file: expected a path below /secrets, without .."),
        ("secrets: {db: {file: /x}}", "secrets.db.file: expected a path below /secrets"),
        ("secrets: {db: {env: 1A}}", "secrets.db.env: a variable's name is letters"),
        ("secrets: {db: {env: A, on_change: signal}}", "signal cannot change the environment of what runs"),
        ("secrets: {db: {signal: SIGNONE, on_change: signal}}", "'SIGNONE' is no signal"),
        ("secrets: {db: {on_chnage: roll}}", "unknown key; did you mean 'on_change'?"),
        ("secrets: {db: A, b: A}", "A is given twice"),
        ("env: {A: x}, secrets: {db: A}", "A is given twice"),
        ("secrets: {Db: {}}", "'Db' is no secret's name"),
        ("secrets: {db: {version: 0}}", "0 is no version; the first is 1"),
        ("secrets: {db: }", "has no value; write {} for a file /secrets/db"),
    ],
)
def test_a_mistake_is_told_with_what_to_do(text: str, told: str) -> None:
    assert told in fault(text)


def test_a_secret_may_stand_in_the_environment_and_nowhere_else() -> None:
    env = "env: {URL: 'x:${secret.db}@y', PLAIN: '$${secret.no}'}"
    assert task(f"secrets: {{db: {{}}}}, {env}").env["URL"] == "x:${secret.db}@y"
    assert "env.URL: it speaks of secret 'db', which is not among the task's secrets" in fault(env)
    assert "env URL has it, and signal cannot change that" in fault(f"secrets: {{db: {{on_change: signal}}}}, {env}")
    said = fault("secrets: {db: {}}, args: [plain, 'a${secret.db}']")
    assert "args[1]: whoever lists processes sees a secret that stands here; put it into env" in said


def test_a_sticky_disk_is_a_path_and_a_size() -> None:
    assert task("sticky: {/cache: 64Mi}").sticky == (StickyDisk(target="/cache", size_bytes=64 * MIB),)
    assert "a size, for example 64Mi" in fault("sticky: {/cache: much}")
    assert "sticky./cache: 1024 bytes; a disk has at least 65536" in fault("sticky: {/cache: 1Ki}")
    assert "expected a whole path inside" in fault("sticky: {cache: 64Mi}")
    assert "/task is not to be covered" in fault("sticky: {/task: 64Mi}")
    assert "a volume is there already" in fault("sticky: {/data: 64Mi}, volumes: {/data: pg}")
    assert "give it a volume" in fault("driver: vm, sticky: {/data: 64Mi}")


def test_a_vm_has_files_of_secrets_and_templates_and_what_it_cannot_have_is_said_with_the_reason() -> None:
    assert "a vm could not move with them" in fault(f"driver: vm, artifacts: {{t: {A}}}")
    assert "secrets.db.env: a vm brings its own environment: give it a file" in fault("driver: vm, secrets: {db: A}")
    signalled = "{db: {on_change: signal}}"
    assert "secrets.db.on_change: no signal reaches what runs in a vm" in fault(f"driver: vm, secrets: {signalled}")
    template = "templates: {a: {content: x, on_change: signal}}"
    assert "templates.a.on_change: no signal reaches what runs in a vm" in fault(f"driver: vm, {template}")
    warm = f"driver: vm, image: {{disk: /d, sha256: {'0' * 64}, start_from: warm}}"
    assert "does not look for it: leave start_from out, or this" in fault(f"{warm}, secrets: {{db: {{}}}}")


def test_a_process_with_a_kernel_of_its_own_has_all_belongings_of_a_process() -> None:
    own = "isolation: vm, image: 'dir:/srv/root', resources: {memory: 128Mi}"
    uses = "secrets: {db: A, key: {on_change: signal}}, templates: {a: {content: x}}"
    given = task(f"{own}, {uses}, artifacts: {{t: {A}}}")
    assert (len(given.secrets), len(given.templates), len(given.artifacts)) == (2, 1, 1)
