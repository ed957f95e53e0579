"""What a task brings along, in a job file: `secrets:` -> `SecretUse` values."""

from outrider.ids import SecretName
from outrider.jobspec.document import Scalar
from outrider.jobspec.fields import Faults, Fields, named
from outrider.model.belongings import OnChange, SecretUse

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
