"""The errors of Outrider, told apart by whose fault they are.

An error that a user can see says what was wrong, where, and what to do next.
"""


class OutriderError(Exception):
    """Base of all. `exit_code` is what the command line ends with (sysexits.h where it has one)."""

    exit_code = 1


class InputError(OutriderError):
    """The user's input: a job file, a flag, a name. Nothing was sent or changed."""

    exit_code = 64  # EX_USAGE


class ConfigError(InputError):
    """A component's configuration; the message names the key."""


class RefusedError(OutriderError):
    """The fleet said no: not allowed, not found, in conflict. `code` is stable, for scripts."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PeerError(OutriderError):
    """A peer (controller, agent, Consul, broker) is away, late or speaks nonsense."""

    exit_code = 69  # EX_UNAVAILABLE


class HostError(OutriderError):
    """The host refused something that Outrider needs: a mount, a cgroup, a tool, a disk."""

    exit_code = 71  # EX_OSERR

    def __init__(self, subject: str, *, step: str, hint: str = "") -> None:
        text = f"{subject}: {step}"
        super().__init__(f"{text} ({hint})" if hint else text)
        self.subject = subject
        self.step = step


class JournalError(OutriderError):
    """The journal could not be written or read. The controller that meets it exits: what is not
    in the journal did not happen."""

    exit_code = 74  # EX_IOERR
