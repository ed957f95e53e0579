"""Time, for edges; a core gets `now_s` as an argument. A monotonic clock for deadlines, the wall's for people."""

import time

monotonic_s = time.monotonic
wall_s = time.time
