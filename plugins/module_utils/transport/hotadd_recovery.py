# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Disks that a crashed run left attached to a proxy (proofs 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Set

from ..errors import NotFoundError
from ..libraries import vim
from ..vsphere.disks import is_multi_writer
from ..vsphere.inventory import VmRef, find_vm
from ..vsphere.session import Session
from .hotadd import detach
from .hotadd_plan import attachments_of
from .hotadd_proxy import DEVICE_TIMEOUT, is_here, is_intended, read_proxy, settle
from .hotadd_reservation import release

if TYPE_CHECKING:
    from ..repository.runs import Run


def recover(session: Session, run: Run, *, sysfs_dir: str, device_dir: str, check_mode: bool) -> List[Dict[str, Any]]:
    """Detach what a crashed run left attached: only what its record names and vCenter shows just so (proofs 9).

    Any proxy does it for another. The devices of a proxy that is another machine can't be deleted from here.

    :returns: [{what, id, action}]; what is not proved to be ours is left, and the action says so.
    """
    found: List[Dict[str, Any]] = []
    for intent in run.intents("attachment"):
        proxy = _proxy_of(session, intent)
        if proxy is None:
            if _is_gone(session, intent):
                if not check_mode:
                    run.settle(intent["id"])
            else:
                found.append(_left(f"{intent['file']} at {intent['proxy_moid']}", "that proxy is not in this vCenter"))
            continue
        if not check_mode:
            # vCenter goes on with what it was told before the crash.
            settle(session, proxy)
        state = read_proxy(session, proxy)
        there = attachments_of(state.devices, [str(intent["file"])])
        ours = [item for item in there if is_intended(item, intent, proxy, state, run.run_id)]
        ours = [item for item in ours if item.device_key not in _shared(state.devices)]
        if ours and not _is_of_its_source(session, intent, proxy):
            ours = []
        if not check_mode:
            devices = device_dir if ours and is_here(session, proxy, sysfs_dir) else None
            detach(session, proxy, ours, sysfs_dir=sysfs_dir, device_dir=devices, timeout=DEVICE_TIMEOUT)
            release(session, proxy, intent.get("disk_uuid"), run.run_id)
            if ours == there:
                run.settle(intent["id"])
        action = "would be detached" if check_mode else "detached"
        found += [{"what": "attachment", "id": f"{item.file} at {proxy}", "action": action} for item in ours]
        found += [
            _left(f"{item.file} at {proxy}", "the record does not prove that it is this run's")
            for item in there
            if item not in ours
        ]
    return found


def _is_of_its_source(session: Session, intent: Dict[str, Any], proxy: VmRef) -> bool:
    """Whether vCenter shows the file as one of the machine that was backed up or restored, which is not the proxy.

    Else a record that somebody has written could take a disk away from the machine that it belongs to.
    """
    try:
        source = find_vm(session, moid=str(intent.get("vm_moid")))
    except NotFoundError:
        return False
    if source.moid == proxy.moid or intent.get("vm_uuid") not in (None, source.instance_uuid):
        return False
    files = session.read(source.obj, "layoutEx.file")["layoutEx.file"] or []
    return any(file.name == intent["file"] for file in files)


def _shared(devices: Sequence[Any]) -> Set[int]:
    """The keys of disks that several machines use at the same time: one machine of a cluster is no proxy of another."""
    buses = {device.key for device in devices if (getattr(device, "sharedBus", None) or "noSharing") != "noSharing"}
    disks = [device for device in devices if isinstance(device, vim.vm.device.VirtualDisk)]
    return {disk.key for disk in disks if disk.controllerKey in buses or is_multi_writer(disk)}


def _left(identity: str, reason: str) -> Dict[str, Any]:
    action = f"left: {reason}; if no backup uses it, detach it with proxy_hotadd and state=detached"
    return {"what": "attachment", "id": identity, "action": action}


def _proxy_of(session: Session, intent: Dict[str, Any]) -> Optional[VmRef]:
    """The proxy that a record names, if vCenter has it; under another moid where it was registered again."""
    uuid = intent.get("proxy_uuid")
    try:
        proxy = find_vm(session, moid=str(intent["proxy_moid"]))
        if not uuid or proxy.instance_uuid == uuid:
            return proxy
    except NotFoundError:
        pass
    try:
        return find_vm(session, uuid=str(uuid), use_instance_uuid=True) if uuid else None
    except NotFoundError:
        return None


def _is_gone(session: Session, intent: Dict[str, Any]) -> bool:
    """Whether a proxy that is not there was of this vCenter: then what was attached to it went with it."""
    return intent.get("server_uuid") in (None, session.about.instanceUuid)
