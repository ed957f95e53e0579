"""Secrets in a fleet: given to who names them, renewed as they want, and nowhere else to be found."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["fleet"]
pytestmark = pytest.mark.host

# Says each value that it has, reversed: what the test looks for afterwards is nobody's but the secret's own.
TELLER = """
import os, signal, time
def tell(*_):
    told = {"env": os.environ.get("API_KEY", "")[::-1], "url": os.environ.get("URL", "")[::-1], "pid": os.getpid()}
    for name in ("db-password", "tls/key"):
        path = "/secrets/" + name
        if os.path.exists(path):
            told[name] = open(path).read().strip()[::-1]
    with open("/task/told.new", "w") as file:
        import json; json.dump(told, file)
    os.rename("/task/told.new", "/task/told")
signal.signal(signal.SIGHUP, tell)
tell()
while True:
    time.sleep(3600)
"""


def job(name: str, uses: str, count: int = 1, namespace: str = "default") -> str:
    return f"""
job: {name}
namespace: {namespace}
groups:
  main:
    count: {count}
    update: {{min_healthy: 0s}}
    tasks:
      main:
        command: [python3, /task/teller.py]
        files: {{teller.py: ./teller.py}}
        secrets: {uses}
"""


class Teller:
    """A job that tells what it was given."""

    def __init__(self, fleet: DevFleet, directory: Path, name: str) -> None:
        self.fleet, self.directory, self.name = fleet, directory, name
        (directory / "teller.py").write_text(TELLER)

    def run(self, uses: str, *, count: int = 1, namespace: str = "default") -> str:
        """What `job run` says where it fails; "" where it does not."""
        file = self.directory / f"{self.name}.yaml"
        file.write_text(job(self.name, uses, count, namespace))
        done = self.fleet.outrider("job", "run", str(file))
        return done.stderr if done.returncode else ""

    def allocations(self) -> list[dict[str, str]]:
        return [each for each in self.fleet.json("alloc", "ls", "--job", self.name) if each["desired"] == "run"]

    def told(self) -> list[dict[str, str]]:
        read = (
            self.fleet.outrider("exec", "--no-tty", each["id"], "--", "cat", "/task/told").stdout
            for each in self.allocations()
        )
        return [json.loads(text) if text else {} for text in read]


@pytest.fixture
def teller(fleet: DevFleet, tmp_path: Path) -> Iterator[Teller]:
    made = Teller(fleet, tmp_path, f"t{secrets.token_hex(3)}")
    yield made
    fleet.outrider("job", "stop", made.name)


def put(fleet: DevFleet, name: str, value: str, *words: str) -> str:
    done = fleet.outrider("secret", "put", name, "--file", "-", *words, text=value)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_secret_is_a_file_or_a_variable_and_is_nowhere_else(fleet: DevFleet, teller: Teller) -> None:
    password, key = secrets.token_hex(24), secrets.token_hex(24)
    put(fleet, "db-password", password + "\n")
    put(fleet, "api-key", key)

    within = '\n        env: {URL: "app:${secret.db-password}@db"}'
    assert teller.run(f"{{db-password: {{}}, api-key: API_KEY}}{within}") == ""

    eventually(lambda: bool(teller.told()[0]), "telling")
    (told,) = teller.told()
    assert (told["db-password"], told["env"]) == (password[::-1], key[::-1])
    assert told["url"] == f"app:{password}@db"[::-1]
    listed = fleet.outrider("secret", "ls").stdout
    assert "db-password" in listed
    assert password not in listed
    # On no disk: journal, records, logs, bundles; of no node.
    needles = (password.encode(), key.encode())
    files = [path for path in fleet.layout.data.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name.startswith("journal.db") for path in files)
    assert [path for path in files if any(needle in path.read_bytes() for needle in needles)] == []
    assert [path for path in fleet.layout.run.rglob("*") if on_disk(path) and holds(path, needles)] == []


def on_disk(path: Path) -> bool:
    """Not on what the agent keeps in memory, where a start needs it."""
    return path.is_file() and path.stat().st_dev == path.parents[-2].stat().st_dev


def holds(path: Path, needles: tuple[bytes, ...]) -> bool:
    return any(needle in path.read_bytes() for needle in needles)


def test_it_is_gone_when_the_task_has_stopped(fleet: DevFleet, teller: Teller) -> None:
    value = secrets.token_hex(24)
    put(fleet, "short-lived", value)
    assert teller.run("{short-lived: {file: tls/key}}") == ""
    (alloc,) = teller.allocations()
    directory = fleet.layout.run / alloc["node"] / "belongings" / alloc["id"]
    fleet.outrider("job", "stop", teller.name)
    eventually(lambda: not fleet.json("alloc", "ls", "--job", teller.name), "the job's end")
    assert not directory.exists()
    assert fleet.outrider("secret", "delete", "short-lived").returncode == 0


def test_a_changed_secret_rolls_the_group_copy_by_copy(fleet: DevFleet, teller: Teller) -> None:
    put(fleet, "rolled", "one")
    assert teller.run("{rolled: {file: tls/key}}", count=2) == ""
    before = {each["id"] for each in teller.allocations()}

    assert f"job {teller.name} is rolled: version 2" in put(fleet, "rolled", "two")

    eventually(lambda: [each.get("tls/key") for each in teller.told()] == ["owt", "owt"], "the new secret")
    assert not before & {each["id"] for each in teller.allocations()}
    assert "holds that already" in put(fleet, "rolled", "two")


def test_or_it_is_told_by_a_signal_and_nothing_restarts(fleet: DevFleet, teller: Teller) -> None:
    put(fleet, "told", "one")
    assert teller.run("{told: {file: tls/key, on_change: signal}}") == ""
    eventually(lambda: teller.told()[0].get("tls/key") == "eno", "the first")
    (before,) = teller.told()

    put(fleet, "told", "two")

    eventually(lambda: teller.told()[0].get("tls/key") == "owt", "the second")
    assert teller.told()[0]["pid"] == before["pid"]
    assert len(teller.allocations()) == 1


def test_or_each_task_is_restarted_where_it_runs(fleet: DevFleet, teller: Teller) -> None:
    put(fleet, "restarting", "one")
    assert teller.run("{restarting: {env: API_KEY, on_change: restart}}") == ""
    eventually(lambda: teller.told()[0].get("env") == "eno", "the first")
    (before,) = teller.allocations()

    put(fleet, "restarting", "two")

    eventually(lambda: teller.told()[0].get("env") == "owt", "the second")
    assert [each["id"] for each in teller.allocations()] == [before["id"]]


def test_a_job_cannot_name_what_is_not_there_nor_what_is_another_namespaces(fleet: DevFleet, teller: Teller) -> None:
    put(fleet, "theirs", "x", "--namespace", "theirs")
    said = teller.run("{theirs: {}}")
    assert "no secret 'theirs' in namespace default; `outrider secret put theirs` makes it" in said


def test_a_secret_in_use_is_not_deleted(fleet: DevFleet, teller: Teller) -> None:
    put(fleet, "used", "x")
    assert teller.run("{used: {}}") == ""
    done = fleet.outrider("secret", "delete", "used")
    assert done.returncode == 1
    assert f"secret used is named by job {teller.name}" in done.stderr


def test_under_another_key_everything_opens_as_before(fleet: DevFleet, teller: Teller) -> None:
    put(fleet, "kept", "value")
    file = fleet.layout.data / "controller" / "secrets.key"
    before = file.read_text()

    done = fleet.outrider("secret", "rekey")

    assert done.returncode == 0, done.stderr
    assert file.read_text() != before
    assert len(file.read_text().splitlines()) == 1
    assert teller.run("{kept: {file: tls/key}}") == ""
    eventually(lambda: teller.told()[0].get("tls/key") == "eulav", "the secret")


def test_a_variable_is_there_to_be_seen(fleet: DevFleet) -> None:
    assert fleet.outrider("variable", "put", "log-level", "debug").returncode == 0
    (variable,) = fleet.json("variable", "ls")
    assert (variable["name"], variable["value"], variable["version"]) == ("log-level", "debug", 1)
    assert fleet.outrider("secret", "put", "log-level", "--file", "-", text="x").returncode == 1


def test_a_secrets_value_is_never_an_argument(fleet: DevFleet) -> None:
    done = fleet.outrider("secret", "put", "db-password", "hunter2")
    assert done.returncode == 64
    assert "hunter2" not in fleet.outrider("secret", "ls").stdout


PROVIDER = """
job: {name}-api
groups:
  main:
    count: {count}
    update: {{min_healthy: 0s}}
    network: {{ports: {{http: {{}}}}}}
    services: [{{name: {name}-api, port: http}}]
    tasks: {{main: {{command: [sleep, infinity]}}}}
"""
READER = """
job: {name}
groups:
  main:
    update: {{min_healthy: 0s}}
    services: [{{name: {name}, upstreams: [{name}-api]}}]
    tasks:
      main:
        command: [sh, -c, "trap 'echo told >> /task/told' HUP; while :; do sleep 0.1; done"]
        secrets: {{{name}-key: {{on_change: none}}}}
        templates:
          app.conf: {{source: ./app.conf, on_change: signal, splay: 0s}}
"""
TEMPLATE = """key={{ secret("NAME-key") }} on {{ node.id }}
{% if secret("NAME-key") == "bad" %}{{ nothing }}{% endif %}
{% for each in service("NAME-api") %}
{{ each.address }}
{% endfor %}
"""


def test_a_template_says_what_is_true_now_and_tells_the_task(fleet: DevFleet, tmp_path: Path) -> None:
    name = f"t{secrets.token_hex(3)}"

    def run(text: str, count: int = 1) -> None:
        (tmp_path / "job.yaml").write_text(text.format(name=name, count=count))
        done = fleet.outrider("job", "run", str(tmp_path / "job.yaml"))
        assert done.returncode == 0, done.stderr

    def sh(command: str) -> str:
        (alloc,) = fleet.json("alloc", "ls", "--job", name)
        return fleet.outrider("exec", "--no-tty", alloc["id"], "--", "sh", "-c", command).stdout

    def said() -> list[str]:
        return sh("cat /templates/app.conf").split()

    (tmp_path / "app.conf").write_text(TEMPLATE.replace("NAME", name))
    put(fleet, f"{name}-key", "one")
    try:
        run(PROVIDER)
        run(READER)
        eventually(lambda: len(said()) == 4, "its instance")
        assert said()[0] == "key=one"

        run(PROVIDER, count=2)
        eventually(lambda: len(said()) == 5, "both instances")
        eventually(lambda: "told" in sh("cat /task/told"), "the signal")

        put(fleet, f"{name}-key", "bad")
        eventually(
            lambda: "is as it was: " in fleet.outrider("alloc", "ls", "--job", name, "--json").stdout, "the error"
        )
        assert said()[0] == "key=one"

        put(fleet, f"{name}-key", "two")
        eventually(lambda: said()[0] == "key=two", "the new secret")
        assert "is as it was: " not in fleet.outrider("alloc", "ls", "--job", name, "--json").stdout
    finally:
        fleet.outrider("job", "stop", name)
        fleet.outrider("job", "stop", f"{name}-api")
