# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The published schemas and the collection's own checks say the same of real files, whole and broken."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import jsonschema
import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import DamagedError, RepositoryError
from ansible_collections.openvadp.backup.plugins.module_utils.repository import content, manifest, runs, trust
from ansible_collections.openvadp.backup.plugins.module_utils.repository.documents import _FACTS, _REPOSITORY_2
from ansible_collections.openvadp.backup.plugins.module_utils.repository.shapes import ShapeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import KEY, PREFIX, World, content_id, disk_entry, manifest_of, old

SCHEMAS = Path(__file__).parents[4] / "docs" / "schemas"


def check_sealed(document: Any, version: int) -> None:
    manifest.check_shape(document)
    if document["format"] != version:
        raise ShapeError("format", f"is {document['format']}")
    if "manifest_blake3" not in document:
        raise ShapeError("", "lacks 'manifest_blake3'")


CHECKS: Dict[str, Callable[[Any], None]] = {
    "repository": lambda document: _REPOSITORY_2(document, ""),
    "vm": lambda document: _FACTS(document, ""),
    "run": lambda document: runs._RUN(document, ""),
    "trust": lambda document: trust._TRUST(document, ""),
    "restore-point": lambda document: check_sealed(document, 2),
    "restore-point of format 1": lambda document: check_sealed(document, 1),
    "pins": lambda document: content._PINS(document, ""),
}
#: Which schema is that of the documents that are written now; 1 where nothing is said.
VERSIONS = {"repository": 2, "vm": 2, "restore-point": 2, "run": runs.FORMAT}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """One real file of each kind."""
    world = World(tmp_path_factory.mktemp("schemas") / "repository")
    store = world.store
    with store.lock(runs.new_run_id(), "test"):
        store.write_facts({"name": "app01"})
        trust.mark(store, KEY, "restored", change_id=f"{PREFIX}/1")
        run = store.create_run("p2")
        run.record("snapshot", name="backup")
        run.record("process", name="nbdkit", pid=1, start_time=2)
        run.record("attachment", file="[a] b.vmdk", proxy_moid="vm-1", device_key=None, proxy_uuid="")
        run.record("access", identity="openvadp", vm_moid="vm-2")
        run.record("temporary_file", key=2000, files=["a"], lease=None)
        run.record("task", task="task-1", failed="it", subject=None, server_uuid=None)
        disk = {"key": 2000, "uuid": None, "file": "[a] b.vmdk", "capacity_bytes": 512}
        new = {"target": "new_vm", "name": "a", "instance_uuid": "b", "folder_moid": "c", "vm_moid": None}
        run.record("restore", **new, disks=[2000], half_written=[], leased=False, made_disks=[disk])
        run.set_snapshot("snapshot-1", "2026-11-22T08:42:03Z", {KEY: None}, "of a template")
        run.finish_disk(KEY, disk_entry("p2"))
        world.commit("p1", world.layer("p1", 1 << 20, [(0, b"a" * 512)]), warnings=["disk left out"])
        merged = {"content_id": content_id("p3"), "layer_blake3s": ["0" * 64]}
        more = dict(world.layer("p3", 1 << 20, [(0, b"b" * 512)], parent="p1"), merged=merged, vm_named=None)
        world.commit("p3", more)
        old_points = [manifest.seal(old(store.resolve(name))) for name in ("p1", "p3")]
    paths = {
        "repository": world.repository.path / "repository.json",
        "vm": store.path / "vm.json",
        "run": run.path,
        "trust": store.trust_path,
        "restore-point": store.manifest_path("p3"),
    }
    found = {name: json.loads(path.read_bytes()) for name, path in paths.items()}
    found["restore-point of format 1"] = old_points[1]
    found["pins"] = content.pins_of(old_points[1], {"p1": old_points[0]})
    return found


def validator(name: str) -> jsonschema.Draft202012Validator:
    version = VERSIONS.get(name, 1)
    schema = json.loads((SCHEMAS / f"{name.partition(' ')[0]}-{version}.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(as_in_ecmascript(schema))


def as_in_ecmascript(schema: Any) -> Any:
    """A schema's patterns with the end that JSON Schema means: Python's ``$`` also matches before a last line feed."""
    if isinstance(schema, list):
        return [as_in_ecmascript(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: re.sub(r"\$$", r"\\Z", value) if key == "pattern" and isinstance(value, str) else as_in_ecmascript(value)
        for key, value in schema.items()
    }


@pytest.mark.parametrize("name", CHECKS)
def test_real_files_match_their_schema(documents: Dict[str, Any], name: str) -> None:
    validator(name).validate(documents[name])
    CHECKS[name](documents[name])


def places(document: Any, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    pairs: Any = ()
    if isinstance(document, dict):
        pairs = document.items()
    elif isinstance(document, list):
        pairs = enumerate(document)
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


OTHERS: List[Any] = [None, True, -1, 0, 1, 2, 511, 1.5, "", "x", "full", "incremental", "a\n", [], {}, [1], {"1": 2}]


@pytest.mark.parametrize("name", CHECKS)
@given(data=st.data())
@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_schema_and_check_agree_on_broken_files(documents: Dict[str, Any], name: str, data: st.DataObject) -> None:
    document = copy.deepcopy(documents[name])
    path = data.draw(st.sampled_from(list(places(document))))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if isinstance(parent, dict) and data.draw(st.booleans()):
        del parent[path[-1]]
    else:
        parent[path[-1]] = data.draw(st.sampled_from(OTHERS))
    try:
        CHECKS[name](document)
        ours = None
    except ShapeError as error:
        ours = str(error)
    theirs = validator(name).is_valid(document)
    # A schema can't say that a file is named after its point; the rest must agree.
    if ours is not None and ".file is " in ours and " not '" in ours:
        return
    assert theirs == (ours is None), (path, ours)


def test_messages_name_the_place() -> None:
    whole = manifest_of("p1", 1, [disk_entry("p1"), disk_entry("p1", key=2001)])
    assert manifest.seal(whole)["manifest_blake3"] == manifest.seal(manifest.seal(whole))["manifest_blake3"]
    for change, words in (
        ({"disks": []}, "disks is empty"),
        ({"disks": [disk_entry("p1"), disk_entry("p1")]}, r"disks\[1\]\.key occurs twice"),
        ({"disks": [disk_entry("p1", capacity_bytes=513)]}, r"disks\[0\]\.capacity_bytes is not a multiple of 512"),
        ({"disks": [disk_entry("p1", mode="incremental", parent="p1", parent_content_id=None)]}, r"\.parent is 'p1'"),
        ({"disks": [disk_entry("p1", parent_content_id="0" * 32)]}, "parent_content_id is there, and no parent is"),
        (
            {
                "disks": [
                    disk_entry("p1", mode="incremental", parent="p0", content_id="0" * 32, parent_content_id="0" * 32)
                ]
            },
            "that of the parent",
        ),
        (
            {"disks": [disk_entry("p1", mode="incremental", parent="p0", parent_layer_blake3=None)]},
            "layer_blake3 is None",
        ),
        (
            {"disks": [disk_entry("p1"), disk_entry("p1", key=2001, content_id=content_id("p1"))]},
            "content_id occurs twice",
        ),
        ({"disks": [disk_entry("p1", merged={"content_id": "0" * 32, "layer_blake3s": []})]}, "merged.content_id is 0"),
        ({"sequence": 0}, "sequence is 0, less than 1"),
        ({"server_uuid": "A"}, "server_uuid has an unexpected form"),
        ({"disks": [disk_entry("p1", seconds=float("inf"))]}, r"not JSON compliant|disks\[0\]\.seconds"),
        ({"snapshot": {}}, "snapshot lacks 'moid'"),
        ({"started": "2026-13-22T08:42:03Z"}, "started is not a time"),
        ({"nvram": {"file": "../../x", "size_bytes": 1, "blake3": "0" * 64}}, "nvram.file is"),
    ):
        with pytest.raises((RepositoryError, ValueError), match=words):
            manifest.seal({**whole, **change})
    sealed = manifest.seal(whole)
    with pytest.raises(DamagedError, match="manifest_blake3 is missing"):
        manifest.validate(whole, "here")
    with pytest.raises(DamagedError, match="hash"):
        manifest.validate({**sealed, "seconds": 1}, "here")
    with pytest.raises(RepositoryError, match="newer version.*format 3"):
        manifest.validate({**sealed, "format": 3}, "here")
    # Fields that a later release adds are kept, and are part of the hash.
    more = manifest.seal({**whole, "later": {"a": 1}})
    assert manifest.validate(more, "here")["later"] == {"a": 1}
