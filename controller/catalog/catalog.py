"""The catalog's server. Signatures first; the bodies follow in the next commits."""

import ssl
from collections.abc import Mapping
from pathlib import Path

from controller.catalog.ca import ConnectCa
from outrider.log import Log


class Catalog:
    """EmbeddedIssuer(catalog.ca) issues with its Connect CA (after start())."""

    ca: ConnectCa
    requests: Mapping[tuple[str, int], int]  # (route, status) -> answered, for metrics

    def __init__(
        self,
        *,
        database: Path,
        socket: Path,
        listen: tuple[str, int] | None = None,
        tls: ssl.SSLContext | None = None,
        cluster: str,
        datacenter: str = "dc1",
        log: Log,
    ) -> None: ...

    async def start(self) -> None: ...
    async def failed(self) -> None:
        """Waits; raises JournalError when the database can no longer be written. A task for the app's TaskGroup."""

    async def stop(self) -> None: ...
