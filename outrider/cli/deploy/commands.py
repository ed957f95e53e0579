"""The command `outrider deploy`."""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.errors import InputError

if TYPE_CHECKING:
    from outrider.cli.deploy.inventory import Host, Inventory

CACHE = Path("~/.cache/outrider/bundles")


def deploy(  # noqa: PLR0917 - typer's way
    hosts: Annotated[list[str] | None, typer.Argument(metavar="[HOST]...", help="Become nodes of the fleet.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="hosts.yaml: which hosts become what.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Of the file's hosts this one; may be given often.")] = None,
    controller: Annotated[str, typer.Option(help="Without a file: where the fleet's controller is, HOST.")] = "",
    upgrade: Annotated[bool, typer.Option("--upgrade", help="A few at a time; stop at the first sick host.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Drain each node, and take Outrider away.")] = False,
    deadline: Annotated[
        str, typer.Option(help="With --remove: until when work leaves with care; then at once. `none`: no end.")
    ] = "1h",
    force: Annotated[bool, typer.Option("--force", help="With --remove: do not drain. What runs there ends.")] = False,
    data: Annotated[bool, typer.Option("--data", help="With --remove: certificates, journal and logs too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at every host and say what would be done.")] = False,
    parallel: Annotated[int | None, typer.Option(min=1, help="Hosts at once. Default: 10; with --upgrade 2.")] = None,
    source: Annotated[Path | None, typer.Option(help="A checkout whose Outrider is deployed.", file_okay=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Make hosts part of a fleet over SSH. Run it again: it does what is still missing, and nothing else.

    Exit 1: a host failed; the others are done.
    """
    from outrider.cli import output
    from outrider.cli.deploy.bundle import make_bundle
    from outrider.cli.deploy.run import Deployment
    from outrider.cli.steering import deadline_s
    from outrider.errors import RefusedError

    if upgrade and remove:
        raise InputError("--upgrade and --remove: give one of them")
    inventory, ways = _inventory(hosts or [], file, only or [], controller)
    bundle = make_bundle(Path(os.environ.get("OUTRIDER_BUNDLES", CACHE)).expanduser(), source=source)
    width = max(len(host.host) for host in inventory.hosts)
    deployment = Deployment(
        inventory,
        bundle,
        ways=ways,
        parallel=parallel or (2 if upgrade else 10),
        dry_run=dry_run,
        tell=lambda host, text: output.say(f"{host.ljust(width)}  {text}"),
    )
    if remove:
        work = deployment.remove(data=data, deadline_s=deadline_s(deadline), force=force)
    else:
        work = deployment.upgrade() if upgrade else deployment.deploy()
    outcomes = asyncio.run(work)
    if json:
        output.print_json({"version": bundle.version, "bundle": bundle.id, "hosts": outcomes})
    failed = [outcome.host for outcome in outcomes if outcome.error]
    if failed:
        raise RefusedError(
            "deploy", f"{len(failed)} of {len(outcomes)} hosts failed: {', '.join(failed)}; mend them and deploy again"
        )
    if not json:
        print(
            f"{len(outcomes)} hosts: {'looked at' if dry_run else 'removed' if remove else f'version {bundle.version}'}"
        )


def _inventory(
    hosts: list[str], file: Path | None, only: list[str], controller: str
) -> tuple["Inventory", tuple["Host", ...]]:
    """What is worked on, and the hosts of the fleet's controllers, worked on or not."""
    import msgspec

    from outrider.cli.deploy.inventory import Host, Inventory, read_inventory

    if (file is None) == (not hosts):
        raise InputError("name hosts, or a file of them with -f hosts.yaml")
    if file is not None:
        inventory = read_inventory(file)
        unknown = set(only) - {host.host for host in inventory.hosts}
        if unknown:
            raise InputError(f"--only: {file} has no host {', '.join(sorted(unknown))}")
        kept = tuple(host for host in inventory.hosts if not only or host.host in only)
        outside = inventory.controllers
        if not any("controller" in host.roles for host in kept):
            outside = tuple(host.reached_at for host in inventory.controller_hosts) or outside
        return msgspec.structs.replace(inventory, hosts=kept, controllers=outside), inventory.controller_hosts
    if not controller:
        raise InputError("--controller: say where the fleet's controller is, or deploy with -f hosts.yaml")
    named = tuple(Host(host=host) for host in hosts)
    return Inventory(cluster=_cluster(), hosts=named, controllers=(controller,)), ()


def _cluster() -> str:
    """Of the fleet that OUTRIDER_ADDRESS names."""
    from outrider.cli.client import connect
    from outrider.v1 import operator_pb2

    with connect() as fleet:
        return str(fleet.call(fleet.stub.GetFleet, operator_pb2.GetFleetRequest()).cluster)
