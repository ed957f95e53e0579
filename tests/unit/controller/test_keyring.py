"""What secrets are sealed under: files, environments, and what happens to what was sealed before."""

import stat
from pathlib import Path

import pytest

from controller.core.records import SecretPut
from controller.keyring import PREVIOUS, VARIABLE, Keyring
from outrider.errors import ConfigError, HostError
from outrider.ids import DEFAULT_NAMESPACE, SecretName

NAME = SecretName("db")
ONE, TWO = "11" * 32, "22" * 32


def sealed(keyring: Keyring, value: bytes = b"hunter2", name: SecretName = NAME) -> SecretPut:
    content = keyring.seal(DEFAULT_NAMESPACE, name, value)
    return SecretPut(namespace=DEFAULT_NAMESPACE, name=name, version=1, sealed=content, at_s=0.0)


def test_a_file_is_made_for_its_owner_alone_and_opens_what_was_sealed(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "secrets.key"
    put = sealed(Keyring(path, {}))
    assert b"hunter2" not in put.sealed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Keyring(path, {}).open(put) == b"hunter2"


def test_the_environment_goes_before_the_file(tmp_path: Path) -> None:
    put = sealed(Keyring(tmp_path / "unused", {VARIABLE: ONE}))
    assert not (tmp_path / "unused").exists()
    assert Keyring(tmp_path / "unused", {VARIABLE: TWO, PREVIOUS: ONE}).open(put) == b"hunter2"


def test_a_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    put = sealed(Keyring(tmp_path / "unused", {VARIABLE: ONE}))
    with pytest.raises(HostError, match=r"sealed under key [0-9a-f]{16}, which OUTRIDER_SECRETS_KEY does not have"):
        Keyring(tmp_path / "unused", {VARIABLE: TWO}).open(put)


def test_a_sealed_value_opens_under_its_own_name_alone(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "unused", {VARIABLE: ONE})
    content = sealed(keyring).sealed
    moved = SecretPut(namespace=DEFAULT_NAMESPACE, name=SecretName("other"), version=1, sealed=content, at_s=0.0)
    with pytest.raises(HostError, match="is not what was sealed"):
        keyring.open(moved)


def test_while_a_key_is_turned_both_open_and_afterwards_the_new_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets.key"
    keyring = Keyring(path, {})
    old = sealed(keyring)
    keyring.turn()
    assert not keyring.is_current(old)
    assert Keyring(path, {}).open(old) == b"hunter2"  # a controller that ended half-way carries on
    new = sealed(keyring)
    keyring.drop_others()
    assert Keyring(path, {}).open(new) == b"hunter2"
    with pytest.raises(HostError):
        Keyring(path, {}).open(old)


@pytest.mark.parametrize("text", ["", "x" * 64, "11" * 31])
def test_what_is_no_key_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="OUTRIDER_SECRETS_KEY: a key is 64 hexadecimal digits"):
        Keyring(tmp_path / "unused", {VARIABLE: text})
