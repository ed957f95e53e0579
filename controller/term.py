"""By what right a controller leads, and what it leads with. A value; holds no logic."""

import dataclasses
from collections.abc import Callable, Coroutine

from controller.journal import Journal
from controller.keyring import Keyring
from controller.mesh.leader import Lock
from controller.standing import Alone, Standing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One stretch of leading. `lock`: the journal's, where others want it too; the mesh's writes are fenced by it."""

    journal: Journal
    standing: Standing = dataclasses.field(default_factory=Alone)
    lock: Lock | None = None
    confirm: Callable[[], Coroutine[object, object, None]] | None = None  # runs beside the rest
    share: Callable[[], None] | None = None  # the fleet's CA, to the other controllers
    agree: Callable[[Keyring], None] | None = None  # with them, on the key of secrets; blocks, raises ConfigError
