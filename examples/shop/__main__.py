"""`python -m examples.shop`: a fleet of three nodes, the shop on it, and proof that it works. Nothing is left behind.

Exit codes: 0 all that was shown is true; 1 something was not; 130 interrupted; else as `outrider` has them.
"""

import os
import signal
import sys
from types import FrameType

from rich.console import Console

from examples.shop.fleet import ShopFleet
from examples.shop.show import Show, UntrueError
from outrider.cli.address import Address
from outrider.cli.client import Fleet, open_channel
from outrider.cli.dev import front
from outrider.cli.dev.layout import find
from outrider.cli.exits import Interrupt
from outrider.errors import OutriderError

_NODES = 3


def main() -> int:
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console()
    name = f"shop-{os.getpid()}"
    try:
        console.print(f"[bold]A fleet of {_NODES} nodes on this machine, called {name}[/]")
        front.start(name, _NODES, detach=True, hints=False)
        try:
            _show(name, console)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half a fleet behind
            front.stop(name)
    except Interrupt:
        return 130
    except UntrueError as error:
        console.print(f"\n[red bold]not true:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    except OutriderError as error:
        print(f"shop: {error}", file=sys.stderr)
        return error.exit_code
    console.print("\n[green bold]All of it is true.[/]")
    return 0


def _show(name: str, console: Console) -> None:
    layout = find(name)
    assert layout is not None, "it was just started"
    address = Address(target=f"unix:{layout.operator_socket}")
    with open_channel(address) as channel:
        Show(ShopFleet(layout, Fleet(address, channel)), console).run()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupt


if __name__ == "__main__":
    sys.exit(main())
