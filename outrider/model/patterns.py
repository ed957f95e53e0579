"""Users' regular expressions: RE2's syntax, which Envoy reads too. Matching takes linear time and hangs nobody."""

import functools

import re2

_QUIET = re2.Options()
_QUIET.log_errors = False  # what is wrong goes to the author, not to standard error
_KEPT = 1024


def fault(pattern: str) -> str:
    """Why it is no regular expression; "" where it is one."""
    try:
        _compiled(pattern)
    except re2.error as error:
        text = error.args[0] if error.args else error
        return text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return ""


def found(pattern: str, text: str) -> bool:
    """Whether it matches anywhere in `text`. `pattern` is one: see `fault`."""
    return _compiled(pattern).search(text) is not None


@functools.lru_cache(_KEPT)
def _compiled(pattern: str) -> "re2._Regexp":
    return re2.compile(pattern, _QUIET)
