# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Real repositories with real layers, made by qemu, as an export makes them."""

from __future__ import annotations

import hashlib
import os
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.hashes import HashWriter
from ansible_collections.openvadp.backup.plugins.module_utils.datapath.image import create_layer, shrink_to
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.repository.manifest import disk_of
from ansible_collections.openvadp.backup.plugins.module_utils.repository.runs import new_run_id
from ansible_collections.openvadp.backup.plugins.module_utils.repository.shapes import format_time
from ansible_collections.openvadp.backup.plugins.module_utils.repository.store import VmStore
from ansible_collections.openvadp.backup.plugins.module_utils.repository.stored import file_entry

UUID = "500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a"
DISK_UUID = "6000C29a-1111-2222-3333-444455556666"
PREFIX = "52 de c0 d9 b9 43 9d 10-61 d5 4c 1b e9 7b 65 63"
BASE_TIME = datetime(2026, 11, 22, 8, 42, 3, tzinfo=timezone.utc)
KEY = 2000


#: The server that the points come from, if nothing else is said.
SERVER = "5e0c0ffe-0000-4000-8000-000000000001"


def content_id(point: str, key: int = KEY) -> str:
    """The content ID of a disk at a point of that name."""
    return hashlib.sha256(f"{point} {key}".encode()).hexdigest()[:32]


def old(entry: Dict[str, Any]) -> Dict[str, Any]:
    """A manifest, or an entry of one, as format 1 had it."""
    added = ("sequence", "server_uuid", "content_id", "parent_content_id", "parent_layer_blake3", "named_in_vm")
    found = {name: value for name, value in entry.items() if name not in added}
    if "disks" in found:
        found.update(format=1, disks=[old(disk) for disk in found["disks"]])
    return found


def disk_entry(point: str, **changes: Any) -> Dict[str, Any]:
    """A disk of a manifest, without files behind it."""
    stored = {"size_bytes": 1, "blake3": "0" * 64}
    entry = {
        "key": KEY,
        "label": "Hard disk 1",
        "uuid": DISK_UUID,
        "file": "[vmfs01] app01/app01.vmdk",
        "datastore": "vmfs01",
        "capacity_bytes": 1 << 20,
        "change_id": f"{PREFIX}/1",
        "mode": "full",
        "parent": None,
        "reason": "it is the VM's first restore point",
        "transport": "nbdssl",
        "bytes_read": 1,
        "bytes_stored": 1,
        "areas": 1,
        "seconds": 0.5,
        "layer": dict(stored, file=f"{point}.qcow2"),
        "hashes": dict(stored, file=f"{point}.hashes"),
    }
    entry.update(changes)
    parent = entry["parent"]
    entry.setdefault("content_id", content_id(point, entry["key"]))
    entry.setdefault("parent_content_id", None if parent is None else content_id(parent, entry["key"]))
    entry.setdefault("parent_layer_blake3", None if parent is None else "0" * 64)
    entry.setdefault("named_in_vm", True)
    return entry


def manifest_of(point: str, number: int, disks: List[Dict[str, Any]], **changes: Any) -> Dict[str, Any]:
    """A manifest without a hash; *number* makes its snapshot later than those of smaller numbers."""
    moment = BASE_TIME + timedelta(minutes=number)
    manifest: Dict[str, Any] = {
        "format": 2,
        "sequence": max(number, 1),
        "server_uuid": SERVER,
        "repository_id": "00000000-0000-0000-0000-000000000001",
        "vm_uuid": UUID,
        "vm_name": "app01",
        "vm_moid": "vm-16",
        "point": point,
        "run_id": new_run_id(),
        "started": format_time(moment),
        "finished": format_time(moment + timedelta(seconds=30)),
        "seconds": 30.25,
        "snapshot": {
            "moid": f"snapshot-{number}",
            "name": "backup",
            "created": format_time(moment),
            "quiesced": True,
            "foreign": [],
        },
        "disks": disks,
        "skipped_disks": [{"key": 2001, "label": "Hard disk 2", "reason": "independent disk"}],
        "configuration": {"file": f"{point}.json", "size_bytes": 1, "blake3": "0" * 64},
        "nvram": None,
        "tools": {"collection": "0.1.0", "qemu": "7.2.0", "vddk": None},
    }
    manifest.update(changes)
    return manifest


class World:
    """A repository with one VM, and a disk whose content the test writes."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.repository = Repository.open(str(path), create=True)
        self.store: VmStore = self.repository.vm(UUID)
        self.count = 0
        self.config: Dict[str, Any] = {"name": "app01"}

    def layer(
        self, point: str, capacity: int, writes: List[Tuple[int, bytes]], parent: Optional[str] = None
    ) -> Dict[str, Any]:
        """Write a layer and its hashes as an export does; returns the manifest's entry."""
        folder = self.store.make_disk_folder(KEY)
        path = str(self.store.layer_path(KEY, point))
        create_layer(path, capacity, backing=None if parent is None else f"{parent}.qcow2")
        identity = content_id(point, KEY)
        with HashWriter(str(self.store.hashes_path(KEY, point)), capacity, content_id=identity) as hashes:
            commands = []
            sources = []
            for offset, data in writes:
                padded = data + bytes(-len(data) % 512)
                source = folder / f"piece-{len(sources)}"
                source.write_bytes(padded)
                sources.append(source)
                commands += ["-c", f"write -q -s {source} {offset} {len(padded)}"]
                hashes.add(offset, data)
            # One after the other, by as few processes as their command lines allow.
            for start in range(0, len(commands), 400):
                subprocess.run(
                    ["qemu-io", "-f", "qcow2", *commands[start : start + 400], path],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
            for source in sources:
                source.unlink()
        shrink_to(path, capacity)
        self.count += 1
        below = None if parent is None else self.store.point(parent)
        pinned = disk_of(below, KEY) if below is not None else None
        return disk_entry(
            point,
            content_id=identity,
            parent_content_id=None if pinned is None else pinned.get("content_id"),
            parent_layer_blake3=None if pinned is None else pinned["layer"]["blake3"],
            capacity_bytes=capacity,
            mode="full" if parent is None else "incremental",
            parent=parent,
            change_id=f"{PREFIX}/{self.count}",
            layer=file_entry(self.store.layer_path(KEY, point)),
            hashes=file_entry(self.store.hashes_path(KEY, point)),
        )

    def point(
        self, name: str, capacity: int, writes: List[Tuple[int, bytes]], parent: Optional[str] = None
    ) -> Dict[str, Any]:
        """A committed point."""
        with self.store.lock(new_run_id(), "test"):
            return self.commit(name, self.layer(name, capacity, writes, parent))

    def commit(self, name: str, disk: Dict[str, Any], **changes: Any) -> Dict[str, Any]:
        """Commit a point of one disk; the lock is held."""
        fields: Dict[str, Any] = {
            "repository_id": self.repository.id,
            "configuration": self.store.write_config(name, self.config),
            "nvram": self.store.write_nvram(name, b"nvram of " + name.encode()),
        }
        fields.update(changes)
        return self.store.commit_point(manifest_of(name, self.count, [disk], **fields))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An empty repository."""
    return World(tmp_path / "repository")


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    with open(str(path), "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ (1 << bit)]))
        os.fsync(stream.fileno())
