"""The configuration of a dev fleet's programs, as files. Starts nothing."""

import shutil
from pathlib import Path

import yaml

from outrider.broker import mosquitto_acl, mosquitto_conf
from outrider.cli.dev.layout import (
    AGENT_METRICS_PORT,
    BROKER_PORT,
    CONTROL_ADDRESS,
    CONTROLLER_METRICS_PORT,
    FLEET_PORT,
    JOIN_PORT,
    Layout,
)
from outrider.errors import InputError
from outrider.ids import NodeId
from outrider.tls import TlsFiles

_BROKER_USER = "mosquitto"
_AGENT_KEYS = "agent-keys.yaml"


def write_controller(layout: Layout) -> Path:
    config: dict[str, object] = {
        "cluster": layout.name,
        "data": str(layout.data / "controller"),
        "listen": f"{CONTROL_ADDRESS}:{FLEET_PORT}",
        "join_listen": f"{CONTROL_ADDRESS}:{JOIN_PORT}",
        "operator_socket": str(layout.operator_socket),
        "metrics_listen": f"{CONTROL_ADDRESS}:{CONTROLLER_METRICS_PORT}",
        "addresses": [CONTROL_ADDRESS],
        "join_token_file": str(layout.join_token),
    }
    if shutil.which("mosquitto"):
        config["mqtt"] = {"host": CONTROL_ADDRESS, "port": BROKER_PORT}
    return _write(layout.config("controller.yaml"), yaml.safe_dump(config))


def write_agent(layout: Layout, node: NodeId) -> Path:
    config: dict[str, object] = {
        "cluster": layout.name,
        "node": node,
        "data": str(layout.data / node),
        "run": str(layout.run / node),
        "address": layout.address(node),
        "controllers": [f"{CONTROL_ADDRESS}:{FLEET_PORT}"],
        "join": {
            "address": f"{CONTROL_ADDRESS}:{JOIN_PORT}",
            "token_file": str(layout.join_token),
        },
        "metrics_listen": f"{layout.address(node)}:{AGENT_METRICS_PORT}",
        "host_image": True,
        "volume_paths": ["/"],  # whoever runs it is root here anyway
    }
    if shutil.which("mosquitto"):
        config["mqtt"] = {"host": CONTROL_ADDRESS, "port": BROKER_PORT}
    more = layout.config(_AGENT_KEYS)
    if more.exists():
        config |= yaml.safe_load(more.read_text())
    return _write(layout.config(f"{node}.yaml"), yaml.safe_dump(config))


def read_agent_keys(path: Path) -> dict[str, object]:
    """What a user wants in every agent's configuration. Raises InputError where it is none."""
    try:
        keys = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"{path}: expected keys and values of an agent's configuration")
    return keys


def write_agent_keys(layout: Layout, keys: dict[str, object]) -> None:
    if keys:
        _write(layout.config(_AGENT_KEYS), yaml.safe_dump(keys))


def write_broker(layout: Layout) -> Path:
    """After the controller's first start, which makes the broker's certificate; Mosquitto reads copies of its own."""
    directory = layout.run / "broker"
    directory.mkdir(mode=0o750, exist_ok=True)
    shutil.chown(directory, group=_BROKER_USER)
    authority = layout.data / "controller" / "ca"
    for suffix in ("ca", "crt", "key"):
        copied = directory / f"broker.{suffix}"
        copied.touch(mode=0o600)
        copied.write_bytes((authority / f"broker.{suffix}").read_bytes())
        shutil.chown(copied, user=_BROKER_USER)
    acl = _write(directory / "acl", mosquitto_acl(layout.name))
    acl.chmod(0o600)
    shutil.chown(acl, user=_BROKER_USER)
    files = TlsFiles(ca=directory / "broker.ca", certificate=directory / "broker.crt", key=directory / "broker.key")
    text = mosquitto_conf(host=CONTROL_ADDRESS, port=BROKER_PORT, files=files, acl=acl, user=_BROKER_USER)
    return _write(directory / "mosquitto.conf", text)


def write_prometheus(layout: Layout) -> Path:
    discovery = f"http://{CONTROL_ADDRESS}:{CONTROLLER_METRICS_PORT}/v1/discovery/prometheus"
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "outrider", "http_sd_configs": [{"url": discovery, "refresh_interval": "1s"}]}],
    }
    return _write(layout.config("prometheus.yaml"), yaml.safe_dump(config))


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.write_text(text)
    return path
