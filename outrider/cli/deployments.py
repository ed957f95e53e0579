"""`outrider deployment`: the rollout of a job's newest version, by hand."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
Job = Annotated[str, typer.Argument(help="A job's name.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the end of the rollout.")]


@app.command()
def promote(job: Job, detach: Detach = False) -> None:
    """The canaries are good: let the rest follow (or, blue/green, switch over), and wait for it."""
    from outrider.cli.steering import steer_rollout
    from outrider.model.fleet import RolloutAction

    steer_rollout(job, RolloutAction.PROMOTE, detach=detach)


@app.command()
def fail(job: Job) -> None:
    """End the rollout: canaries go, nothing more is replaced, and `auto_revert` goes back."""
    from outrider.cli.steering import steer_rollout
    from outrider.model.fleet import RolloutAction

    steer_rollout(job, RolloutAction.FAIL, detach=True)


@app.command()
def pause(job: Job) -> None:
    """Hold the rollout where it is. No deadline of it runs meanwhile."""
    from outrider.cli.steering import steer_rollout
    from outrider.model.fleet import RolloutAction

    steer_rollout(job, RolloutAction.PAUSE, detach=True)


@app.command()
def resume(job: Job, detach: Detach = False) -> None:
    """Go on with a rollout that was paused, and wait for its end."""
    from outrider.cli.steering import steer_rollout
    from outrider.model.fleet import RolloutAction

    steer_rollout(job, RolloutAction.RESUME, detach=detach)
