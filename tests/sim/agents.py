"""An agent's process around the production core: what the edges `engine`, `executor`, `fleet` do, in small."""

import itertools
from collections.abc import Sequence

from agent.core import commands as c
from agent.core import events as e
from agent.core.state import State, next_deadline_s
from agent.core.step import all_reports, step
from outrider.ids import AllocId
from outrider.model.allocation import AllocReport, Generation, TaskStatus
from outrider.model.job import PULLED
from outrider.model.node import Node
from tests.sim import messages
from tests.sim.controllers import ControllerProcess
from tests.sim.host import KILLED, Host
from tests.sim.kernel import BrokenError, Kernel, Process
from tests.sim.network import Network, Stream

GREETING_S = 3.0
SILENCE_S = 2.5
BACKOFF_S, BACKOFF_MAX_S = 0.1, 2.0
TICK_S_MIN = 0.002


class AgentProcess(Process):
    def __init__(
        self, kernel: Kernel, network: Network, host: Host, node: Node, controllers: Sequence[ControllerProcess]
    ) -> None:
        super().__init__(kernel, node.id)
        self.network, self.host, self.node = network, host, node
        self.failing = 0.0  # the share of the host's steps that fail
        self.sick: set[AllocId] = set()
        self.state = State(allocs={}, strays={})
        self._controllers = list(controllers)
        self._next = itertools.cycle(range(len(controllers)))
        self._stream: Stream | None = None
        self._welcome = False
        self._failures = 0
        self._heard_s = 0.0
        self._reports: dict[AllocId, AllocReport] = {}
        self._applied: Generation | None = None
        self._beats_s: dict[int, float] = {}
        self._flushing = False
        self._tick_at_s: float | None = None
        self._operations: dict[int, c.Command] = {}
        self._count = 0
        self._watched: set[tuple[AllocId, str]] = set()
        self._saves: dict[AllocId, c.Save] = {}
        self._forgets: set[AllocId] = set()
        self._generation: Generation | None = None
        self._written: tuple[set[AllocId], list[c.Save], Generation | None] | None = None

    # Life and death.

    def start(self) -> None:
        if self.alive:
            return
        self.begin_life()
        self._stream, self._welcome, self._failures, self._tick_at_s = None, False, 0, None
        self._reports, self._applied, self._flushing = {}, None, False
        self._operations, self._watched = {}, set()
        self._saves, self._forgets, self._generation, self._written = {}, set(), None, None
        self.state = State(allocs={}, strays={})
        self.host.changed, self.host.sidecar_died = self._task_changed, self._sidecar_died
        found = self.host.found()
        self.note(f"starts and finds {len(found)}")
        self._step(e.Recovered(acknowledged=self.host.disk.acknowledged, found=found, heard_s=self.host.heard_s))
        self._check_adopted()
        self.later(0.01, self._dial)

    def kill(self) -> None:
        """kill -9: what was under way has happened or has not; the kernel closes its sockets."""
        if not self.alive:
            return
        self.note("agent is killed")
        rng = self.kernel.rng
        for command in self._operations.values():
            if rng.random() < 0.5:
                self._half_done(command)
        if self._written is not None:
            forgets, saves, _ = self._written
            self._put(forgets, saves[: rng.randrange(len(saves) + 1)], None)
        self.end_life()
        self.host.changed = self.host.sidecar_died = lambda _which: None
        if self._stream is not None:
            self._stream.close(self, lost=True)

    def lose_power(self) -> None:
        """The whole host: nobody says anything any more, and what was being written may be torn."""
        self.note("host loses power")
        if self.alive and self._written is not None:
            forgets, saves, _ = self._written
            whole = saves[: self.kernel.rng.randrange(len(saves) + 1)]
            self._put(forgets, whole, None)
            if len(whole) < len(saves) and self.kernel.chance(0.3):
                self.host.disk.records.pop(saves[len(whole)].record.assignment.alloc, None)  # set aside as damaged
        self.end_life()
        self.host.changed = self.host.sidecar_died = lambda _which: None
        if self._stream is not None:
            self._stream.vanish()
        self.host.lose_power()

    def _half_done(self, command: c.Command) -> None:
        host = self.host
        match command:
            case c.CreateNetwork():
                host.networks.add(command.assignment.alloc)
            case c.StartTask() if command.assignment.alloc in host.networks:
                self._start(command)
            case c.StartSidecar() if command.assignment.alloc in host.networks:
                host.sidecars.add(command.assignment.alloc)
            case c.StopSidecar():
                host.sidecars.discard(command.alloc)
            case c.StopTask():
                host.end((command.alloc, command.task.name), KILLED)
            case c.Clean():
                for key in [key for key in host.tasks if key[0] == command.alloc]:
                    host.end(key, KILLED)
            case _:
                pass

    def _start(self, command: c.StartTask) -> None:
        assignment = command.assignment
        never_twice = assignment.group.disconnect.stop_after_s is not None
        name = f"{assignment.job}.{assignment.group.name}[{assignment.index}]" if never_twice else ""
        self.host.start((assignment.alloc, command.task.name), batch=assignment.batch, exclusive=name)

    def _check_adopted(self) -> None:
        """What the agent believes is what runs."""
        known = self.state.allocs.keys() | self.state.strays.keys()
        for alloc, name in self.host.running():
            if alloc not in known:
                raise BrokenError(f"{self.name}: {alloc}.{name} runs and the agent knows nothing of it")
        for alloc in self.state.allocs.values():
            for name, task in alloc.tasks.items():
                if task.status is TaskStatus.RUNNING and (alloc.id, name) not in self.host.running():
                    raise BrokenError(f"{self.name}: {alloc.id}.{name} is said to run and does not")

    # The loop.

    def _tell(self, event: e.Event) -> None:
        self._step(event)

    def _now_s(self) -> float:
        return self.host.uptime_s()

    def _step(self, event: e.Event) -> None:
        before = self.state.acknowledged
        commands = step(self.state, event, self._now_s(), self.kernel.rng)
        if self.state.acknowledged < before and not isinstance(event, e.Recovered):
            raise BrokenError(f"{self.name}: {self.state.acknowledged} after {before}")
        for command in commands:
            self._execute(command)
        self._arm()

    def _arm(self) -> None:
        deadline_s = next_deadline_s(self.state)
        if deadline_s == float("inf"):
            return
        at_s = max(self.kernel.now_s + TICK_S_MIN, self.host.booted_s + deadline_s)
        if self._tick_at_s is not None and self.kernel.now_s <= self._tick_at_s <= at_s:
            return
        self._tick_at_s = at_s

        def tick() -> None:
            if self._tick_at_s == at_s:
                self._tick_at_s = None
                self._step(e.Tick())

        self.later(at_s - self.kernel.now_s, tick)

    def _execute(self, command: c.Command) -> None:
        match command:
            case c.Save():
                alloc = command.record.assignment.alloc
                before = self._saves.get(alloc)
                announce = command.announce or (before is not None and before.announce)
                self._saves[alloc] = c.Save(record=command.record, announce=announce)
                self._write()
            case c.Forget():
                self._saves.pop(command.alloc, None)
                self._forgets.add(command.alloc)
                self._write()
            case c.Acknowledge():
                self._generation = command.generation
                self._write()
            case c.Report():
                self._reports[command.report.alloc] = command.report
                self._flush()
            case c.Note():
                self.note(f"{command.event} {command.alloc} {command.message}")
            case c.AdoptTask():
                self._watch((command.assignment.alloc, command.task))
            case c.CreateTask():
                pass  # nothing of it runs
            case _:
                self._begin(command)

    def _begin(self, command: c.Command) -> None:
        self._check_order(command)
        self._cancel_for(command)
        self._count += 1
        number, rng = self._count, self.kernel.rng
        self._operations[number] = command
        delay_s = rng.uniform(0.001, 0.05) if rng.random() < 0.9 else rng.uniform(0.05, 2.0)

        def perform() -> None:
            if self._operations.pop(number, None) is not None:
                self._perform(command)

        self.later(delay_s, perform)

    def _check_order(self, command: c.Command) -> None:
        match command:
            case c.StartTask():
                alloc = command.assignment.alloc
                if alloc not in self.host.disk.records:
                    raise BrokenError(f"{self.name}: {alloc} starts before its record is on disk")
                if command.assignment.group.services and alloc not in self.host.sidecars:
                    ready = self.state.allocs[alloc].sidecar_ready
                    if not ready:
                        raise BrokenError(f"{self.name}: {alloc} starts before its sidecar serves")
            case c.StopSidecar():
                if any(key[0] == command.alloc for key in self.host.running()):
                    raise BrokenError(f"{self.name}: the sidecar of {command.alloc} is to end before its tasks")
            case _:
                pass

    def _cancel_for(self, command: c.Command) -> None:
        """The edge ends a start that it is told to stop or to clean."""
        if not isinstance(command, c.StopSidecar | c.Clean):
            return
        kinds = c.StartSidecar | c.AdoptSidecar | c.PullImages if isinstance(command, c.Clean) else c.StartSidecar
        for number, other in list(self._operations.items()):
            if isinstance(other, kinds) and other.assignment.alloc == command.alloc:
                del self._operations[number]

    def _fails(self) -> bool:
        return self.kernel.chance(self.failing)

    def _perform(self, command: c.Command) -> None:  # noqa: C901, PLR0912 - one arm for each command
        host, rng = self.host, self.kernel.rng
        match command:
            case c.CreateNetwork(assignment=assignment):
                host.networks.add(assignment.alloc)
                if self._fails():
                    self._tell(e.StepFailed(alloc=assignment.alloc, message="no network"))
                else:
                    self._tell(e.NetworkReady(alloc=assignment.alloc, local_address="100.64.0.2"))
            case c.PullImages(assignment=assignment):
                pulled = any(task.image.kind in PULLED for task in assignment.group.tasks)
                assert pulled, "nothing is to be pulled"
                if self._fails():
                    self._tell(e.ImagesFailed(alloc=assignment.alloc, message="no registry", retry=True))
                else:
                    self._tell(e.ImagesReady(alloc=assignment.alloc))
            case c.StartSidecar(assignment=assignment):
                if self._fails() or assignment.alloc not in host.networks:
                    host.sidecars.discard(assignment.alloc)
                    self._tell(e.StepFailed(alloc=assignment.alloc, message="no sidecar"))
                else:
                    host.sidecars.add(assignment.alloc)
                    self._tell(e.SidecarReady(alloc=assignment.alloc))
            case c.AdoptSidecar(assignment=assignment):
                if assignment.alloc in host.sidecars:
                    self._tell(e.SidecarReady(alloc=assignment.alloc))
                else:
                    self._tell(e.SidecarExited(alloc=assignment.alloc, message="it died meanwhile"))
            case c.StartTask(assignment=assignment, task=task):
                if self._fails():
                    self._tell(e.TaskStartFailed(alloc=assignment.alloc, task=task.name, message="no task"))
                else:
                    self._start(command)
                    self._tell(e.TaskStarted(alloc=assignment.alloc, task=task.name, started_at_s=1.0))
                    self._watch((assignment.alloc, task.name))
            case c.RunCheck():
                passing = command.alloc not in self.sick and rng.random() >= self.failing
                self._tell(e.CheckRan(alloc=command.alloc, service=command.service, passing=passing))
            case c.DrainSidecar():
                self._tell(e.SidecarDrained(alloc=command.alloc))
            case c.StopTask():
                host.end((command.alloc, command.task.name), e.TaskExit(code=143))
            case c.StopSidecar():
                host.sidecars.discard(command.alloc)
                self._tell(e.SidecarStopped(alloc=command.alloc))
            case c.Clean():
                if self._fails():
                    self._tell(e.StepFailed(alloc=command.alloc, message="busy"))
                else:
                    host.remove(command.alloc)
                    self._tell(e.Cleaned(alloc=command.alloc))
            case _:
                raise AssertionError(command)

    def _watch(self, key: tuple[AllocId, str]) -> None:
        self._watched.add(key)
        self._task_changed(key)

    def _task_changed(self, key: tuple[AllocId, str]) -> None:
        run = self.host.tasks.get(key)  # type: ignore[call-overload]
        if key in self._watched and run is not None and run.exit is not None:
            self._watched.discard(key)
            event = e.TaskExited(alloc=key[0], task=key[1], exit=run.exit)  # type: ignore[arg-type]
            self.later(self.kernel.rng.uniform(0.0, 0.02), lambda: self._tell(event))

    def _sidecar_died(self, alloc: AllocId) -> None:
        event = e.SidecarExited(alloc=alloc, message="envoy died")
        self.later(self.kernel.rng.uniform(0.0, 0.02), lambda: self._tell_of_sidecar(event))

    def _tell_of_sidecar(self, event: e.SidecarExited) -> None:
        if event.alloc not in self.host.sidecars:  # a new one may run meanwhile; then its watcher is another
            self._tell(event)

    # The disk: one batch at a time, the newest of each.

    def _write(self) -> None:
        if self._written is not None or not (self._saves or self._forgets or self._generation):
            return
        self._written = (self._forgets, list(self._saves.values()), self._generation)
        self._forgets, self._saves, self._generation = set(), {}, None
        rng = self.kernel.rng
        self.later(rng.uniform(0.001, 0.02) if rng.random() < 0.95 else rng.uniform(0.02, 1.5), self._wrote)

    def _wrote(self) -> None:
        assert self._written is not None
        if self.host.disk.full and (self._written[1] or self._written[2]):
            self.note("the disk is full: the agent ends")
            life = self.life
            self.kill()
            self.kernel.at(1.0, lambda: self.start() if self.life == life else None)
            return
        (forgets, saves, generation), self._written = self._written, None
        self._put(forgets, saves, generation)
        for save in saves:
            if save.announce:
                self._tell(e.Saved(alloc=save.record.assignment.alloc, ended=save.record.ended))
        if generation is not None:
            self._applied = generation
            self._flush()
        self._write()

    def _put(self, forgets: set[AllocId], saves: Sequence[c.Save], generation: Generation | None) -> None:
        disk = self.host.disk
        for alloc in forgets:
            disk.records.pop(alloc, None)
        for save in saves:
            disk.records[save.record.assignment.alloc] = save.record
        if generation is not None:
            if generation < disk.acknowledged:
                raise BrokenError(f"{self.name}: {generation} is written over {disk.acknowledged}")
            disk.acknowledged = generation

    # The session.

    def _dial(self, leader: ControllerProcess | None = None) -> None:
        controller = leader or self._controllers[next(self._next)]
        stream = Stream(self.network, self, controller)
        self._stream, self._welcome = stream, False
        self._beats_s = {0: self._now_s()}  # the greeting
        self._reports, self._applied = {}, None  # all of it is in the greeting
        hello = messages.Hello(node=self.node, acknowledged=self.state.acknowledged, reports=all_reports(self.state))
        if not controller.alive:
            refused_s = GREETING_S if self.network.is_cut(self.name, controller.name) else self.network.delay_s()
            self.later(refused_s, lambda: self._ended(stream))
            return
        stream.to_agent = lambda message: self._heard(stream, message)
        stream.to_controller = lambda message: controller.dialled(stream, message) if message is not None else None
        stream.send(self, hello)
        self.later(GREETING_S, lambda: self._give_up(stream) if not self._welcome else None)

    def _heard(self, stream: Stream, message: object) -> None:
        if stream is not self._stream:
            return
        self._heard_s = self.kernel.now_s
        match message:
            case None:
                self._ended(stream)
            case messages.NotLeader():
                self._ended(stream)
            case messages.Welcome():
                self._welcome, self._failures = True, 0
                self._heard_of(0)
                self._beat(stream, message.interval_s)
                self._listen(stream)
                self._flush()
            case messages.Heartbeat():
                if message.sequence == 0:
                    self._send_beat(stream)
                else:
                    self._heard_of(message.sequence)
            case messages.Assignments():
                self._tell(
                    e.Assigned(
                        generation=message.generation,
                        full=message.full,
                        assignments=message.assignments,
                        removed=message.removed,
                    )
                )
            case _:
                raise AssertionError(message)

    def _beat(self, stream: Stream, interval_s: float) -> None:
        if stream is self._stream:
            self._send_beat(stream)
            self.later(interval_s, lambda: self._beat(stream, interval_s))

    def _send_beat(self, stream: Stream) -> None:
        sequence = max(self._beats_s, default=0) + 1
        self._beats_s[sequence] = self._now_s()
        stream.send(self, messages.Heartbeat(sequence=sequence))

    def _heard_of(self, sequence: int) -> None:
        self.host.heard_s = self._beats_s[sequence]
        self._tell(e.ControllerHeard(at_s=self._beats_s[sequence]))

    def _listen(self, stream: Stream) -> None:
        if stream is not self._stream:
            return
        left_s = self._heard_s + SILENCE_S - self.kernel.now_s
        if left_s <= 0:
            self._give_up(stream)
        else:
            self.later(left_s + 0.001, lambda: self._listen(stream))

    def _give_up(self, stream: Stream) -> None:
        if stream is self._stream:
            stream.close(self, lost=True)
            self._ended(stream)

    def _ended(self, stream: Stream) -> None:
        if stream is not self._stream:
            return
        self._stream, self._welcome = None, False
        self._failures += 1
        delay_s = min(BACKOFF_S * 2 ** min(self._failures, 10), BACKOFF_MAX_S)
        self.later(delay_s * self.kernel.rng.uniform(0.5, 1.0), self._redial)

    def _redial(self) -> None:
        if self._stream is None:
            self._dial()

    def reset_stream(self) -> None:
        """Something on the way sends a reset to both ends."""
        stream = self._stream
        if stream is not None:
            stream.close(self, lost=True)
            self._ended(stream)

    def _flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            self.later(0.0, self._flush_now)

    def _flush_now(self) -> None:
        self._flushing = False
        if self._stream is None or not self._welcome:
            return
        if self._reports:
            self._stream.send(self, messages.Reports(reports=tuple(self._reports.values())))
            self._reports = {}
        if self._applied is not None:
            self._stream.send(self, messages.Applied(generation=self._applied))
            self._applied = None
