"""Where sidecars send spans, as the agent's configuration has it."""

import pytest

from agent.config import TracesConfig


def test_a_collector_is_an_address_and_a_port() -> None:
    assert TracesConfig(otlp="10.0.0.5:4317").percent == 1.0


@pytest.mark.parametrize(
    ("otlp", "told"),
    [("collector:4317", "otlp: .*collector.*sidecars resolve no names"), ("10.0.0.5", "otlp: ")],
)
def test_anything_else_says_what_is_wrong(otlp: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        TracesConfig(otlp=otlp)
