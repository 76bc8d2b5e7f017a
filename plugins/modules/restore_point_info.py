#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
from __future__ import annotations

DOCUMENTATION = r"""
module: restore_point_info
short_description: List the restore points of a repository
version_added: 0.1.0
description:
  - Lists what a repository holds. It needs no vCenter and takes no lock, so it also works while a backup runs.
  - Without O(vm_uuid) and O(vm_name), the points of all virtual machines are listed.
  - It reads the manifests and checks their hashes. M(openvadp.backup.restore_point_verify) reads the disks' data too.
author:
  - openvadp maintainers (@openvadp)
extends_documentation_fragment:
  - openvadp.backup.repository
  - openvadp.backup.repository_vm
  - openvadp.backup.attributes
attributes:
  check_mode:
    support: full
    details: This module changes nothing.
  diff_mode:
    support: N/A
    details: This module changes nothing.
  idempotent:
    support: N/A
    details: This module changes nothing.
options:
  point:
    description:
      - Only the point of this name. The list is empty if there is none.
      - V(latest) means the point of each virtual machine that was made last, by its number; a time, such as
        V(2026-11-20T03:00Z) or V(before 2026-11-20T03:00Z), the one whose snapshot was taken last before it. Where
        points of several servers are there, one of each server.
    type: str
  run_id:
    description:
      - Only the point that this run has made, or that was there when it began. The list is empty if there is none.
      - RV(complete) then says whether it has all its files, and nothing but the repository is asked. Role
        P(openvadp.backup.vm_backup#role) does so where vCenter can't be reached at the end.
    type: str
  manifests:
    description: Whether each point carries its whole manifest, with the hashes of all its files.
    type: bool
    default: false
  query:
    description:
      - JMESPath expression that is applied to the list of points. What comes out is returned as RV(points).
      - It needs the Python library jmespath.
    type: str
requirements:
  - blake3
  - jmespath, for O(query)
seealso:
  - module: openvadp.backup.restore_point_verify
  - name: JMESPath
    description: The query language.
    link: https://jmespath.org
"""

EXAMPLES = r"""
- name: List all that the repository holds
  openvadp.backup.restore_point_info:
    repository: /backup/vms
  register: held

- name: Show it
  ansible.builtin.debug:
    msg: "{{ item.vm_name }} {{ item.point }} {{ item.mode }}"
  loop: "{{ held.points }}"
  loop_control:
    label: "{{ item.point }}"

- name: Names of the full points of one virtual machine
  openvadp.backup.restore_point_info:
    repository: /backup/vms
    vm_name: app01
    query: "[?mode == 'full'].point"

- name: What a backup has come to, without vCenter
  openvadp.backup.restore_point_info:
    repository: /backup/vms
    run_id: 3f9a2b1c7d5e4a0b9a3c2f1e0d9c8b7a
  register: outcome

- name: Manifests that are damaged
  openvadp.backup.restore_point_info:
    repository: /backup/vms
    query: "[?damaged].[vm_uuid, point, problem]"
"""

RETURN = r"""
complete:
  description: Whether the run has a point, and all its files are there, as far as their sizes and headers tell.
  returned: with O(run_id)
  type: bool
  sample: true
points:
  description:
    - The points, sorted by the virtual machine's name, oldest first, by the time of their snapshots.
    - Damaged ones follow at the end of each virtual machine.
    - With O(query), what the expression makes of them.
  returned: success
  type: list
  elements: dict
  contains:
    vm_uuid:
      description: Instance UUID of the virtual machine.
      type: str
      sample: 500c1a2b-7d5e-0a4b-9a3c-2f1e0d9c8b7a
    vm_name:
      description: Its name at that time; of a damaged point the name at the newest point, or null.
      type: str
      sample: app01
    point:
      description: Name of the point.
      type: str
      sample: 20261122T084203Z
    damaged:
      description: Whether the manifest can't be believed. The fields below RV(points[].disks) are then absent.
      type: bool
      sample: false
    problem:
      description: What is wrong with the manifest; null if nothing is.
      type: str
      sample: null
    disks:
      description: The disks that the point holds; empty if it is damaged.
      type: list
      elements: dict
      sample:
        - key: 2000
          label: Hard disk 1
          uuid: 6000C29a-1111-2222-3333-444455556666
          capacity_bytes: 42949672960
          mode: incremental
          parent: 20261121T084201Z
          reason: what changed since point 20261121T084201Z
          transport: nbdssl
          bytes_read: 429916160
          bytes_stored: 171966464
          seconds: 3.1
    sequence:
      description: >-
        Number of the point among those of the virtual machine; the largest is the newest. Points of format 1 lie below
        all others.
      type: int
      sample: 17
    server_uuid:
      description: >-
        The server that the point was read from, by the instance UUID of the vCenter or the UUID of the host's hardware;
        null for points of format 1.
      type: str
      sample: 3c6d0f0e-5b1c-4c0e-9f5e-8a7b6c5d4e3f
    created:
      description: When the snapshot was made that the point was read from, by the server's clock (UTC).
      type: str
      sample: '2026-11-22T08:42:03Z'
    started:
      description: When the export began (UTC).
      type: str
      sample: '2026-11-22T08:42:05Z'
    finished:
      description: When the export ended (UTC).
      type: str
      sample: '2026-11-22T08:42:09Z'
    seconds:
      description: How long the export took.
      type: float
      sample: 4.2
    quiesced:
      description: Whether the snapshot was quiesced.
      type: bool
      sample: true
    mode:
      description: V(full), V(incremental) or V(differential) if all disks were read so, else V(mixed).
      type: str
      sample: incremental
    bytes_read:
      description: Bytes read from the disks.
      type: int
      sample: 429916160
    bytes_stored:
      description: Bytes that the layers of this point take.
      type: int
      sample: 171966464
    skipped_disks:
      description: Disks that are not in the point, and why.
      type: list
      elements: dict
      sample: [{key: 2001, label: Hard disk 2, reason: 'independent disk: not in a snapshot'}]
    manifest:
      description: The whole manifest, as C(docs/repository-format.md) describes it.
      type: dict
      returned: with O(manifests=true)
"""

from typing import Any, Dict

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

from ..module_utils.libraries import first_missing
from ..module_utils.repository.layout import Repository
from ..module_utils.repository.report import describe_outcome, describe_points, search
from ..module_utils.runner import Options, repository_options, repository_vm_options, run_module

OPTIONS = Options(
    dict(
        point=dict(type="str"),
        run_id=dict(type="str"),
        manifests=dict(type="bool", default=False),
        query=dict(type="str"),
    ),
    mutually_exclusive=[("run_id", name) for name in ("vm_uuid", "vm_name", "point")],
)


def body(module: AnsibleModule) -> Dict[str, Any]:
    params = module.params
    name, what, trace = first_missing("jmespath")
    if params["query"] is not None and name:
        module.fail_json(msg=missing_required_lib(what), exception=trace)
    repository = Repository.open(params["repository"])
    if params["run_id"] is not None:
        outcome = describe_outcome(repository, params["run_id"], manifests=params["manifests"])
        return {"changed": False, **outcome, "points": search(params["query"], outcome["points"])}
    points = describe_points(
        repository,
        vm_uuid=params["vm_uuid"],
        vm_name=params["vm_name"],
        point=params["point"],
        manifests=params["manifests"],
    )
    return {"changed": False, "points": search(params["query"], points)}


def main() -> None:
    run_module(repository_options() + repository_vm_options(required=False) + OPTIONS, body, libraries=["blake3"])


if __name__ == "__main__":
    main()
