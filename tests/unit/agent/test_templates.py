"""Templates as the program that renders them takes them: what they see, what they cannot, how they end."""

import pytest

from agent.belongings import templates
from agent.belongings.facts import Facts, Rendered
from outrider.ids import TaskName
from outrider.model.belongings import Template
from outrider.model.job import Task

FACTS = Facts(
    node={"id": "n1"},
    alloc={"id": "00000000aa", "index": 2, "job": "shop", "group": "web", "task": "app"},
    ports={"http": 8080},
    secrets={"db": "hunter2"},
    services={"api": ({"node": "n2", "address": "10.0.0.2", "port": 20001},)},
)


async def rendered(**texts: str) -> Rendered:
    made = tuple(Template(path=path, content=text) for path, text in texts.items())
    return await templates.render(Task(name=TaskName("app"), templates=made), FACTS)


async def test_a_template_sees_what_it_should() -> None:
    text = (
        '{{ secret("db") }} {{ node.id }} {{ alloc.job }}[{{ alloc.index }}] {{ port("http") }}\n'
        '{% for each in service("api") %}\n{{ each.address }}:{{ each.port }}\n{% endfor %}\n'
    )
    done = await rendered(a=text)
    assert done.files == {"a": "hunter2 n1 shop[2] 8080\n10.0.0.2:20001\n"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ok\n{{ secret('other') }}", "no secret 'other' here; name it under the task's `secrets`"),
        ("{{ service('db') }}", "no service 'db' here; name it under the group's `upstreams`"),
        ("{{ nothing }}", "'nothing' is undefined"),
        ("ok\n{% for %}", "line 2: "),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe"),
        ("{{ secret.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ 'x' * 3000000 }}", "it renders to more than 1048576 characters"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does it loop for ever?"),
        ("{{ 'x' * 900000000 }}", "more than"),
    ],
)
async def test_what_it_must_not_is_told_and_the_others_are_rendered(text: str, told: str) -> None:
    done = await rendered(good="fine", wrong=text)
    assert done.files == {"good": "fine"}
    assert told in done.errors["wrong"]
