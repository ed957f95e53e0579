"""A program of its own: renders a task's templates, which somebody else wrote, and ends whatever they do.

Reads a `Request` as JSON from standard input and writes a `Rendered`. The templates see what the request has and
nothing else (jinja2's sandbox); time, memory and output are bounded, and the program is nobody before it renders.
"""

import os
import resource
import sys
from collections.abc import Callable, Mapping

import jinja2
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agent.belongings.facts import CPU_S_MAX, Facts, Rendered, Request
from outrider.model.job import MIB

OUTPUT_CHARS_MAX = 1024 * 1024
_MEMORY_BYTES_MAX = 512 * MIB
_NOBODY = 65534


def main() -> None:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    _confine()
    files, errors = {}, {}
    environment = _environment(request.facts)
    for path, text in request.templates.items():
        try:
            files[path] = _rendered(environment.from_string(text), request.facts)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            errors[path] = f"line {line}: {error.message}" if line else str(error.message)
        except MemoryError:
            errors[path] = f"it needs more than {_MEMORY_BYTES_MAX // MIB} MiB"
        except Exception as error:  # noqa: BLE001 - whatever a template makes Python do is its author's to hear
            errors[path] = f"{type(error).__name__}: {error}"
    sys.stdout.buffer.write(msgspec.json.encode(Rendered(files=files, errors=errors)))


def _confine() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S_MAX, CPU_S_MAX))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES_MAX, _MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if os.geteuid() == 0:
        os.setgroups(())
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _environment(facts: Facts) -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals = {
        "range": environment.globals["range"],
        "secret": _known(facts.secrets, "secret", "name it under the task's `secrets`"),
        "variable": _known(facts.secrets, "variable", "name it under the task's `secrets`"),
        "service": _known(facts.services, "service", "name it under the group's `upstreams`"),
        "port": _known(facts.ports, "port", "name it under the group's `ports`"),
    }
    return environment


def _known(values: Mapping[str, object], what: str, hint: str) -> Callable[[str], object]:
    def look_up(name: str) -> object:
        if name not in values:
            raise jinja2.TemplateRuntimeError(f"no {what} {name!r} here; {hint}")
        return values[name]

    return look_up


def _rendered(template: jinja2.Template, facts: Facts) -> str:
    pieces, left = [], OUTPUT_CHARS_MAX
    for piece in template.generate(node=facts.node, alloc=facts.alloc):
        left -= len(piece)
        if left < 0:
            raise jinja2.TemplateRuntimeError(f"it renders to more than {OUTPUT_CHARS_MAX} characters")
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    main()
