"""What runs on a host, in the host's own Python: looks, installs, configures, starts, stops, removes.

Standard library alone, and readable by Python 3.7: an old one must be told, not trip. `python3 -` gets this file on
standard input, after a line that sets ASKED to a JSON document; the answer is one JSON object, {"error": TEXT} where a
step failed. Whole or not at all: a version is unpacked beside and moved into place, a file replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

ASKED: str  # set by whoever sends this file

PREFIX = Path("/opt/outrider")
ETC = Path("/etc/outrider")
DATA = Path("/var/lib/outrider")
NODE = DATA / "agent"
LOGS = Path("/var/log/outrider")
UNITS = Path("/etc/systemd/system")
CURRENT = PREFIX / "current"
VERSIONS_KEPT = 2
ROOM_BYTES = 1 << 30  # an unpacked version, and as much again
WAIT_S = 20.0


class StepError(Exception):
    """Told as it is."""


def probe(asked: dict[str, Any]) -> dict[str, Any]:
    """What the host is, and what of Outrider is on it."""
    packages = asked.get("packages", [])
    return {
        "python": ".".join(map(str, sys.version_info[:2])),
        "machine": platform.machine(),
        "hostname": platform.node(),
        "uid": os.geteuid(),
        "systemd": Path("/run/systemd/system").is_dir(),
        "apt": shutil.which("apt-get") is not None,
        "missing": [name for name in packages if not installed(name)],
        "free_bytes": free(PREFIX),
        "clock_s": time.time(),
        "versions": sorted(path.name for path in versions()),
        "current": CURRENT.resolve().name if CURRENT.is_symlink() and CURRENT.exists() else "",
        "bundle_there": Path(asked.get("bundle", "/nowhere")).exists(),
        "joined": {"agent": certified(NODE / "node.crt")},
        "identity": identity(NODE / "node.crt"),
        "trusts": fingerprints(NODE / "ca.crt"),
        "running": {role: running(role) for role in ("agent", "controller")},
        "configured": {role: digest(ETC / (f"{role}.yaml")) for role in ("agent", "controller")},
    }


def packages(asked: dict[str, Any]) -> dict[str, Any]:
    """Installs Debian packages. Their daemons are not started: a policy stands in the way meanwhile."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        told = apt("install", "--no-install-recommends", *asked["packages"])
        if told:  # lists that are old or absent are the usual reason
            apt("update")
            told = apt("install", "--no-install-recommends", *asked["packages"])
        if told:
            raise StepError(f"apt-get cannot install {' '.join(asked['packages'])}: {told}")
        return {"installed": asked["packages"]}
    finally:
        if ours:
            policy.unlink()


def apt(*words: str) -> str:
    """What apt-get complained of last; "" where all went well."""
    done = subprocess.run(
        ["apt-get", "-y", "-q", *words],
        env=dict(os.environ, DEBIAN_FRONTEND="noninteractive"), capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    lines = (done.stderr or done.stdout).strip().splitlines() or ["it does not say why"]
    return lines[-1] if done.returncode else ""


def install(asked: dict[str, Any]) -> dict[str, Any]:
    """Unpacks the bundle into a virtual environment of its own. One that is there already stays as it is."""
    bundle = Path(asked["bundle"])
    try:
        with tarfile.open(bundle) as tar:
            manifest = json.loads(member(tar, "manifest.json"))
            target = PREFIX / "versions" / manifest["id"]
            if (target / "complete").exists():
                return {"version": manifest["id"], "new": False}
            unpack(tar, manifest, target)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, KeyError) as error:
        if getattr(error, "errno", None) == 28:
            raise StepError(f"the disk is full: {PREFIX} needs about {ROOM_BYTES >> 20} MiB") from error
        raise StepError(f"the bundle cannot be unpacked: {error}") from error
    finally:
        bundle.unlink(missing_ok=True)
    return {"version": manifest["id"], "new": True}


def unpack(tar: tarfile.TarFile, manifest: dict[str, Any], target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(partial)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise StepError(f"python3 -m venv: {(done.stderr or done.stdout).strip()}")
        (site,) = (partial / "lib").glob("python3.*/site-packages")
        for name, sha256 in sorted(manifest["wheels"].items()):
            content = member(tar, name)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise StepError(f"the bundle is damaged: {name} is not what its list says")
            extract(content, site)
        script = partial / "bin" / "outrider"
        script.write_text(f"#!{target}/bin/python\nimport sys\nfrom outrider.cli.main import main\nsys.exit(main())\n")
        script.chmod(0o755)
        for name in partial.glob("bin/[aA]ctivate*"):
            name.unlink()  # they name the directory where it was made
        (partial / "complete").write_text(manifest["id"])
        subprocess.run(["sync", "--file-system", str(partial)], check=False)  # what `complete` promises is on the disk
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise StepError(f"the bundle is damaged: {name} is no file")
    return file.read()


def extract(wheel: bytes, site: Path) -> None:
    """Files alone: there is no link that a later name could follow."""
    made = set()
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename)
            if name.is_absolute() or ".." in name.parts:
                raise StepError(f"the bundle is damaged: {entry.filename} leads out of it")
            if name.parent not in made:
                (site / name.parent).mkdir(parents=True, exist_ok=True)
                made.add(name.parent)
            with (site / name).open("wb") as out:
                os.fchmod(out.fileno(), (entry.external_attr >> 16) & 0o755 or 0o644)
                out.write(archive.read(entry))


def configure(asked: dict[str, Any]) -> dict[str, Any]:
    """Writes files, and tells which are new or other than they were."""
    changed = []
    for name, file in sorted(asked["files"].items()):
        path, content, mode = Path(name), file["content"], int(file["mode"], 8)
        if path.exists() and path.read_text() == content and stat.S_IMODE(path.stat().st_mode) == mode:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            os.fchmod(out.fileno(), mode)
            out.write(content)
        partial.replace(path)
        changed.append(name)
    return {"changed": changed}


def activate(asked: dict[str, Any]) -> dict[str, Any]:
    """From here on `current` is this version. Older ones beyond the one before are removed."""
    target = PREFIX / "versions" / asked["version"]
    if not (target / "complete").exists():
        raise StepError(f"{asked['version']} is not installed")
    before = CURRENT.resolve().name if CURRENT.is_symlink() else ""
    partial = PREFIX / ".current.partial"
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(CURRENT)
    command = Path("/usr/local/bin/outrider")
    if not command.exists() and not command.is_symlink():
        command.symlink_to(CURRENT / "bin" / "outrider")
    # A running sidecar keeps the Envoy of the version it started with: that one stays.
    kept = {asked["version"], before}
    others = sorted((p for p in versions() if p.name not in kept), key=lambda p: p.stat().st_mtime)
    for path in others[: max(0, len(others) + len(kept) - VERSIONS_KEPT)]:
        if not in_use(path):
            shutil.rmtree(path, ignore_errors=True)
    return {"before": before}


def service(asked: dict[str, Any]) -> dict[str, Any]:
    """start, restart or stop one role; with systemd where it runs, else in the background of its own."""
    role, verb = asked["role"], asked["verb"]
    if Path("/run/systemd/system").is_dir():
        if verb == "stop":
            systemctl("disable", "--now", f"outrider-{role}.service")
        else:
            systemctl("daemon-reload")
            systemctl("enable", f"outrider-{role}.service")
            systemctl("restart" if verb == "restart" else "start", f"outrider-{role}.service")
        return {"by": "systemd"}
    if verb in ("stop", "restart"):
        stop_keeper(role)
    if verb in ("start", "restart") and not running(role):
        start_keeper(role)
    return {"by": "keeper"}


def forget(_: dict[str, Any]) -> dict[str, Any]:
    """The node's certificate, and whom it trusts: it joins anew. Its key stays."""
    for name in ("node.crt", "ca.crt"):
        with contextlib.suppress(FileNotFoundError):
            (NODE / name).unlink()
    return {}


def purge(_: dict[str, Any]) -> dict[str, Any]:
    """Ends what the agent runs here, and removes it."""
    config = ETC / "agent.yaml"
    if not config.exists() or not CURRENT.exists():
        return {"purged": False}
    words = [str(CURRENT / "bin" / "python"), "-m", "agent", "--config", str(config), "--purge"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, cwd="/")
    if done.returncode:
        raise StepError(f"agent --purge: {(done.stderr or done.stdout).strip()[-400:]}")
    return {"purged": True}


def remove(asked: dict[str, Any]) -> dict[str, Any]:
    """All of Outrider, and with `data` what it kept."""
    for role in ("agent", "controller"):
        unit = UNITS / (f"outrider-{role}.service")
        if unit.exists():
            unit.unlink()
    if Path("/run/systemd/system").is_dir():
        systemctl("daemon-reload")
    command = Path("/usr/local/bin/outrider")
    if command.is_symlink() and str(os.readlink(command)).startswith(str(PREFIX)):
        command.unlink()
    for path in (PREFIX, ETC, LOGS, *([DATA] if asked.get("data") else [])):
        clear(path)
    return {}


def clear(path: Path) -> None:
    """The directory may be a mount of its own: then it stays, empty."""
    for child in path.iterdir() if path.is_dir() else ():
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def logs(asked: dict[str, Any]) -> dict[str, Any]:
    """The last lines of a role's log."""
    if Path("/run/systemd/system").is_dir():
        words = ["journalctl", "-u", f"outrider-{asked['role']}", "-n", "20", "-o", "cat", "--no-pager"]
        return {"text": subprocess.run(words, capture_output=True, text=True, check=False).stdout}
    path = LOGS / (f"{asked['role']}.log")
    return {"text": "\n".join(path.read_text(errors="replace").splitlines()[-20:]) if path.exists() else ""}


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """One command of the installed Outrider."""
    words = [str(CURRENT / "bin" / "outrider"), *asked["words"]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


def versions() -> list[Path]:
    directory = PREFIX / "versions"
    return [path for path in directory.iterdir() if (path / "complete").exists()] if directory.is_dir() else []


def in_use(version: Path) -> bool:
    """Whether a process runs a program of it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(version) in os.readlink(entry / "exe") or str(version) in (entry / "maps").read_text():
                    return True
            except OSError:
                continue
    return False


def installed(name: str) -> bool:
    words = ["dpkg-query", "-W", "-f", "${db:Status-Status}", name]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout == "installed"


def free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def certified(path: Path) -> bool:
    """Whether there is a certificate, and it has not ended."""
    if not path.exists():
        return False
    told = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]  # the library has no other reader
    return ssl.cert_time_to_seconds(str(told["notAfter"])) > time.time()


def identity(path: Path) -> str:
    """Whom the certificate names, as outrider://CLUSTER/node/NODE."""
    if not path.exists():
        return ""
    told = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]  # as above
    return next((value for kind, value in told.get("subjectAltName", ()) if kind == "URI"), "")


def fingerprints(path: Path) -> list[str]:
    """Of each certificate in the file."""
    end = "-----END CERTIFICATE-----"
    blocks = path.read_text().split(end)[:-1] if path.exists() else []
    return [hashlib.sha256(ssl.PEM_cert_to_DER_cert(block.strip() + "\n" + end)).hexdigest() for block in blocks]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def running(role: str) -> bool:
    if Path("/run/systemd/system").is_dir():
        words = ["systemctl", "is-active", f"outrider-{role}"]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() == "active"
    return keeper(role) is not None


def systemctl(*words: str) -> None:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise StepError("systemctl {}: {}".format(" ".join(words), done.stderr.strip()))


def keeper(role: str) -> int | None:
    """The process that keeps the role running: a number in a file may long be another's."""
    try:
        pid = int((DATA / (f"{role}.pid")).read_text())
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if str(ETC / (f"{role}.yaml")).encode() in words else None


def start_keeper(role: str) -> None:
    """`outrider-keep ROLE CONFIG`: starts the role, and again when it ends, until it is told to stop."""
    DATA.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    keep = PREFIX / "outrider-keep"
    with (LOGS / (f"{role}.log")).open("ab") as log:
        process = subprocess.Popen(
            ["/bin/sh", str(keep), role, str(ETC / (f"{role}.yaml"))],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True,
        )  # fmt: skip
    (DATA / (f"{role}.pid")).write_text(str(process.pid))


def stop_keeper(role: str) -> None:
    pid = keeper(role)
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    end_s = time.monotonic() + WAIT_S
    while keeper(role) is not None:
        if time.monotonic() > end_s:
            raise StepError(f"the {role} does not end")
        time.sleep(0.05)


TASKS = {
    "probe": probe, "packages": packages, "install": install, "configure": configure, "activate": activate,
    "service": service, "forget": forget, "purge": purge, "remove": remove, "logs": logs, "run": run,
}  # fmt: skip


def main() -> None:
    asked = json.loads(ASKED)
    try:
        answer = TASKS[asked["task"]](asked)
    except StepError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": "{}: {}".format(error.filename or "the host", error.strerror)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
