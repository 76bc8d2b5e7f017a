# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Names with what the API escapes in them, and names that are like them, in an inventory behind real vim types."""

from __future__ import annotations

import pytest
from ansible_collections.openvadp.backup.plugins.module_utils.errors import VsphereError
from ansible_collections.openvadp.backup.plugins.module_utils.vsphere.placement import Wanted, place
from pyVmomi import vim


class Tree:
    """Folders, pools and what a machine needs besides, in a datacenter "x/y" beside y in folder x."""

    def __init__(self, stub):
        self.stub = stub
        self.parents = {}
        stub.methods["CreateContainerView"] = self.view
        stub.methods["DestroyView"] = None
        root = self.add(vim.Folder, "group-d1", "Datacenters", None)
        above = self.add(vim.Folder, "group-d2", "x", root)
        self.datacenter(0, "x%2fy", root)
        self.datacenter(1, "y", above)

    def datacenter(self, number, name, parent):
        roots = {kind: vim.Folder(f"group-{kind[0]}{number}", self.stub) for kind in ("vm", "host", "store", "net")}
        center = self.add(
            vim.Datacenter,
            f"datacenter-{number}",
            name,
            parent,
            vmFolder=roots["vm"],
            hostFolder=roots["host"],
            datastoreFolder=roots["store"],
            networkFolder=roots["net"],
        )
        for kind, folder in roots.items():
            self.add(vim.Folder, folder._moId, kind, center)
        host = vim.HostSystem(f"host-{number}", self.stub)
        mounts = [vim.Datastore.HostMount(key=host, mountInfo=vim.host.MountInfo(accessMode="readWrite"))]
        facts = {"summary__accessible": True, "summary__freeSpace": 1 << 40, "host": mounts}
        self.add(vim.Datastore, f"datastore-{number}", "vmfs01", roots["store"], **facts)
        pool = vim.ResourcePool(f"resgroup-{number}", self.stub)
        cluster = self.add(
            vim.ClusterComputeResource, f"domain-{number}", "C", roots["host"], host=[host], resourcePool=pool
        )
        connected = {"runtime__connectionState": "connected", "runtime__inMaintenanceMode": False}
        self.add(vim.HostSystem, host._moId, f"esx{number}", cluster, **connected)
        self.add(vim.ResourcePool, pool._moId, "Resources", cluster)
        prod = self.add(vim.ResourcePool, f"resgroup-{number}2", "Prod", pool)
        self.add(vim.ResourcePool, f"resgroup-{number}1", "Prod%2fDev", pool)
        self.add(vim.ResourcePool, f"resgroup-{number}3", "Dev", prod)
        one = self.add(vim.Folder, f"group-v{number}2", "a", roots["vm"])
        self.add(vim.Folder, f"group-v{number}1", "a%2fb", roots["vm"])
        self.add(vim.Folder, f"group-v{number}3", "b", one)
        self.add(vim.Folder, f"group-v{number}4", " spaced 100%25", roots["vm"])

    def add(self, kind, moid, name, parent, **properties):
        obj = kind(moid, self.stub)
        self.stub.add(obj, name=name, parent=parent, **properties)
        self.parents[moid] = parent
        return obj

    def view(self, _manager, container, kinds, _recursive):
        found = [obj for obj, _properties in list(self.stub.objects.values()) if isinstance(obj, tuple(kinds))]
        view = vim.view.ContainerView("view-1", self.stub)
        self.stub.add(view, view=[obj for obj in found if self.is_below(obj, container)] or None)
        return view

    def is_below(self, obj, container):
        above = self.parents.get(obj._moId)
        while above is not None and above._moId != container._moId:
            above = self.parents.get(above._moId)
        return above is not None


WAS = {"datacenter_path": "x%2fy", "folder": "/x%2fy/vm/a%2fb", "resource_pool": "Resources/Prod%2fDev"}


def wanted(**asked):
    nothing = dict.fromkeys(("datacenter", "folder", "cluster", "host", "resource_pool"))
    return Wanted(**{**nothing, "home": "vmfs01", "datastores": {}, "networks": [], "was": WAS, **asked})


@pytest.fixture
def found(session, stub):
    Tree(stub)

    def found(**asked):
        placement = place(session, wanted(**asked), "app01")
        return placement.folder._moId, placement.pool._moId

    return found


@pytest.mark.parametrize(
    "was, folder, pool",
    [
        ({}, "group-v01", "resgroup-01"),
        ({"folder": "/x%2fy/vm/a/b", "resource_pool": "Resources/Prod/Dev"}, "group-v03", "resgroup-03"),
        ({"folder": "/x%2fy/vm/ spaced 100%25", "resource_pool": "Resources/gone"}, "group-v04", "resgroup-0"),
        ({"folder": "/x/y/vm/a%2fb", "datacenter_path": "x/y"}, "group-v11", "resgroup-11"),
    ],
    ids=["escaped", "nested", "spaced", "another datacenter"],
)
def test_a_machine_comes_back_where_it_was(found, was, folder, pool):
    assert found(was={**WAS, **was}) == (folder, pool)


@pytest.mark.parametrize(
    "asked, folder",
    [
        ("a%2fb", "group-v01"),
        ("/x%2fy/vm/a%2Fb", "group-v01"),
        ("a/b", "group-v03"),
        ("/x%2fy/vm/a/b/", "group-v03"),
        ("a", "group-v02"),
        (" spaced 100%", "group-v04"),
        (" spaced 100%25", "group-v04"),
        ("/x/y/vm/a%2fb", "group-v11"),
    ],
)
def test_a_folder_is_named_as_it_is_shown_or_escaped(found, asked, folder):
    assert found(folder=asked)[0] == folder


@pytest.mark.parametrize(
    "asked, pool",
    [
        ("Prod/Dev", "resgroup-01"),
        ("Prod%2fDev", "resgroup-01"),
        ("Resources/Prod%2fDev", "resgroup-01"),
        ("Resources/Prod/Dev", "resgroup-03"),
        ("Dev", "resgroup-03"),
        ("/Resources/Prod/", "resgroup-02"),
    ],
)
def test_a_pool_is_named_as_it_is_shown_or_escaped(found, asked, pool):
    assert found(resource_pool=asked)[1] == pool


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"folder": "spaced 100%"}, "there is no folder 'spaced 100%'.*a%2fb"),
        ({"datacenter": "x/y"}, "there are several datacenters 'x/y'"),
        ({"resource_pool": "Resources/Dev"}, "there is no resource pool 'Resources/Dev'.*Prod%2fDev"),
        ({"was": {**WAS, "folder": "/x%2fy/vm/gone"}}, "there is no folder '/x%2fy/vm/gone'"),
    ],
)
def test_what_does_not_fit_exactly_is_refused(found, asked, words):
    with pytest.raises(VsphereError, match=words):
        found(**asked)


def test_a_datastore_cluster_and_a_host_of_its_own(session, stub):
    """A datastore of a cluster lies in a folder of its kind; a stand-alone host has a compute resource of its name."""
    tree = Tree(stub)
    roots = {kind: vim.Folder(f"group-{kind[0]}0", stub) for kind in ("host", "store")}
    pod = tree.add(vim.StoragePod, "group-p9", "Pod", roots["store"])
    host, pool = vim.HostSystem("host-9", stub), vim.ResourcePool("resgroup-9", stub)
    mounts = [vim.Datastore.HostMount(key=host, mountInfo=vim.host.MountInfo(accessMode="readWrite"))]
    facts = {"summary__accessible": True, "summary__freeSpace": 1 << 40, "host": mounts}
    tree.add(vim.Datastore, "datastore-9", "pod01", pod, **facts)
    alone = tree.add(vim.ComputeResource, "domain-9", "esx9", roots["host"], host=[host], resourcePool=pool)
    connected = {"runtime__connectionState": "connected", "runtime__inMaintenanceMode": False}
    tree.add(vim.HostSystem, "host-9", "esx9", alone, **connected)
    tree.add(vim.ResourcePool, "resgroup-9", "Resources", alone)
    for was in ({**WAS, "host": "esx9", "cluster": None}, {**WAS, "host": "gone", "cluster": None}):
        placement = place(session, wanted(home="pod01", datastores={"pod01": 1}, was=was), "app01")
        assert placement.host._moId == "host-9" and placement.pool._moId == "resgroup-9"
        assert {name: one._moId for name, one in placement.datastores.items()} == {"pod01": "datastore-9"}
