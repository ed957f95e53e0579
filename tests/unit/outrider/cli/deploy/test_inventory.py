"""hosts.yaml: what it says, and how its mistakes are told."""

from pathlib import Path

import pytest
import yaml

from agent.config import Config as AgentConfig
from controller.config import Config as ControllerConfig
from outrider.cli.deploy.inventory import Host, Inventory, read_inventory
from outrider.cli.deploy.units import AGENT_CONFIG, CONTROLLER_CONFIG, agent_files, controller_files
from outrider.config import load
from outrider.errors import ConfigError

INVENTORY = Inventory(
    cluster="prod",
    agent={"host_image": True},
    hosts=(
        Host(host="c1.example", roles=("controller",), address="10.0.0.1"),
        Host(host="n1.example", address="10.0.0.2", agent={"log": "debug"}),
    ),
)


def test_a_hosts_configurations_are_such_as_the_programs_read(tmp_path: Path) -> None:
    controller, node = INVENTORY.hosts
    agent_text = agent_files(INVENTORY, node)[AGENT_CONFIG][0]
    controller_text = controller_files(INVENTORY, controller)[CONTROLLER_CONFIG][0]
    (tmp_path / "a").write_text(agent_text)
    (tmp_path / "c").write_text(controller_text)
    agent = load(tmp_path / "a", AgentConfig)
    assert (agent.node, agent.address, agent.log, agent.host_image) == ("n1", "10.0.0.2", "debug", True)
    assert agent.controllers == ("10.0.0.1:7070",)
    assert load(tmp_path / "c", ControllerConfig).listen == "10.0.0.1:7070"
    assert "token:" not in agent_text


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"cluster": "prod", "hosts": []}, "hosts: name one at least"),
        ({"cluster": "prod", "hosts": [{"host": "a"}]}, "none has the role controller"),
        ({"cluster": "prod", "hosts": [{"host": "a"}, {"host": "a"}], "controllers": ["c"]}, "two have the host 'a'"),
        ({"cluster": "Prod", "hosts": [{"host": "a"}]}, "cluster"),
        ({"cluster": "prod", "host": []}, "host: unknown key; did you mean 'hosts'"),
        ({"cluster": "prod", "hosts": [{"host": "a", "roles": ["boss"]}]}, "roles"),
    ],
)
def test_a_mistake_names_its_key(tmp_path: Path, document: dict[str, object], told: str) -> None:
    path = tmp_path / "hosts.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match=told):
        read_inventory(path)
