"""The difference of two versions of a job reads like the job file."""

from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from outrider.job_diff import diff
from outrider.jobspec.reader import parse_job
from outrider.model.job import Job

SHOP = """
job: shop
groups:
  web:
    count: 3
    network: {ports: {http: {}}}
    services:
      - {name: web, port: http, protocol: http, check: {http: /healthz, interval: 2s}, upstreams: [api]}
    tasks:
      server:
        command: [serve, --fast]
        env: {API: one, MODE: plain}
        resources: {cpu: 100m, memory: 64Mi}
"""


def job(text: str = SHOP) -> Job:
    return parse_job(text.encode(), Path("shop.yaml"))


def changes(old: str, new: str) -> list[str]:
    return [str(change) for change in diff(job(old), job(new))]


def test_the_same_has_no_difference() -> None:
    assert diff(job(), job()) == ()


def test_each_leaf_is_told_in_the_files_units() -> None:
    new = (
        SHOP.replace("count: 3", "count: 5")
        .replace("64Mi", "1Gi")
        .replace("100m", "0.5")
        .replace("interval: 2s", "interval: 500ms")
        .replace("/healthz", "/ready")
        .replace("--fast", "--slow")
        .replace("API: one, MODE: plain", "API: two, EXTRA: yes")
    )
    assert changes(SHOP, new) == [
        '~ groups.web.tasks.server.command: ["serve", "--fast"] -> ["serve", "--slow"]',
        '~ groups.web.tasks.server.env.API: "one" -> "two"',
        '+ groups.web.tasks.server.env.EXTRA: "yes"',
        "~ groups.web.tasks.server.resources.cpu: 100m -> 500m",
        "~ groups.web.tasks.server.resources.memory: 64Mi -> 1Gi",
        "~ groups.web.count: 3 -> 5",
        '~ groups.web.services.web.check.path: "/healthz" -> "/ready"',
        "~ groups.web.services.web.check.interval: 2s -> 500ms",
        '- groups.web.tasks.server.env.MODE: "plain"',
    ]


def test_what_is_new_is_told_without_its_defaults() -> None:
    new = SHOP + "  worker: {tasks: {main: {command: [work]}}}\n"
    assert changes(SHOP, new) == ['+ groups.worker.tasks.main.command: ["work"]']
    assert changes(new, SHOP) == ['- groups.worker.tasks.main.command: ["work"]']


def test_a_new_part_that_says_nothing_is_told_as_such() -> None:
    new = SHOP.replace("{http: {}}", "{http: {}, admin: {}}")
    assert changes(SHOP, new) == ["+ groups.web.network.ports.admin: as by default"]


def test_a_renamed_or_moved_part_is_found_by_its_name() -> None:
    two = SHOP + "      helper: {command: [help], role: helper}\n"
    swapped = msgspec.structs.replace(job(two).groups[0], tasks=tuple(reversed(job(two).groups[0].tasks)))
    assert diff(job(two), msgspec.structs.replace(job(two), groups=(swapped,))) == ()


def test_a_file_is_told_by_size_and_sum(tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(SHOP + "        files: {app.py: ./app.py}\n")
    versions = []
    for content in ("print(1)", "print(22)"):
        (tmp_path / "app.py").write_text(content)
        versions.append(parse_job(file.read_bytes(), file))
    (change,) = diff(*versions)
    assert change.path == "groups.web.tasks.server.files.app.py.content"
    assert (change.old or "").startswith("8 bytes, sha256 ")
    assert (change.new or "").startswith("9 bytes, sha256 ")


def test_a_first_version_is_all_new() -> None:
    told = [str(change) for change in diff(None, job())]
    assert "+ groups.web.count: 3" in told
    assert all(line.startswith("+ ") for line in told)


edits = st.lists(
    st.sampled_from(["count: 3|count: 4", "64Mi|65Mi", "web: |site: ", "plain|fancy", "upstreams: [api]|upstreams: []"])
)


@given(edits, edits)
def test_a_difference_is_empty_only_for_the_same_and_turns_round(first: list[str], second: list[str]) -> None:
    texts = [SHOP, SHOP]
    for at, chosen in enumerate((first, second)):
        for edit in chosen:
            texts[at] = texts[at].replace(*edit.split("|"))
    old, new = map(job, texts)
    assert (diff(old, new) == ()) == (old == new)
    back = {(change.path, change.new, change.old) for change in diff(new, old)}
    assert back == {(change.path, change.old, change.new) for change in diff(old, new)}
