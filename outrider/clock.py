"""Time, for edges; a core gets `now_s` as an argument. A monotonic clock for deadlines, the wall's for people, and the
host's uptime where a host that slept must know for how long."""

import time

monotonic_s = time.monotonic
wall_s = time.time


def uptime_s() -> float:
    """Since the host's boot, time asleep counted; no setting of the clock moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
