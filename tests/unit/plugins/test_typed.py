# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Text becomes what it says, or is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.openvadp.backup.plugins.plugin_utils.typed import to_boolean, to_dictionary, to_list
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("text", ["yes", "Yes", "y", "t", "true", "TRUE", "on", "1", " true\n", 1, True])
def test_true(text: Any) -> None:
    assert to_boolean(text) is True


@pytest.mark.parametrize("text", ["no", "No", "n", "f", "false", "FALSE", "off", "0", " false ", 0, False])
def test_false(text: Any) -> None:
    assert to_boolean(text) is False


@pytest.mark.parametrize("bad", ["", "maybe", "truee", "2", None, [], {}, 2])
def test_what_is_neither_is_refused(bad: Any) -> None:
    with pytest.raises(AnsibleFilterError, match="neither true nor false"):
        to_boolean(bad)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a"], ["a"]),
        (("a", "b"), ["a", "b"]),
        ("", []),
        ("  ", []),
        (None, []),
        ("a", ["a"]),
        ("a, b,,c", ["a", "b", "c"]),
        ("a\nb\r\nc d\n", ["a", "b", "c d"]),
        ('["a,b", "c"]', ["a,b", "c"]),
        ("[2000, 2001]", [2000, 2001]),
        ("[a, b]", ["a", "b"]),
        ('[{"key": 2000}]', [{"key": 2000}]),
        (2000, [2000]),
    ],
)
def test_lists(value: Any, expected: Any) -> None:
    assert to_list(value) == expected


@pytest.mark.parametrize("bad", ["[a", {"a": 1}, True, 1.5, b"a"])
def test_what_is_not_a_list_is_refused(bad: Any) -> None:
    with pytest.raises(AnsibleFilterError, match="is not a list"):
        to_list(bad)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ('{"a": {"b": "c"}}', {"a": {"b": "c"}}),
        ("a: b\nc: 1", {"a": "b", "c": 1}),
    ],
)
def test_dictionaries(value: Any, expected: Any) -> None:
    assert to_dictionary(value) == expected


@pytest.mark.parametrize("bad", ["a", "[1]", ["a"], 1, "{a: ["])
def test_what_is_not_a_dictionary_is_refused(bad: Any) -> None:
    with pytest.raises(AnsibleFilterError, match="is not a dictionary"):
        to_dictionary(bad)


_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))


@given(st.lists(_values, max_size=4))
def test_the_json_text_of_a_list_is_that_list(value: Any) -> None:
    assert to_list(json.dumps(value)) == value


@given(st.dictionaries(st.text(), _values, max_size=4))
def test_the_json_text_of_a_dictionary_is_that_dictionary(value: Any) -> None:
    assert to_dictionary(json.dumps(value)) == value
