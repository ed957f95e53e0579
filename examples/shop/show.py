"""What the demo shows. Each step prints what the fleet really answered, and raises `UntrueError` where it is not so."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from examples.shop.fleet import ShopFleet, Visits, read_visits
from outrider.model.allocation import Allocation
from outrider.model.mesh import Action, Intention, ObservedRefusal

_HERE = Path(__file__).parent
_POLL_S = 0.1
_VISITS = 240
_LOAD_VISITS = 600
_LOAD_CLIENTS = 6

Found = TypeVar("Found")


class UntrueError(Exception):
    """What the demo says of the fleet is not so."""


class Show:
    def __init__(self, fleet: ShopFleet, console: Console, *, wait_s: float = 15.0) -> None:
        """`wait_s`: for what is to happen soon."""
        self._fleet = fleet
        self._console = console
        self._wait_s = wait_s

    def run(self) -> None:
        """All steps, in order; each needs the ones before."""
        self.start_jobs()
        self.balance()
        self.certificates()
        self.intruder()
        self.sudden_death()
        self.figures()

    def start_jobs(self) -> None:
        self._title("Jobs: web (3), api (2), a real redis-server (1), each process with its Envoy")
        for job in ("shop", "shopper", "intruder"):
            began_s = time.monotonic()
            self._fleet.run(_HERE / f"{job}.yaml")
            self._say(f"job [bold]{job}[/] runs and is healthy after {time.monotonic() - began_s:.1f} s")
        for group in ("web", "api", "redis"):
            places = ", ".join(f"{each.id} on {each.node}" for each in self._fleet.allocations("shop", group))
            self._say(f"{group:<5} {places}")

    def balance(self) -> None:
        self._title(f"Balance: {_VISITS} visits of http://web.mesh, web asks http://api.mesh, api counts in Redis")
        found = self._visit(_VISITS, 4, 0)
        check(not found.failures, f"no visit fails, yet: {found.failures}")
        for group, tally in (("web", found.web), ("api", found.api)):
            replicas = self._fleet.allocations("shop", group)
            for replica in replicas:
                share = tally.get(replica.id, 0) / _VISITS
                check(share > 0.5 / len(replicas), f"{group} {replica.id} gets its share, yet: {tally}")
                bar = "█" * round(share * 40)
                self._say(f"{group} {replica.id} on {replica.node}  {tally[replica.id]:>4}  [cyan]{bar}[/]")
        check(found.visits_distinct == _VISITS, f"each visit is counted once, yet: {found}")
        self._say(f"Redis counted from {found.visits_first} to {found.visits_last}, each visit once")

    def certificates(self) -> None:
        self._title("Identity: the peer's certificate of one request, from both Envoys' access logs")
        pairs = (("shopper", "shopper", "web", "web"), ("shop", "web", "api", "api"), ("shop", "api", "redis", "redis"))
        for job, source, group, destination in pairs:
            sides = functools.partial(self._both_sides, job, source, group)
            caller, callee = self._wait(sides, f"a call of {source} in the logs of both sidecars")
            check(str(caller["callee"]).endswith(f"/svc/{destination}"), f"{source} sees {destination}, yet: {caller}")
            check(str(callee["caller"]).endswith(f"/svc/{source}"), f"{destination} sees {source}, yet: {callee}")
            self._say(f"{source:>7} -> {destination:<6} the caller's Envoy saw  [green]{caller['callee']}[/]")
            self._say(f"{'':>17} the callee's Envoy saw  [green]{callee['caller']}[/]")

    def intruder(self) -> None:
        self._title("Refusal: a workload that no intention names calls web")
        before = self._refused("by default")
        check(before.rule == "", f"nothing but the default denies it, yet: {before}")
        self._say(f"refused by {self._by(before)}")
        made = self._fleet.create_intention("intruder", "web", Action.DENY, "not from here")
        try:
            refusal = self._refused("by the intention", lambda found: found.intention_id == made.id)
            self._say(f"after [bold]intention create intruder web --deny[/]: refused by {self._by(refusal)}")
        finally:
            self._fleet.delete_intention("intruder", "web")
        after = self._refused("by default again", lambda found: found.intention_id == "")
        self._say(f"after [bold]intention delete[/]: refused by {self._by(after)}")
        self._fleet.create_intention("intruder", "web", Action.ALLOW, "a guest")
        self._wait(lambda: not self._visit(1, 1, 0, job="intruder").failures, "an allowed visit")
        self._say("after [bold]intention create intruder web[/]: [green]served[/]")
        self._fleet.delete_intention("intruder", "web")
        self._refused("after all", lambda found: found.intention_id == "")
        self._say("after [bold]intention delete[/]: refused")

    def sudden_death(self) -> None:
        self._title(
            f"Sudden death: SIGKILL of one api workload while {_LOAD_CLIENTS} clients visit, nobody tries twice"
        )
        victim = self._fleet.allocations("shop", "api")[0]
        lines = self._fleet.exec("shopper", "python3", "shopper.py", str(_LOAD_VISITS), str(_LOAD_CLIENTS), "10")
        check(next(lines) == "begun", "the visits begin")
        began_s = time.monotonic()
        time.sleep(0.5)
        pid = self._fleet.kill_workload(victim)
        killed_s = time.monotonic() - began_s
        self._say(f"killed process {pid} of api {victim.id} on {victim.node} {killed_s:.1f} s after the first visit")
        found = read_visits(list(lines)[-1])
        check(found.seconds > killed_s, f"it was killed while they visited, yet: {found}")
        check(not found.failures, f"no visit fails, yet: {found.failures}")
        self._wait(lambda: self._restarted(victim), "its restart")
        tally = ", ".join(f"{alloc} {count}" for alloc, count in sorted(found.api.items()))
        self._say(f"{found.asked} visits in {found.seconds:.1f} s, [green]0 failed[/]; served by {tally}; restarted")

    def figures(self) -> None:
        self._title("Figures per pair of services, read back from Prometheus")
        wanted = {("web", "shopper"), ("api", "web"), ("redis", "api")}
        by_pair = 'sum by (source, destination) ({}{{source!=""}})'

        def read() -> tuple[dict[tuple[str, ...], float], ...] | None:
            names = ("outrider_mesh_requests_total", "outrider_mesh_connections_total", "outrider_mesh_bytes_total")
            found = tuple(self._fleet.figures(by_pair.format(name)) for name in names)
            # Each node is scraped at its own second: wait until all that was asked has arrived.
            requests = [found[0].get(pair, 0) for pair in (("web", "shopper"), ("api", "web"))]
            return found if min(requests) >= _VISITS + _LOAD_VISITS and wanted <= set(found[2]) else None

        requests, connections, sizes = self._wait(read, "the figures in Prometheus")
        check(connections[("redis", "api")] > 0, f"api talks to redis, yet: {connections}")
        for pair in sorted(wanted, key=lambda pair: pair[0], reverse=True):
            destination, source = pair
            asked = f"{requests[pair]:>5.0f} requests" if pair in requests else f"{'':>14}"
            carried = f"{connections.get(pair, 0):>5.0f} connections {sizes[pair]:>8.0f} bytes"
            self._say(f"{source:>7} -> {destination:<6} {asked} {carried}")

    def _visit(self, count: int, clients: int, pause_ms: int, job: str = "shopper") -> Visits:
        words = ("python3", "shopper.py", str(count), str(clients), str(pause_ms))
        return read_visits(list(self._fleet.exec(job, *words))[-1])

    def _both_sides(
        self, job: str, source: str, destination: str
    ) -> tuple[dict[str, object], dict[str, object]] | None:
        """One exchange, as the caller's Envoy and the callee's tell of it."""
        outbound = [
            line
            for caller in self._fleet.allocations(job, source)
            for line in self._fleet.sidecar_log(caller)
            if line["side"] == "outbound" and line.get("upstream") == destination and line["callee"]
        ]
        inbound = [
            line
            for callee in self._fleet.allocations("shop", destination)
            for line in self._fleet.sidecar_log(callee)
            if line["side"] == "inbound" and line.get("service") == destination and line["caller"]
        ]
        by_request = {line["request"]: line for line in inbound if line.get("request")}
        for line in outbound:
            if "request" not in line and inbound:
                return line, inbound[-1]  # a TCP connection has no id that both sides know
            if line.get("request") in by_request:
                return line, by_request[line["request"]]
        return None

    def _refused(self, how: str, matches: Callable[[ObservedRefusal], bool] = lambda _found: True) -> ObservedRefusal:
        """Calls web as the intruder until its refusal, as a sidecar of web recorded it, `matches`."""

        def attempt() -> ObservedRefusal | None:
            began_s = time.time()
            found = self._visit(1, 1, 0, job="intruder")
            if not any(failure.startswith("403 ") for failure in found.failures):
                return None
            deadline_s = time.monotonic() + 2.0
            while time.monotonic() < deadline_s:
                recent = [each for each in self._fleet.refusals("intruder", "web") if each.at_s >= began_s - 0.05]
                if recent:
                    return recent[0] if matches(recent[0]) else None
                time.sleep(_POLL_S)
            return None

        return self._wait(attempt, f"a refusal {how}")

    def _by(self, refusal: ObservedRefusal) -> str:
        """The intention that Envoy's record names, as the fleet has it now."""
        known: dict[str, Intention] = {each.id: each for each in self._fleet.intentions()}
        recorded = f"Envoy of web {refusal.alloc} on {refusal.node} recorded: {refusal.rule or 'no rule allows it'}"
        if not refusal.intention_id:
            return f"[red]the default, deny[/]\n      ({recorded})"
        check(refusal.intention_id in known, f"intention {refusal.intention_id} exists, yet: {list(known)}")
        rule = known[refusal.intention_id]
        return f"[red]{rule.source} -> {rule.destination} {rule.action} “{rule.description}”[/]\n      ({recorded})"

    def _restarted(self, before: Allocation) -> bool:
        for now in self._fleet.allocations("shop", "api"):
            if now.id == before.id and now.report is not None:
                return now.healthy and any(task.restarts for task in now.report.tasks)
        return False

    def _wait(self, attempt: Callable[[], Found | None], what: str) -> Found:
        """The first answer that is one. Raises UntrueError where none comes in time."""
        deadline_s = time.monotonic() + self._wait_s
        while time.monotonic() < deadline_s:
            found = attempt()
            if found:
                return found
            time.sleep(_POLL_S)
        raise UntrueError(f"{what} within {self._wait_s:g} s")

    def _title(self, text: str) -> None:
        self._console.print(f"\n[bold]{text}[/]", highlight=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        self._console.print(f"  [green]✔[/] {text}", highlight=False, soft_wrap=True)


def check(true: object, claim: str) -> None:
    """Raises UntrueError where `claim` is not so."""
    if not true:
        raise UntrueError(claim)
