# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A run that serves one disk of a VM by HotAdd until its standard input ends, for tests that kill it.

Reads {connection, repository, vm, run_id, snapshot, key, writable, proxy, device_dir, sysfs_dir, io_timeout} as a line
of JSON; prints {uri, transport, method} or {error}, and {ended} at its end.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Dict

from ansible_collections.openvadp.backup.plugins.module_utils.datapath.processes import RuntimeDir
from ansible_collections.openvadp.backup.plugins.module_utils.errors import VadpError
from ansible_collections.openvadp.backup.plugins.module_utils.repository.layout import Repository
from ansible_collections.openvadp.backup.plugins.module_utils.transport.hotadd import open_hotadd
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.disks import disks_of
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.inventory import find_vm
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.session import Connection, Session
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.snapshots import find_snapshot, snapshot_disks


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def serve(wanted: Dict[str, Any]) -> None:
    connection = Connection(**wanted["connection"])
    with Session.connect(connection) as session:
        vm = find_vm(session, name=wanted["vm"])
        proxy = find_vm(session, name=wanted["proxy"])
        if wanted["snapshot"] is None:
            disks = disks_of(session.read(vm.obj, "config.hardware.device")["config.hardware.device"])
        else:
            snapshot = find_snapshot(session, vm, moid=wanted["snapshot"])
            assert snapshot is not None
            disks = snapshot_disks(session, snapshot)
        disk = next(disk for disk in disks if disk.key == wanted["key"])
        store = Repository.open(wanted["repository"], create=True).vm(vm.instance_uuid)
        with store.lock(wanted["run_id"], "test"):
            run = store.run(wanted["run_id"]) or store.create_run(
                None, vm_moid=vm.moid, vm_name=vm.name, run_id=wanted["run_id"], server_uuid=session.server_uuid
            )
            with RuntimeDir(run.run_id) as run_dir:
                with open_hotadd(
                    session,
                    proxy,
                    disk,
                    writable=wanted["writable"],
                    run=run,
                    run_dir=run_dir,
                    device_dir=wanted["device_dir"],
                    sysfs_dir=wanted["sysfs_dir"],
                    io_timeout=wanted["io_timeout"],
                ) as endpoint, run.recorded(endpoint.child):
                    say(uri=endpoint.uri, transport=endpoint.transport, method=endpoint.method)
                    sys.stdin.read()
                say(ended=run.intents())


if __name__ == "__main__":
    try:
        serve(json.loads(sys.stdin.readline()))
    except VadpError as failure:
        say(error=str(failure))
