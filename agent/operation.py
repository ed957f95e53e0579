"""The shape of what operators converse with, for what is no program."""

from typing import Self


class Operation:
    """As `agent.tunnels.Process` has it: what takes no input, has no terminal and cannot be killed half-way."""

    async def read(self) -> tuple[str, bytes] | None:
        raise NotImplementedError

    async def write(self, data: bytes) -> None:
        """Nothing is expected."""

    def close_stdin(self) -> None:
        """Nothing is expected."""

    def resize(self, rows: int, columns: int) -> None:
        """There is no terminal."""

    def kill(self) -> None:
        """Its end is `__aexit__`'s."""

    async def wait(self) -> int:
        return 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Nothing is held."""
