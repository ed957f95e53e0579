"""The agent's own record of each sandbox below its run directory: what lets a restarted agent find them again.

Owns `RUN/sandboxes/*.json`. A record is there before anything of its sandbox is, and goes after everything: what a
killed agent left half done is found by it. The run directory is volatile, as sandboxes are.
"""

from pathlib import Path

import msgspec

from agent.sandbox.spec import SandboxRecord


class Records:
    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory / "sandboxes"
        self._directory.mkdir(parents=True, exist_ok=True)
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder(SandboxRecord).decode

    def write(self, record: SandboxRecord) -> None:
        path = self._directory / f"{record.id}.json"
        temporary = path.with_suffix(".new")
        temporary.write_bytes(self._encode(record))
        temporary.replace(path)

    def read(self, sandbox: str) -> SandboxRecord | None:
        try:
            return self._decode((self._directory / f"{sandbox}.json").read_bytes())
        except FileNotFoundError:
            return None

    def all(self) -> tuple[SandboxRecord, ...]:
        return tuple(self._decode(path.read_bytes()) for path in sorted(self._directory.glob("*.json")))

    def remove(self, sandbox: str) -> None:
        (self._directory / f"{sandbox}.json").unlink(missing_ok=True)
