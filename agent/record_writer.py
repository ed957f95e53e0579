"""Writes the core's records, in order, beside everything else: fsync must hold up nobody but who waits for it.

Task: `run`, which writes in a thread what came meanwhile as one batch. Nothing queues up: of each allocation only the
newest record waits, of acknowledgements only the newest.
"""

import asyncio
from collections.abc import Awaitable, Callable

from agent.core.commands import Acknowledge, Forget, Save
from agent.core.events import AllocRecord
from agent.store import Store
from outrider.ids import AllocId
from outrider.model.allocation import Generation


class RecordWriter:
    def __init__(
        self,
        *,
        store: Store,
        saved: Callable[[AllocRecord], Awaitable[None]],
        acknowledged: Callable[[Generation], None],
    ) -> None:
        self._store = store
        self._saved = saved
        self._acknowledged = acknowledged
        self._forgets: set[AllocId] = set()
        self._saves: dict[AllocId, Save] = {}
        self._generation: Generation | None = None
        self._wake = asyncio.Event()

    def put(self, command: Save | Acknowledge | Forget) -> None:
        match command:
            case Save():
                alloc = command.record.assignment.alloc
                before = self._saves.get(alloc)
                announce = command.announce or (before is not None and before.announce)
                self._saves[alloc] = Save(record=command.record, announce=announce)
            case Forget():
                self._saves.pop(command.alloc, None)
                self._forgets.add(command.alloc)
            case Acknowledge():
                self._generation = command.generation
        self._wake.set()

    async def run(self) -> None:
        """Raises HostError where the disk refuses: an agent that cannot remember must not go on."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            forgets, self._forgets = self._forgets, set()
            saves, self._saves = self._saves, {}
            generation, self._generation = self._generation, None
            await asyncio.to_thread(self._write, forgets, tuple(saves.values()), generation)
            for save in saves.values():
                if save.announce:
                    await self._saved(save.record)
            if generation is not None:
                self._acknowledged(generation)

    def _write(self, forgets: set[AllocId], saves: tuple[Save, ...], generation: Generation | None) -> None:
        for alloc in forgets:  # first: one that was forgotten may be assigned again
            self._store.forget(alloc)
        for save in saves:
            self._store.save(save.record)
        if generation is not None:
            self._store.acknowledge(generation)
