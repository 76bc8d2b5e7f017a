# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""AuthorizationManager: who may do what. A user has the same privileges on every object."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim, vmodl

from .. import soap
from ..model import Managed
from ..services import BACKUP_PRIVILEGES, SYSTEM_PRIVILEGES, User
from . import Context, find_object, method, service


@service("AuthorizationManager")
class AuthorizationManager(Managed):
    type = vim.AuthorizationManager

    def p_privilegeList(self) -> Any:
        names = sorted(SYSTEM_PRIVILEGES | BACKUP_PRIVILEGES)
        Privilege = vim.AuthorizationManager.Privilege
        return soap.array(
            Privilege,
            [
                Privilege(
                    privId=name,
                    onParent=False,
                    name=name.rsplit(".", 1)[-1],
                    privGroupName=name.rsplit(".", 1)[0],
                )
                for name in names
            ],
        )

    def p_roleList(self) -> Any:
        return soap.array(vim.AuthorizationManager.Role)


def _availability(user: User, names: Any) -> list[Any]:
    kind = vim.AuthorizationManager.PrivilegeAvailability
    return [kind(privId=name, isGranted=user.may(name)) for name in names]


def _by_entity(context: Context, user: User, refs: Any, names: Any) -> Any:
    result = []
    for ref in refs:
        find_object(context, ref._moId, ref._wsdlName)
        result.append(vim.AuthorizationManager.EntityPrivilege(entity=ref, privAvailability=_availability(user, names)))
    return soap.array(vim.AuthorizationManager.EntityPrivilege, result)


def _of_session(context: Context, key: str) -> User:
    for session in context.simulator.sessions.all():
        if session.key == key:
            return session.user
    raise vmodl.fault.InvalidArgument(invalidProperty="sessionId")


def _of_name(context: Context, name: str) -> User:
    user = context.simulator.users.get(name.lower())
    if user is None:
        raise vmodl.fault.InvalidArgument(invalidProperty="userName")
    return user


@method("AuthorizationManager", "HasPrivilegeOnEntities")
def has_privilege_on_entities(context: Context, manager: Managed, entity: Any, sessionId: str, privId: Any) -> Any:
    return _by_entity(context, _of_session(context, sessionId), entity, privId)


@method("AuthorizationManager", "HasPrivilegeOnEntity")
def has_privilege_on_entity(context: Context, manager: Managed, entity: Any, sessionId: str, privId: Any) -> Any:
    user = _of_session(context, sessionId)
    find_object(context, entity._moId, entity._wsdlName)
    return soap.array(bool, [user.may(name) for name in privId])


@method("AuthorizationManager", "HasUserPrivilegeOnEntities")
def has_user_privilege(context: Context, manager: Managed, entities: Any, userName: str, privId: Any) -> Any:
    return _by_entity(context, _of_name(context, userName), entities, privId)


@method("AuthorizationManager", "FetchUserPrivilegeOnEntities")
def fetch_user_privilege(context: Context, manager: Managed, entities: Any, userName: str) -> Any:
    user = _of_name(context, userName)
    names = sorted(name for name in SYSTEM_PRIVILEGES | BACKUP_PRIVILEGES | user.privileges if user.may(name))
    kind = vim.AuthorizationManager.UserPrivilegeResult
    return soap.array(kind, [kind(entity=ref, privileges=names) for ref in entities])
