# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A restore point as a new virtual machine.

Look (nothing is touched) -> lock -> record the run, which names the machine by an instance UUID of our choice -> make
the machine -> NVRAM -> write each disk, read it back -> boot order, custom attributes, tags -> compare the
configurations -> start it, if that is wanted -> the run is over. What fails on the way is removed again, or kept, as
``on_failure`` says; what a crash leaves the next run for this name, or ``vadp_recover`` for that machine, takes away.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple

from ..datapath import files
from ..datapath.processes import RuntimeDir
from ..datapath.progress import Progress
from ..errors import (
    AmbiguousError,
    ConnectionLostError,
    DamagedError,
    InputError,
    LockedError,
    NotFoundError,
    RepositoryError,
    VadpError,
    VsphereError,
)
from ..libraries import vim
from ..repository.store import VmStore
from ..repository.run_files import remove_files_of, remove_orphans
from ..repository.runs import Run, new_run_id
from ..repository.saved import read_configuration
from ..repository.verify import point_problems
from ..transport.facts import datastore_facts, proxy_facts
from ..transport.hotadd_recovery import recover
from ..transport.opener import OpenContext
from ..transport.planner import (
    BY_IMPORT,
    WRITE,
    DiskFacts,
    Plan,
    ProxyFacts,
    VmFacts,
    by_import,
    plan,
    plan_new_machine,
)
from ..vsphere import new_machine, placement, tags, vm_keys
from ..vsphere.configuration import restore_config
from ..vsphere.datastore_files import http_size
from ..vsphere.disks import Disk, disks_of, split_datastore_path
from ..vsphere.inventory import VmRef, find_vm
from ..vsphere.session import Session
from .disk_write import is_transport_failure, plan_targets, write_new_disks
from .new_vm_import import Import
from .new_vm_diff import (
    BIOS_UUID,
    DISKS,
    MAC_ADDRESSES,
    MAC_TAKEN,
    NAME,
    NETWORKS,
    PROVISIONING,
    TAGS,
    Difference,
    differences,
    tag_differences,
)
from .new_vm_spec import (
    NEW,
    NewDisk,
    NewMachine,
    Wishes,
    cards_of,
    design,
    finish_spec,
    image_files_of,
    network_of,
    new_keys,
    obstacles,
)
from .point import Point, PointDisk, open_connected, require_intact
from .request import KEEP, SAME, RestoreRequest

_THIN, _EAGER = "thin", "eager"


@dataclass(frozen=True)
class _Saved:
    """What the point keeps of its machine beside the disks."""

    facts: Dict[str, Any]
    nvram: Optional[bytes]

    def config(self) -> Any:
        """A ``vim.vm.ConfigInfo`` of the caller's own."""
        return restore_config(self.facts)


@dataclass(frozen=True)
class _Planned:
    """What is done, as far as it is known before anything is made."""

    name: str
    place: placement.Placement
    wishes: Wishes
    machine: NewMachine
    transports: Dict[int, Plan]
    asked: Set[str]
    warnings: List[str]


def restore_point(request: RestoreRequest, check_mode: bool) -> Dict[str, Any]:
    """Make a virtual machine of a point.

    :param check_mode: all checks, but nothing is made and no lock is taken.
    :returns: {changed, point, restored, vm, differences, warnings, diff}.
    :raises VadpError: before the machine was made nothing was touched; after it ``on_failure`` decides.
    """
    request.check()
    if request.connection is None:
        raise InputError("A new virtual machine needs vCenter", remedy="Give hostname, username and password")
    with ExitStack() as stack:
        point, session = open_connected(request, stack)
        saved = _read_saved(point)
        name = request.vm.get("name") or str(saved.facts["vm"]["name"])
        if not check_mode:
            _clear_crashed(session, point, name, request)
        planned = _look(session, point, saved, name, request)
        with Progress(None if check_mode else request.progress_file) as progress:
            require_intact(point, progress)
            if check_mode:
                tagged = _tag(session, saved, request, None, name)
                entries = [_planned_entry(disk, planned) for disk in point.disks]
                return _result(point, planned, None, entries, [], tagged)
            store = point.repository.vm(planned.wishes.instance_uuid)
            run_id = new_run_id()
            try:
                with store.lock(run_id, "vadp_disk_restore", request.lock_timeout), ExitStack() as stack:
                    # The check of the point may have taken long.
                    planned = _look(session, point, saved, name, request, planned.wishes.instance_uuid)
                    run = store.create_run(None, vm_name=name, run_id=run_id, server_uuid=session.server_uuid)
                    stack.enter_context(run.working())
                    stack.enter_context(session.remembering(run.remember_task))
                    return _Restore(session, point, saved, planned, store, run, request, progress).do()
            finally:
                store.remove_unused()


# Before the first write


def _read_saved(point: Point) -> _Saved:
    """:raises DamagedError: the configuration or the NVRAM is not what was saved."""
    problems = point_problems(point.store, point.manifest)
    if problems:
        raise DamagedError(
            "The restore point is damaged, and nothing was written",
            subject=str(point),
            reason="; ".join(problems),
            remedy="Restore another point, or the disks alone into a machine that exists (target in_place or file)",
            details={"problems": problems},
        )
    facts = read_configuration(point.store.config_path(point.name), ("format", "server", "vm", "disks", "config"))
    nvram = None
    if point.manifest["nvram"] is not None:
        nvram = files.read(str(point.store.nvram_path(point.name)))
    return _Saved(facts, nvram)


def _look(
    session: Session,
    point: Point,
    saved: _Saved,
    name: str,
    request: RestoreRequest,
    instance_uuid: Optional[str] = None,
) -> _Planned:
    """Everything that can be known before anything is made. :raises VadpError: what speaks against it."""
    config = saved.config()
    against = obstacles(config, request.vtpm)
    if against:
        raise InputError(
            "The restore point can't become a virtual machine, and nothing was touched",
            subject=str(point),
            reason="; ".join(against),
            details={"obstacles": against},
        )
    warnings = _check_name(session, name, request)
    names = _network_names(config, saved.facts, request)
    disks = {disk.key: _new_disk(disk, config, request) for disk in point.disks}
    home = request.datastore or _home(saved.facts)
    needed: Dict[str, int] = {}
    for disk in point.disks:
        wanted = disks[disk.key]
        # A thin disk takes what the guest wrote, of which the layer is the compressed part that is known at once.
        size = int(disk.entry["layer"]["size_bytes"]) if wanted.thin else wanted.capacity_bytes
        needed[wanted.datastore] = needed.get(wanted.datastore, 0) + size
    was = {**saved.facts["vm"], **{key: saved.facts.get(key) for key in ("host", "cluster", "resource_pool")}}
    place = placement.place(
        session,
        placement.Wanted(
            datacenter=request.vm.get("datacenter"),
            folder=request.vm.get("folder"),
            cluster=request.cluster,
            host=request.esxi_hostname,
            resource_pool=request.resource_pool,
            home=home,
            datastores=needed,
            networks=sorted(set(names.values())),
            was=was,
        ),
        f"{point} as '{name}'",
    )
    warnings += place.warnings
    original = _original(session, point)
    warnings += _check_identity(session, original, saved, request)
    wishes = Wishes(
        name=name,
        instance_uuid=instance_uuid or new_machine.new_instance_uuid(),
        home=home,
        disks=disks,
        networks={old: place.networks[new] for old, new in names.items()},
        mac_addresses=request.mac_addresses,
        bios_uuid=request.bios_uuid,
        vtpm=request.vtpm,
        missing_files=_missing_files(session, config, place),
    )
    machine = design(config, saved.facts.get("networks") or [], wishes)
    if saved.nvram is not None and saved.config().keyId is not None:
        machine.warnings.append("Its NVRAM was encrypted with the machine, so the new one starts with an empty NVRAM")
    return _Planned(
        name=name,
        place=place,
        wishes=wishes,
        machine=machine,
        transports=_plan(session, point, saved, wishes, place, request),
        asked=_asked(session, saved, names, request) | ({MAC_TAKEN} if original is not None else set()),
        warnings=warnings + machine.warnings,
    )


def _asked(session: Session, saved: _Saved, names: Mapping[str, str], request: RestoreRequest) -> Set[str]:
    asked = set()
    if request.vm.get("name") not in (None, saved.facts["vm"]["name"]):
        asked.add(NAME)
    elsewhere = saved.facts["server"].get("instance_uuid") != session.about.instanceUuid
    if elsewhere or request.vm.get("datacenter") or any(old != new for old, new in names.items()):
        # The same name in another vCenter or datacenter is another network.
        asked.add(NETWORKS)
    if request.mac_addresses == NEW:
        asked.add(MAC_ADDRESSES)
    if request.bios_uuid == NEW:
        asked.add(BIOS_UUID)
    if request.provisioning != SAME or any(choice.provisioning for choice in request.disks):
        asked.add(PROVISIONING)
    if request.disks:
        asked.add(DISKS)
    if not request.tags:
        asked.add(TAGS)
    return asked


def _tag(session: Session, saved: _Saved, request: RestoreRequest, vm: Optional[VmRef], name: str) -> tags.Restored:
    """The tags that the machine had, as far as this vCenter has them. :param vm: None if it is not there yet."""
    if not request.tags:
        return tags.Restored([], [])
    held = tags.saved_tags(saved.facts)
    if held is None and session.is_vcenter:
        return tags.Restored([], ["The restore point does not report the machine's tags, so the new one has none"])
    return tags.restore(session, held or [], vm, name)


def _home(facts: Mapping[str, Any]) -> str:
    return split_datastore_path(str(facts.get("vm_path_name") or ""))[0]


def _new_disk(disk: PointDisk, config: Any, request: RestoreRequest) -> NewDisk:
    device = next((one for one in config.hardware.device if one.key == disk.key), None)
    if device is None:
        raise DamagedError(
            "The saved configuration does not fit the restore point",
            subject=f"disk {disk.key} ('{disk.label}')",
            reason="the configuration has no such disk",
            remedy="Restore the disks alone into a machine that exists (target in_place or file)",
        )
    wanted = disk.choice.provisioning or request.provisioning
    thin = wanted == _THIN
    eager = wanted == _EAGER
    if wanted == SAME:
        thin = getattr(device.backing, "thinProvisioned", None) is not False
        eager = bool(getattr(device.backing, "eagerlyScrub", False))
    where = disk.choice.datastore or request.datastore or str(disk.entry["datastore"])
    return NewDisk(where, disk.capacity_bytes, thin, eager and not thin)


def _check_name(session: Session, name: str, request: RestoreRequest) -> List[str]:
    """Never a second machine of a name, unless that is said."""
    try:
        taken = [f"{vm.path} ({vm.moid})" for vm in [find_vm(session, name=name)]]
    except NotFoundError:
        return []
    except AmbiguousError as error:
        taken = [f"{match['path']} ({match['moid']})" for match in error.details["matches"]]
    if not request.allow_duplicate_name:
        raise InputError(
            "There is a virtual machine of this name already, and nothing was touched",
            subject=name,
            reason=", ".join(taken),
            remedy="Give another name; or set allow_duplicate_name, and another folder, if two should have it",
            details={"matches": taken},
        )
    return [f"There is another virtual machine '{name}': {', '.join(taken)}"]


def _original(session: Session, point: Point) -> Optional[VmRef]:
    """The machine that the point was made of, if this vCenter still has it."""
    try:
        return find_vm(session, uuid=point.store.uuid, use_instance_uuid=True)
    except NotFoundError:
        return None


def _check_identity(session: Session, original: Optional[VmRef], saved: _Saved, request: RestoreRequest) -> List[str]:
    """Two machines with one address in one network harm each other."""
    if request.mac_addresses == NEW or original is None or not cards_of(saved.config()):
        return []
    state = str(session.read(original.obj, "runtime.powerState")["runtime.powerState"])
    if request.power_on and state == "poweredOn":
        raise InputError(
            "The new machine would start with the network addresses of one that runs, and nothing was touched",
            subject=str(original),
            reason=f"mac_addresses is keep, and {original.name} is {state}",
            remedy="Set mac_addresses to new, leave power_on out, or power the other machine off",
        )
    return [
        f"{original} is there too: addresses that vCenter chose it chooses again, those that a user set are the same on"
        " both machines. Set mac_addresses to new if both are to run"
    ]


def _network_names(config: Any, facts: Mapping[str, Any], request: RestoreRequest) -> Dict[str, str]:
    """Name of a saved card's network -> of the one that it is connected to now."""
    found = [network_of(card, facts.get("networks") or []) for card in cards_of(config)]
    saved = sorted({name for name in found if name is not None})
    strange = sorted(set(request.networks) - set(saved))
    if strange:
        # A typing error must not connect the copy of a server to the network of the server.
        raise InputError(
            "No network card of the restore point is connected to a network of networks",
            subject=", ".join(strange),
            reason=f"its cards are connected to {', '.join(saved)}" if saved else "it has no network cards",
            remedy="Name the networks on the left as they were called when the point was made",
        )
    return {name: request.networks.get(name, name) for name in saved}


def _missing_files(session: Session, config: Any, place: placement.Placement) -> List[str]:
    missing = []
    for path in image_files_of(config):
        try:
            http_size(session, path, place.datacenter_path)
        except VsphereError:
            missing.append(path)
    return missing


def _plan(
    session: Session, point: Point, saved: _Saved, wishes: Wishes, place: placement.Placement, request: RestoreRequest
) -> Dict[int, Plan]:
    """How each disk will be written, as far as that is known without it. :raises TransportError:"""
    stores = datastore_facts(session, list(place.datastores.values()))
    machine = VmFacts(
        moid=place.folder._moId,
        name=wishes.name,
        datacenter_moid=place.datacenter_moid,
        host_moid=place.host._moId,
        new=True,
    )
    facts = {
        disk.key: DiskFacts(
            label=disk.label,
            file=f"[{wishes.disks[disk.key].datastore}] {wishes.name}",
            capacity_bytes=disk.capacity_bytes,
            controller=_controller(disk, saved),
            thin=wishes.disks[disk.key].thin,
            datastore=stores.get(wishes.disks[disk.key].datastore),
            vm=machine,
        )
        for disk in point.disks
    }
    # What the user may do to the machine is asked of the folder that it will lie in.
    stand_in = VmRef(
        obj=place.folder,
        moid=place.folder._moId,
        name=wishes.name,
        path=place.folder_path,
        datacenter=place.datacenter,
        instance_uuid=wishes.instance_uuid,
        bios_uuid="",
        datacenter_path=place.datacenter_path,
        datacenter_moid=place.datacenter_moid,
    )
    proxy = proxy_facts(session, request, stand_in, facts, WRITE, place.pool)
    plans = {
        key: plan(fact, proxy, request.transports, WRITE, request.require_transport) for key, fact in facts.items()
    }
    return plan_new_machine(plans, {disk.key: disk.label for disk in point.disks})


def _controller(disk: PointDisk, saved: _Saved) -> str:
    kinds = {one["key"]: str(one["controller"].get("type", "")) for one in saved.facts["disks"]}
    kind = kinds.get(disk.key, "")
    return kind if kind in ("ide", "sata", "nvme") else "scsi"


# What earlier runs left


def _clear_crashed(session: Session, point: Point, name: str, request: RestoreRequest) -> None:
    """Take away what crashed restores of this machine under this name left; their own locks say that they are dead."""
    for store in point.repository.stores():
        if not any(_is_same(intent, point, name) for run in store.runs() for intent in run.intents()):
            continue
        try:
            with store.lock(new_run_id(), "vadp_disk_restore", request.lock_timeout):
                store.refuse_busy(force=request.force)
                runs = [run for run in store.own_runs() if any(_is_same(item, point, name) for item in run.intents())]
                for run in runs:
                    recover(session, run, sysfs_dir=request.sysfs_dir, device_dir=request.device_dir, check_mode=False)
                    for intent in run.intents("restore"):
                        if _is_same(intent, point, name):
                            _remove_leftover(session, store, run, intent)
                    if not _is_needed(run):
                        RuntimeDir.leftovers(run.run_id, remove=True)
                        run.remove()
                remove_files_of(store, runs)
                remove_orphans(store)
        except LockedError as error:
            raise LockedError(
                "Another run makes this virtual machine",
                subject=name,
                reason=error.reason,
                remedy="Wait until it has ended, or choose another name",
                retryable=True,
                details=error.details,
            ) from error
        store.remove_unused()


def _remove_leftover(session: Session, store: VmStore, run: Run, intent: Mapping[str, Any]) -> None:
    """:raises VsphereError: what is left of the name is not proved to be what a restore made."""
    mark = new_machine.new_mark(store.repository.id, run.run_id)
    removal = new_machine.remove_leftover(session, intent, mark, run.data["server_uuid"], check_mode=False)
    if removal is not None and not removal.settled:
        raise VsphereError(
            "A virtual machine of an earlier restore is there, and was left as it is",
            subject=removal.name,
            reason=removal.action.split(": ", 1)[-1],
            remedy="Or restore under another name",
        )
    run.done(intent["id"])


def _is_needed(run: Run) -> bool:
    """Whether the record of a crashed run still names what may be left."""
    if run.intents("process") and not (run.here or run.of_an_ended_boot):
        return True
    return any(run.intents(what) for what in ("restore", "task", "attachment", "snapshot", "access"))


def _is_same(intent: Mapping[str, Any], point: Point, name: str) -> bool:
    return new_machine.is_new_vm(intent) and intent.get("name") == name and intent.get("point_vm") == point.store.uuid


# Making it


class _Restore:
    """One restore under its lock; the run's record is on the disk."""

    def __init__(
        self,
        session: Session,
        point: Point,
        saved: _Saved,
        planned: _Planned,
        store: VmStore,
        run: Run,
        request: RestoreRequest,
        progress: Progress,
    ) -> None:
        self.session = session
        self.point = point
        self.saved = saved
        self.planned = planned
        self.store = store
        self.run = run
        self.request = request
        self.progress = progress
        self.warnings: List[str] = []
        self.intent = run.record(
            "restore",
            **new_machine.intent_fields(planned.place, planned.name, planned.wishes.instance_uuid, request.on_failure),
            vm_uuid=planned.wishes.instance_uuid,
            vm_moid=None,
            point=point.name,
            point_vm=point.store.uuid,
            disks=[disk.key for disk in point.disks],
            half_written=[],
            leased=False,
        )
        # A machine without it is nobody's of ours to remove (proofs 10).
        self.mark, value = new_machine.new_mark(point.repository.id, run.run_id)
        own = vim.option.OptionValue(key=self.mark, value=value)
        planned.machine.spec.extraConfig = [*vm_keys.strip(planned.machine.spec.extraConfig), own]
        self.vm: Optional[VmRef] = None
        self.leased = False
        self.tagged = tags.Restored([], [])

    def do(self) -> Dict[str, Any]:
        plans = self.planned.transports
        try:
            vm, restored, found = self._attempt(plans)
        except VadpError as error:
            other = self._other_way(plans, error)
            if not self._undo(error, last=other is None) or other is None:
                raise
            other_plans, why = other
            self.warnings = [
                f"All disks came by https, for by the transports before {why}"
                if other_plans
                else f"Transport https was tried first, and {why}"
            ]
            try:
                vm, restored, found = self._attempt(other_plans)
            except VadpError as second:
                self._undo(second, last=True)
                raise
            for entry in restored:
                entry["transport_reasons"] = [
                    f"https: {why}" if line.startswith("https: ") else line for line in entry["transport_reasons"]
                ]
        self.run.update(self.intent, complete=True)
        try:
            # Before it is started: from then on it is its owner's.
            self._release(vm)
            if self.request.power_on:
                new_machine.power_on(self.session, vm)
        finally:
            self._over()
        return _result(self.point, self.planned, vm, restored, found, self.tagged, self.warnings)

    def _attempt(self, plans: Mapping[int, Plan]) -> Tuple[VmRef, List[Dict[str, Any]], List[Difference]]:
        """Make the machine with all that belongs to it; ``self.vm`` is what is there of it."""
        if any(one.method == BY_IMPORT for one in plans.values()):
            brought = Import(self.session, self.point, self.store, self.run, self.intent, self.request, self.progress)
            self._lease(True)
            with brought.open(self.planned.place, self.planned.machine.spec) as (vm, lease):
                self._made(vm)
                brought.upload(lease, self._pairs(vm, new_machine.config_of(self.session, vm)))
            self._lease(False)
            restored = self._fill(vm, brought, plans)
        else:
            vm = new_machine.create(self.session, self.planned.place, self.planned.machine.spec)
            self._made(vm)
            restored = self._fill(vm, None, plans)
        return vm, restored, self._compare(vm)

    def _release(self, vm: VmRef) -> None:
        """Take away the mark by which a recovery might remove the machine.

        :raises VsphereError: it is there still. The machine is restored, and was not started.
        """
        vm_keys.update(
            self.session,
            vm,
            lambda _keys: {self.mark: ""},
            what=f"The new virtual machine is there, but its mark ({self.mark}) was not removed",
            sleep=self.session.sleep,
        )

    def _made(self, vm: VmRef) -> None:
        self.vm = vm
        self._record(vm)

    def _recorded(self) -> Dict[str, Any]:
        (intent,) = [item for item in self.run.intents("restore") if item["id"] == self.intent]
        return intent

    def _record(self, vm: VmRef) -> None:
        """What proves later on that it is still the machine that was made here."""
        config = new_machine.config_of(self.session, vm)
        self.run.update(self.intent, vm_moid=vm.moid, made_disks=new_machine.made_disks(config))

    def _lease(self, held: bool) -> None:
        self.leased = held
        self.run.update(self.intent, leased=held)

    def _other_way(self, plans: Mapping[int, Plan], error: VadpError) -> Optional[Tuple[Dict[int, Plan], str]]:
        """After the transports of one way have failed: the plans of the other one, and why, if it can be tried."""
        if self.request.require_transport or not is_transport_failure(error):
            return None
        why = f"it failed: {error.what}" + (f": {error.reason}" if error.reason else "")
        if not any(one.method == BY_IMPORT for one in plans.values()):
            leased = by_import(plans, why)
            return None if leased is None else (leased, why)
        others = {key: one.usable() for key, one in plans.items()}
        if all(any(item.method != BY_IMPORT for item in usable) for usable in others.values()):
            return {}, why
        return None

    def _fill(self, vm: VmRef, brought: Optional[Import], plans: Mapping[int, Plan]) -> List[Dict[str, Any]]:
        """NVRAM, disks, and what only the machine's own device keys can say."""
        config = new_machine.config_of(self.session, vm)
        if self.saved.nvram is not None and self.saved.config().keyId is None:
            new_machine.put_nvram(self.session, vm, config.files.vmPathName, self.saved.nvram)
        elif self.saved.nvram is None and config.firmware == "efi":
            self.warnings.append("The point has no NVRAM: the firmware looks for a boot loader by itself")
        pairs = self._pairs(vm, config)
        with RuntimeDir(self.run.run_id) as run_dir:

            def context(proxy: ProxyFacts) -> OpenContext:
                return self._context(vm, proxy, run_dir)

            if brought is None:
                targets, proxy = plan_targets(self.session, vm, pairs, self.request)
                restored = write_new_disks(
                    self.point, targets, self.store, context(proxy), self.intent, self.request, self.progress
                )
            else:
                restored = brought.results(vm, pairs, plans, context, self.warnings)
        spec = finish_spec(self.saved.config(), config)
        if spec is not None:
            new_machine.reconfigure(self.session, vm, spec)
        attributes = self.saved.facts.get("custom_attributes") or {}
        self.warnings += new_machine.set_custom_attributes(self.session, vm, attributes)
        self.tagged = _tag(self.session, self.saved, self.request, vm, vm.name)
        return restored

    def _context(self, vm: VmRef, proxy: ProxyFacts, run_dir: RuntimeDir) -> OpenContext:
        return OpenContext.of(self.request, self.session, vm, proxy, self.run, run_dir, self.store.work_path)

    def _pairs(self, vm: VmRef, config: Any) -> List[Tuple[PointDisk, Disk]]:
        """The disks that were made, found by their places. :raises VsphereError: they are not as they were ordered."""
        keys = new_keys(self.saved.config().hardware.device, config.hardware.device)
        made = {disk.key: disk for disk in disks_of(config.hardware.device)}
        pairs: List[Tuple[PointDisk, Disk]] = []
        for source in self.point.disks:
            disk = made.get(keys.get(source.key, -1))
            if disk is None or disk.capacity_bytes != source.capacity_bytes:
                found = "no disk" if disk is None else f"{disk.capacity_bytes} bytes"
                raise VsphereError(
                    "The new machine's disk is not as it was ordered",
                    subject=f"disk {source.key} ('{source.label}') of {vm}",
                    reason=f"there is {found} in its place, and {source.capacity_bytes} bytes were ordered",
                    remedy="Look at the host's limits for this hardware version",
                )
            pairs.append((source, disk))
        return pairs

    def _compare(self, vm: VmRef) -> List[Difference]:
        config = new_machine.config_of(self.session, vm)
        found = differences(self.saved.config(), config, self.planned.asked, self.planned.machine.told)
        for difference in found:
            if difference.reason is None:
                self.warnings.append(f"The new machine's configuration differs: {difference}")
        held = tags.saved_tags(self.saved.facts) or []
        return found + tag_differences(held, self.tagged.attached, self.planned.asked)

    def _undo(self, error: VadpError, last: bool) -> bool:
        """Remove the machine, or keep it; the error tells which.

        :param last: nothing else is tried.
        :returns: whether nothing of the machine is there.
        """
        vm, self.vm = self.vm, None
        if vm is None or self.leased:
            # Made, though we were not told; or gone with its lease.
            known, vm = vm, None
            with suppress(VadpError):
                vm = new_machine.find(self.session, self.planned.wishes.instance_uuid, self.planned.place.folder)
            if vm is None and self.leased and isinstance(error, ConnectionLostError):
                # It may still be in the making. The record stays for the next run, which looks again.
                error.remedy = _with(error.remedy, "If it was made anyway, vSphere removes it within minutes")
                return False
            if vm is None and known is not None:
                error.remedy = _with(error.remedy, "The machine that was half restored was removed")
        if vm is None:
            return self._undone(last)
        if last and self.request.on_failure == KEEP and not self.leased:
            self._keep(vm, error)
            return False
        return self._remove(vm, error) and self._undone(last)

    def _keep(self, vm: VmRef, error: VadpError) -> None:
        """Leave a machine that is not whole to the user, as on_failure says."""
        error.remedy = _with(error.remedy, f"{vm} is kept, as on_failure says, and is not whole")
        try:
            self._release(vm)
        except VadpError as left:
            error.remedy = _with(error.remedy, f"{left.what}: remove that advanced setting")
        self._over()

    def _remove(self, vm: VmRef, error: VadpError) -> bool:
        """Remove a machine that is half restored; the error tells what came of it. :returns: whether it has gone."""
        with suppress(VadpError):
            # Where its making was not told to us, only now it can be recorded what it is.
            if self._recorded().get("vm_moid") != vm.moid:
                self._record(vm)
        if self.run.intents("attachment"):
            # It can't be deleted while the proxy has one of its disks.
            with suppress(VadpError):
                recover(
                    self.session,
                    self.run,
                    sysfs_dir=self.request.sysfs_dir,
                    device_dir=self.request.device_dir,
                    check_mode=False,
                )
        intent = self._recorded()
        mark = new_machine.new_mark(self.store.repository.id, self.run.run_id)
        server = self.run.data["server_uuid"]
        try:
            rest = new_machine.remove_failed(self.session, intent, mark, server, self.leased)
        except VadpError as left:
            error.remedy = _with(
                error.remedy, f"{vm} is half restored and could not be removed ({left.reason}): run the restore again"
            )
            return False
        stay = f", but these files of it stay: {', '.join(rest)}" if rest else ""
        error.remedy = _with(error.remedy, f"The machine that was half restored was removed{stay}")
        return True

    def _undone(self, last: bool) -> bool:
        if last:
            self._over()
        else:
            self._lease(False)
            self.run.update(self.intent, vm_moid=None, made_disks=None, half_written=[])
        return True

    def _over(self) -> None:
        with suppress(RepositoryError):
            self.run.done(self.intent)
            if not (self.run.intents("attachment") or self.run.intents("task")):
                self.run.remove()


def _with(remedy: Optional[str], sentence: str) -> str:
    return f"{remedy.rstrip('. ')}. {sentence}" if remedy else sentence


# Results


def _planned_entry(disk: PointDisk, planned: _Planned) -> Dict[str, Any]:
    transport = planned.transports[disk.key]
    return {
        "key": disk.key,
        "label": disk.label,
        "target": f"{planned.name}/{disk.label}",
        "format": None,
        "transport": transport.chosen,
        "method": transport.method,
        "transport_reasons": transport.reasons(),
        "transport_notes": transport.notes(transport.chosen),
        "bytes_read": 0,
        "bytes_written": 0,
        "seconds": 0.0,
        "verified": None,
        "reason": "it would be made and written",
    }


def _result(
    point: Point,
    planned: _Planned,
    vm: Optional[VmRef],
    restored: List[Dict[str, Any]],
    found: List[Difference],
    tagged: tags.Restored,
    warnings: Optional[List[str]] = None,
) -> Dict[str, Any]:
    path = f"{planned.place.folder_path}/{planned.name}" if vm is None else vm.path
    made = f"a virtual machine of {point}"
    if tagged.attached:
        made += f" with the tags {', '.join(tag.path for tag in tagged.attached)}"
    return {
        "changed": True,
        "point": point.name,
        "restored": restored,
        "vm": {
            "moid": None if vm is None else vm.moid,
            "name": planned.name,
            "path": path,
            "instance_uuid": None if vm is None else vm.instance_uuid,
            "host": planned.place.host_name,
        },
        "differences": [difference.to_dict() for difference in found],
        "tags": [{"category": tag.category, "name": tag.name} for tag in tagged.attached],
        "warnings": planned.warnings + (warnings or []) + tagged.warnings,
        "diff": {"before": {path: "is not there"}, "after": {path: made}},
    }
