# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Names of files of another machine, in whatever encoding they are.

Inside, a name is text in which bytes that are not UTF-8 stand as surrogates, as Python has file names.
"""

from __future__ import annotations

import base64
from typing import Dict, Optional

from ...shown import shown as escaped

NAME_BYTES = 255
PATH_BYTES = 4095


def bad_name(name: str, path: str) -> Optional[str]:
    """Why a name can't be that of a file here; None if it can."""
    if name in ("", ".", ".."):
        return "its name means a directory"
    if "/" in name or "\0" in name:
        return "its name holds a character that no name can hold"
    if len(encoded(name)) > NAME_BYTES:
        return f"its name is longer than {NAME_BYTES} bytes"
    if len(encoded(path)) > PATH_BYTES:
        return f"its path is longer than {PATH_BYTES} bytes"
    return None


def encoded(name: str) -> bytes:
    """The bytes of a name: those of the image, and for a lone surrogate of NTFS what ntfs-3g makes of it."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogatepass")


def shown(path: str) -> str:
    """A path for people and for JSON: what is not text, or would move the cursor, stands as ``\\xNN`` or ``\\n``."""
    return escaped(encoded(path).decode("utf-8", "surrogateescape"))


def path_fields(path: str) -> Dict[str, str]:
    """``path`` of a result, and ``path_base64``, its very bytes, where ``path`` does not report them."""
    text = shown(path)
    fields = {"path": text}
    if text != path:
        fields["path_base64"] = base64.b64encode(encoded(path)).decode("ascii")
    return fields
