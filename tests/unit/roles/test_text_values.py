# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Every variable of every role works as the text that a survey or ``-e name=value`` sends.

``not 'false'`` is false and ``'[]' | length`` is 2. So each use of a boolean, list or dictionary goes through a
filter that reads text, or is the whole value of a module's option, which the module reads itself. Lists always need the
filter: a module splits the text of one at its commas.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import jinja2
import pytest
import yaml
from jinja2 import nodes

ROLES = Path(__file__).resolve().parents[3] / "roles"
FILTERS = {"bool": "to_boolean", "list": "to_list", "dict": "to_dictionary"}
FOLDERS = ("tasks", "vars", "handlers", "templates")
# Those of another role, with the reading of text left to it.
HANDED_ON = re.compile(r"^vm_backup_\w+$")


class _Environment(jinja2.Environment):
    """Knows any filter and test: only the form of the expressions is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = _Any(self.filters)
        self.tests = _Any(self.tests)


class _Any(dict):  # type: ignore[type-arg]
    def __contains__(self, key: object) -> bool:
        return True

    def get(self, key: Any, default: Any = None) -> Any:
        return dict.get(self, key, lambda *arguments, **named: "")


ENVIRONMENT = _Environment()


def _strings(value: Any, key: str = "") -> Iterator[Tuple[str, str]]:
    """(name of the option, text) of all that YAML holds."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
    elif isinstance(value, str):
        yield key, value


def _uses(template: nodes.Template) -> Iterator[Tuple[str, List[nodes.Node]]]:
    """Each variable that is read, with what stands around it, innermost first."""

    def walk(node: nodes.Node, above: List[nodes.Node]) -> Iterator[Tuple[str, List[nodes.Node]]]:
        if isinstance(node, nodes.Name) and node.ctx == "load":
            yield node.name, above
        for child in node.iter_child_nodes():
            yield from walk(child, [node, *above])

    yield from walk(template, [])


def _filtered(above: List[nodes.Node], wanted: str) -> bool:
    for node in above:
        if not isinstance(node, nodes.Filter):
            return False
        if node.name == f"openvadp.backup.{wanted}":
            return True
        if node.name not in ("default", "d"):
            return False
    return False


def _expression(key: str, text: str) -> str:
    return "{{ " + text + " }}" if key in ("when", "that", "until", "failed_when", "changed_when") else text


def problems(role: str, name: str, kinds: Dict[str, str], texts: Iterator[Tuple[str, str]]) -> Iterator[str]:
    for key, text in texts:
        alone = re.fullmatch(r"{{ (\w+)( \| default\((omit, true|omit|'')\))? }}", text.strip())
        for variable, above in _uses(ENVIRONMENT.parse(_expression(key, text))):
            kind = kinds.get(variable)
            if kind is None or _filtered(above, FILTERS[kind]):
                continue
            if alone and (kind != "list" or HANDED_ON.match(key)):
                continue
            # What is not set is left out of a module's options, which read the rest.
            if any(isinstance(node, nodes.Pair) for node in above) and kind == "bool":
                continue
            yield f"{role}/{name}: {variable} ({kind}) in {key}: {text.strip()[:120]}"


@pytest.mark.parametrize("role", sorted(path.name for path in ROLES.iterdir() if path.is_dir()))
def test_each_use_of_a_variable_reads_text(role: str) -> None:
    folder = ROLES / role
    specs = yaml.safe_load((folder / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    kinds = {name: option["type"] for name, option in specs.items() if option["type"] in FILTERS}
    kinds.update({name: "list" for name, option in specs.items() if option.get("default") == []})
    found: List[str] = []
    for path in sorted(folder.glob("*/*")):
        if path.parent.name == "templates":
            found += problems(role, path.name, kinds, iter([("template", path.read_text())]))
        elif path.parent.name in FOLDERS:
            found += problems(role, path.name, kinds, _strings(yaml.safe_load(path.read_text())))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    ["{{ 'a' if flag else 'b' }}", "{{ not flag }}", "{% if flag %}a{% endif %}", "{{ flag | default(false) }} x"],
)
def test_a_use_that_does_not_is_found(text: str) -> None:
    assert list(problems("role", "file", {"flag": "bool"}, iter([("msg", text)])))
    assert not list(problems("role", "file", {"other": "bool"}, iter([("msg", text)])))
