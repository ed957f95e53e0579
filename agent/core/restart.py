"""When to try again, and when not any more. Owns the arithmetic of `RestartPolicy`, for tasks and preparing alike."""

import random

from outrider.model.job import RestartPolicy, Value

_JITTER = 0.2  # either way: neighbours that failed together do not come back together

# For what is tried until it works: a sidecar that died, cleaning. The first time at once or nearly so.
PERSISTENT = RestartPolicy(attempts=1_000_000, interval_s=60.0, delay_s=0.1, delay_max_s=5.0)


# For images: a registry that is away, or has had enough of us, is left alone longer and longer.
PULL = RestartPolicy(attempts=1_000_000, interval_s=3600.0, delay_s=1.0, delay_max_s=60.0)


class Retry(Value, frozen=True, kw_only=True):
    at_s: float
    tried_at_s: tuple[float, ...]  # with this try; those beyond the interval are gone


def next_try(policy: RestartPolicy, tried_at_s: tuple[float, ...], now_s: float, rng: random.Random) -> Retry | None:
    """The next try after those at `tried_at_s`, or None: `attempts` within `interval_s` are used up.

    The delay begins at `delay_s`, doubles with each try within the interval, and ends at `delay_max_s`; with jitter.
    Tries in the future are of a clock before a reboot: they do not count.
    """
    recent = tuple(at_s for at_s in tried_at_s if now_s - policy.interval_s < at_s <= now_s)
    if len(recent) >= policy.attempts:
        return None
    doubled = policy.delay_s * 2.0 ** min(len(recent), 30)
    delay_s = min(doubled, policy.delay_max_s) * rng.uniform(1 - _JITTER, 1 + _JITTER)
    return Retry(at_s=now_s + delay_s, tried_at_s=(*recent[-63:], now_s))
