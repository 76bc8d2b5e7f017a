# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One access call of VDDK, as the program of a short-lived process: see :mod:`.access`, which hands over this source.

Nothing but the standard library, and of that no ``ssl``: VDDK brings a libcrypto of its own (VADP facts 38). The
request comes through one pipe, the result goes through another; what the library logs goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any, Dict

# The interface that is asked for; every later VDDK offers it.
_MAJOR, _MINOR = 6, 5
_CREDENTIALS_BY_NAME = 1
_LOG_BYTES = 4096

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)


class ConnectParams(ctypes.Structure):
    """``VixDiskLibConnectParams`` on x86-64."""

    _fields_ = [
        ("vmxSpec", ctypes.c_char_p),
        ("serverName", ctypes.c_char_p),
        ("thumbPrint", ctypes.c_char_p),
        ("privateUse", ctypes.c_long),
        ("credType", ctypes.c_int),
        ("userName", ctypes.c_char_p),
        ("password", ctypes.c_char_p),
        ("restOfCredentials", ctypes.c_void_p),
        ("port", ctypes.c_uint32),
        ("nfcHostPort", ctypes.c_uint32),
        ("vimServer", ctypes.c_void_p * 6),
        ("specType", ctypes.c_int),
    ]


def call(request: Dict[str, Any]) -> Dict[str, Any]:
    """Load the library and make the call.

    :param request: {library, libdir, config, operation, identity, vm, server, port, nfc_port, thumbprint, user,
        password}.
    :returns: {code, text, cleaned, remaining}; code 0 is success. {failure} if the library can't be used at all.
    """
    try:
        library = ctypes.CDLL(request["library"])
        library.VixDiskLib_AllocateConnectParams.restype = ctypes.POINTER(ConnectParams)
        library.VixDiskLib_GetErrorText.restype = ctypes.c_char_p
        functions = {
            name: _function(library, name, types)
            for name, types in (
                ("InitEx", [ctypes.c_uint32, ctypes.c_uint32, _LOG, _LOG, _LOG, ctypes.c_char_p, ctypes.c_char_p]),
                ("PrepareForAccess", [ctypes.c_void_p, ctypes.c_char_p]),
                ("EndAccess", [ctypes.c_void_p, ctypes.c_char_p]),
                ("Cleanup", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]),
            )
        }
    except (OSError, AttributeError) as error:
        return {"failure": str(error)}
    log = _LOG(_logger())
    cleaned, remaining = ctypes.c_uint32(0), ctypes.c_uint32(0)
    libdir, config = request["libdir"].encode(), request["config"].encode()
    error = functions["InitEx"](_MAJOR, _MINOR, log, log, log, libdir, config)
    if not error:
        params = library.VixDiskLib_AllocateConnectParams()
        _fill(params.contents, request)
        if request["operation"] == "cleanup":
            error = functions["Cleanup"](params, ctypes.byref(cleaned), ctypes.byref(remaining))
        else:
            name = "PrepareForAccess" if request["operation"] == "prepare" else "EndAccess"
            error = functions[name](params, request["identity"].encode())
    text = b""
    if error:
        library.VixDiskLib_GetErrorText.argtypes = [ctypes.c_uint64, ctypes.c_char_p]
        text = library.VixDiskLib_GetErrorText(error, None) or b""
    return {
        # Failure is what is not 0; the number is in the lowest bits (VADP facts 47).
        "code": ((error & 0xFFFF) or 1) if error else 0,
        "text": text.decode("utf-8", "replace"),
        "cleaned": cleaned.value,
        "remaining": remaining.value,
    }


def _function(library: ctypes.CDLL, name: str, types: Any) -> Any:
    function = getattr(library, "VixDiskLib_" + name)
    function.argtypes, function.restype = types, ctypes.c_uint64
    return function


def _fill(params: ConnectParams, request: Dict[str, Any]) -> None:
    # A clean-up is of all virtual machines (VADP facts 30).
    params.vmxSpec = f"moref={request['vm']}".encode() if request["operation"] != "cleanup" else None
    params.serverName = request["server"].encode()
    params.thumbPrint = request["thumbprint"].encode()
    params.credType = _CREDENTIALS_BY_NAME
    params.userName = request["user"].encode()
    params.password = request["password"].encode()
    params.port = request["port"]
    params.nfcHostPort = request["nfc_port"]


def _logger() -> Any:
    """Takes what C's ``vprintf`` does; the library calls it from threads of its own."""
    vsnprintf = ctypes.CDLL(None).vsnprintf
    vsnprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]

    def write(text: bytes, arguments: int) -> None:
        line = ctypes.create_string_buffer(_LOG_BYTES)
        vsnprintf(line, _LOG_BYTES, text, arguments)
        os.write(2, line.value.rstrip(b"\n") + b"\n")

    return write


def main(request_fd: int, result_fd: int) -> None:
    """Answer one request, and end without the library's own clean-up, which may wait for what it never gets."""
    with os.fdopen(request_fd, "rb") as stream:
        request = json.loads(stream.read())
    os.write(result_fd, json.dumps(call(request)).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
