# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What a restore of files is asked to do, checked before anything is touched."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from ...errors import InputError
from .patterns import parts_of

TIMES, MODE, OWNER, SPECIAL = "times", "mode", "owner", "special_bits"
PRESERVE = (TIMES, MODE, OWNER, SPECIAL)
AUTO, DISSECT, GUESTFISH = "auto", "dissect", "guestfish"
READERS = (AUTO, DISSECT, GUESTFISH)


@dataclass(frozen=True)
class FilesRequest:
    """The options of ``vadp_file_restore``.

    :param volumes: names, labels or UUIDs of the volumes that are searched; empty means all.
    :param list_only: tell the files and write nothing.
    :param versions: look into all points.
    :param reader: one of READERS.
    """

    repository: str
    paths: Tuple[str, ...]
    vm_uuid: Optional[str] = None
    vm_name: Optional[str] = None
    point: str = "latest"
    disks: List[int] = field(default_factory=list)
    volumes: List[str] = field(default_factory=list)
    dest: Optional[str] = None
    list_only: bool = False
    versions: bool = False
    checksums: bool = False
    recurse: bool = True
    overwrite: bool = False
    fail_on_skipped: bool = False
    preserve: Tuple[str, ...] = (TIMES,)
    reader: str = AUTO
    limit: int = 100000
    io_timeout: int = 180
    timeout: int = 86400

    @classmethod
    def from_params(cls, params: Dict[str, Any]) -> FilesRequest:
        """From ``module.params``. :raises InputError: an option makes no sense."""
        given = {name: params[name] for name in cls.__dataclass_fields__ if params.get(name) is not None}
        for name in ("paths", "preserve"):
            if name in given:
                given[name] = tuple(given[name])
        request = cls(list_only=bool(params.get("list")), **given)
        request.check()
        return request

    def check(self) -> None:
        """:raises InputError: an option makes no sense; nothing was touched."""
        if not self.paths:
            raise InputError("There is no path", remedy="Give 'paths'")
        for path in self.paths:
            parts_of(path)
        if self.versions and not self.list_only:
            raise InputError("Versions of files can only be listed", remedy="Set 'list: true', or 'versions: false'")
        if self.versions and self.reader == GUESTFISH:
            raise InputError(
                "Versions of files are not searched by guestfish",
                reason="it would have to start a virtual machine for each point",
                remedy="Leave 'reader' out, or list one 'point' at a time",
            )
        if not self.list_only:
            if self.dest is None:
                raise InputError("There is no folder for the files", remedy="Give 'dest', or 'list: true'")
            if not os.path.isabs(self.dest):
                raise InputError(
                    "The folder for the files is not an absolute path",
                    subject=self.dest,
                    remedy="Give the whole path, from / on",
                )
        for name, number in (("limit", self.limit), ("io_timeout", self.io_timeout), ("timeout", self.timeout)):
            if number < 1:
                raise InputError(f"The option {name} must be at least 1", subject=str(number))
