# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  hostname:
    description:
      - Name or address of the vCenter server, or of an ESXi host.
      - If not given, the environment variable E(VMWARE_HOST) of the machine that runs the module is used.
    type: str
    required: true
  username:
    description:
      - User of the vSphere API.
      - If not given, the environment variable E(VMWARE_USER) is used.
    type: str
    required: true
  password:
    description:
      - Password of O(username). It is handed on through file descriptors only and never written down.
      - If not given, the environment variable E(VMWARE_PASSWORD) is used.
    type: str
    required: true
  port:
    description:
      - Port of the vSphere API.
      - If not given, the environment variable E(VMWARE_PORT) is used.
    type: int
    default: 443
  validate_certs:
    description:
      - Whether the server's certificate must be signed by a known authority and carry the server's name.
      - With V(false) and O(thumbprint), the certificate must be the one with that thumbprint.
      - If not given, the environment variable E(VMWARE_VALIDATE_CERTS) is used.
    type: bool
    default: true
  ca_path:
    description: File with the certificates of the authorities to trust, instead of the system's.
    type: path
  thumbprint:
    description:
      - SHA-1 or SHA-256 thumbprint of the server's certificate, in hexadecimal with colons.
      - It is worked out from the server's verified certificate, so it is needed only where that can't be verified.
    type: str
  reconnect_timeout:
    description:
      - Seconds for which a server that can't be reached is waited for, from the first failure on, such as a vCenter
        whose services restart. It holds for the first contact, each login and each call.
      - V(0) means not at all. What does not pass, such as an unknown name or a certificate, fails at once.
    type: int
    default: 60
requirements:
  - pyVmomi
"""
