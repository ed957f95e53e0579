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
AGENTS = ("n1", "n2", "n3")


def test_the_controllers_configuration_is_read() -> None:
    config = load(ROOT / "deploy/compose/controller.yaml", ControllerConfig)
    assert config.consul is not None
    assert {"controller", "broker"} <= set(config.addresses)


@pytest.mark.parametrize("name", AGENTS)
def test_an_agents_configuration_is_read_once_filled_in(name: str, tmp_path: Path) -> None:
    service = COMPOSE["services"][name]
    text = (ROOT / "deploy/compose/agent.yaml").read_text()
    for key, value in (*service["environment"].items(), ("CA_SHA256", "ab" * 32)):
        text = text.replace(f"@{key}@", value)
    filled = tmp_path / "agent.yaml"
    filled.write_text(text)
    config = load(filled, AgentConfig)
    assert config.node == name
    assert config.address == service["networks"]["fleet"]["ipv4_address"]


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
