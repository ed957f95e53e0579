"""Answers the core's `PlanLaunch`: when a schedule fires. Knows calendars; decides nothing, and keeps nothing."""

from datetime import UTC, datetime

from controller.core.commands import PlanLaunch
from controller.core.events import Launch, LaunchPlanned
from outrider.cron import last_launch_s, next_launch_s


def planned(command: PlanLaunch) -> LaunchPlanned:
    cron, time_zone = command.schedule.cron, command.schedule.time_zone
    try:
        next_s = next_launch_s(cron, time_zone, command.now_s)
    except ValueError:  # it has fired for the last time, or the host has forgotten the zone
        return LaunchPlanned(job=command.job, version=command.version)
    last_s = last_launch_s(cron, time_zone, command.now_s)
    return LaunchPlanned(
        job=command.job,
        version=command.version,
        due=_launch(last_s) if last_s is not None and last_s > command.after_s else None,
        next=_launch(next_s),
    )


def _launch(at_s: float) -> Launch:
    return Launch(at_s=at_s, stamp=f"{datetime.fromtimestamp(at_s, UTC):%Y%m%d-%H%M%S}")
