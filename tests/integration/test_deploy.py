"""`outrider deploy` on real sshd instances, each a host of its own: what it does, does again, and refuses."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from controller.ca import FleetCa
from tests.integration.ssh_hosts import SshHosts

pytestmark = pytest.mark.deep  # each host gets the whole bundle: minutes on a busy machine


@pytest.fixture(scope="module")
def hosts() -> Iterator[SshHosts]:
    with SshHosts(3) as made:
        yield made


def nodes(hosts: SshHosts) -> dict[str, str]:
    done = on_controller(hosts, "node", "ls", "--json")
    return {state["node"]["id"]: state["status"] for state in json.loads(done.stdout)}


def run_copies(hosts: SshHosts, count: int) -> None:
    """One on each host at first; a copy begins anew elsewhere before its node is left."""
    job = {
        "job": "copies",
        "groups": {
            "sleeper": {
                "count": count, "update": {"min_healthy": "0s"},
                "tasks": {"sleep": {"command": ["sleep", "infinity"]}},
            },
        },
    }  # fmt: skip
    hosts.path(hosts.addresses[0], "/var/tmp/copies.yaml").write_text(yaml.safe_dump(job))  # noqa: S108 - the host's own
    on_controller(hosts, "job", "run", "/var/tmp/copies.yaml")  # noqa: S108
    assert sorted(copies(hosts)) == [f"h{at}" for at in range(count)]


def copies(hosts: SshHosts) -> list[str]:
    """The node of each that runs."""
    found = json.loads(on_controller(hosts, "alloc", "ls", "--json").stdout)
    return [each["node"] for each in found if each["status"] == "running"]


def audited(hosts: SshHosts) -> set[str]:
    """Changing calls that were made."""
    return {json.loads(line)["call"] for line in on_controller(hosts, "audit", "--json").stdout.splitlines()}


def on_controller(hosts: SshHosts, *words: str) -> subprocess.CompletedProcess[str]:
    socket = "unix:/run/outrider/controller/operator.sock"
    done = hosts.inside(hosts.addresses[0], "/opt/outrider/current/bin/outrider", "--address", socket, *words)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.timeout(1800)
def test_hosts_become_a_fleet_once_and_what_is_wrong_is_told_host_by_host(hosts: SshHosts, tmp_path: Path) -> None:
    first, second, third = hosts.addresses
    file = str(hosts.inventory("sshtest"))

    looked = hosts.outrider("deploy", "-f", file, "--dry-run", "--json")
    assert looked.returncode == 0, looked.stderr
    version = json.loads(looked.stdout)["bundle"]
    assert looked.stderr.count("push the bundle, install, configure, switch to the version, join, start") == 3
    assert not list(hosts.path(first, "/opt/outrider").iterdir()), "a dry run changes nothing"

    # An earlier run that broke off: half a bundle, half a version, half a switch to it.
    hosts.path(second, f"/var/tmp/outrider-{version}.tar.partial").write_bytes(b"half")  # noqa: S108 - the host's own
    hosts.path(second, f"/opt/outrider/versions/.{version}.partial/bin").mkdir(parents=True)
    hosts.path(second, f"/opt/outrider/versions/{version}").mkdir()
    hosts.path(second, "/opt/outrider/.current.partial").symlink_to(f"/opt/outrider/versions/{version}")
    hosts.change_host_key(third)
    done = hosts.outrider("deploy", "-f", file)
    assert done.returncode == 1
    assert f"1 of 3 hosts failed: {third}" in done.stderr
    assert "its host key is not the known one" in done.stderr
    assert not hosts.path(third, "/opt/outrider/versions").exists(), "nothing is half-joined"
    assert nodes(hosts) == {"h0": "ready", "h1": "ready"}
    assert [path.name for path in hosts.path(second, "/opt/outrider/versions").iterdir()] == [version]

    hosts.trust(third)
    again = hosts.outrider("deploy", "-f", file, "--json")
    assert again.returncode == 0, again.stderr
    told = {each["host"]: each["done"] for each in json.loads(again.stdout)["hosts"]}
    assert told[first] == told[second] == "healthy, nothing to do"
    assert nodes(hosts) == {"h0": "ready", "h1": "ready", "h2": "ready"}
    tokens = json.loads(on_controller(hosts, "token", "ls", "--json").stdout)
    assert tokens == [], "each join token was for one node, once"
    secret = hosts.path(third, "/etc/outrider/join-token")
    assert not secret.exists() or secret.stat().st_mode & 0o077 == 0

    # Somebody changed a configuration, and a node knows an earlier fleet of this name: nothing else is touched.
    hosts.path(second, "/etc/outrider/agent.yaml").write_text("cluster: sshtest\n")
    FleetCa(tmp_path / "ca", "sshtest")
    shutil.copy(tmp_path / "ca/ca.crt", hosts.path(third, "/var/lib/outrider/agent/ca.crt"))
    mended = hosts.outrider("deploy", "-f", file, "--json")
    assert mended.returncode == 0, mended.stderr
    told = {each["host"]: each["done"] for each in json.loads(mended.stdout)["hosts"]}
    assert told == {
        first: "healthy, nothing to do", second: "healthy, configure, restart", third: "healthy, join, restart",
    }  # fmt: skip

    run_copies(hosts, 3)
    gone = hosts.outrider("deploy", "-f", file, "--remove", "--data", "--only", third)
    assert gone.returncode == 0, gone.stderr
    steps = [line.split(maxsplit=1)[1] for line in gone.stderr.splitlines()]
    assert steps == ["is a node", "drain", "empty", "stop the agent", "end what runs there", "removed"]
    assert sorted(copies(hosts)) == ["h0", "h0", "h1"] or sorted(copies(hosts)) == ["h0", "h1", "h1"]
    assert not list(hosts.path(third, "/opt/outrider").iterdir())
    assert "RevokeNode" in audited(hosts), "its key is worth nothing to whoever kept it"

    removed = hosts.outrider("deploy", "-f", file, "--remove", "--data")
    assert removed.returncode == 0, removed.stderr
    assert "drain at once: no other node is left" in removed.stderr
    for address in hosts.addresses:
        for path in ("/opt/outrider", "/etc/outrider", "/var/lib/outrider"):
            assert not list(hosts.path(address, path).iterdir())
    again = hosts.outrider("deploy", "-f", file, "--remove", "--data")
    assert again.returncode == 0, again.stderr


@pytest.mark.timeout(1200)
def test_ten_hosts_become_a_fleet_at_once() -> None:
    with SshHosts(10) as ten:
        deployed = ten.outrider("deploy", "-f", str(ten.inventory("sshtest")), "--parallel", "10", timeout_s=900)
        assert deployed.returncode == 0, deployed.stderr
        assert nodes(ten) == {f"h{at}": "ready" for at in range(10)}


def test_who_cannot_be_a_node_is_told_so_and_nothing_is_changed_there(hosts: SshHosts, tmp_path: Path) -> None:
    first, second, third = hosts.addresses
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    (tmp_path / "password").write_text("wrong\n")
    known = {"user": "root", "known_hosts": str(hosts.known_hosts)}
    key = {"ssh": {"identity": str(hosts.key)}}

    def told(mistakes: Mapping[str, object], *only: str) -> str:
        """`mistakes`: of the second host's `ssh`."""
        file = hosts.inventory("sshtest", ssh=known, each={first: key, third: key, second: {"ssh": mistakes}})
        options = [word for address in only or (second,) for word in ("--only", address)]
        done = hosts.outrider("deploy", "-f", str(file), *options)
        assert done.returncode == 1, done.stderr
        for address in only or (second,):
            for path in ("/opt/outrider", "/etc/outrider", "/var/lib/outrider"):
                assert not list(hosts.path(address, path).iterdir())
        return done.stderr

    assert f"{second}  failed: no SSH connection" in told({**key["ssh"], "port": 2222})
    assert f"{second}  failed: it does not let us in" in told({"identity": str(tmp_path / "other")})
    hosts.reconfigure(second, "PasswordAuthentication yes")
    assert f"{second}  failed: it does not let us in" in told({"password_file": str(tmp_path / "password")})
    hosts.reconfigure(second, "SetEnv PATH=/nowhere")
    hosts.reconfigure(third, 'ForceCommand setarch i686 sh -c "$SSH_ORIGINAL_COMMAND"')
    both = told(key["ssh"], second, third)
    assert f"{second}  failed: find python3: the host has none in its PATH (apt install python3 on it)" in both
    assert f"{third}  failed: it is i686, the bundle is for x86_64" in both
