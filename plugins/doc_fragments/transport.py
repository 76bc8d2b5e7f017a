# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  transports:
    description:
      - The transports that may be used, the preferred one first. For each disk the first that can work is taken, and
        the result says why each of the others was not.
      - This release moves data by V(nbdssl) and V(nbd). The others are planned, and are passed over with that reason.
    type: list
    elements: str
    choices: [san, hotadd, nbdssl, nbd, https]
  require_transport:
    description: Whether anything but the first of O(transports) is an error.
    type: bool
    default: false
  vddk_libdir:
    description:
      - Folder of VMware's Virtual Disk Development Kit (VDDK), the one that holds C(lib64/libvixDiskLib.so.*).
      - If not given, the folder that the nbdkit VDDK plugin was built for is used.
    type: path
  nfc_port:
    description: Port on which ESXi hosts serve disk data (NFC).
    type: int
    default: 902
  io_timeout:
    description: Seconds without an answer after which reading or writing a disk fails.
    type: int
    default: 180
"""
