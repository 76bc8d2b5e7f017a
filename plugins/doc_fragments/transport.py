# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  transports:
    description:
      - The transports that may be used, the preferred one first. For each disk the first that can work is taken, and
        the result says why none before it was.
      - V(san) reads the LUN of a VMFS datastore, V(hotadd) attaches the disk to this machine, V(nbdssl) and V(nbd) have
        an ESXi host send it, V(https) downloads it. All but V(https) go through VDDK; V(hotadd) works without it too.
      - With V(https) the disks of a machine that is off, and of a template, are read as files of their datastore; those
        of a running one by an export lease of the snapshot, so the whole disk crosses the network, waits in a file
        beside the repository's, and the machine can't be migrated or powered on meanwhile. V(https) writes no existing
        disk; a new machine it brings with all its disks, by an import lease.
      - A transport that fails on the way is left for the next one.
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
      - Without VDDK disks are moved by V(hotadd) and V(https) only.
    type: path
  device_dir:
    description:
      - Folder in which this machine's disks are found by their ids. LUNs are recognised there for V(san), attached
        disks for V(hotadd).
    type: path
    default: /dev/disk/by-id
  sysfs_dir:
    description: Where this machine's kernel shows its hardware.
    type: path
    default: /sys
  proxy_name:
    description:
      - Name of the virtual machine that this machine is, for V(hotadd).
      - If none of O(proxy_name), O(proxy_uuid), O(proxy_moid) and O(proxy_physical) is given, it is recognised by its
        hardware's UUID or serial number, without root by the addresses of its network cards. Where none fits, it is
        treated as a machine outside of that vCenter; two that fit are an error.
    type: str
  proxy_uuid:
    description: BIOS UUID of the virtual machine that this machine is.
    type: str
  proxy_moid:
    description: Managed object id of the virtual machine that this machine is, such as V(vm-109).
    type: str
  proxy_physical:
    description: Whether this machine is not a virtual machine of that vCenter, whatever its hardware says.
    type: bool
    default: false
  nfc_port:
    description: Port on which ESXi hosts serve disk data (NFC).
    type: int
    default: 902
  nfc_host_limit:
    description:
      - How many disks may be open at a time on one ESXi host by V(nbdssl) and V(nbd), counted over all backups of one
        user on this machine (1 to 50). The others wait for their turn.
      - If not given, it is what VMware's own limits and the host's memory for disk data allow.
    type: int
  wire_compression:
    description: Compression of what crosses the network, for V(nbdssl) and V(nbd).
    type: str
    choices: [none, zlib, fastlz, skipz]
    default: none
  io_timeout:
    description: Seconds without an answer after which reading or writing a disk fails.
    type: int
    default: 180
"""
