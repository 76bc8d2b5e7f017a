#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: vadp_file_restore
short_description: Copy or list files out of a restore point
version_added: 0.1.0
description:
  - Reads the file systems on the disks of a restore point, and copies files out of them into a folder on the backup
    proxy, or lists them. The backup need not know of files, and nothing is unpacked or mounted.
  - It needs no vCenter, no root and no kernel driver. Exactly one of O(vm_uuid) and O(vm_name) is required.
  - It reads ext2, ext3, ext4, XFS, btrfs on one device, NTFS and FAT, in GPT and MBR partitions, in LVM volumes and on
    whole disks. What it does not know to read right is refused by its name, and read by libguestfs, the library behind
    guestfish, where that is installed; such are exFAT, squashfs, F2FS, arrays, and LVM volumes that are not linear or
    striped. Encrypted volumes are reported in RV(volumes), and can't be read.
  - A process of its own reads the disks, and can do nothing but answer. By dissect, each block of the disk is compared
    with the hash that was taken when it was backed up. Where libguestfs reads, all files of the repository that the
    disks stand on are checked beside. So no damage of the repository gets into a file unseen.
  - All files are written into a hidden folder in O(dest) and get their places when the last one is complete. If
    anything fails before, nothing is there. No name or link of the image leads outside O(dest).
  - Symbolic links are restored as links and never followed here. In O(paths), links of the guest on the way to a file
    are followed within its volume. Devices, pipes and sockets are skipped, and reported in RV(skipped_files).
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.repository
  - openvadp.backup.repository_vm
  - openvadp.backup.repository_vm.point
  - openvadp.backup.progress
  - openvadp.backup.attributes
attributes:
  check_mode:
    support: full
    details: The files are found and compared with what is in O(dest), but nothing is written.
  diff_mode:
    support: full
  idempotent:
    support: full
    details: A file whose content is in its place already is left as it is.
options:
  paths:
    description:
      - Paths in the guest, from the root of their volume on, each beginning with C(/). On Windows volumes too, without
        the drive letter.
      - V(*), V(?) and V([...]) stand for parts of a name, V(**) for any number of directories. The case of letters does
        not matter on NTFS and FAT.
      - Each of them must be there, if files are restored.
    type: list
    elements: str
    required: true
  dest:
    description:
      - Folder that the files are written to. It must exist. A file C(/etc/hosts) becomes O(dest)C(/etc/hosts).
      - Directories on the way to a file that are not restored themselves are made for the owner alone.
      - Required unless O(list=true).
    type: path
  list:
    description: Whether the files are only reported by RV(files), and not written.
    type: bool
    default: false
  versions:
    description:
      - Whether all restore points of the virtual machine are searched, and not O(point) alone. It takes O(list=true).
      - RV(files) then has an element for each version of each file, and says which points hold it. A version is
        another one if its type, size, time of the last change or target differs, or with O(checksums) its content. A
        change that left size and time as they were is seen with O(checksums) only.
      - A point that can't be searched is reported in RV(points), with a warning. O(limit) holds for each point,
        O(timeout) for all of them together.
    type: bool
    default: false
  checksums:
    description: Whether O(list=true) also returns the SHA-256 of each file, which reads all of it.
    type: bool
    default: false
  query:
    description:
      - JMESPath expression that is applied to the list of files. What comes out is returned as RV(files).
      - It needs the Python library jmespath.
    type: str
  recurse:
    description: Whether a directory comes with all that is in it.
    type: bool
    default: true
  disks:
    description: Device keys of the disks of the point that are read. Empty means all.
    type: list
    elements: int
    default: []
  volumes:
    description:
      - The volumes that are searched, each by its name, label or UUID as in RV(volumes). Empty means all that
        can be read, without those that are searched only by their names (RV(volumes[].only_by_name)).
      - If the same path exists on two of them, this must name the one that is meant.
    type: list
    elements: str
    default: []
  reader:
    description:
      - What reads the file systems. V(dissect) is there at once and reads only what it needs. V(guestfish) boots a
        small virtual machine by libguestfs, in which Linux mounts them; it takes seconds with KVM, without it a minute
        or two.
      - V(auto) takes dissect, and libguestfs for each volume that dissect knows and does not read, or fails on, or
        whose log must be replayed (RV(volumes[].clean)), and for files that dissect refuses and Linux is known to
        read right. Which volumes those are can be narrowed by O(volumes). RV(volumes[].reader) says which it was.
      - With O(versions=true) only dissect reads.
    type: str
    choices: [auto, dissect, guestfish]
    default: auto
  overwrite:
    description:
      - Whether a file in O(dest) whose content differs is replaced. Otherwise nothing is written if there is one.
      - What is of another kind, such as a directory where a file should be, is never replaced.
    type: bool
    default: false
  preserve:
    description:
      - What a file keeps, besides its content. Without V(mode) a file can be read by its owner only, because the
        guest's users are not those of this machine.
      - V(times) is the time of the last change. V(mode) are the permissions, V(special_bits) the set-user-id and
        set-group-id bits of them. V(owner) are the guest's user and group ids; it takes root.
      - NTFS and FAT have no modes and owners that mean anything here. Access control lists and other extended
        attributes are not restored.
    type: list
    elements: str
    choices: [times, mode, owner, special_bits]
    default: [times]
  fail_on_skipped:
    description:
      - Whether the restore fails, and writes nothing, if any selected file can't be restored.
      - Otherwise the others are restored, and RV(skipped_files) and a warning say which were not.
    type: bool
    default: false
  limit:
    description: Most files that may be selected. More of them are an error.
    type: int
    default: 100000
  io_timeout:
    description:
      - Seconds after which a reader that says nothing is killed, for example over a damaged file system. The virtual
        machine of libguestfs has at least 600 seconds to start.
    type: int
    default: 180
  timeout:
    description: Seconds that reading may take altogether.
    type: int
    default: 86400
requirements:
  - blake3
  - libnbd's Python binding
  - qemu-nbd
  - Python 3.10 or newer with dissect.btrfs, for btrfs
  - libguestfs (package guestfish or libguestfs), with a kernel in C(/boot) that the user may read, for what is not read
    here
  - jmespath, for O(query)
notes:
  - The file systems are as they were at the snapshot. dissect replays the journal of ext3 and ext4, in memory.
    libguestfs replays those of XFS and btrfs, on an overlay that is thrown away. Only Windows replays that of NTFS, and
    FAT has none. Where a file system is not known to be clean after that, the newest changes may be missing, and files
    that had just changed may hold other bytes. RV(volumes[].clean) and a warning say so.
  - The times of FAT are local times of the guest; they are read as UTC.
seealso:
  - module: openvadp.backup.vadp_disk_restore
"""

EXAMPLES = r"""
- name: Bring back a configuration
  openvadp.backup.vadp_file_restore:
    repository: /backup/vms
    vm_name: app01
    paths: [/etc/nginx]
    dest: /restore/app01
    preserve: [times, mode]

- name: See which large files are in home directories
  openvadp.backup.vadp_file_restore:
    repository: /backup/vms
    vm_name: app01
    point: 20261122T084203Z
    paths: ['/home/**']
    list: true
    query: '[?size > `1000000`].{path: path, size: size}'
  register: large

- name: See when a file changed, and which points hold which version
  openvadp.backup.vadp_file_restore:
    repository: /backup/vms
    vm_name: app01
    paths: [/etc/fstab]
    list: true
    versions: true
    checksums: true

- name: Take the version that was there in the morning
  openvadp.backup.vadp_file_restore:
    repository: /backup/vms
    vm_name: app01
    point: before 2026-11-20T09:00+01:00
    paths: [/etc/fstab]
    dest: /restore/app01

- name: A folder of an exFAT volume, by libguestfs
  openvadp.backup.vadp_file_restore:
    repository: /backup/vms
    vm_name: app01
    volumes: [2001p1]
    reader: guestfish
    paths: [/photos]
    dest: /restore/app01

- name: One file of a Windows machine, from the volume with that label
  openvadp.backup.vadp_file_restore:
    repository: /backup/vms
    vm_name: win01
    volumes: [Data]
    paths: ['/Users/anna/Documents/*.docx']
    dest: /restore/win01
"""

RETURN = r"""
point:
  description: Name of the point; with O(versions=true) the newest that was searched.
  returned: success
  type: str
  sample: 20261122T084203Z
vm_name:
  description: The virtual machine's name when the point was made.
  returned: success
  type: str
  sample: app01
vm_uuid:
  description: Its instance UUID.
  returned: success
  type: str
  sample: 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a
reader:
  description: What read the file systems, V(dissect), V(guestfish) or V(dissect, guestfish).
  returned: success
  type: str
  sample: dissect
volumes:
  description: What is on the disks.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Disk and partition, or volume group and logical volume.
      type: str
      sample: 2000p1
    disk:
      description: Device key of the disk; of a logical volume that of the first disk.
      type: int
      sample: 2000
    size:
      description: Size in bytes.
      type: int
      sample: 42948624384
    type:
      description: The file system, or what else is there.
      type: str
      sample: ext4
    label:
      description: Label of the file system; null if it has none.
      type: str
      sample: root
    uuid:
      description: UUID or serial number of the file system.
      type: str
      sample: 8d5a3c1e-5b1f-4b7c-9f53-2d4c7f2b1a90
    readable:
      description: Whether files can be read from it.
      type: bool
      sample: true
    problem:
      description: Why not; null if it can be.
      type: str
      sample: null
    clean:
      description:
        - Whether it is known that all of the file system lies in its place, and nothing waits in a log or for a check.
          Otherwise RV(volumes[].warnings) says why. Null if it can't be read.
      type: bool
      sample: true
    warnings:
      description: What to mind about its files.
      type: list
      elements: str
      sample: []
    only_by_name:
      description:
        - Whether it is searched only if O(volumes) names it. Of btrfs with a default subvolume that is not the top
          level, the top level is such a volume, with C(/top) behind the name. All subvolumes lie there, snapshots too.
      type: bool
      sample: false
    reader:
      description: What reads it, V(dissect) or V(guestfish); null if it can't be read.
      type: str
      sample: guestfish
    reader_reason:
      description: Why it is that one.
      type: str
      sample: "dissect: only libguestfs reads exfat"
files:
  description: The selected files; with O(query), what the expression makes of them.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description:
        - Path on the volume. What is not UTF-8, or no printable character, stands as C(\xNN) or C(\n).
      type: str
      sample: /etc/hosts
    path_base64:
      description: The very bytes of the path.
      returned: if RV(files[].path) does not report them
      type: str
      sample: L2V0Yy///g==
    volume:
      description: Name of the volume.
      type: str
      sample: 2000p1
    type:
      description: V(file), V(directory) or V(link).
      type: str
      sample: file
    size:
      description: Size of a file in bytes.
      type: int
      sample: 221
    mtime:
      description: Time of the last change (UTC).
      type: str
      sample: '2026-11-20T21:14:07Z'
    mode:
      description: Permissions, in octal digits; null where there are none.
      type: str
      sample: '0644'
    uid:
      description: Id of the owner.
      type: int
      sample: 0
    gid:
      description: Id of the group.
      type: int
      sample: 0
    target:
      description: Where a link points to; null for what is not a link.
      type: str
      sample: null
    sha256:
      description: SHA-256 of a file's content; null if it was not read.
      type: str
      sample: 30294566aa1f5d4737b6d1537e939eaa44432283994b799080132d6917180e96
    dest:
      description: Where it was written; null with O(list=true).
      type: str
      sample: /restore/app01/etc/hosts
    state:
      description: V(restored), V(unchanged) or V(listed).
      type: str
      sample: restored
    points:
      description: Names of the points that hold this version, oldest first.
      returned: with O(versions=true)
      type: list
      elements: str
      sample: [20261120T084203Z, 20261121T084203Z]
    first_point:
      description: The oldest of them.
      returned: with O(versions=true)
      type: str
      sample: 20261120T084203Z
    last_point:
      description: The newest of them.
      returned: with O(versions=true)
      type: str
      sample: 20261121T084203Z
    absent_from:
      description: Names of the points in which there is no such file, whichever version.
      returned: with O(versions=true)
      type: list
      elements: str
      sample: []
    unknown_in:
      description:
        - Names of the points that do not say, because they or the volume can't be read, or the file or a directory on
          the way was skipped.
      returned: with O(versions=true)
      type: list
      elements: str
      sample: []
points:
  description: All points of the virtual machine, those whose manifest is damaged first, then oldest first.
  returned: with O(versions=true)
  type: list
  elements: dict
  contains:
    point:
      description: Name of the point.
      type: str
      sample: 20261120T084203Z
    created:
      description: When its snapshot was taken; null if its manifest is damaged.
      type: str
      sample: '2026-11-20T08:42:03Z'
    problem:
      description: Why it was not searched; null if it was.
      type: str
      sample: null
skipped_files:
  description: Selected files that could not be had.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: As in RV(files).
      type: str
      sample: /dev/console
    volume:
      description: Name of the volume.
      type: str
      sample: 2000p1
    point:
      description: Name of the point.
      returned: with O(versions=true)
      type: str
      sample: 20261120T084203Z
    reason:
      description: Why.
      type: str
      sample: it is a character device
bytes_restored:
  description: Bytes of the files that were written.
  returned: success
  type: int
  sample: 221
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

from ..module_utils.datapath.progress import Progress
from ..module_utils.libraries import first_missing
from ..module_utils.repository.report import search
from ..module_utils.restore.files.request import AUTO, PRESERVE, READERS, FilesRequest
from ..module_utils.restore.files.run import restore_files
from ..module_utils.restore.files.versions import list_versions
from ..module_utils.runner import Options, progress_options, repository_options, repository_vm_options, run_module

OPTIONS = Options(
    dict(
        paths=dict(type="list", elements="str", required=True),
        dest=dict(type="path"),
        list=dict(type="bool", default=False),
        versions=dict(type="bool", default=False),
        checksums=dict(type="bool", default=False),
        query=dict(type="str"),
        recurse=dict(type="bool", default=True),
        disks=dict(type="list", elements="int", default=[]),
        volumes=dict(type="list", elements="str", default=[]),
        reader=dict(type="str", choices=list(READERS), default=AUTO),
        overwrite=dict(type="bool", default=False),
        preserve=dict(type="list", elements="str", choices=list(PRESERVE), default=["times"]),
        fail_on_skipped=dict(type="bool", default=False),
        limit=dict(type="int", default=100000),
        io_timeout=dict(type="int", default=180),
        timeout=dict(type="int", default=86400),
    ),
    required_if=[("list", False, ["dest"])],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    name, what, trace = first_missing("jmespath")
    if params["query"] is not None and name:
        module.fail_json(msg=missing_required_lib(what), exception=trace)
    with Progress(None if module.check_mode else params["progress_file"]) as progress:
        request = FilesRequest.from_params(params)
        result = list_versions(request) if request.versions else restore_files(request, module.check_mode, progress)
    result["files"] = search(params["query"], result["files"])
    return result


def main() -> None:
    options = repository_options() + repository_vm_options() + progress_options() + OPTIONS
    run_module(options, body, libraries=["blake3", "nbd"])


if __name__ == "__main__":
    main()
