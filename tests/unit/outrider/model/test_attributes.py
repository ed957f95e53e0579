"""What a constraint says of a node's attribute."""

import pytest

from outrider.model.attributes import attributes, describe, is_known, satisfied
from outrider.model.job import Constraint, Operator
from tests.scenarios.world import node


def holds(operator: str, wanted: str, value: str | None) -> bool:
    return satisfied(Constraint(attribute="meta.x", operator=Operator(operator), value=wanted), value)


@pytest.mark.parametrize(
    ("operator", "wanted", "passing", "failing"),
    [
        ("=", "r1", ("r1",), ("r2", "", None)),
        ("!=", "r1", ("r2", None), ("r1",)),
        ("<", "8", ("7", "-1", "7.5"), ("8", "many", None)),
        ("<=", "1Gi", ("1073741824", "1Gi", "1G"), ("2Gi", None)),
        (">", "8", ("9", "1Ki"), ("8", "x")),
        (">=", "8", ("8", "8.0"), ("7.9",)),
        ("matches", "^eu-", ("eu-1",), ("us-eu-1", None)),
        ("version", ">= 5.10, < 7", ("5.10", "6.1.0-56-cloud", "v6"), ("5.9", "7.0", "none", None)),
        ("version", "~> 6.1", ("6.1", "6.9"), ("7.0", "6.0.9")),
        ("version", "6.1", ("6.1.0",), ("6.1.1",)),
        ("version", "!= 6.1", ("6.2",), ("6.1",)),
        ("contains", "a, b", ("b,a,c",), ("a", None)),
        ("contains any", "a, b", ("c,b",), ("c", None)),
        ("is set", "", ("anything",), (None,)),
        ("is not set", "", (None,), ("anything",)),
    ],
)
def test_an_operator_means_what_the_reference_says(
    operator: str, wanted: str, passing: tuple[str | None, ...], failing: tuple[str | None, ...]
) -> None:
    assert all(holds(operator, wanted, value) for value in passing)
    assert not any(holds(operator, wanted, value) for value in failing)


def test_a_node_has_what_it_is_and_what_its_operator_says() -> None:
    found = attributes(node("n1", meta={"rack": "r1"}, devices={"gpu": 2}, kvm="works", kernel="6.1.0"))
    assert found["node.id"] == "n1"
    assert found["node.cores"] == "4"
    assert (found["node.kvm"], found["meta.rack"], found["device.gpu"]) == ("works", "r1", "2")
    assert found["runtime.crun"] == "1.8.1"
    assert "node.version" not in found, "what is empty is not set"
    assert all(is_known(name) for name in found)
    assert not any(is_known(name) for name in ("meta.", "node.kernal", "rack"))


def test_a_constraint_is_told_as_the_job_file_writes_it() -> None:
    def told(attribute: str, operator: Operator, value: str = "") -> str:
        return describe(Constraint(attribute=attribute, operator=operator, value=value))

    assert told("meta.rack", Operator.NOT_EQUAL, "r1") == "meta.rack != r1"
    assert told("meta.gpu", Operator.IS_SET) == "meta.gpu is set"
    assert told("node.id", Operator.DISTINCT, "1") == "distinct host"
    assert told("meta.rack", Operator.DISTINCT, "2") == "distinct meta.rack at most 2"
