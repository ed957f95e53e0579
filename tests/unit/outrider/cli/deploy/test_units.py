"""The systemd units that a host gets: systemd's own reader takes every line of them."""

import subprocess
from pathlib import Path

import pytest

from outrider.cli.deploy.units import AGENT_UNIT, CONTROLLER_UNIT

UNITS = {"agent": AGENT_UNIT, "controller": CONTROLLER_UNIT}


@pytest.mark.parametrize("role", UNITS)
def test_systemd_takes_the_unit(role: str, tmp_path: Path) -> None:
    unit = tmp_path / f"outrider-{role}.service"
    # It looks for the program, which is only there once it was deployed.
    unit.write_text(UNITS[role].replace("/opt/outrider/current/bin/python", "/usr/bin/python3"))
    words = ["systemd-analyze", "verify", "--man=no", "--generators=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_line_that_systemd_does_not_know_would_be_told(tmp_path: Path) -> None:
    unit = tmp_path / "outrider-wrong.service"
    unit.write_text(AGENT_UNIT.replace("/opt/outrider/current/bin/python", "/usr/bin/python3") + "Wrong=1\n")
    words = ["systemd-analyze", "verify", "--man=no", "--generators=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert "Wrong" in done.stderr


def test_workloads_outlive_the_agents_unit() -> None:
    assert {"KillMode=process", "Delegate=yes"} <= set(AGENT_UNIT.splitlines())
    own_mounts = ("Protect", "Private", "ReadOnly", "ReadWrite", "TemporaryFileSystem", "BindPaths")
    assert not [line for line in AGENT_UNIT.splitlines() if line.startswith(own_mounts)], "mounts must outlive it"
