"""`python -m tests.scenarios`: play every script and write its trace anew. Look at the diff before you keep it."""

from tests.scenarios.script import played, scripts

for path in scripts():
    before = path.read_text()
    after = played(before)
    if after != before:
        path.write_text(after)
        print(f"{path.name}: changed")
