"""nft rules loaded in-process through libnftables: no process to start, which is most of what `nft` costs.

Owns the binding. Not for several threads at once: each user keeps it to one.
"""

import ctypes
from functools import cache
from typing import Self

from outrider.errors import HostError

_LIBRARY = "libnftables.so.1"
_MESSAGE_CHARS_MAX = 500


class Nftables:
    """Speaks to the network namespace that the thread is in when this is made."""

    def __init__(self) -> None:
        self._library = _library()
        self._context = self._library.nft_ctx_new(0)
        self._library.nft_ctx_buffer_error(self._context)
        self._library.nft_ctx_buffer_output(self._context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, commands: str, *, subject: str) -> None:
        """Apply `commands` as one transaction. Raises HostError with nft's own words; nothing was applied then."""
        if self._library.nft_run_cmd_from_buffer(self._context, commands.encode()) == 0:
            return
        message = self._library.nft_ctx_get_error_buffer(self._context).decode(errors="replace")
        raise HostError(subject, step="load nftables rules", hint=message.strip()[:_MESSAGE_CHARS_MAX])

    def asked(self, command: str, *, subject: str) -> str:
        """What nft answers. Raises HostError."""
        self.run(command, subject=subject)
        answer: bytes = self._library.nft_ctx_get_output_buffer(self._context)
        return answer.decode(errors="replace")

    def close(self) -> None:
        if self._context:
            self._library.nft_ctx_free(self._context)
            self._context = None


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise HostError(_LIBRARY, step="load the library", hint="install the package nftables") from error
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    for name in ("nft_ctx_get_error_buffer", "nft_ctx_get_output_buffer"):
        getattr(library, name).restype = ctypes.c_char_p
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_buffer_error", "nft_ctx_buffer_output", "nft_ctx_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return library
