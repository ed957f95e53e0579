"""What several edges of one controller share. Made by `app`, whole before any edge uses it; holds no logic."""

import dataclasses
from collections import Counter
from collections.abc import Callable

from controller.engine import Engine
from controller.event_log import EventLog
from controller.keyring import Keyring
from controller.mesh.mesh import Mesh
from controller.refusals import Refusals
from controller.sessions import Sessions
from controller.tunnels import Tunnels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    cluster: str
    engine: Engine
    mesh: Mesh
    events: EventLog
    keyring: Keyring
    agree: Callable[[Keyring], None]  # with the other controllers, on the key of secrets
    sessions: Sessions = dataclasses.field(default_factory=Sessions)
    tunnels: Tunnels = dataclasses.field(default_factory=Tunnels)
    refusals: Refusals = dataclasses.field(default_factory=Refusals)
    refused: Counter[str] = dataclasses.field(default_factory=Counter)  # calls, by code
