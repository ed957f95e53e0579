"""skopeo's and the unpacker's own words, and what is made of them."""

import pytest

from agent.pull.complaints import judged, not_unpacked


def fatal(text: str) -> str:
    return f'time="2024-01-01T00:00:00Z" level=warning msg="x"\ntime="2024-01-01T00:00:00Z" level=fatal msg="{text}"\n'


@pytest.mark.parametrize(
    ("said", "meaning", "retry"),
    [
        ("reading manifest 2 in r/app: manifest unknown: manifest unknown", "no such image there", False),
        ("unable to retrieve auth token: invalid username/password: unauthorized", "wants other credentials", False),
        ("x: toomanyrequests: slow down", "has had enough", True),
        ("pinging container registry r: too many requests to registry", "has had enough", True),
        ("no image found in manifest list for architecture s390x", "not published for this node's architecture", False),
        ("Digest did not match, expected sha256:a, got sha256:b", "not what its digest promises", False),
        ("writing blob: write /x: no space left on device", "disk is full", True),
        ("dial tcp 127.0.0.1:1: connect: connection refused", "does not answer as it should", True),
        ("received unexpected HTTP status: 503 Service Unavailable", "does not answer as it should", True),
        ("unexpected EOF", "does not answer as it should", True),
        ("tls: failed to verify certificate: x509: unknown authority", "certificate is not trusted", False),
        ("something nobody has seen", "something nobody has seen", True),
    ],
)
def test_what_skopeo_says(said: str, meaning: str, *, retry: bool) -> None:
    error = judged(fatal(said))
    assert meaning in str(error)
    assert said in str(error)
    assert error.retry is retry


def test_what_unpacking_says() -> None:
    error = not_unpacked("Traceback\nlayer 2, 0123456789ab: 'x' leads out of it\n", retry=False)
    assert str(error) == "it cannot be unpacked (layer 2, 0123456789ab: 'x' leads out of it)"
    assert not error.retry
    full = not_unpacked("layer 1, 0123456789ab: /big: No space left on device", retry=True)
    assert str(full) == "the node's disk is full (layer 1, 0123456789ab: /big: No space left on device)"
    assert full.retry
    assert not_unpacked("", retry=True).args
