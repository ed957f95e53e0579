"""`python -m agent.network.dns --socket PATH`: the node's DNS responder."""

import argparse
from pathlib import Path

from agent.network.dns.responder import Responder


def main() -> None:
    parser = argparse.ArgumentParser(prog="agent.network.dns", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="where it listens for the agent")
    Responder(parser.parse_args().socket).serve()


main()
