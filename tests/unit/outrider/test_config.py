"""A configuration file is read whole, and what is wrong with it is named by file and key."""

from pathlib import Path

import pytest

from controller.config import Config
from outrider.config import host_port, load
from outrider.errors import ConfigError

_GOOD = """
cluster: dev
data: /var/lib/outrider
listen: 127.0.0.1:7070
join_listen: 127.0.0.1:7071
operator_socket: /run/outrider/operator.sock
"""


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "controller.yaml"
    path.write_text(text)
    return path


def test_a_good_file_becomes_a_frozen_value_with_defaults(tmp_path: Path) -> None:
    config = load(_write(tmp_path, _GOOD + "mqtt: {host: broker}\n"), Config)
    assert config.data == Path("/var/lib/outrider")
    assert config.mqtt is not None
    assert config.mqtt.port == 8883
    assert config.consul is None
    assert config.catalog_socket == Path("/run/outrider/catalog.sock")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_GOOD + "joinlisten: 1", "joinlisten: unknown key; did you mean 'join_listen'?"),
        (_GOOD + "mqtt: {hots: broker}", "mqtt.hots: unknown key; did you mean 'host'?"),
        (_GOOD + "mqtt: {host: broker, port: 99999}", "mqtt.port: "),
        (_GOOD + "adopt_intentions: 3", "adopt_intentions: Expected `bool`, got `int`"),
        (_GOOD.replace("dev", "Dev_1"), "cluster: "),
        (_GOOD.replace(":7070", ""), "listen: '127.0.0.1' is not HOST:PORT"),
        (_GOOD + "consul: {url: ftp://x}", "consul.url: "),
        (_GOOD + "consul: {url: http://x:8500, cert_file: /a}", "cert_file and key_file come together"),
        (_GOOD.replace("/run/", "/run/" + "x" * 100), "operator_socket: "),
        ("- a\n", "expected keys and values"),
        ("a: [", "is no YAML"),
        ("cluster: dev", "missing required field `data`"),
    ],
)
def test_an_error_names_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, Config)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "absent.yaml", Config)


def test_host_and_port_are_parted() -> None:
    assert host_port("[::1]:80") == ("::1", 80)
    with pytest.raises(ValueError, match="HOST:PORT"):
        host_port("127.0.0.1:http")
