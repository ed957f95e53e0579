"""docker-compose.yml and what it mounts: forms that the real readers accept, and no secret in them."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.config import Config as AgentConfig
from controller.config import Config as ControllerConfig
from outrider.config import load

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
AGENTS, CONTROLLERS = ("n1", "n2", "n3"), ("controller1", "controller2")


def filled(service: str, template: str, directory: Path) -> Path:
    """The template as the service's start script fills it in: what it names, the service has."""
    text = (ROOT / "deploy/compose" / template).read_text()
    for key, value in COMPOSE["services"][service]["environment"].items():
        text = text.replace(f"@{key}@", value)
    assert "@" not in text
    path = directory / template
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controllers_configuration_is_read_once_filled_in(name: str, tmp_path: Path) -> None:
    config = load(filled(name, "controller.yaml", tmp_path), ControllerConfig)
    assert config.consul is not None
    assert config.consul.url.removeprefix("http://").partition(":")[0] in COMPOSE["services"]
    assert {name, "broker"} <= set(config.addresses)
    address = COMPOSE["services"][name]["networks"]["control"]["ipv4_address"]
    assert config.progress_listen.startswith(f"{address}:"), "Consul must reach it"


def test_consul_is_the_controllers_alone() -> None:
    """Whoever reads its KV holds the fleet's CA."""
    on_it = {name for name, service in COMPOSE["services"].items() if "control" in service["networks"]}
    assert on_it == {"consul1", "consul2", "consul3", *CONTROLLERS}


def test_nothing_is_published_but_on_loopback() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("name", AGENTS)
def test_an_agents_configuration_is_read_once_filled_in(name: str, tmp_path: Path) -> None:
    config = load(filled(name, "agent.yaml", tmp_path), AgentConfig)
    assert config.node == name
    assert config.address == COMPOSE["services"][name]["networks"]["fleet"]["ipv4_address"]
    assert {address.partition(":")[0] for address in config.controllers} == set(CONTROLLERS)


def test_an_agent_is_given_what_it_needs_and_no_more() -> None:
    for name in AGENTS:
        service = COMPOSE["services"][name]
        assert set(service["cap_add"]) == {"SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "NET_RAW", "MKNOD"}
        assert "privileged" not in service
        assert service["init"] is True


def test_every_service_is_watched_and_every_mount_is_there() -> None:
    for name, service in COMPOSE["services"].items():
        assert service["healthcheck"]["test"], name
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), mount
            elif not source.startswith("/"):
                assert source in COMPOSE["volumes"], mount


@pytest.mark.parametrize("script", ["agent", "controller"])
def test_start_scripts_are_shell(script: str) -> None:
    subprocess.run(["sh", "-n", ROOT / "deploy/compose" / script], check=True)
