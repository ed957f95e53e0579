"""The one place that speaks to Consul, or to the embedded catalog."""

import ssl


class ConsulAdapter:
    """`url`: http(s)://HOST:PORT, or unix:PATH for the embedded catalog."""

    def __init__(self, url: str, *, token: str = "", tls: ssl.SSLContext | None = None) -> None: ...
    async def close(self) -> None: ...
