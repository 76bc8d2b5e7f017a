#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vadp_disk_export
short_description: Read the disks of a snapshot or of a template into a restore point
version_added: 0.1.0
description:
  - Reads the disks of a snapshot and stores them as a restore point of a repository. Each disk becomes a
    qcow2 layer, full or upon the layer of an earlier point, that plain C(qemu-img) opens.
  - The point appears at once when all of it is stored, and not at all if anything fails.
  - All disks of a point come from one snapshot. A second try on the very same snapshot reads only the disks that the
    first one did not finish.
  - A template has no snapshots, so its disks themselves are read, always in full and by transport V(https) alone. If it
    was changed or converted before the last byte was read, the module fails and no point appears.
  - A disk that a restore left half written is read as it is, with a warning that is in the manifest too.
  - The module runs on the machine that holds the repository (the backup proxy), and keeps the virtual machine locked
    against other runs there.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.vm
  - openvadp.backup.repository
  - openvadp.backup.repository_write
  - openvadp.backup.lock
  - openvadp.backup.transport
  - openvadp.backup.progress
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
    details:
      - Tells how each disk would be read. No file is written, the lock neither.
      - If the snapshot does not exist yet, the plan is made from the virtual machine's present configuration.
  diff_mode:
    support: full
  idempotent:
    support: partial
    details:
      - With O(point), a complete point of that name means that nothing changes. Without it each run makes a new one.
options:
  snapshot_moid:
    description:
      - Managed object id of the snapshot, such as V(snapshot-47).
      - Exactly one of O(snapshot_moid), O(snapshot_name) and O(run_id) is required, for a template none of them.
    type: str
  snapshot_name:
    description: Name of the snapshot. Two snapshots of one name are an error that lists both.
    type: str
  run_id:
    description:
      - Id of a run that M(openvadp.backup.vadp_recover) has begun. Its record says which virtual machine, which
        snapshot and which point are meant, and the snapshot must carry the run's marker.
      - The options that name the virtual machine count only where the record is of another server.
    type: str
  force:
    description:
      - Whether another run that is at work on the virtual machine is treated as over. A warning says which.
      - Without it the module fails until that run has ended, or its deadline has passed.
      - A virtual machine that is off and carries the mark of a restore in place is read with it too. The point may hold
        the mixture that the restore has left.
    type: bool
    default: false
  point:
    description:
      - Name of the restore point. If it exists, nothing is done, whatever the other options say; it is an error
        if it is damaged, or was made from another server.
      - If not given, it is that of the run which made the snapshot, or one that is made of the time, such as
        V(20261122T084203Z).
    type: str
  mode:
    description:
      - V(auto) reads what changed since the newest point of the disk where that can be known for certain, and else
        everything that holds data. The result says which it was, and why.
      - V(full) reads everything that holds data.
      - V(incremental) and V(differential) (what changed since the newest full) fail where V(auto) would make a full,
        and for a template.
    type: str
    choices: [auto, full, incremental, differential]
    default: auto
  max_chain:
    description:
      - With O(mode=auto), a disk whose newest point stands on a chain of so many layers, the full included, is read in
        full (1 to 500). The result says so. With V(1) each point is a full.
      - Whoever reads a point opens all layers of its chain. Each one costs time, memory and an open file.
    type: int
    default: 30
  disks:
    description: Device keys or labels of the disks to read. If not given, all that a snapshot can hold.
    type: list
    elements: str
  exclude_disks:
    description: Device keys or labels of disks that are not read.
    type: list
    elements: str
    default: []
  transports:
    description:
      - The transports that may be used, the preferred one first. For each disk the first that can work is taken, and
        the result says why none before it was.
      - V(san) reads the LUN of a VMFS datastore, V(hotadd) attaches the disk to this machine, V(nbdssl) and V(nbd) have
        an ESXi host send it, V(https) downloads it. All but V(https) go through VDDK; V(hotadd) works without it too.
      - A transport that fails on the way is left for the next one.
    type: list
    elements: str
    choices: [san, hotadd, nbdssl, nbd, https]
    default: [san, hotadd, nbdssl, nbd, https]
  rate_limit:
    description:
      - Bytes a second that are read at most, with K, M or G (binary) if you like, such as V(50M).
      - Disks that are read at the same time share it equally.
    type: str
  compression:
    description: Compression of what is stored.
    type: str
    choices: [zstd, none]
    default: zstd
  parallel_disks:
    description: How many disks are read at a time (1 to 16). Each takes two connections to its ESXi host.
    type: int
    default: 2
  vm_ids:
    description:
      - Whether the virtual machine itself names its newest point. One advanced setting for each disk
        (C(openvadp.id.<repository id>.<disk uuid>)) is written after the point is complete and before the snapshot is
        removed, if anything changed.
      - A virtual machine that went back in time (a revert, a rollback of the storage array), or that is a replica in
        another vCenter, is recognised by what it says, and its next point is a full one.
      - With V(false), or where the user lacks C(VirtualMachine.Config.AdvancedConfig), points are built upon as long as
        change tracking alone shows nothing wrong, which it does not always do in these cases.
      - Nothing is written to templates.
    type: bool
    default: true
requirements:
  - nbdkit; with its VDDK plugin and VDDK for all transports but V(https) and V(hotadd) without VDDK, for those with its
    plugins file and curl
  - qemu-img and qemu-nbd (QEMU 5.1 or newer)
  - libnbd's Python binding (package python3-libnbd)
  - blake3
notes:
  - Required privileges are C(VirtualMachine.Provisioning.DiskRandomRead) and C(VirtualMachine.Provisioning.GetVmFiles)
    on the virtual machine, C(Datastore.Browse) and C(Datastore.FileManagement) on its datastores, and
    C(Global.DisableMethods) and C(Global.EnableMethods) on the vCenter server.
  - For V(hotadd) also C(VirtualMachine.Config.AddExistingDisk) and C(VirtualMachine.Config.RemoveDisk) on the proxy,
    for V(https) of running virtual machines C(VApp.Export).
  - C(VirtualMachine.Config.AdvancedConfig) on the virtual machine is needed for O(vm_ids=true). Without it the point is
    made, and a warning says what is missing.
  - The names of the virtual machine's tags are kept with the point. They are read by the REST API of vCenter 7.0 U2 or
    newer. If that fails the point is made without them, and a warning says why.
  - For V(nbdssl) and V(nbd) the NFC port (902) must be open from the proxy to every ESXi host that sees the datastores.
seealso:
  - module: openvadp.backup.vm_snapshot
  - module: openvadp.backup.vadp_recover
  - module: openvadp.backup.restore_point_verify
"""

EXAMPLES = r"""
- name: Back up all disks of a snapshot, in full or what changed
  openvadp.backup.vadp_disk_export:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    snapshot_moid: "{{ made.snapshot.moid }}"
    repository: /backup
    vddk_libdir: /opt/vmware-vix-disklib-distrib
  register: exported

- name: Show how each disk was read
  ansible.builtin.debug:
    msg: "{{ item.label }}: {{ item.mode }} ({{ item.reason }}) by {{ item.transport }}, {{ item.bytes_read }} bytes"
  loop: "{{ exported.disks | rejectattr('skipped') }}"

- name: Back up a template
  openvadp.backup.vadp_disk_export:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: golden-debian12
    repository: /backup
    transports:
      - https

- name: A weekly full of one disk, slowly
  openvadp.backup.vadp_disk_export:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    name: app01
    snapshot_name: weekly
    repository: /backup
    point: weekly-2026-47
    mode: full
    disks:
      - Hard disk 1
    rate_limit: 50M
"""

RETURN = r"""
point:
  description:
    - The manifest of the restore point.
    - In check mode, for a point that does not exist, its name alone (RV(point.point)).
  returned: success
  type: dict
  contains:
    point:
      description: Name of the point.
      type: str
      sample: 20261122T084203Z
    vm_uuid:
      description: Instance UUID of the virtual machine.
      type: str
      sample: 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a
    vm_name:
      description: Its name.
      type: str
      sample: app01
    repository_id:
      description: Id of the repository.
      type: str
      sample: 7f6d1c52-3a8e-4a51-9b56-0c1d2e3f4a5b
    sequence:
      description: >-
        Number of the point. The repository counts the points of a virtual machine, and the largest number is the
        newest point, whatever any clock says.
      type: int
      sample: 17
    server_uuid:
      description: >-
        The server that it was read from: the instance UUID of the vCenter, or of a host that was logged in to directly
        the UUID of its hardware.
      type: str
      sample: 3c6d0f0e-5b1c-4c0e-9f5e-8a7b6c5d4e3f
    run_id:
      description: Id of the run that made the point.
      type: str
      sample: 20261122T084203.417123Z-3f9a2b1c
    snapshot:
      description:
        - The snapshot that was read, and those of others that were there.
        - Of a template C(moid) and C(name) are null, and C(created) is the time at which it was read.
      type: dict
      sample: {moid: snapshot-47, name: nightly, created: '2026-11-22T08:42:03Z', quiesced: true, foreign: []}
    disks:
      description: What is stored of each disk.
      type: list
      elements: dict
      sample: []
    skipped_disks:
      description: Disks that the point does not hold, with the reason.
      type: list
      elements: dict
      sample: [{key: 2002, label: Hard disk 3, reason: 'named in exclude_disks'}]
    format:
      description: Version of the manifest's format.
      type: int
      sample: 2
    vm_moid:
      description: Managed object ID of the virtual machine at that time.
      type: str
      sample: vm-101
    started:
      description: When the export began.
      type: str
      sample: '2026-11-22T08:42:04Z'
    finished:
      description: When the export ended.
      type: str
      sample: '2026-11-22T08:47:31Z'
    seconds:
      description: How long it took.
      type: float
      sample: 327.18
    configuration:
      description: The file of the saved configuration, with its size and hash.
      type: dict
      sample: {file: configs/20261122T084203Z.json, size_bytes: 20331, blake3: 6b0f...}
    nvram:
      description: The file of the saved NVRAM, with its size and hash; null if the virtual machine has none.
      type: dict
      sample: {file: configs/20261122T084203Z.nvram, size_bytes: 74232, blake3: 91ac...}
    tools:
      description: Versions of the programs that made the point, by name; null where one is not known.
      type: dict
      sample: {nbdkit: 1.32.5, qemu: 7.2.11}
    warnings:
      description: What the export warned of.
      type: list
      elements: str
      sample: []
    manifest_blake3:
      description: BLAKE3 of the manifest's canonical JSON without this key.
      type: str
      sample: 0d3f5c1b5e4a6b7c8d9e0f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e
disks:
  description: How each disk was read, or would be.
  returned: success
  type: list
  elements: dict
  contains:
    key:
      description: Device key.
      type: int
      sample: 2000
    label:
      description: Label.
      type: str
      sample: Hard disk 1
    mode:
      description: V(full), V(incremental) or V(differential); null for a disk that is not in the point.
      type: str
      sample: incremental
    parent:
      description: The point whose layer this one stands upon; null for a full.
      type: str
      sample: 20261121T084158Z
    reason:
      description: Why it is that mode; null for a disk that is not in the point.
      type: str
      sample: what changed since point 20261121T084158Z
    transport:
      description: >-
        The transport that was really used, V(none) if nothing had changed; null for a disk that is not in the point.
      type: str
      sample: nbdssl
    method:
      description:
        - How the transport did it, V(vddk), or without VDDK V(proxy_hotadd) for V(hotadd), V(folder) or V(export_lease)
          for V(https).
        - Null if nothing was read.
      type: str
      sample: vddk
    transport_reasons:
      description:
        - Why no transport that stands before it in O(transports) was used, a line each; some can't serve the disk, some
          failed when they tried.
      type: list
      elements: str
      sample: ["san: datastore 'nfs01' is NFS, which has no LUN"]
    transport_notes:
      description: What the transport that was used costs.
      type: list
      elements: str
      sample: ["'app01' can't be migrated or powered on meanwhile"]
    capacity_bytes:
      description: Size of the disk; null for a disk that is not in the point.
      type: int
      sample: 8589934592
    bytes_read:
      description: Bytes read from the disk; null in check mode.
      type: int
      sample: 85983232
    bytes_stored:
      description: Size of the layer; null in check mode.
      type: int
      sample: 17825792
    areas:
      description: How many areas were read; null in check mode where that is not known.
      type: int
      sample: 1312
    seconds:
      description: How long it took; null in check mode.
      type: float
      sample: 1.24
    skipped:
      description: Whether the disk is not in the point.
      type: bool
      sample: false
    skip_reason:
      description: Why it is not; null for a disk that is.
      type: str
      sample: named in exclude_disks
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.backup.export import export_point
from ..module_utils.backup.request import COMPRESSIONS, ExportRequest
from ..module_utils.repository.chain import MAX_CHAIN, MODES
from ..module_utils.runner import (
    Options,
    connection_options,
    lock_options,
    progress_options,
    repository_options,
    repository_write_options,
    run_module,
    transport_options,
    vm_options,
)

OPTIONS = Options(
    dict(
        snapshot_moid=dict(type="str"),
        snapshot_name=dict(type="str"),
        run_id=dict(type="str"),
        force=dict(type="bool", default=False),
        point=dict(type="str"),
        mode=dict(type="str", choices=list(MODES), default="auto"),
        max_chain=dict(type="int", default=MAX_CHAIN),
        disks=dict(type="list", elements="str"),
        exclude_disks=dict(type="list", elements="str", default=[]),
        rate_limit=dict(type="str"),
        compression=dict(type="str", choices=list(COMPRESSIONS), default="zstd"),
        parallel_disks=dict(type="int", default=2),
        vm_ids=dict(type="bool", default=True),
    ),
    mutually_exclusive=[("snapshot_moid", "snapshot_name", "run_id")],
)
TRANSPORTS = ["san", "hotadd", "nbdssl", "nbd", "https"]


def body(module: AnsibleModule) -> Dict[str, Any]:
    result = export_point(ExportRequest.from_params(module.params), module.check_mode)
    if not module._diff:
        del result["diff"]
    return result


def main() -> None:
    options = connection_options() + vm_options() + repository_options() + repository_write_options()
    options += transport_options(TRANSPORTS) + progress_options() + lock_options() + OPTIONS
    run_module(options, body, libraries=["pyVmomi", "nbd", "blake3"])


if __name__ == "__main__":
    main()
