"""Fleet events: what people are told. Owns how an event is made from what the state knows."""

from controller.core.commands import Publish
from controller.core.kinds import Kind
from controller.core.state import State
from outrider.ids import JobName
from outrider.model.fleet import FleetEvent


def of_node(state: State, kind: Kind, ref: int, message: str = "") -> None:
    _publish(state, FleetEvent(kind=kind, node=state.nodes.nodes[ref].id, message=message))


def of_job(state: State, kind: Kind, job: JobName, message: str = "") -> None:
    _publish(state, FleetEvent(kind=kind, job=job, message=message))


def of_alloc(state: State, kind: Kind, row: int, message: str = "") -> None:
    ref = int(state.table.node[row])
    _publish(
        state,
        FleetEvent(
            kind=kind,
            node=state.nodes.nodes[ref].id if ref >= 0 else "",
            job=state.group_of(row).job,
            alloc=state.alloc_id(int(state.table.serial[row])),
            message=message,
        ),
    )


def of_fleet(state: State, kind: Kind, message: str) -> None:
    _publish(state, FleetEvent(kind=kind, message=message))


def of_stranger(state: State, kind: Kind, *, node: str, alloc: str, message: str) -> None:
    """Of an allocation that the journal does not know."""
    _publish(state, FleetEvent(kind=kind, node=node, alloc=alloc, message=message))


def _publish(state: State, event: FleetEvent) -> None:
    state.live.out.append(Publish(event=event))
