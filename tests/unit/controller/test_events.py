"""docs/EVENTS.md is what is sent."""

import json
import re
from pathlib import Path

import msgspec

from controller.core.kinds import Kind
from controller.events import PresenceMessage, event_topic
from outrider.model.fleet import FleetEvent

TEXT = (Path(__file__).parents[3] / "docs/EVENTS.md").read_text()
SCHEMAS = {schema["title"]: schema for schema in map(json.loads, re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))}


def test_every_kind_is_told_of_and_no_other() -> None:
    assert set(re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", TEXT, re.MULTILINE)) == set(Kind)


def test_the_schemas_have_the_members_that_are_sent() -> None:
    assert set(SCHEMAS["FleetEvent"]["properties"]) == set(FleetEvent.__struct_fields__)
    assert set(SCHEMAS["PresenceMessage"]["properties"]) == set(PresenceMessage.__struct_fields__)
    sent = msgspec.json.decode(msgspec.json.encode(PresenceMessage(status="online")))
    assert set(SCHEMAS["PresenceMessage"]["required"]) <= set(sent)


def test_a_topic_names_what_the_event_is_about() -> None:
    for event, tail in (
        (FleetEvent(kind=Kind.ALLOC_LOST, alloc="a", job="j", node="n"), "alloc/a"),
        (FleetEvent(kind=Kind.JOB_STOPPED, job="j"), "job/j"),
        (FleetEvent(kind=Kind.NODE_DOWN, node="n"), "node/n"),
        (FleetEvent(kind=Kind.FLEET_BRAKED), "fleet"),
    ):
        assert event_topic("c", event) == f"outrider/c/controller/event/{tail}"
