# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The privileges that each task needs, and on what (VADP facts 48): the one table, which the docs repeat.

``docs/ports-and-privileges.md`` and the roles in ``docs/roles`` are tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterable, List, Tuple

# Tasks
BACKUP = "backup"
KEYS = "keys"
VDDK = "vddk"
ACCESS = "access"
HOTADD = "hotadd"
HTTPS = "https"
ENCRYPTED = "encrypted"
ENCRYPTED_HOTADD = "encrypted_hotadd"
RESTORE = "restore"
NEW_VM = "new_vm"
TAGS = "tags"
LAN = "backup_lan"

TASKS: Dict[str, str] = {
    BACKUP: "snapshots and change tracking: every backup",
    KEYS: "noting in a virtual machine which point it stands on; a backup works without, and can prove less",
    VDDK: "reading through VDDK: san, hotadd, nbdssl, nbd",
    ACCESS: "the access calls of VDDK (vadp_access)",
    HOTADD: "attaching disks to the proxy VM: hotadd",
    HTTPS: "reading without VDDK: https",
    ENCRYPTED: "encrypted virtual machines",
    ENCRYPTED_HOTADD: "encrypted virtual machines by hotadd",
    RESTORE: "writing into the disks of a virtual machine",
    NEW_VM: "restoring as a new virtual machine",
    TAGS: "giving a new virtual machine the tags that the old one had; it is restored without this too",
    LAN: "setting up the backup LAN",
}

# What a privilege is asked for on.
VM = "virtual machine"
PROXY = "proxy VM"
DATASTORE = "datastore"
VCENTER = "vCenter"
FOLDER = "folder"
POOL = "resource pool"
NETWORK = "network"
HOST = "host"
TAG = "tag"

# The transports of the planner, and the tasks of each beside the backup itself.
OF_TRANSPORT: Dict[str, Tuple[str, ...]] = {
    "san": (VDDK,),
    "hotadd": (HOTADD,),
    "nbdssl": (VDDK,),
    "nbd": (VDDK,),
    "https": (HTTPS,),
}


@dataclass(frozen=True)
class Privilege:
    """A privilege: its id, what it is needed on, for which tasks, and what for."""

    name: str
    on: str
    tasks: Tuple[str, ...]
    purpose: str


PRIVILEGES: Tuple[Privilege, ...] = (
    Privilege(
        "VirtualMachine.State.CreateSnapshot", VM, (BACKUP, RESTORE), "make the snapshot that is read; stun cycles"
    ),
    Privilege("VirtualMachine.State.RemoveSnapshot", VM, (BACKUP, RESTORE), "remove it, and consolidate"),
    Privilege(
        "VirtualMachine.Config.ChangeTracking",
        VM,
        (BACKUP, RESTORE),
        "switch changed block tracking on and query it; reset it after a restore",
    ),
    Privilege(
        "VirtualMachine.Config.AdvancedConfig",
        VM,
        (KEYS, RESTORE),
        "note the newest point of each disk; mark disks that a restore writes",
    ),
    Privilege("VirtualMachine.Provisioning.DiskRandomRead", VM, (VDDK, RESTORE), "read the disks"),
    Privilege("VirtualMachine.Provisioning.GetVmFiles", VM, (BACKUP, VDDK, HTTPS), "read the machine's files"),
    Privilege("VirtualMachine.Provisioning.DiskRandomAccess", VM, (RESTORE,), "write the disks"),
    Privilege("Datastore.Browse", DATASTORE, (BACKUP, VDDK, HTTPS), "find the machine's files"),
    Privilege(
        "Datastore.FileManagement",
        DATASTORE,
        (BACKUP, VDDK, HTTPS, NEW_VM),
        "read files of a datastore (NVRAM, disks), write NVRAM",
    ),
    Privilege("Global.DisableMethods", VCENTER, (ACCESS,), "stop Storage vMotion meanwhile"),
    Privilege("Global.EnableMethods", VCENTER, (ACCESS,), "allow it again"),
    Privilege("VirtualMachine.Config.AddExistingDisk", PROXY, (HOTADD,), "attach a disk"),
    Privilege(
        "VirtualMachine.Config.AddNewDisk",
        PROXY,
        (HOTADD, NEW_VM),
        "attach a disk with a redo log; a new machine's disks",
    ),
    Privilege(
        "VirtualMachine.Config.RemoveDisk",
        PROXY,
        (HOTADD, NEW_VM),
        "detach it; a new machine's disks, where the restore came to nothing",
    ),
    Privilege(
        "VirtualMachine.Config.Settings",
        PROXY,
        (HOTADD, NEW_VM),
        "change settings, the boot order of a new machine too",
    ),
    Privilege("VirtualMachine.Config.AdvancedConfig", PROXY, (HOTADD,), "change the proxy's advanced settings"),
    Privilege("VirtualMachine.Config.Resource", PROXY, (HOTADD,), "change the proxy's resources"),
    Privilege(
        "VirtualMachine.Config.AddRemoveDevice", PROXY, (HOTADD, NEW_VM), "add a controller; a new machine's devices"
    ),
    Privilege("Datastore.AllocateSpace", DATASTORE, (HOTADD, NEW_VM), "redo logs and new disks"),
    Privilege("VApp.Export", VM, (HTTPS,), "the export lease of a running machine"),
    Privilege("Cryptographer.Access", VM, (ENCRYPTED,), "read an encrypted disk; the backup of it is plaintext"),
    Privilege("Cryptographer.AddDisk", PROXY, (ENCRYPTED_HOTADD,), "attach an encrypted disk"),
    Privilege("VApp.Import", POOL, (NEW_VM,), "the import lease"),
    Privilege("VirtualMachine.Inventory.Create", FOLDER, (NEW_VM,), "make the machine"),
    Privilege("VirtualMachine.Inventory.Unregister", FOLDER, (NEW_VM,), "remove it, where the restore came to nothing"),
    Privilege("VirtualMachine.Config.AdvancedConfig", FOLDER, (NEW_VM,), "give it the advanced settings that it had"),
    Privilege("VirtualMachine.Config.EditDevice", FOLDER, (NEW_VM,), "give it the video card that it had"),
    Privilege("VirtualMachine.Interact.PowerOn", FOLDER, (NEW_VM,), "start it, with power_on"),
    Privilege("Global.SetCustomField", FOLDER, (NEW_VM,), "give it the custom attributes that it had"),
    Privilege("Resource.AssignVMToPool", POOL, (NEW_VM,), "put it into a resource pool"),
    Privilege("InventoryService.Tagging.AttachTag", TAG, (TAGS,), "attach tags to it"),
    Privilege("InventoryService.Tagging.ObjectAttachable", FOLDER, (TAGS,), "have tags attached to it"),
    Privilege("Network.Assign", NETWORK, (NEW_VM,), "connect its network cards"),
    Privilege("Host.Config.Network", HOST, (LAN,), "VMkernel NICs, switches and port groups of a host"),
    Privilege("DVSwitch.Modify", NETWORK, (LAN,), "Network I/O Control of a distributed switch"),
    Privilege("DVPortgroup.Create", NETWORK, (LAN,), "make a distributed port group"),
    Privilege("DVPortgroup.Modify", NETWORK, (LAN,), "change it"),
)

# The roles that the docs offer: for backups alone, and for restores too.
ROLES: Dict[str, Tuple[str, ...]] = {
    "openvadp-backup": (BACKUP, KEYS, VDDK, ACCESS, HOTADD, HTTPS, ENCRYPTED, ENCRYPTED_HOTADD),
    "openvadp-restore": (
        BACKUP,
        KEYS,
        VDDK,
        ACCESS,
        HOTADD,
        HTTPS,
        ENCRYPTED,
        ENCRYPTED_HOTADD,
        RESTORE,
        NEW_VM,
        TAGS,
    ),
}


def needed(tasks: Iterable[str]) -> List[Privilege]:
    """The privileges of any of *tasks*, in the order of the table."""
    wanted = set(tasks)
    return [privilege for privilege in PRIVILEGES if wanted.intersection(privilege.tasks)]


def role(name: str) -> List[str]:
    """The ids of a role of ``ROLES``, sorted."""
    return sorted({privilege.name for privilege in needed(ROLES[name])})
