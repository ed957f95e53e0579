"""Cron lines and time zones: whether one is good, and when it fires next. Reads the host's time zones, or tzdata's.

Never knows what time it is. The rules are Debian's cron, as cronsim has them: where the clock is put forward, what
would fall into the gap runs at its end; where it is put back, what names an hour runs once.
"""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

_FIELDS = "minute hour day month weekday, or six fields with seconds first"


def next_launch_s(cron: str, time_zone: str, after_s: float) -> float:
    """The first time after `after_s`, in seconds since 1970. Raises ValueError where the line or the zone is bad, or
    there is none within 50 years."""
    try:
        found = next(CronSim(cron, datetime.fromtimestamp(after_s, zone(time_zone))))
    except CronSimError as error:
        raise ValueError(_complaint(cron, str(error))) from error
    except StopIteration as error:
        raise ValueError(f"{cron[:80]!r} never fires") from error
    return found.timestamp()


def last_launch_s(cron: str, time_zone: str, until_s: float) -> float | None:
    """The newest time up to `until_s`; None where there is none within 50 years. Raises ValueError likewise."""
    # A fraction of a second counts as the step back from which the search begins: `until_s` itself is found too.
    start = datetime.fromtimestamp(int(until_s), zone(time_zone)).replace(microsecond=1)
    try:
        return next(CronSim(cron, start, reverse=True)).timestamp()
    except CronSimError as error:
        raise ValueError(_complaint(cron, str(error))) from error
    except StopIteration:
        return None


def zone(name: str) -> ZoneInfo:
    """Raises ValueError where there is none of this name."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{name[:80]!r} is no time zone; for example Europe/Berlin or UTC") from error


def _complaint(cron: str, what: str) -> str:
    """cronsim's word, as a person wants it. A good day that no month of the line has is its `Bad day-of-month` too."""
    if what == "Bad day-of-month":
        fields = cron.split()
        fields[-2:-1] = ["*"]
        try:
            CronSim(" ".join(fields), datetime.fromtimestamp(0, UTC))
        except CronSimError:
            pass
        else:
            return f"{cron[:80]!r} never fires: none of its months has that day"
    return f"{cron[:80]!r} is no cron line: {what[:1].lower()}{what[1:]}; expected {_FIELDS}"
