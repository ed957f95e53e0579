"""Which nodes are there. Owns the status of nodes and the brake; never moves work: a node that is down for the
journal has its allocations lost by `commit`.

    READY --closed stream--> GONE --grace--> DOWN        GONE: endpoints stay. SUSPECT: they leave load balancing.
      ^  \\--silence--> SUSPECT --grace--> DOWN           Anything --session or heartbeat--> READY
"""

from typing import Final

import numpy as np

from controller.core import absence, drains, notices, pace, retry
from controller.core.absence import GRACE
from controller.core.commands import CloseSession, ProbeNode
from controller.core.events import AgentConnected, AgentDisconnected, HeartbeatReceived, LastWillSeen
from controller.core.kinds import Kind
from controller.core.reports import take_reports
from controller.core.state import State
from controller.core.volatile import NodeLink
from outrider.ids import NodeId
from outrider.model.node import NodeStatus

SCAN: Final = "scan"

AWAY = frozenset({NodeStatus.GONE, NodeStatus.SUSPECT})
_REVOKED = "its certificate was revoked"
_KINDS = {
    NodeStatus.READY: Kind.NODE_READY,
    NodeStatus.GONE: Kind.NODE_GONE,
    NodeStatus.SUSPECT: Kind.NODE_SUSPECT,
    NodeStatus.DOWN: Kind.NODE_DOWN,
}


def begin(state: State, now_s: float) -> None:
    """The first step after replay: nobody is connected, and everybody has the whole grace to come back."""
    state.live.started_at_s = now_s
    for ref in range(len(state.nodes)):
        watch(state, ref, now_s, "the controller started and the agent has not come back yet")
        state.live.mesh_nodes[ref] = None
    pace.take(state)
    state.live.mesh_intentions = True
    state.live.dirty_jobs.update(dict.fromkeys(state.jobs))
    state.live.replacements_left, state.live.replacements_s = state.policy.replacements_burst, now_s
    state.live.drains_changed = True
    for ref in state.nodes.drains:
        drains.watch(state, ref)
    retry.begin(state)


def watch(state: State, ref: int, now_s: float, reason: str) -> None:
    """From here on the node has its grace to connect; one that was down stays so until it does."""
    down = bool(state.nodes.down[ref])
    link = state.live.links[ref]
    link.status = NodeStatus.DOWN if down else NodeStatus.GONE
    link.since_s, link.away_s, link.reason = now_s, now_s, reason
    live = state.live
    if len(live.heartbeat_s) <= ref:
        more = np.full(len(live.heartbeat_s), np.inf)
        live.heartbeat_s = np.concatenate([live.heartbeat_s, more])
        live.missed_s = np.concatenate([live.missed_s, more])
        live.is_down = np.concatenate([live.is_down, np.zeros(len(more), np.bool_)])
    _note_absence(state, ref)
    absence.watch(state, ref, now_s)


def connected(state: State, event: AgentConnected, now_s: float) -> None:
    """A session of a node that the journal knows as it is. It is told all that is wanted of it."""
    ref = state.nodes.reference[event.node.id]
    link = state.live.links[ref]
    if link.session is not None and link.session != event.session:
        _close(state, link, ref, "a newer session of the same node replaces this one")
    link.session, link.acknowledged, link.seen = event.session, event.acknowledged, True
    _become_ready(state, ref, now_s)
    state.live.to(ref).full = True
    take_reports(state, ref, event.reports, now_s, whole=True)


def returned(state: State, ref: int, now_s: float) -> None:
    """A node that was down spoke again on a stream that never closed."""
    _become_ready(state, ref, now_s)
    state.live.to(ref).full = True


def disconnected(state: State, event: AgentDisconnected, now_s: float) -> None:
    joining = state.live.joining.get(event.node)
    if joining is not None and joining.session == event.session:
        del state.live.joining[event.node]
    ref = state.nodes.reference.get(event.node)
    if ref is None or state.live.links[ref].session != event.session:
        return  # of a session that was replaced
    link = state.live.links[ref]
    link.session = None
    state.live.outgoing.pop(ref, None)
    if link.status is NodeStatus.READY:
        _become_away(state, ref, NodeStatus.GONE, event.reason or "the agent's stream ended", now_s)


def heartbeat(state: State, event: HeartbeatReceived, now_s: float) -> None:
    ref = state.nodes.reference.get(event.node)
    if ref is None:
        return  # its registration is on the way to the journal
    link = state.live.links[ref]
    if link.session != event.session:
        return
    if link.status is NodeStatus.READY:
        state.live.heartbeat_s[ref] = now_s
    elif state.nodes.down[ref] or ref in state.live.downing:
        state.live.registering[event.node] = state.nodes.nodes[ref]
    else:
        _become_ready(state, ref, now_s)


def last_will(state: State, event: LastWillSeen) -> None:
    """Look at once, decide nothing."""
    ref = state.nodes.reference.get(event.node)
    if ref is not None and (session := state.live.links[ref].session) is not None:
        state.live.out.append(ProbeNode(session=session, node=event.node))


def scan(state: State, now_s: float, due_s: float) -> None:
    """Who fell silent? A scan that comes late says that the controller slept: then heartbeats wait behind it."""
    pace.take(state)
    silence_s = pace.silence_s(state)
    if now_s - due_s > silence_s / 2:
        state.live.timers.set((SCAN, 0), now_s + silence_s / 2)
        return
    heard = state.live.heartbeat_s[: len(state.nodes)]
    for ref in np.flatnonzero(heard + silence_s <= now_s).tolist():
        reason = f"no heartbeat for {silence_s:g} s on an open stream"
        _become_away(state, ref, NodeStatus.SUSPECT, reason, now_s)
    _plan_scan(state)


def grace_over(state: State, ref: int, now_s: float) -> None:
    """A disconnect policy ran out: the node is down, or copies of it are lost or need a stand-in.

    Nothing of it holds while so many nodes are away that the fault is elsewhere.
    """
    judge_brake(state, now_s)
    link = state.live.links[ref]
    if link.status is NodeStatus.READY or state.live.braked:
        return
    if link.status in AWAY and now_s >= link.away_s + state.policy.disconnect_grace_s:
        state.live.downing[ref] = None
    absence.take_due(state, ref, now_s)
    absence.watch(state, ref, now_s)


def went_down(state: State, ref: int, now_s: float) -> None:
    """The journal has it."""
    state.live.downing.pop(ref, None)
    link = state.live.links[ref]
    reason = link.reason
    if reason != _REVOKED:
        reason = f"away for more than {state.policy.disconnect_grace_s:g} s: {reason}"
    _set(state, ref, NodeStatus.DOWN, reason, now_s)
    judge_brake(state, now_s)


def revoked(state: State, node: NodeId, now_s: float) -> None:
    """Its key is worth nothing any more: it is down at once, however many others are away."""
    ref = state.nodes.reference.get(node)
    if ref is None:
        return
    link = state.live.links[ref]
    if link.session is not None:
        _close(state, link, ref, _REVOKED)
        link.session = None
        state.live.outgoing.pop(ref, None)
    if link.status is not NodeStatus.DOWN:
        _become_away(state, ref, NodeStatus.GONE, _REVOKED, now_s)
        state.live.downing[ref] = None
        absence.lose_all(state, ref)


def judge_brake(state: State, now_s: float) -> None:
    """DESIGN, decision 5: many at once means a network or a controller that is ill, not that many nodes."""
    policy, links, size = state.policy, state.live.links, len(state.nodes)
    present = size - int(state.live.is_down[:size].sum())
    away = int((state.live.missed_s[:size] <= now_s).sum())
    braking = away >= policy.brake_nodes_min and away > policy.brake_share * present
    was = state.live.braked
    state.live.braked = f"{away} of {present} nodes are away at once" if braking else ""
    if braking and not was:
        notices.of_fleet(state, Kind.FLEET_BRAKED, f"{state.live.braked}: nothing is ejected or replaced")
    elif was and not braking:
        notices.of_fleet(state, Kind.FLEET_RELEASED, "enough nodes are back")
        for ref, link in enumerate(links):
            if link.status in AWAY:  # they come back one after the other: each has its whole grace from here on
                link.away_s = now_s
                absence.watch(state, ref, now_s)
            elif link.status is NodeStatus.DOWN:
                state.live.timers.set((GRACE, ref), now_s)
    if bool(was) != braking:
        suspects = (ref for ref, link in enumerate(links) if link.status is NodeStatus.SUSPECT)
        state.live.mesh_nodes.update(dict.fromkeys(suspects))


def _become_ready(state: State, ref: int, now_s: float) -> None:
    link = state.live.links[ref]
    state.live.heartbeat_s[ref] = now_s
    state.live.timers.cancel((GRACE, ref))
    state.live.timers.set_earlier((SCAN, 0), now_s + pace.silence_s(state))
    state.live.downing.pop(ref, None)
    link.away_s = np.inf
    if link.status is not NodeStatus.READY:
        _set(state, ref, NodeStatus.READY, "", now_s)
        room_appeared(state)
        if state.live.braked:  # one more that is there brakes nothing
            judge_brake(state, now_s)


def room_appeared(state: State) -> None:
    """What did not fit may fit now; system jobs may have a new node."""
    live = state.live
    live.dirty_jobs.update(dict.fromkeys(job for job, _ in live.unplaced))
    live.dirty_jobs.update(dict.fromkeys(state.system_jobs))
    live.dirty_jobs.update(live.moving)


def _become_away(state: State, ref: int, status: NodeStatus, reason: str, now_s: float) -> None:
    state.live.heartbeat_s[ref] = np.inf
    _set(state, ref, status, reason, now_s)
    state.live.links[ref].away_s = now_s
    absence.watch(state, ref, now_s)
    judge_brake(state, now_s)


def _set(state: State, ref: int, status: NodeStatus, reason: str, now_s: float) -> None:
    link = state.live.links[ref]
    link.status, link.reason, link.since_s = status, reason, now_s
    _note_absence(state, ref)
    state.live.mesh_nodes[ref] = None
    notices.of_node(state, _KINDS[status], ref, reason)


def _note_absence(state: State, ref: int) -> None:
    """One that was not seen in this controller's life has its grace before it counts."""
    link = state.live.links[ref]
    counts_s = link.since_s if link.seen else link.since_s + state.policy.disconnect_grace_s
    state.live.missed_s[ref] = counts_s if link.status in AWAY else np.inf
    state.live.is_down[ref] = link.status is NodeStatus.DOWN


def _plan_scan(state: State) -> None:
    earliest = float(state.live.heartbeat_s[: len(state.nodes)].min(initial=np.inf))
    if earliest < np.inf:
        state.live.timers.set((SCAN, 0), earliest + pace.silence_s(state))


def _close(state: State, link: NodeLink, ref: int, reason: str) -> None:
    assert link.session is not None, "only an open session is closed"
    state.live.out.append(CloseSession(session=link.session, node=state.nodes.nodes[ref].id, reason=reason))
