"""The images of an allocation: wanted beside everything else, waited for by its tasks alone.

Owns what of an allocation's state speaks of images. A pull is no try of a task: it uses up no restarts.
"""

from typing import assert_never

from agent.core import exposed
from agent.core.commands import PullImages
from agent.core.events import ImagesFailed, ImagesOnTheirWay, ImagesReady
from agent.core.lifecycle import Phase
from agent.core.report import duration
from agent.core.restart import PULL, next_try
from agent.core.state import AllocState, Turn, needs_images
from outrider.errors import InputError
from outrider.model.job import inner_ports


def want(alloc: AllocState, turn: Turn) -> None:
    """Unless they are there, or on their way, or will be asked for later."""
    if not alloc.images_ready and not alloc.images_asked and alloc.images_retry_at_s is None:
        alloc.images_asked = True
        turn.emit(PullImages(assignment=alloc.assignment))


def tick(alloc: AllocState, turn: Turn) -> None:
    if alloc.images_retry_at_s is not None and alloc.images_retry_at_s <= turn.now_s:
        alloc.images_retry_at_s = None
        want(alloc, turn)


def abandon(alloc: AllocState) -> None:
    """It is on the way out: what comes late means nothing."""
    alloc.pulling, alloc.images_retry_at_s, alloc.images_message = False, None, ""


def let_go(alloc: AllocState) -> None:
    """Its cleaning lets the node remove them."""
    abandon(alloc)
    alloc.images_asked = False
    alloc.images_ready = not needs_images(alloc.assignment)
    alloc.assignment = exposed.opened(alloc.assignment)


def handle(alloc: AllocState, event: ImagesOnTheirWay | ImagesReady | ImagesFailed, turn: Turn) -> bool:
    """Whether the allocation cannot run: its `failure` says why."""
    if alloc.stopping or alloc.phase is Phase.CLEANING:
        return False
    match event:
        case ImagesOnTheirWay():
            alloc.pulling, alloc.images_message = True, event.message
        case ImagesReady():
            abandon(alloc)
            alloc.images_ready, alloc.images_asked, alloc.images_tried_at_s = True, False, ()
            return not _ports_known(alloc, event)
        case ImagesFailed():
            return _failed(alloc, event, turn)
        case _:
            assert_never(event)
    return False


def _ports_known(alloc: AllocState, event: ImagesReady) -> bool:
    try:
        alloc.assignment = exposed.filled(alloc.assignment, event.exposed)
    except InputError as error:
        alloc.failure = str(error)
        return False
    ports = inner_ports(alloc.assignment.group.network)
    for service in alloc.assignment.group.services:
        if service.name in alloc.probes and service.port is not None:
            alloc.probes[service.name].port = ports[service.port]
    return True


def _failed(alloc: AllocState, event: ImagesFailed, turn: Turn) -> bool:
    abandon(alloc)
    alloc.images_asked = False
    again = next_try(PULL, alloc.images_tried_at_s, turn.now_s, turn.rng) if event.retry else None
    if again is None:
        alloc.failure = event.message
        return True
    alloc.images_tried_at_s, alloc.images_retry_at_s = again.tried_at_s, again.at_s
    alloc.images_message = f"{event.message}; trying again in {duration(again.at_s - turn.now_s)}"
    return False
