#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vadp_disk_restore
short_description: Restore the disks of a restore point
version_added: 0.1.0
description:
  - Writes the disks of a restore point into image files, into the disks of a virtual machine that is off, or makes a
    new virtual machine of the point.
  - Before the first write everything that the point stands on is read and compared with what was recorded. A damaged
    point is not restored.
  - After the last write everything is read back and compared with the point, unless O(verify=false).
  - The module runs on the machine that holds the repository (the backup proxy).
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.connection
  - openvadp.backup.vm
  - openvadp.backup.repository
  - openvadp.backup.repository_vm
  - openvadp.backup.repository_vm.point
  - openvadp.backup.lock
  - openvadp.backup.transport
  - openvadp.backup.progress
  - openvadp.backup.attributes
  - openvadp.backup.attributes.actiongroup_vadp
attributes:
  check_mode:
    support: full
    details:
      - All checks are made, those of the stored data too. Nothing is written, and no lock is taken.
  diff_mode:
    support: full
    details:
      - It names what is replaced; it does not show the content.
  idempotent:
    support: partial
    details:
      - With O(target=file), an image file that holds the point's bytes already is left alone.
      - With O(target=in_place), every run writes everything, and says that it changed something. With
        O(changed_only=true) a disk on which nothing changed since the point is left alone.
      - With O(target=new_vm), a name that is taken is refused, so a second run makes no second machine.
options:
  hostname:
    description:
      - Name or address of the vCenter server, or of an ESXi host. Needed for O(target=in_place) and O(target=new_vm).
      - If not given, the environment variable E(VMWARE_HOST) of the machine that runs the module is used.
    type: str
    required: false
  username:
    description:
      - User of the vSphere API. Needed for O(target=in_place) and O(target=new_vm).
      - If not given, the environment variable E(VMWARE_USER) is used.
    type: str
    required: false
  password:
    description:
      - Password of O(username). Needed for O(target=in_place) and O(target=new_vm).
      - It is handed on through file descriptors only and never written down.
      - If not given, the environment variable E(VMWARE_PASSWORD) is used.
    type: str
    required: false
  name:
    description:
      - Name of the virtual machine to write to, with O(target=in_place). Two machines of one name are an error that
        lists both.
      - If none of O(name), O(uuid) and O(moid) is given, it is the one that the restore point was made of.
      - With O(target=new_vm), the name of the new machine; if not given, that of the one that was backed up.
    type: str
  uuid:
    description:
      - BIOS UUID of the virtual machine to write to, or its instance UUID with O(use_instance_uuid=true).
    type: str
  moid:
    description: Managed object id of the virtual machine to write to, such as V(vm-16).
    type: str
  folder:
    description:
      - Inventory folder that the virtual machine lies in. A path from the root (V(/DC0/vm/production)) or the end of
        one (V(production)).
      - With O(target=new_vm), the folder or vApp that the new machine is put into. If not given, it is the one of the
        machine that was backed up, or with O(datacenter) the datacenter's own folder.
    type: str
  datacenter:
    description:
      - Datacenter that the virtual machine lies in, by name or inventory path.
      - With O(target=new_vm), the one that the new machine is put into; if not given, the one of the old.
    type: str
  vm_uuid:
    description:
      - Instance UUID of the virtual machine whose restore point is meant, under which the repository keeps it.
      - Exactly one of O(vm_uuid) and O(vm_name) is required.
    type: str
  vm_name:
    description:
      - Name that the virtual machine, whose restore point is meant, had when it was last backed up.
      - Two machines of one name are an error that lists both.
    type: str
  point:
    description:
      - Name of the restore point, V(latest), or a time such as V(2026-11-20T03:00Z), which means the point whose
        snapshot was taken last before it.
      - V(latest) is the point that was made last; of the connected server where one is, that is not with
        O(target=file).
    type: str
    default: latest
  target:
    description:
      - V(file) writes one image file for each disk into the folder O(dest). No vCenter is needed.
      - V(in_place) writes into the disks of an existing virtual machine. It must be off, without snapshots, and its
        disks as large as those of the point. All that they hold is replaced, so O(overwrite=true) is required. They are
        marked in the machine's advanced settings before the first write, change tracking is stopped, and restarted
        after the last one. So the next backup of all disks is a full one, with every backup product.
      - V(new_vm) makes a virtual machine with the configuration, the NVRAM and the disks of the point. It has the old
        one's hardware, settings, PCI slots and BIOS UUID, and an instance UUID and disk UUIDs of its own. What belongs
        to one host (USB and passthrough devices, serial ports, images that are not there) is left away with a warning.
        RV(differences) lists every field that differs.
    type: str
    choices: [file, in_place, new_vm]
    default: file
  dest:
    description:
      - Folder for the image files, which must exist. Required for O(target=file).
      - The files are named C(<name of the virtual machine>-<label of the disk>-<device key>.<extension>), such as
        C(app01-hard-disk-1-2000.raw); with O(format=ova) there is one, C(<name of the virtual machine>.ova).
        RV(restored) returns their paths.
      - An image appears there when it is complete, with mode 0600. Until then it is in a hidden folder there,
        C(.openvadp-restore-*), that only this user can enter. What a crashed restore left in the folder is removed.
    type: path
  format:
    description:
      - Format of the image files. It is of no meaning for other targets than O(target=file).
      - V(vmdk) is a sparse VMDK that grows, V(vmdk_stream) a compressed one that is read from its beginning to its end
        (C(streamOptimized)), as packages and uploads want it. Both have the extension C(vmdk).
      - V(ova) is one file for all disks, with the machine's configuration as an OVF descriptor, its NVRAM, and the
        SHA-256 of all of them. For a while the largest disk takes its space twice.
    type: str
    choices: [raw, qcow2, vmdk, vmdk_stream, ova]
    default: raw
  disks:
    description: Which disks of the point are restored, and how. If not given, or empty, all of them are.
    type: list
    elements: dict
    default: []
    suboptions:
      key:
        description: Device key of the disk in the restore point, such as V(2000).
        type: int
        required: true
      target_key:
        description:
          - Device key of the disk that is written, with O(target=in_place).
          - If not given, it is the disk of the same key, and its UUID must be that of the disk that was backed up.
        type: int
      datastore:
        description:
          - Datastore on which the disk that is written must lie, with O(target=in_place).
          - Datastore on which the disk is made, with O(target=new_vm), if another than O(datastore).
        type: str
      format:
        description: Format of this disk's image file, if another than O(format). Not with O(format=ova).
        type: str
        choices: [raw, qcow2, vmdk, vmdk_stream]
      provisioning:
        description: How this disk is made, if another way than O(provisioning), with O(target=new_vm).
        type: str
        choices: [same, thin, thick, eager]
  overwrite:
    description:
      - Consent to replace what is there, namely image files with other content, or what the disks of the virtual
        machine hold.
    type: bool
    default: false
  force:
    description:
      - Whether another run that is at work on the virtual machine is treated as over, with O(target=in_place) and
        O(target=new_vm). Without it the module fails until that run has ended, or its deadline has passed.
      - With O(target=in_place), disks are written also where they carry the mark of another restore that is not known
        to be over. Use it only when that restore was cut and can't be repeated, for two restores at the same time make
        a mixture.
    type: bool
    default: false
  safety_run_id:
    description:
      - With O(target=in_place), nothing is overwritten unless the run of this id has made a restore point of the
        virtual machine that is written, in this repository. Its files must be there, and it must hold the disks as
        they are now.
      - Role P(openvadp.backup.vm_restore#role) gives the id of the backup that makes the safety point. The guard is
        here because tasks of a role are passed over where a play ignores errors.
    type: str
  changed_only:
    description:
      - Whether only what changed since the point is written, with O(target=in_place).
      - Change tracking says which areas changed, by a snapshot that is made and removed before anything is written.
        They are compared with the point, and what differs is written. Where a random sample of them differs nearly all
        over, they are written without further comparison, and RV(restored[].reason) says so. All the rest of the disk
        is believed to be as it was, and O(verify) compares a sample of it; if that is not good enough, use
        O(verify=full) or O(changed_only=false).
      - The virtual machine must name this point, or one that was built upon it, as its newest in this repository; a
        backup writes that name (C(openvadp.id.<repository ID>.<disk UUID>) in the advanced settings). Without it the
        disk may have been restored from elsewhere, reverted or rolled back, and is written as a whole.
      - A disk is written as a whole, and RV(restored[].reason) says why, where change tracking can't tell. That is, if
        the point or the disk has no change ID, if change tracking was reset or is not trusted since an earlier restore,
        if the machine had other snapshots at the point, if the disk is another one, or if the query fails.
      - What is about to be written is kept in a journal in the repository. After a crash the same restore goes on from
        there; it then compares the whole disk, since nobody knows who wrote to it meanwhile. A restore of another point
        writes the whole disk.
    type: bool
    default: false
  verify:
    description:
      - Whether what was written is read back and compared with the restore point, V(false), V(true) or V(full).
      - With O(changed_only=true), V(true) also compares a random sample of the areas that are believed to be as they
        were, holes included. It is 64 MiB or 1 % of the disk, whichever is more, at most 4 GiB, in pieces of 64 KiB.
        V(full) compares all of them. One difference, and the whole disk is written.
    type: raw
    default: true
  transports:
    description:
      - The transports that may be used to write into virtual machines, the preferred one first. For each disk the first
        that can work is taken, and the result says why none before it was.
      - V(san) writes thick disks only, and only where it stands first. V(https) writes no existing disk;
        with O(target=new_vm) it brings the whole machine, all disks compressed, where nothing before it can write them.
      - A transport that fails on the way is left for the next one, which writes the whole disk again.
    type: list
    elements: str
    choices: [san, hotadd, nbdssl, nbd, https]
    default: [hotadd, nbdssl, nbd, https]
  rate_limit:
    description:
      - Bytes a second that are written at most into a virtual machine, such as V(50M).
      - The suffixes K, M and G are binary.
    type: str
  cluster:
    description:
      - Cluster (or host outside of one) that the new machine is put into, with O(target=new_vm).
      - If neither this nor O(esxi_hostname) is given, it is the cluster of the old machine, if that is still there.
    type: str
  esxi_hostname:
    description:
      - Host that the new machine is made on, with O(target=new_vm). It must see its datastores and networks.
      - If not given, the host of the old machine if it can take it, else the first that can.
    type: str
  resource_pool:
    description:
      - Resource pool of the new machine, with O(target=new_vm), by name or by its path from the root pool on
        (V(Resources/production)). In a path a slash that belongs to a name is written as C(%2f).
      - If not given, the pool of the old machine, if there is one of that path, else the root pool.
      - A vApp is a pool too. Its machines lie in no folder, so O(folder) is omitted or names it as well.
    type: str
  datastore:
    description:
      - Datastore of the new machine's files and disks, with O(target=new_vm).
      - If not given, each of them lies where it lay.
    type: str
  networks:
    description:
      - Other networks for the network cards of the new machine, with O(target=new_vm). Name of the network when the
        point was made, and name of the one to connect to.
      - A card whose network is not listed is connected to the network of the same name, which must be there. A
        listed network that no card was connected to is an error.
    type: dict
    default: {}
  provisioning:
    description:
      - How the disks of the new machine are made, with O(target=new_vm). V(same) is as they were, V(thin) takes space
        as it is written, V(thick) takes all of it at once, V(eager) fills it with zeros at once.
    type: str
    choices: [same, thin, thick, eager]
    default: same
  mac_addresses:
    description:
      - Whether the network cards of the new machine have the addresses of the old ones, with O(target=new_vm).
      - vCenter gives a card another address where it chose that itself and another machine has it.
      - With V(keep) and O(power_on=true), a restore beside the machine that was backed up is refused while that runs.
    type: str
    choices: [keep, new]
    default: keep
  bios_uuid:
    description:
      - Whether the new machine has the BIOS UUID of the old one, which guests and licences know it by, with
        O(target=new_vm).
    type: str
    choices: [keep, new]
    default: keep
  vtpm:
    description:
      - What to do about a virtual TPM, with O(target=new_vm). Its content is worth nothing without its key provider,
        and is in no backup.
      - V(refuse) makes no machine then, V(drop) makes it without. A guest whose disks are sealed to it asks for its
        recovery key.
    type: str
    choices: [refuse, drop]
    default: refuse
  tags:
    description:
      - Whether the new machine gets the tags that the old one had, with O(target=new_vm), before it is started.
      - They are looked for by the names of category and tag. What vCenter does not have, or refuses, is not made, and a
        warning reports it.
    type: bool
    default: true
  power_on:
    description: Whether the new machine is started when it is whole, with O(target=new_vm).
    type: bool
    default: false
  allow_duplicate_name:
    description:
      - Consent to a second virtual machine of this name, in another folder, with O(target=new_vm).
    type: bool
    default: false
  on_failure:
    description:
      - What becomes of a machine that could not be restored wholly, with O(target=new_vm). V(remove) deletes it and its
        files, V(keep) leaves it for you to look at.
      - What a restore that crashed left is treated so by the next one of that machine and name, or by
        M(openvadp.backup.vadp_recover) for the half-restored machine.
      - While a machine comes by transport V(https) vSphere removes it itself if that is broken off, whatever this says.
      - A machine that is whole and only could not be started is kept.
    type: str
    choices: [remove, keep]
    default: remove
notes:
  - The repository may be read-only, in a place that it does not list, or of an older format. Lock, record and journal
    of a restore to a virtual machine then lie in C(/var/lib/openvadp/<repository id>) on the machine that runs it.
  - Required privileges for O(target=in_place) are C(VirtualMachine.Provisioning.DiskRandomAccess),
    C(VirtualMachine.Provisioning.DiskRandomRead), C(VirtualMachine.Provisioning.GetVmFiles),
    C(VirtualMachine.Config.AdvancedConfig), C(VirtualMachine.Config.ChangeTracking),
    C(VirtualMachine.State.CreateSnapshot) and C(VirtualMachine.State.RemoveSnapshot).
  - For O(target=new_vm) also C(VirtualMachine.Inventory.Create) and C(VirtualMachine.Inventory.Unregister) on the
    folder, C(VirtualMachine.Config.AddNewDisk), C(VirtualMachine.Config.RemoveDisk),
    C(VirtualMachine.Config.AddRemoveDevice), C(VirtualMachine.Config.AdvancedConfig),
    C(VirtualMachine.Config.EditDevice) and
    C(VirtualMachine.Config.Settings) there, C(Resource.AssignVMToPool) on the resource pool, C(Network.Assign) on
    networks, C(Datastore.AllocateSpace), C(Datastore.Browse) and C(Datastore.FileManagement) on datastores, and
    C(VirtualMachine.Interact.PowerOn) to start it. For tags C(InventoryService.Tagging.AttachTag) on them and
    C(InventoryService.Tagging.ObjectAttachable) on the folder; without them the machine comes back without tags.
  - Tags take vCenter 7.0 U2 or newer, whose REST API they come by.
  - A new machine is made as the saved configuration says; a hardware version that the host does not know, or a device
    that it refuses, is reported in vCenter's words, and nothing stays.
seealso:
  - module: openvadp.backup.vadp_disk_export
  - module: openvadp.backup.restore_point_info
  - module: openvadp.backup.restore_point_verify
"""

EXAMPLES = r"""
- name: Write the newest state of a machine into image files
  openvadp.backup.vadp_disk_restore:
    repository: /backup
    vm_name: app01
    dest: /restore
    format: qcow2
  register: images

- name: Show where they are
  ansible.builtin.debug:
    msg: "{{ images.restored | map(attribute='target') }}"

- name: Put one disk back into the machine it came from
  openvadp.backup.vadp_disk_restore:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    repository: /backup
    vm_name: app01
    point: 20261122T084203Z
    target: in_place
    disks:
      - key: 2000
    overwrite: true

- name: Write a machine's disk into a disk of another machine
  openvadp.backup.vadp_disk_restore:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    repository: /backup
    vm_name: app01
    target: in_place
    name: restore01
    disks:
      - key: 2000
        target_key: 2001
    overwrite: true

- name: Take a machine back to last night, writing only what changed since
  openvadp.backup.vadp_disk_restore:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    repository: /backup
    vm_name: app01
    target: in_place
    changed_only: true
    overwrite: true

- name: Make a new machine of the newest point, apart from the old one's network, and start it
  openvadp.backup.vadp_disk_restore:
    hostname: vcenter.example.com
    username: backup@vsphere.local
    password: "{{ vcenter_password }}"
    repository: /backup
    vm_name: app01
    target: new_vm
    name: app01-restored
    folder: /DC0/vm/restored
    datastore: vmfs02
    networks:
      VM Network: Isolated
    mac_addresses: new
    power_on: true
"""

RETURN = r"""
point:
  description: Name of the restore point.
  returned: success
  type: str
  sample: 20261122T084203Z
restored:
  description: The disks, in the order of the restore point.
  returned: success
  type: list
  elements: dict
  contains:
    key:
      description: Device key in the restore point.
      type: int
      sample: 2000
    label:
      description: Label in the restore point.
      type: str
      sample: Hard disk 1
    target:
      description: Path of the image file, or machine and label of the disk that was written.
      type: str
      sample: /restore/app01-hard-disk-1-2000.qcow2
    target_key:
      description: Device key of the disk that was written.
      returned: with O(target=in_place)
      type: int
      sample: 2000
    format:
      description: Format of the image file; null for a disk of a machine.
      type: str
      sample: qcow2
    transport:
      description: How the disk was written; null for an image file.
      type: str
      sample: nbdssl
    method:
      description: How the transport did it, V(vddk), V(proxy_hotadd) or V(import_lease); null for an image file.
      type: str
      sample: vddk
    transport_reasons:
      description:
        - Why no transport that stands before it in O(transports) was used, a line each; some can't serve the disk, some
          failed when they tried.
      type: list
      elements: str
      sample: ["hotadd: this machine is not a virtual machine of this vCenter"]
    transport_notes:
      description: What the transport that was used costs.
      type: list
      elements: str
      sample: []
    bytes_read:
      description: Bytes read from the restore point; for an image file the size of the disk.
      type: int
      sample: 8589934592
    bytes_written:
      description:
        - Bytes written, zeros included; for an image file what it takes on its file system, for a disk that came by
          transport V(https) what was sent.
        - With O(changed_only=true) at most an eighth more than what differed, since what lies close together is written
          as one; or what change tracking reported, where a sample of it differed nearly all over.
      type: int
      sample: 4187593113
    seconds:
      description: How long it took, reading back included.
      type: float
      sample: 5.9
    verified:
      description:
        - Whether what is there was compared with the restore point and is the same. A difference is an error.
        - Null if nothing was compared; after transport V(https), with a warning, also where nothing can read the disk.
      type: bool
      sample: true
    verification:
      description:
        - How much was compared. V(whole) is all of the disk; V(sampled) is what was written or known to have changed,
          and a sample of the rest. Null if nothing was compared.
        - It is not there for an image file, of which all is compared.
      type: str
      sample: sampled
    sampled_percent:
      description: >-
        The share of the rest that the sample compared, in percent, where it was not all of it; null if no sample was
        compared.
      type: float
      sample: 1.0
    changed_only:
      description: Whether only what changed was written. It is not there for an image file.
      type: bool
      sample: false
    reason:
      description: Why the disk was written, or was not, and why as a whole where O(changed_only=true).
      type: str
      sample: it was not there
vm:
  description: The virtual machine that was written to, or the new one.
  returned: with O(target=in_place) and O(target=new_vm)
  type: dict
  contains:
    moid:
      description: Its managed object id; null in check mode with O(target=new_vm).
      type: str
      sample: vm-117
    name:
      description: Its name.
      type: str
      sample: app01-restored
    path:
      description: Its place in the inventory.
      type: str
      sample: /DC0/vm/restored/app01-restored
    instance_uuid:
      description: Its instance UUID, by which the repository knows it; null in check mode with O(target=new_vm).
      type: str
      sample: 502f6c1e-7a1a-4b6e-9d3c-0d5a0d1b2c3d
    host:
      description: Host that it was made on.
      returned: with O(target=new_vm)
      type: str
      sample: esx01.example.com
half_written:
  description:
    - Disks of that machine that hold neither what they held nor a restore point, since a restore of them did not come
      to its end. After a restore, those that it did not write.
    - Only what this repository's restores have left is known.
  returned: with O(target=in_place)
  type: list
  elements: dict
  contains:
    key:
      description: Device key of the disk.
      type: int
      sample: 2000
    point:
      description: Name of the restore point that was being written.
      type: str
      sample: 20261122T084203Z
    point_vm:
      description: Instance UUID of the machine that this point is of.
      type: str
      sample: 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a
    run_id:
      description: The run of that restore.
      type: str
      sample: 20261122T084203.417123Z-3f9a2b1c
    started:
      description: When it began (UTC).
      type: str
      sample: '2026-11-22T08:42:03Z'
tags:
  description: The tags that were attached to the new machine; in check mode those that would be, as far as it is known.
  returned: with O(target=new_vm)
  type: list
  elements: dict
  contains:
    category:
      description: Name of the category.
      type: str
      sample: Backup
    name:
      description: Name of the tag.
      type: str
      sample: daily
differences:
  description: Every field in which its configuration differs from the one that was saved, and the tags it has no more.
  returned: with O(target=new_vm), empty in check mode
  type: list
  elements: dict
  contains:
    path:
      description: The field. Devices go by the keys that they had.
      type: str
      sample: hardware.device[2000].backing.uuid
    before:
      description: Its value in the saved configuration; null if it was not set.
      type: raw
      sample: 6000C29e-3c1d-4a52-8f0e-5a1b2c3d4e5f
    after:
      description: Its value in the new machine; null if it is not set.
      type: raw
      sample: 6000C291-11aa-4c52-9d0e-0f1b2c3d4e5f
    reason:
      description: Why it must differ. Null if nothing explains it; then there is a warning too.
      type: str
      sample: disks have new files and UUIDs of their own
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

from ..module_utils.backup.request import parse_rate
from ..module_utils.datapath.image import FORMATS
from ..module_utils.libraries import first_missing
from ..module_utils.restore import in_place, new_vm, to_file
from ..module_utils.restore.request import FILE, FILE_FORMATS, IN_PLACE, NEW_VM, PROVISIONING, TARGETS, RestoreRequest
from ..module_utils.runner import (
    Options,
    connection_options,
    lock_options,
    progress_options,
    repository_options,
    repository_vm_options,
    run_module,
    transport_options,
    vm_options,
)

DISK = dict(
    key=dict(type="int", required=True, no_log=False),
    target_key=dict(type="int", no_log=False),
    datastore=dict(type="str"),
    format=dict(type="str", choices=list(FORMATS)),
    provisioning=dict(type="str", choices=list(PROVISIONING)),
)
TRANSPORTS = ["hotadd", "nbdssl", "nbd", "https"]


def options() -> Options:
    """Connection and VM belong to one of the targets only, so they are not required as such."""
    connection = {name: dict(spec) for name, spec in connection_options().argument_spec.items()}
    needed = [name for name, spec in connection.items() if spec.pop("required", False)]
    own = dict(
        target=dict(type="str", choices=list(TARGETS), default="file"),
        dest=dict(type="path"),
        format=dict(type="str", choices=list(FILE_FORMATS), default="raw"),
        disks=dict(type="list", elements="dict", options=DISK, default=[]),
        overwrite=dict(type="bool", default=False),
        changed_only=dict(type="bool", default=False),
        force=dict(type="bool", default=False),
        safety_run_id=dict(type="str"),
        verify=dict(type="raw", default=True),
        rate_limit=dict(type="str"),
        cluster=dict(type="str"),
        esxi_hostname=dict(type="str"),
        resource_pool=dict(type="str"),
        datastore=dict(type="str"),
        networks=dict(type="dict", default={}),
        provisioning=dict(type="str", choices=list(PROVISIONING), default="same"),
        mac_addresses=dict(type="str", choices=["keep", "new"], default="keep"),
        bios_uuid=dict(type="str", choices=["keep", "new"], default="keep"),
        vtpm=dict(type="str", choices=["refuse", "drop"], default="refuse"),
        tags=dict(type="bool", default=True),
        power_on=dict(type="bool", default=False),
        allow_duplicate_name=dict(type="bool", default=False),
        on_failure=dict(type="str", choices=["remove", "keep"], default="remove"),
    )
    return (
        Options(connection, required_if=[("target", target, needed) for target in (IN_PLACE, NEW_VM)])
        + Options(vm_options().argument_spec, mutually_exclusive=[("name", "uuid", "moid")])
        + repository_options()
        + repository_vm_options()
        + transport_options(TRANSPORTS)
        + progress_options()
        + lock_options()
        + Options(own, required_if=[("target", "file", ["dest"])])
    )


def body(module: AnsibleModule) -> Dict[str, Any]:
    restore = to_file.restore_point
    if module.params["target"] != FILE:
        restore = in_place.restore_point if module.params["target"] == IN_PLACE else new_vm.restore_point
        name, what, trace = first_missing("pyVmomi", "nbd")
        if name:
            module.fail_json(msg=missing_required_lib(what), exception=trace)
    request = RestoreRequest.from_params(module.params, parse_rate(module.params["rate_limit"]))
    result = restore(request, module.check_mode)
    if not module._diff:
        del result["diff"]
    return result


def main() -> None:
    run_module(options(), body, libraries=["blake3"])


if __name__ == "__main__":
    main()
