"""What an image says of itself, read without believing it."""

import pytest

from agent.pull import image as images
from agent.pull.complaints import PullError
from agent.pull.image import Configuration, Settings, identity
from outrider.model.job import Image, ImageKind

PASSWD = "root:x:0:0::/:/bin/sh\napp:x:33:44::/srv:/bin/sh\nhigh:x:70000:1::/:/bin/sh\nbroken\ntoor:x:0:0::/:/bin/sh\n"
GROUP = "root:x:0:\nstaff:x:50:\n"


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (1000, 1000)),
        ("root", (1000, 1000)),
        ("0:0", (1000, 1000)),
        ("toor", (1000, 1000)),
        ("app", (33, 44)),
        ("33", (33, 44)),
        ("4711", (4711, 0)),
        ("app:staff", (33, 50)),
        ("app:7", (33, 7)),
    ],
)
def test_the_user_is_looked_up_in_the_image_and_never_root(user: str, expected: tuple[int, int]) -> None:
    assert identity(user, PASSWD, GROUP) == expected


@pytest.mark.parametrize("user", ["nobody-here", "high", "70000", "-1", "app:nogroup", "\u0663"])
def test_a_user_who_is_nobody_is_named(user: str) -> None:
    with pytest.raises(PullError, match=user.rpartition(":")[2]):
        identity(user, PASSWD, GROUP)


def test_another_architecture_or_system_is_refused() -> None:
    images.check_platform(Configuration(architecture="arm64", os="linux"), "aarch64")
    images.check_platform(Configuration(), "x86_64")
    for architecture, system in (("arm64", "linux"), ("amd64", "windows")):
        with pytest.raises(PullError, match=f"built for {system}/{architecture}, this node is linux/amd64"):
            images.check_platform(Configuration(architecture=architecture, os=system), "x86_64")


def test_what_is_absent_has_a_meaning() -> None:
    read = images.read(
        b'{"config": {"Env": ["A=b=c", "odd"], "Cmd": null, "Labels": {}}}', Configuration, "configuration"
    )
    made = images.unpacked(read, digest="sha256:1", root="/r", passwd="", group="")
    assert (made.env, made.command, made.entrypoint, made.workdir, made.user) == ({"A": "b=c"}, (), (), "", 1000)
    assert images.unpacked(Configuration(config=Settings()), digest="d", root="/r", passwd="", group="").command == ()
    with pytest.raises(PullError, match="its configuration cannot be read"):
        images.read(b"[]", Configuration, "configuration")


def test_what_it_exposes_is_read_where_it_makes_sense() -> None:
    ports = b'{"8080/tcp": {}, "80": {}, "53/udp": {}, "0/tcp": {}, "65536/tcp": {}, "\xd9\xa3/tcp": {}, "http/tcp": 1}'
    read = images.read(b'{"config": {"ExposedPorts": ' + ports + b"}}", Configuration, "configuration")
    assert images.unpacked(read, digest="d", root="/r", passwd="", group="").ports == (80, 8080)


def test_a_digest_pins_and_a_tag_does_not() -> None:
    digest = "sha256:" + "0" * 64
    assert images.pinned(Image(kind=ImageKind.OCI, reference=f"registry.test:5000/a/b@{digest}")) == digest
    assert images.pinned(Image(kind=ImageKind.OCI, reference="registry.test:5000/a/b:1")) == ""
    assert images.pinned(Image(kind=ImageKind.OCI_LAYOUT, reference="/odd@path")) == ""
    assert images.registry_of(Image(kind=ImageKind.OCI, reference="registry.test:5000/a/b:1")) == "registry.test:5000"
