# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a check comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Iterable, Optional

OK = "ok"
WARNING = "warning"
ERROR = "error"
NOT_CHECKED = "not_checked"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    :param code: the check's name, the same for all that it is done on.
    :param severity: ``error``: the backup fails, or would be worth nothing. ``warning``: it works, and something is
        worse than it has to be or soon will be. ``not_checked``: nobody knows.
    :param subject: what was looked at.
    :param evidence: what was seen.
    :param remedy: what to do about it; None where nothing has to be done.
    """

    code: str
    severity: str
    subject: str
    evidence: str
    remedy: Optional[str] = None

    def to_result(self) -> Dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity,
            "subject": self.subject,
            "evidence": self.evidence,
            "remedy": self.remedy,
        }


def is_ready(checks: Iterable[Check]) -> bool:
    """Whether a backup can be expected to work."""
    return all(check.severity != ERROR for check in checks)
