# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The server's clock against this machine's. No order of ours goes by either (proofs 22); users' times do."""

from __future__ import annotations

import datetime
from typing import Any, Optional

from .session import Session

#: From here on a time that a user states may name another point than is meant, and logins by token fail.
WARNING_SECONDS = 300


def skew_seconds(session: Session) -> float:
    """How far the server's clock is ahead of this machine's (negative: behind); what the call took is not counted.

    The answer to a login holds the server's time; another call is made where it does not.

    :raises VsphereError: the server does not say.
    """
    if session.login_time is not None:
        return skew(*session.login_time)
    before = datetime.datetime.now(datetime.timezone.utc)
    theirs = session.call(session.service.CurrentTime, what="The server's time was not read", idempotent=True)
    return skew(theirs, before, datetime.datetime.now(datetime.timezone.utc))


def skew(theirs: Any, before: datetime.datetime, after: datetime.datetime) -> float:
    """:param before, after: this machine's time when the server was asked and when it had answered."""
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=datetime.timezone.utc)
    if theirs > after:
        return float((theirs - after).total_seconds())
    return -float((before - theirs).total_seconds()) if theirs < before else 0.0


def warning(session: Session) -> Optional[str]:
    """What is wrong with the clocks, for people; None where nothing is wrong."""
    seconds = skew_seconds(session)
    if abs(seconds) <= WARNING_SECONDS:
        return None
    later = "ahead of" if seconds > 0 else "behind"
    return (
        f"The clock of {session.connection.address} is {abs(seconds):.0f} s {later} this machine's. Points are not"
        " ordered by it, but their times are its, and so is the point that is found by a time. Let both be set by the"
        " same time servers (NTP)."
    )
