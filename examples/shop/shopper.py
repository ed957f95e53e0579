"""`shopper.py COUNT CLIENTS PAUSE_MS`: visits http://web.mesh and prints what came of it as one JSON object.

Prints `begun` first. Nothing is tried twice here: a failure is a failure.
"""

import collections
import http.client
import json
import sys
import threading
import time

_TIMEOUT_S = 15.0


class Tally:
    """What all clients saw."""

    def __init__(self, visits: int) -> None:
        self._lock = threading.Lock()
        self._left = visits
        self.web: collections.Counter[str] = collections.Counter()
        self.api: collections.Counter[str] = collections.Counter()
        self.counts: list[int] = []
        self.failures: collections.Counter[str] = collections.Counter()

    def take(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def add(self, status: int, body: bytes) -> None:
        with self._lock:
            if status != 200:
                self.failures[f"{status} {body[:200].decode(errors='replace')}"] += 1
                return
            said = json.loads(body)
            self.web[said["web"]] += 1
            self.api[said["api"]] += 1
            self.counts.append(said["visits"])

    def fail(self, error: Exception) -> None:
        with self._lock:
            self.failures[f"{type(error).__name__}: {error}"] += 1


def visit(tally: Tally, pause_s: float) -> None:
    while tally.take():
        connection = http.client.HTTPConnection("web.mesh", timeout=_TIMEOUT_S)
        try:
            connection.request("GET", "/")
            response = connection.getresponse()
            tally.add(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            tally.fail(error)
        finally:
            connection.close()
        time.sleep(pause_s)


def main(count: int, clients: int, pause_s: float) -> None:
    tally = Tally(count)
    threads = [threading.Thread(target=visit, args=(tally, pause_s)) for _ in range(clients)]
    print("begun", flush=True)
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {
        "asked": count,
        "web": tally.web,
        "api": tally.api,
        "failures": tally.failures,
        "visits_first": min(tally.counts, default=0),
        "visits_last": max(tally.counts, default=0),
        "visits_distinct": len(set(tally.counts)),
        "seconds": time.monotonic() - began_s,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) / 1000)
