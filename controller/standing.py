"""Whether this controller may act as the one that leads. Owns the contract; `election` has the real one."""

from typing import Protocol


class Standing(Protocol):
    """`wait` returns once it may act; raises LeadershipLostError."""

    def confirmed(self) -> bool: ...
    async def wait(self) -> None: ...


class Alone:
    """The standing of a controller whose journal nobody else can write."""

    def confirmed(self) -> bool:
        return True

    async def wait(self) -> None:
        return
