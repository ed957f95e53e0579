"""What a task brings along, in a job file: `secrets:`, `volumes:`, `artifacts:`, `templates:` -> values."""

from collections.abc import Callable

from outrider.ids import SecretName, VolumeName
from outrider.jobspec.document import Mapping, Scalar
from outrider.jobspec.fields import Faults, Fields, named
from outrider.jobspec.units import duration_s, size_bytes
from outrider.model.belongings import Artifact, OnChange, SecretUse, StickyDisk, Template, VolumeUse
from outrider.model.job import File

_ARTIFACT_KEYS = ("source", "sha256", "unpack", "executable")
_TEMPLATE_KEYS = ("source", "content", "on_change", "signal", "splay")
_VOLUME_KEYS = ("volume", "read_only")
_SECRET_KEYS = ("env", "file", "on_change", "signal", "version")


def read_secrets(task: Fields, faults: Faults) -> tuple[SecretUse, ...]:
    """Each is a mapping, or the name of the environment variable alone."""
    node = task.node("secrets")
    path = (*task.path, "secrets")
    uses = []
    for name, value in named(node, path, faults) if node is not None else ():
        if isinstance(value, Scalar):
            if value.empty:
                faults.add((*path, name), "has no value; write {} for a file /secrets/" + name, value.mark)
            else:
                uses.append(SecretUse(name=SecretName(name), env=value.text))
            continue
        fields = Fields(value, (*path, name), faults, _SECRET_KEYS)
        env = fields.text("env", "")
        default = SecretUse(name=SecretName(name))
        uses.append(
            SecretUse(
                name=SecretName(name),
                env=env,
                file=fields.text("file", "" if env else name),
                on_change=fields.choice("on_change", OnChange, default.on_change),
                signal=fields.text("signal", default.signal),
                version=fields.integer("version", 0) if "version" in fields else None,
            )
        )
    return tuple(uses)


def read_volumes(task: Fields, faults: Faults) -> tuple[VolumeUse, ...]:
    """By the path inside: each is a mapping, or the volume's name alone."""
    node = task.node("volumes")
    path = (*task.path, "volumes")
    uses = []
    for target, value in named(node, path, faults) if node is not None else ():
        if isinstance(value, Scalar):
            uses.append(VolumeUse(volume=VolumeName(value.text), target=target))
            continue
        fields = Fields(value, (*path, target), faults, _VOLUME_KEYS)
        fields.required("volume", "pgdata")
        name = VolumeName(fields.text("volume", ""))
        uses.append(VolumeUse(volume=name, target=target, read_only=fields.flag("read_only", default=False)))
    return tuple(uses)


def read_sticky(task: Fields, faults: Faults) -> tuple[StickyDisk, ...]:
    """By the path inside: its size."""
    node = task.node("sticky")
    if node is None:
        return ()
    path = (*task.path, "sticky")
    targets = [target for target, _ in named(node, path, faults)]
    fields = Fields(node, path, faults, tuple(targets))
    return tuple(StickyDisk(target=target, size_bytes=fields.quantity(target, size_bytes, 0)) for target in targets)


def read_artifacts(task: Fields, faults: Faults) -> tuple[Artifact, ...]:
    """By the path below /artifacts."""
    node = task.node("artifacts")
    path = (*task.path, "artifacts")
    found = []
    for inside, value in named(node, path, faults) if node is not None else ():
        fields = Fields(value, (*path, inside), faults, _ARTIFACT_KEYS)
        fields.required("source", "https://example.org/tool.tar.gz")
        fields.required("sha256", "as sha256sum prints it")
        found.append(
            Artifact(
                path=inside,
                source=fields.text("source", ""),
                sha256=fields.text("sha256", ""),
                unpack=fields.flag("unpack", default=False),
                mode=0o755 if fields.flag("executable", default=False) else 0o644,
            )
        )
    return tuple(found)


def read_templates(task: Fields, faults: Faults, read: Callable[[str, str], File]) -> tuple[Template, ...]:
    """By the path below /templates. `read` has what a file beside the job file holds; it raises ValueError."""
    node = task.node("templates")
    path = (*task.path, "templates")
    found = []
    for inside, value in named(node, path, faults) if node is not None else ():
        fields = Fields(value, (*path, inside), faults, _TEMPLATE_KEYS)
        content = fields.text("content", "")
        if ("content" in fields) == ("source" in fields):
            faults.add((*path, inside), "give either source, a file beside the job file, or content")
        elif "source" in fields:
            try:
                content = read(inside, fields.text("source", "")).content.decode()
            except UnicodeDecodeError:
                fields.fault("source", "is no text")
            except ValueError as error:
                fields.fault("source", str(error))
        default = Template(path=inside, content=content)
        found.append(
            Template(
                path=inside,
                content=content,
                on_change=fields.choice("on_change", OnChange, default.on_change),
                signal=fields.text("signal", default.signal),
                splay_s=fields.quantity("splay", duration_s, default.splay_s),
            )
        )
    return tuple(found)


def read_ulimits(resources: Fields, faults: Faults) -> dict[str, int]:
    node = resources.node("ulimits")
    if node is None:
        return {}
    names = [key.text for key, _ in node.entries] if isinstance(node, Mapping) else []
    limits = Fields(node, (*resources.path, "ulimits"), faults, names)
    return {name: limits.integer(name, 0) for name in names}
