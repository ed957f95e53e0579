"""A simulated host: what outlives its agent. Sandboxes and namespaces last until a reboot, the disk beyond it."""

from dataclasses import dataclass, field

from agent.core.events import AllocRecord, Found, FoundTask, TaskExit
from outrider.ids import AllocId, TaskName
from outrider.model.allocation import Generation
from tests.sim.kernel import BrokenError, Kernel

TaskKey = tuple[AllocId, TaskName]
KILLED = TaskExit(code=None, signal=9)


@dataclass
class Run:
    """One start of a task."""

    number: int
    exit: TaskExit | None = None


@dataclass
class Disk:
    records: dict[AllocId, AllocRecord] = field(default_factory=dict)
    acknowledged: Generation = field(default_factory=Generation)
    full: bool = False


class Host:
    def __init__(self, kernel: Kernel, name: str, others: "list[Host]") -> None:
        self.kernel, self.name = kernel, name
        self.disk = Disk()
        self.networks: set[AllocId] = set()
        self.sidecars: set[AllocId] = set()
        self.tasks: dict[TaskKey, Run] = {}
        self.starts = 0
        self.heard_s: float | None = None  # in a file that a reboot removes
        self.booted_s = -kernel.rng.uniform(0.0, 1e6)
        self.changed = lambda _key: None  # the agent's watch, while there is one
        self.sidecar_died = lambda _alloc: None
        self.exclusive: dict[TaskKey, str] = {}
        self._others = others  # all hosts of the fleet, this one too

    def uptime_s(self) -> float:
        return self.kernel.now_s - self.booted_s

    def start(self, key: TaskKey, *, batch: bool, exclusive: str = "") -> None:
        """`exclusive`: the name of what must never run twice, wherever."""
        if exclusive:
            for other in self._others:
                if twice := [
                    one for one, name in other.exclusive.items() if name == exclusive and one in other.running()
                ]:
                    raise BrokenError(
                        f"{exclusive} is to run on {self.name} as {key}, and {twice} runs on {other.name}"
                    )
            self.exclusive[key] = exclusive
        if key[0] not in self.networks:
            raise BrokenError(f"{self.name}: {key} starts without a namespace")
        if key in self.tasks and self.tasks[key].exit is None:
            raise BrokenError(f"{self.name}: {key} runs already")
        for other in self._others:
            if other is not self and any(one[0] == key[0] and run.exit is None for one, run in other.tasks.items()):
                raise BrokenError(f"{key[0]} runs on {other.name} and on {self.name}")
        self.starts += 1
        run = self.tasks[key] = Run(self.starts)
        self.kernel.note(self.name, f"task {key[0]}.{key[1]} runs")
        if batch:
            done = TaskExit(code=0)
            self.kernel.at(self.kernel.rng.uniform(0.2, 6.0), lambda: self.end(key, done, run.number))

    def end(self, key: TaskKey, exit_: TaskExit, number: int | None = None) -> None:
        """`number`: of that run alone."""
        run = self.tasks.get(key)
        if run is None or run.exit is not None or (number is not None and run.number != number):
            return
        run.exit = exit_
        self.kernel.note(self.name, f"task {key[0]}.{key[1]} ends: {exit_.code} {exit_.signal}")
        self.changed(key)

    def kill_sidecar(self, alloc: AllocId) -> None:
        if alloc in self.sidecars:
            self.sidecars.discard(alloc)
            self.kernel.note(self.name, f"sidecar {alloc} dies")
            self.sidecar_died(alloc)

    def remove(self, alloc: AllocId) -> None:
        self.networks.discard(alloc)
        self.sidecars.discard(alloc)
        for key in [key for key in self.tasks if key[0] == alloc]:
            if self.tasks[key].exit is None:
                self.kernel.note(self.name, f"task {key[0]}.{key[1]} is removed")
            del self.tasks[key]

    def lose_power(self) -> None:
        self.networks.clear()
        self.sidecars.clear()
        self.tasks.clear()
        self.heard_s = None
        self.booted_s = self.kernel.now_s - self.kernel.rng.uniform(1.0, 20.0)

    def running(self) -> set[TaskKey]:
        return {key for key, run in self.tasks.items() if run.exit is None}

    def found(self) -> tuple[Found, ...]:
        """As the agent's start sees it (`agent/discovery`): networks of nobody are removed."""
        known = self.disk.records.keys() | self.sidecars | {alloc for alloc, _ in self.tasks}
        self.networks &= known
        return tuple(
            Found(
                alloc=alloc,
                record=self.disk.records.get(alloc),
                local_address="100.64.0.2" if alloc in self.networks else None,
                sidecar=alloc in self.sidecars,
                tasks={
                    name: FoundTask(exit=run.exit, started_at_s=1.0)
                    for (owner, name), run in self.tasks.items()
                    if owner == alloc
                },
            )
            for alloc in sorted(known)
        )
