"""The numbers that the controller decides by, in one place. Never read from anywhere else."""

from outrider.model.job import Packing, Value


class Policy(Value, frozen=True, kw_only=True):
    heartbeat_interval_s: float = 0.3  # the fastest; the edge tells agents in Welcome and with each answer
    fastest_nodes_max: int = 500  # that are not down; a larger fleet beats slower
    suspect_after_s: float = 0.8  # silence on an open stream, at the fastest pace; else in proportion
    disconnect_grace_s: float = 30.0  # gone or suspect for so long: down
    # DESIGN, decision 5: more than this share of the nodes, and at least so many, away at once: hold everything.
    brake_share: float = 0.1
    brake_nodes_min: int = 3
    withdraw_timeout_s: float = 2.0  # for sidecars to acknowledge that an endpoint is gone
    replacements_per_s: float = 500.0  # of what failed or was lost, all jobs together
    replacements_burst: float = 2000.0  # so many at once
    ended_kept: int = 5  # ended allocations of each group that stay visible
    versions_kept: int = 20  # of each job
    scaling_interval_s: float = 3.0  # between two looks at a group that the fleet scales
    scaling_window_s: float = 10.0  # whose mean counts
    scaling_samples_max: int = 8  # of a copy that are remembered
    children_kept: int = 20  # that are over, of each job that others are launched from
    plan_jobs_max: int = 500  # decided in one step: agents' signs of life wait behind it
    plan_placements_max: int = 50_000  # in one plan: bounds a step, and what one fsync carries
    operator_calls_max: int = 4096  # waiting for the journal; more are told to come back
    unclaimed_max: int = 10_000  # allocations of others that are remembered by name
    placement: Packing = Packing.SPREAD  # of jobs that do not say
    preempts: bool = True  # whether a job of higher priority may take the place of one of lower
    events_each_max: int = 1000  # placements of one run told one by one; more are told as one
