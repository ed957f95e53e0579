"""Topics and Mosquitto's texts."""

from pathlib import Path

from outrider.broker import alloc_event_topic, mosquitto_acl, mosquitto_conf, node_status_topic
from outrider.ids import AllocId, NodeId
from outrider.tls import TlsFiles

ROOT = Path(__file__).parents[3]


def test_a_node_writes_below_its_own_topic() -> None:
    assert node_status_topic("dev", NodeId("n1")) == "outrider/dev/node/n1/status"
    assert alloc_event_topic("dev", NodeId("n1"), AllocId("a")) == "outrider/dev/node/n1/alloc/a/event"
    assert "pattern write outrider/dev/node/%u/#" in mosquitto_acl("dev").splitlines()


def test_the_deployed_files_are_what_the_builders_say() -> None:
    files = TlsFiles(
        ca=Path("/mosquitto/certs/broker.ca"),
        certificate=Path("/mosquitto/certs/broker.crt"),
        key=Path("/mosquitto/certs/broker.key"),
    )
    conf = mosquitto_conf(host="0.0.0.0", port=8883, files=files, acl=Path("/mosquitto/config/acl"))
    assert (ROOT / "deploy/mosquitto/mosquitto.conf").read_text() == conf
    assert (ROOT / "deploy/mosquitto/acl").read_text() == mosquitto_acl("outrider")
