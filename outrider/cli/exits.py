"""Ends of the program that are no errors. Imports nothing."""


class Interrupt(BaseException):
    """Ctrl-C. No KeyboardInterrupt, which typer would turn into an exit code of its own."""


class RemoteExit(Exception):  # noqa: N818 - the command's own end, told on
    """A command in an allocation ended with this code, or a plan has changes: it is the answer, and no error."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code
