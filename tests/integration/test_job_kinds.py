"""Every kind of job on a real fleet of three nodes, as people run them."""

import json
from pathlib import Path

import pytest

from tests.integration.fleet import DevFleet, eventually, fleet

__all__ = ["fleet"]
pytestmark = pytest.mark.host


class Jobs:
    """Job files, beside each other, and the fleet that they are for."""

    def __init__(self, fleet: DevFleet, directory: Path) -> None:
        self.fleet = fleet
        self.directory = directory

    def run(self, text: str, *, code: int = 0) -> str:
        """`job run`; what it said on both ends."""
        file = self.directory / "job.yaml"
        file.write_text(text)
        return self.outrider("job", "run", str(file), code=code)

    def outrider(self, *words: str, code: int = 0, text: str = "") -> str:
        done = self.fleet.outrider(*words, text=text)
        assert done.returncode == code, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def status(self, job: str) -> dict[str, object]:
        found = self.fleet.json("job", "status", job)
        assert isinstance(found, dict)
        return found

    def events(self, job: str, kind: str) -> list[str]:
        """The messages of a job's events of one kind."""
        lines = self.fleet.outrider("events", "--json").stdout.splitlines()
        found = [json.loads(line) for line in lines]
        return [event["message"] for event in found if event["job"] == job and event["kind"] == kind]


@pytest.fixture
def jobs(fleet: DevFleet, tmp_path: Path) -> Jobs:
    return Jobs(fleet, tmp_path)


ROLES = """
job: roles
type: {kind}
groups:
  web:
    restart: {{delay: 100ms}}
    tasks:
      shipper:
        role: helper
        command: [sh, -c, "trap 'echo shipper ends; exit 0' TERM; echo shipper begins; while :; do sleep 0.05; done"]
      first: {{role: init, command: [sh, -c, "echo first; sleep 0.2"]}}
      second: {{role: init, command: [sh, -c, "echo second; {second}"]}}
      server: {{command: [sh, -c, "{server}"]}}
"""


def test_init_tasks_run_first_and_the_helper_beside_the_main_task(jobs: Jobs) -> None:
    jobs.run(ROLES.format(kind="service", second="true", server="echo works; exec sleep infinity"))
    (allocation,) = jobs.fleet.json("alloc", "ls", "--job", "roles")
    tasks = {task["name"]: task for task in allocation["report"]["tasks"]}
    assert {name: task["status"] for name, task in tasks.items()} == {
        "first": "exited",
        "second": "exited",
        "server": "running",
        "shipper": "running",
    }
    assert tasks["first"]["finished_at_s"] <= tasks["second"]["started_at_s"]
    assert tasks["second"]["finished_at_s"] <= min(tasks[name]["started_at_s"] for name in ("server", "shipper"))
    assert jobs.outrider("alloc", "logs", allocation["id"]) == "works\n", "the main task's, where none is named"
    assert jobs.outrider("alloc", "logs", allocation["id"], "second") == "second\n"
    assert "job roles: stopped" in jobs.outrider("job", "stop", "roles")


def test_a_batch_job_does_not_wait_for_its_helper(jobs: Jobs) -> None:
    said = jobs.run(ROLES.format(kind="batch", second="true", server="echo works").replace("roles", "roles-batch"))
    assert "job roles-batch, version 1: is complete" in said
    assert jobs.status("roles-batch")["state"] == "complete"
    said = jobs.outrider("logs", "roles-batch", "shipper")
    assert "shipper begins" in said, "its logs outlive it"
    assert "shipper ends" in said
    assert "works" in jobs.outrider("logs", "roles-batch"), "the main task's, where none is named"


def test_an_init_task_that_fails_keeps_the_others_from_running_and_says_so(jobs: Jobs) -> None:
    text = ROLES.format(kind="batch", second="echo broken; exit 3", server="echo never")
    said = jobs.run(text.replace("delay: 100ms", "attempts: 0").replace("roles", "roles-broken"), code=1)
    assert "second exited with code 3" in said
    assert "| broken" in said
    assert jobs.status("roles-broken")["state"] == "failed"


PERIODIC = """
job: report
schedule: {cron: "*/2 * * * * *", time_zone: Europe/Berlin}
groups: {main: {tasks: {main: {command: [sh, -c, "sleep 3"]}}}}
"""


def test_a_schedule_launches_jobs_and_leaves_out_what_would_overlap(jobs: Jobs) -> None:
    said = jobs.run(PERIODIC)
    assert "job report: next launch 20" in said
    assert " Europe/Berlin, in " in said
    eventually(lambda: bool(jobs.events("report", "job.skipped")), "a launch that is left out")
    assert "still runs, and overlap is forbidden" in jobs.events("report", "job.skipped")[0]
    launched = jobs.events("report", "job.launched")
    children = jobs.status("report")["children"]
    assert [child["name"] for child in children][: len(launched)] == launched  # type: ignore[index, union-attr]
    assert jobs.status("report")["state"] == "waiting"
    eventually(lambda: jobs.status(launched[0])["state"] == "complete", "the first one's end")
    assert "waiting, next in " in jobs.outrider("job", "ls")
    jobs.outrider("job", "stop", "report")
    assert jobs.status("report")["next_launch_s"] is None
    assert "is stopped" in jobs.outrider("job", "dispatch", "report", code=1)


def test_a_cron_line_that_never_fires_is_bad_input(jobs: Jobs) -> None:
    said = jobs.run(PERIODIC.replace("*/2 * * * * *", "0 0 30 2 *"), code=64)
    assert "job.yaml:3:12: schedule.cron: '0 0 30 2 *' never fires: none of its months has that day" in said


DISPATCH = """
job: resize
parameters: {required: [url], optional: [width]}
groups:
  main:
    restart: {attempts: 0}
    tasks:
      main:
        command:
          - sh
          - -c
          - test "$0 $OUTRIDER_PARAM_WIDTH" = 'http://a $${b} 3' && grep -q hello payload
          - ${param.url}
"""


def test_a_dispatch_fills_in_parameters_and_payload_and_ends_as_its_job_did(jobs: Jobs) -> None:
    assert "version 1: waits to be launched" in jobs.run(DISPATCH)
    url = "url=http://a ${b}"
    said = jobs.outrider(
        "job", "dispatch", "resize", "--param", url, "--param", "width=3", "--payload", "-", text="hello"
    )
    assert "job resize: launched resize-1" in said
    assert "job resize-1, version 1: is complete" in said
    said = jobs.outrider("job", "dispatch", "resize", "--param", url, code=1)
    assert "main exited with code 1" in said
    children = jobs.status("resize")["children"]
    assert [(child["name"], child["state"]) for child in children] == [  # type: ignore[union-attr]
        ("resize-1", "complete"),
        ("resize-2", "failed"),
    ]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["resize"], 64, "parameter 'url' is required; --param url=VALUE"),
        (["resize", "--param", "url=a", "--param", "hight=1"], 64, "no parameter 'hight'; known: url, width"),
        (["resize", "--param", "url"], 64, "--param url: expected NAME=VALUE"),
        (["resize", "--param", "url=a", "--payload", "/nowhere"], 64, "--payload /nowhere: cannot be read"),
        (["nobody"], 1, "no job 'nobody'"),
    ],
)
def test_a_bad_dispatch_says_what_is_wrong(jobs: Jobs, words: list[str], code: int, text: str) -> None:
    jobs.run(DISPATCH)
    assert text in jobs.outrider("job", "dispatch", *words, code=code)


def test_a_payload_is_bounded(jobs: Jobs) -> None:
    jobs.run(DISPATCH)
    said = jobs.outrider("job", "dispatch", "resize", "--param", "url=a", "--payload", "-", text="x" * 70_000, code=64)
    assert "payload: 70000 bytes; at most 65536" in said


SLEEPER = """
job: sleeper
groups:
  main:
    count: 2
    tasks: {main: {command: [sleep, "INFINITY"]}}
"""


def test_versions_are_kept_compared_and_gone_back_to(jobs: Jobs) -> None:
    jobs.run(SLEEPER.replace("INFINITY", "1111"))
    jobs.run(SLEEPER.replace("INFINITY", "2222"))
    assert '~ groups.main.tasks.main.command: ["sleep", "1111"] -> ["sleep", "2222"]' in jobs.outrider(
        "job", "diff", "sleeper"
    )
    said = jobs.outrider("job", "revert", "sleeper")
    assert "job sleeper, version 3: holds what the last good version before did" in said
    assert "job sleeper, version 3: runs as it should" in said
    history = jobs.fleet.json("job", "history", "sleeper")
    assert [(one["status"]["version"]["version"], one["status"]["rollout"]) for one in history] == [
        (1, "successful"),
        (2, "successful"),
        (3, "successful"),
    ]
    assert "0 changes" in jobs.outrider("job", "diff", "sleeper", "1", "3")
    assert "version 17 is not there" in jobs.outrider("job", "revert", "sleeper", "17", code=1)
    assert "version 3 is the newest already" in jobs.outrider("job", "revert", "sleeper", "3", code=1)
    assert "nothing older than version 1 is kept" in jobs.outrider("job", "diff", "sleeper", "0", "1", code=1)
    jobs.outrider("job", "stop", "sleeper")


def test_a_group_is_scaled_by_hand_without_touching_what_runs(jobs: Jobs) -> None:
    jobs.run(SLEEPER.replace("INFINITY", "infinity"))
    before = {one["id"] for one in jobs.fleet.json("alloc", "ls", "--job", "sleeper")}
    jobs.outrider("job", "scale", "sleeper", "5")
    after = jobs.fleet.json("alloc", "ls", "--job", "sleeper")
    assert len(after) == 5
    assert all(one["healthy"] for one in after)
    assert before < {one["id"] for one in after}
    jobs.outrider("job", "scale", "sleeper", "main", "2")
    assert {one["id"] for one in jobs.fleet.json("alloc", "ls", "--job", "sleeper")} == before
    assert jobs.events("sleeper", "job.scaled") == ["group main: 2 -> 5 by hand", "group main: 5 -> 2 by hand"]
    assert "expected [GROUP] COUNT" in jobs.outrider("job", "scale", "sleeper", "main", "many", code=64)
    assert "has no group 'web'; it has main" in jobs.outrider("job", "scale", "sleeper", "web", "3", code=1)
    jobs.outrider("job", "stop", "sleeper")


def test_a_system_job_has_one_copy_on_each_node_and_follows_one_that_comes(jobs: Jobs) -> None:
    assert jobs.fleet.dev("kill", "n3").returncode == 0
    eventually(lambda: jobs.fleet.node_statuses()["n3"] != "ready", "n3's loss")
    jobs.run("job: watch\ntype: system\ngroups: {dog: {tasks: {main: {command: [sleep, infinity]}}}}\n")
    assert {one["node"] for one in jobs.fleet.json("alloc", "ls", "--job", "watch")} == {"n1", "n2"}
    assert jobs.fleet.dev("heal", "n3").returncode == 0

    def everywhere() -> bool:
        found = jobs.fleet.json("alloc", "ls", "--job", "watch")
        return {one["node"] for one in found if one["healthy"]} == {"n1", "n2", "n3"}

    eventually(everywhere, "a copy on n3")
    jobs.outrider("job", "stop", "watch")


SERVER = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        time.sleep(0.1)
        self.send_response(200); self.send_header("content-length", "2"); self.end_headers(); self.wfile.write(b"ok")
    def log_message(self, *arguments): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
CLIENT = """
import threading, time, urllib.request
def visit():
    while True:
        try:
            urllib.request.urlopen("http://web.mesh/", timeout=5).read()
        except OSError:
            time.sleep(0.1)
for _ in range(3):
    threading.Thread(target=visit).start()
"""
WEB = """
job: web
groups:
  web:
    scaling: {{min: 1, max: 3, target: {{{target}}}, cooldown: 2s}}
    network: {{ports: {{http: {{}}}}}}
    services: [{{name: web, port: http, protocol: http, check: {{http: /}}, allow: [visitor]}}]
    tasks:
      main: {{command: [python3, "${{task.dir}}/server.py", "${{port.http}}"], files: {{server.py: ./server.py}}}}
"""
VISITOR = """
job: visitor
groups:
  visitor:
    depends_on: [web]
    services: [{name: visitor, upstreams: [web]}]
    tasks: {main: {command: [python3, "${task.dir}/client.py"], files: {client.py: ./client.py}}}
"""


def copies(jobs: Jobs, job: str) -> int:
    return len(jobs.fleet.json("alloc", "ls", "--job", job))


@pytest.mark.parametrize("target", ["requests: 5", "concurrency: 0.5"])
def test_a_group_grows_with_what_its_sidecars_count_and_shrinks_after(jobs: Jobs, target: str) -> None:
    (jobs.directory / "server.py").write_text(SERVER)
    (jobs.directory / "client.py").write_text(CLIENT)
    jobs.run(WEB.format(target=target))
    jobs.run(VISITOR)
    eventually(lambda: copies(jobs, "web") == 3, "as many copies as there may be")
    (scaling,) = jobs.status("web")["scaling"]  # type: ignore[misc]
    assert scaling["count"] == 3
    jobs.outrider("job", "stop", "visitor")
    eventually(lambda: copies(jobs, "web") == 1, "the one copy that is left")
    reasons = jobs.events("web", "job.scaled")
    assert any("-> 3: " in reason and "each, wanted" in reason for reason in reasons)
    assert reasons[-1].endswith("for 2 s")
    assert "scaling: group web: 1 copies of 1 to 3; " in jobs.outrider("job", "status", "web")
    jobs.outrider("job", "stop", "web")


def test_a_group_grows_with_its_cpu_and_a_new_submission_keeps_what_was_found(jobs: Jobs) -> None:
    text = """
job: burner
groups:
  burner:
    scaling: {min: 1, max: 2, target: {cpu: 50%}, cooldown: 2s}
    tasks: {main: {command: [sh, -c, "while :; do :; done"], resources: {cpu: 50m, cpu_max: 50m}}}
"""
    jobs.run(text)
    eventually(lambda: copies(jobs, "burner") == 2, "a second copy")
    assert "1 -> 2: " in jobs.events("burner", "job.scaled")[0]
    assert "exactly this already" in jobs.run(text)
    said = jobs.outrider("job", "scale", "burner", "3", code=1)
    assert "its scaling keeps group burner within 1 and 2 copies" in said
    jobs.outrider("job", "stop", "burner")


def test_a_job_waits_for_a_service_and_says_for_which(jobs: Jobs) -> None:
    waiting = "job: front\ngroups: {web: {depends_on: [store], tasks: {main: {command: [sleep, infinity]}}}}\n"
    file = jobs.directory / "front.yaml"
    file.write_text(waiting)
    said = jobs.outrider("job", "run", str(file), "--detach")
    assert "nobody provides service 'store' yet, which it depends on" in said
    (allocation,) = jobs.status("front")["allocations"]  # type: ignore[misc]
    assert (allocation["status"], allocation["reason"]) == ("pending", "waits for service store: nobody provides it")
    jobs.run(
        "job: store\ngroups:\n  db:\n    network: {ports: {db: {}}}\n"
        "    services: [{name: store, port: db, check: {command: [test, -e, /task/ready], interval: 100ms}}]\n"
        '    tasks: {main: {command: [sh, -c, "sleep 2; touch /task/ready; exec sleep infinity"]}}\n'
    )
    assert "job front, version 1: runs as it should" in jobs.outrider("job", "run", str(file))
    started = [one["report"]["tasks"][0]["started_at_s"] for one in jobs.status("front")["allocations"]]  # type: ignore[attr-defined]
    (store,) = jobs.status("store")["allocations"]  # type: ignore[misc]
    assert started[0] >= store["report"]["tasks"][0]["started_at_s"] + 2
    for job in ("front", "store"):
        jobs.outrider("job", "stop", job)


BATCH = """
job: JOB
type: batch
groups:
  work:
    count: COUNT
    restart: {attempts: RESTARTS, delay: 100ms}
    reschedule: {attempts: RESCHEDULES, delay: 200ms}
    tasks:
      main: {command: [sh, -c, "SCRIPT"]}
"""


def batch(job: str, script: str, *, count: int = 2, restarts: int = 1, reschedules: int = 0) -> str:
    text = BATCH.replace("JOB", job).replace("SCRIPT", script).replace("COUNT", str(count))
    return text.replace("RESTARTS", str(restarts)).replace("RESCHEDULES", str(reschedules))


def test_batch_work_is_tried_again_and_is_done_once_it_ended_well(jobs: Jobs) -> None:
    text = batch("tries", "test -e again || { touch again; echo broken; exit 3; }")
    said = jobs.run(text)
    assert "main exited with code 3; starting again" in said
    assert "job tries, version 1: is complete" in said
    status = jobs.status("tries")
    assert status["state"] == "complete"
    assert [one["status"] for one in status["allocations"]] == ["complete", "complete"]  # type: ignore[attr-defined]
    assert "exactly this already" in jobs.run(text)
    assert len(jobs.status("tries")["allocations"]) == 2, "what is done is not done again"  # type: ignore[arg-type]


def test_batch_work_that_fails_for_good_fails_its_job_with_its_last_words(jobs: Jobs) -> None:
    said = jobs.run(batch("fails", "echo no way; exit 7"), code=1)
    assert "main exited with code 7; tried again once within 5 min" in said
    assert "| no way" in said
    assert jobs.status("fails")["state"] == "failed"


def test_batch_work_that_fails_on_one_node_is_tried_on_another(jobs: Jobs) -> None:
    first, *others = jobs.fleet.node_statuses()
    for node in others:
        jobs.outrider("node", "eligibility", node, "--disable")
    file = jobs.directory / "moves.yaml"
    file.write_text(batch("moves", f"test $OUTRIDER_NODE != {first}", count=1, restarts=0, reschedules=20))

    def ended(how: str) -> list[str]:
        allocations = jobs.status("moves")["allocations"]
        return [one["node"] for one in allocations if one["status"] == how]  # type: ignore[attr-defined]

    jobs.outrider("job", "run", str(file), "--detach")
    eventually(lambda: bool(ended("failed")), "a failure")
    assert jobs.status("moves")["state"] != "failed", "it is tried again"
    for node in others:
        jobs.outrider("node", "eligibility", node, "--enable")
    eventually(lambda: jobs.status("moves")["state"] == "complete", "its end")
    assert set(ended("failed")) == {first}
    assert ended("complete")[0] in others
