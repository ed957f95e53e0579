"""What skopeo and `layers` say when something is wrong, in words for a job's author, and whether to try again. Pure."""

import re

from outrider.errors import OutriderError

_FATAL = re.compile(r'level=fatal msg="((?:[^"\\]|\\.)*)"')
_CHARS_MAX = 400

# The first that fits. The second part is what to do about it; the third whether it may come good by itself.
_KNOWN: tuple[tuple[str, str, bool], ...] = (
    (r"no space left on device", "the node's disk is full", True),
    (r"toomanyrequests|too many requests|429 Too Many", "the registry has had enough of requests for now", True),
    (r"manifest unknown|name unknown|NAME_UNKNOWN|no descriptor found for reference", "no such image there", False),
    (
        r"unauthorized|authentication required|denied|403 Forbidden|invalid username/password",
        "the registry wants other credentials: name them in the agent's `images: {auth_file: ...}`",
        False,
    ),
    (r"no image found in (manifest list|image index)", "it is not published for this node's architecture", False),
    (
        r"[Dd]igest did not match|[Dd]igest mismatch|not match.* digest|digest.* not match",
        "the content is not what its digest promises: do not use it, ask whoever runs the registry",
        False,
    ),
    (
        r"x509:|gave HTTP response to HTTPS client",
        "the registry's certificate is not trusted: put its CA into the agent's `images: {certificates: ...}`",
        False,
    ),
    (r"no such file or directory|not a directory", "it is not there on this node", False),
    (r"Source image rejected|signature", "the node's policy (/etc/containers/policy.json) does not let it in", False),
    (
        r"connection re(fused|set)|no such host|timeout|unreachable|no route to host|EOF|misbehaving|\b50[0234]\b",
        "the registry does not answer as it should",
        True,
    ),
)


class PullError(OutriderError):
    """An image did not come. The message follows the image's name; `retry`: it may come good by itself."""

    def __init__(self, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


def judged(output: str) -> PullError:
    """What a failed skopeo meant. What nobody has seen before is tried again."""
    said = _last_words(output)
    for pattern, meaning, retry in _KNOWN:
        if re.search(pattern, said):
            return PullError(f"{meaning} ({said})", retry=retry)
    return PullError(said, retry=True)


def not_unpacked(output: str, *, retry: bool) -> PullError:
    """The same of the unpacker: its input is always the same, so only the host can come good."""
    said = _last_words(output)
    if re.search("no space left on device", said, re.IGNORECASE):
        return PullError(f"the node's disk is full ({said})", retry=True)
    return PullError(f"it cannot be unpacked ({said})", retry=retry)


def _last_words(output: str) -> str:
    found = _FATAL.findall(output)
    if found:
        text = found[-1].replace('\\"', '"').replace("\\\\", "\\")
    else:
        text = (output.strip().splitlines() or ["it ended without a word"])[-1]
    return " ".join(text.split())[:_CHARS_MAX]
