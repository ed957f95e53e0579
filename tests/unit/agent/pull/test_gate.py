"""What a node's policy on images lets in."""

import json
import sys
from pathlib import Path

import pytest

from agent.pull.complaints import PullError
from agent.pull.gate import Gate, ImagePolicy
from agent.pull.image import UnpackedImage
from outrider.log import Log
from outrider.model.job import Image, ImageKind

IMAGE = Image(kind=ImageKind.OCI, reference="registry.example.org/app:1")
TRIVY = {"Results": [{"Vulnerabilities": [{"VulnerabilityID": "CVE-1", "PkgName": "zlib", "Severity": "CRITICAL"}]}]}
GRYPE = {"matches": [{"vulnerability": {"id": "CVE-2", "severity": "High"}, "artifact": {"name": "curl"}}]}
PLAIN = {"findings": [{"id": "X", "package": "y", "severity": "medium"}]}


def found(directory: Path) -> UnpackedImage:
    root = directory / "image" / "root"
    root.mkdir(parents=True)
    return UnpackedImage(digest="sha256:" + "0" * 64, root=str(root))


def scanner(says: object) -> ImagePolicy:
    """Prints it, and leaves a mark for each time."""
    script = f"import sys; open(sys.argv[1] + '/../count', 'a').write('x'); print({json.dumps(says)!r})"
    return ImagePolicy(scan=(sys.executable, "-c", script, "{root}"))


async def judged(policy: ImagePolicy, image: UnpackedImage) -> str:
    """The reason of a refusal; "" where it may run."""
    try:
        await Gate(policy, Log("test")).unpacked(IMAGE, image, lambda _: None)
    except PullError as error:
        return str(error)
    return ""


def test_only_a_digest_will_do_where_the_node_says_so() -> None:
    gate = Gate(ImagePolicy(require_digest=True), Log("test"))
    with pytest.raises(PullError, match="this node takes images by their digest alone"):
        gate.asked(IMAGE)
    gate.asked(Image(kind=ImageKind.OCI, reference=f"registry.example.org/app@sha256:{'0' * 64}"))


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (TRIVY, "refuses it: CVE-1 in zlib (CRITICAL)"),
        (GRYPE, "refuses it: CVE-2 in curl (High)"),
        (PLAIN, ""),
        ({"Results": None}, ""),
        ({"other": 1}, "ended with 0"),
        ([1], "ended with 0"),
    ],
)
async def test_findings_over_the_threshold_are_listed(tmp_path: Path, says: object, told: str) -> None:
    said = await judged(scanner(says), found(tmp_path))
    assert (told in said) if told else not said


async def test_an_image_is_looked_at_once(tmp_path: Path) -> None:
    image, policy = found(tmp_path), scanner(PLAIN)
    assert await judged(policy, image) == await judged(policy, image) == ""
    assert (tmp_path / "image/count").read_text() == "x"
    assert await judged(ImagePolicy(scan=(*policy.scan, "more"), refuse="medium"), image)
    assert (tmp_path / "image/count").read_text() == "xx"


async def test_a_scanner_that_fails_lets_nothing_in(tmp_path: Path) -> None:
    policy = ImagePolicy(scan=(sys.executable, "-c", "import sys; sys.exit('no database')"))
    assert "ended with 1: no database" in await judged(policy, found(tmp_path))
