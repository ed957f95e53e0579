"""The one entry: an event in, commands out. Signatures first; the bodies follow in the next commits."""

import random

from controller.core.commands import Command
from controller.core.events import Event
from controller.core.state import State


def step(state: State, event: Event, now_s: float, rng: random.Random) -> tuple[Command, ...]:  # type: ignore[empty-body]
    """`now_s`: wall-clock seconds that never step back within a controller's life (wall at start + monotonic)."""
