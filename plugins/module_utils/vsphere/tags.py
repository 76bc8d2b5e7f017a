# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""vCenter's tags of a virtual machine: kept with each restore point, and given to a machine that is made of one.

Tags are not in the SOAP API, and ESXi has none. Their ids mean something in one vCenter only, so tags are known by the
name of their category and their own. No backup and no restore fails for them.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple
from urllib.parse import quote

from ..errors import NotFoundError, PrivilegeError, VsphereError
from .inventory import VmRef
from .rest import RestSession
from .session import Session

ATTACH = "InventoryService.Tagging.AttachTag"
ATTACHABLE = "InventoryService.Tagging.ObjectAttachable"

_API = "/api/cis/tagging"
_VM = "VirtualMachine"
_NOT_READ = "The tags were not read"


class Tag(NamedTuple):
    """A tag by its names. :param description: "" where there is none."""

    category: str
    name: str
    description: str = ""

    def to_dict(self) -> Dict[str, str]:
        return self._asdict()

    @property
    def path(self) -> str:
        return f"{self.category}/{self.name}"

    def __str__(self) -> str:
        return f"Tag '{self.name}' of category '{self.category}'"


class Restored(NamedTuple):
    """What became of the tags of a new machine. :param warnings: a sentence for each that it does not have."""

    attached: List[Tag]
    warnings: List[str]


class Saved(NamedTuple):
    """The tags to be kept with a point: None if they could not be read, and then a sentence that says why."""

    tags: Optional[List[Dict[str, str]]]
    warnings: List[str]


def attached_tags(session: Session, vm: VmRef) -> List[Tag]:
    """The tags that a virtual machine has, sorted: three calls, and one for each tag and category.

    :raises VsphereError: they can't be read.
    """
    if not session.is_vcenter:
        return []
    tags = []
    categories: Dict[str, str] = {}
    with RestSession(session, _NOT_READ, str(vm)) as api:
        body = {"object_id": {"id": vm.moid, "type": _VM}}
        for tag_id in _ids(api.post(f"{_API}/tag-association?action=list-attached-tags", body), api):
            tag = _read(api, "tag", tag_id)
            if tag is None:
                continue
            category_id = _text(tag, "category_id", api)
            if category_id not in categories:
                category = _read(api, "category", category_id)
                if category is None:
                    continue
                categories[category_id] = _text(category, "name", api)
            tags.append(Tag(categories[category_id], _text(tag, "name", api), str(tag.get("description") or "")))
    return sorted(tags)


def save(session: Session, vm: VmRef) -> Saved:
    """The tags of a virtual machine, as they are kept with a point. Never fails."""
    try:
        return Saved([tag.to_dict() for tag in attached_tags(session, vm)], [])
    except VsphereError as error:
        return Saved(None, [f"The machine's tags are not in the restore point: {error.reason or error.what}"])


def saved_tags(facts: Dict[str, Any]) -> Optional[List[Tag]]:
    """The tags in a saved configuration; None if it does not report them."""
    held = facts.get("tags")
    if held is None:
        return None
    return sorted(Tag(str(tag["category"]), str(tag["name"]), str(tag.get("description") or "")) for tag in held)


def restore(session: Session, tags: Sequence[Tag], vm: Optional[VmRef], name: str) -> Restored:
    """Attach the tags that this vCenter has by these names; none is made. Never fails.

    :param vm: None if it is not there yet: what would be attached, as far as that is known.
    :param name: its name.
    """
    restored = Restored([], [])
    if not tags:
        return restored
    if not session.is_vcenter:
        told = ", ".join(tag.path for tag in tags)
        restored.warnings.append(f"Tags are vCenter's, so these were not restored: {told}")
        return restored
    left = list(tags)

    def refuse(tag: Tag, reason: str) -> None:
        left.remove(tag)
        restored.warnings.append(f"{tag} was not restored: {reason}")

    try:
        with RestSession(session, "The tags were not restored", f"'{name}'" if vm is None else str(vm)) as api:
            found = _find(api, tags)
            for tag, (tag_id, reason) in found.items():
                if tag_id is None:
                    refuse(tag, reason)
                    continue
                if vm is not None:
                    try:
                        _attach(api, tag_id, vm)
                    except VsphereError as error:
                        if error.details.get("http_status") not in (400, 403, 404):
                            raise
                        refuse(tag, _refusal(error))
                        continue
                left.remove(tag)
                restored.attached.append(tag)
    except VsphereError as error:
        for tag in list(left):
            refuse(tag, error.reason or error.what)
    return restored


class _Found(NamedTuple):
    """A tag in this vCenter: its id, or why it can't be attached."""

    tag_id: Optional[str]
    reason: str = ""


def _find(api: RestSession, tags: Sequence[Tag]) -> Dict[Tag, _Found]:
    """All of *tags* in their order, looked for by names."""
    wanted: Dict[str, Set[str]] = {}
    for tag in tags:
        wanted.setdefault(tag.category, set()).add(tag.name)
    ids: Dict[Tuple[str, str], str] = {}
    categories: Dict[str, Dict[str, Any]] = {}
    for category_id in _ids(api.get(f"{_API}/category"), api):
        if len(categories) == len(wanted):
            break
        category = _read(api, "category", category_id)
        name = category.get("name") if category is not None else None
        if category is None or name not in wanted:
            continue
        categories[name] = category
        missing = set(wanted[name])
        listed = api.post(f"{_API}/tag?action=list-tags-for-category", {"category_id": category_id})
        for tag_id in _ids(listed, api):
            if not missing:
                break
            tag_read = _read(api, "tag", tag_id)
            if tag_read is not None and tag_read.get("name") in missing:
                missing.discard(tag_read["name"])
                ids[(name, tag_read["name"])] = tag_id
    found: Dict[Tag, _Found] = {}
    taken: Dict[str, str] = {}
    for tag in tags:
        one_category = categories.get(tag.category)
        there = ids.get((tag.category, tag.name))
        if one_category is None:
            found[tag] = _Found(None, "vCenter shows no such category")
        elif there is None:
            found[tag] = _Found(None, "vCenter shows no such tag in the category")
        elif not _for_machines(one_category):
            found[tag] = _Found(None, "tags of the category are not for virtual machines in this vCenter")
        elif one_category.get("cardinality") == "SINGLE" and tag.category in taken:
            found[tag] = _Found(None, f"a machine can have one tag of the category, and it is '{taken[tag.category]}'")
        else:
            taken[tag.category] = tag.name
            found[tag] = _Found(there)
    return found


def _for_machines(category: Dict[str, Any]) -> bool:
    kinds = category.get("associable_types") or []
    return not kinds or any(str(kind).rpartition(":")[2] == _VM for kind in kinds)


def _attach(api: RestSession, tag_id: str, vm: VmRef) -> None:
    """No harm is done if it is attached already."""
    body = {"object_id": {"id": vm.moid, "type": _VM}}
    api.post(f"{_API}/tag-association/{quote(tag_id, safe=':')}?action=attach", body)


def _refusal(error: VsphereError) -> str:
    reason = error.reason or error.what
    if isinstance(error, PrivilegeError):
        reason += f"; the user may lack the privilege {ATTACH} on the tag or {ATTACHABLE} on the machine"
    return reason


def _read(api: RestSession, kind: str, one_id: str) -> Optional[Dict[str, Any]]:
    """A tag or category; None if it is gone meanwhile."""
    try:
        read = api.get(f"{_API}/{kind}/{quote(one_id, safe=':')}")
    except NotFoundError:
        return None
    if not isinstance(read, dict):
        raise _unexpected(api)
    return read


def _ids(listed: Any, api: RestSession) -> List[str]:
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise _unexpected(api)
    return listed


def _text(read: Dict[str, Any], field: str, api: RestSession) -> str:
    if not isinstance(read.get(field), str):
        raise _unexpected(api)
    return str(read[field])


def _unexpected(api: RestSession) -> VsphereError:
    return api.error(VsphereError, "the REST API's answer is not as expected")
