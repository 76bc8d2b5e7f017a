# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import InputError
from ansible_collections.openvadp.backup.plugins.module_utils.restore.request import RestoreRequest, verify_of


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, True),
        (False, False),
        ("true", True),
        ("False", False),
        ("no", False),
        ("1", True),
        (0, False),
        ("full", "full"),
        ("FULL ", "full"),
    ],
)
def test_verify_is_what_a_survey_or_the_command_line_sends(value, expected):
    assert verify_of(value) is expected or verify_of(value) == expected == "full"


@pytest.mark.parametrize("value", ["", "some", None, 2, ["full"]])
def test_verify_is_nothing_else(value):
    with pytest.raises(InputError, match="false, true or full"):
        verify_of(value)


def test_force_is_for_what_is_written_in_place():
    with pytest.raises(InputError, match="in_place"):
        RestoreRequest(repository="/r", dest="/d", force=True).check()
