"""`outrider audit`: who changed what."""

import datetime as dt
from typing import Annotated

import typer


def audit(
    newest: Annotated[int, typer.Option(help="So many at most; 0: all that is kept.")] = 50,
    json: Annotated[bool, typer.Option("--json", help="For scripts: one object a line.")] = False,
) -> None:
    """Who changed what, oldest first: every changing call, done or refused."""
    from outrider import codec
    from outrider.cli import output
    from outrider.cli.client import connect
    from outrider.model.access import AuditEntry
    from outrider.v1 import access_pb2

    with connect() as fleet:
        for message in fleet.stream(fleet.access.ReadAudit, access_pb2.ReadAuditRequest(newest=newest)):
            entry = codec.from_wire(message, AuditEntry)
            if json:
                output.print_json_line(entry)
                continue
            at = dt.datetime.fromtimestamp(entry.at_s).astimezone()
            who = f"{entry.caller} ({entry.by}{f', {entry.peer}' if entry.peer else ''})"
            about = " ".join(
                part for part in (entry.call, entry.subject, entry.namespace and f"[{entry.namespace}]") if part
            )
            print(f"{at:%Y-%m-%d %H:%M:%S}  {who}: {about}: {entry.outcome}")
            for change in entry.changes:
                print(f"    {change}")
