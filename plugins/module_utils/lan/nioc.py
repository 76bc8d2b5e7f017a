# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The pool of backup traffic on a distributed switch: all of module ``dvswitch_backup_nioc`` but its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

from ..errors import InputError, VsphereError
from ..vsphere import dvswitch
from ..vsphere.datacenters import find_datacenter
from ..vsphere.dvswitch import BACKUP_POOL, DvSwitch, Pool
from ..vsphere.session import Session, check_timeout

LEVELS = {"low": 25, "normal": 50, "high": 100}
NO_LIMIT = -1


@dataclass(frozen=True)
class Wanted:
    """Options of ``dvswitch_backup_nioc``; what is None stays."""

    dvswitch: str
    datacenter: Optional[str] = None
    level: Optional[str] = None
    shares: Optional[int] = None
    limit: Optional[int] = None
    reservation: Optional[int] = None
    timeout: int = 120

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> Wanted:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        level, shares = None, None
        if params["shares"] is not None:
            text = params["shares"].strip().lower()
            if text in LEVELS:
                level, shares = text, LEVELS[text]
            elif text.isdigit() and 1 <= int(text) <= 100:
                level, shares = "custom", int(text)
            else:
                raise InputError(
                    "The option shares can't be used",
                    subject=repr(params["shares"]),
                    remedy="Give low, normal, high, or a number from 1 to 100",
                )
        limit, reservation = params["limit"], params["reservation"]
        for name, number, low in (("limit", limit, NO_LIMIT), ("reservation", reservation, 0)):
            if number is not None and (number < low or (name == "limit" and number == 0)):
                raise InputError(
                    f"The option {name} is out of range",
                    subject=str(number),
                    remedy="Give Mbit/s; -1 is no limit" if name == "limit" else "Give Mbit/s, 0 for none",
                )
        return cls(
            params["dvswitch"],
            params["datacenter"],
            level,
            shares,
            limit,
            reservation,
            check_timeout(params["timeout"]),
        )


def ensure(session: Session, wanted: Wanted, check_mode: bool) -> Dict[str, Any]:
    """Give the pool its values. -> the module's result"""
    root = find_datacenter(session, wanted.datacenter).obj if wanted.datacenter else None
    switch = dvswitch.find_switch(session, wanted.dvswitch, root)
    before = _pool(switch)
    after = Pool(
        key=before.key,
        level=wanted.level or before.level,
        shares=before.shares if wanted.shares is None else wanted.shares,
        limit=before.limit if wanted.limit is None else wanted.limit,
        reservation=before.reservation if wanted.reservation is None else wanted.reservation,
    )
    if after.limit != NO_LIMIT and after.reservation > after.limit:
        raise InputError(
            "The reservation is larger than the limit",
            subject=f"{after.reservation} Mbit/s and {after.limit} Mbit/s, {BACKUP_POOL} of {switch}",
            remedy="Lower the reservation, or raise the limit (-1: none)",
        )
    warnings: List[str] = []
    if not switch.nioc_enabled:
        warnings.append(
            f"Network I/O Control is switched off on {switch}: the pool has no effect until it is switched on."
        )
    changed = after != before
    if changed and not check_mode:
        dvswitch.set_pool(session, switch, after, wanted.timeout)
    return {
        "changed": changed,
        "pool": after.to_dict(),
        "warnings": warnings,
        "diff": {"before": _words(switch, before), "after": _words(switch, after)},
    }


def _pool(switch: DvSwitch) -> Pool:
    """:raises VsphereError: the switch has no such pool."""
    found = next((pool for pool in switch.pools if pool.key == BACKUP_POOL), None)
    version = switch.nioc_version or "unknown"
    if version != "version3" or found is None:
        why = (
            f"its Network I/O Control has {version}, and pools by kind of traffic came with version3"
            if version != "version3"
            else f"its version {switch.version} has none; it came with vSphere 7.0.1"
        )
        raise VsphereError(
            "The distributed switch has no pool for backup traffic",
            subject=f"{BACKUP_POOL} of {switch}",
            reason=why,
            remedy="Upgrade the switch (and Network I/O Control) in the vSphere client",
        )
    return found


def _words(switch: DvSwitch, pool: Pool) -> str:
    limit = "none" if pool.limit == NO_LIMIT else f"{pool.limit} Mbit/s"
    shares = f"{pool.shares}" if pool.level == "custom" else f"{pool.level} ({pool.shares})"
    return (
        f"{switch.name}, {pool.key}:\n  shares: {shares}\n  limit: {limit}\n  reservation: {pool.reservation} Mbit/s\n"
    )
