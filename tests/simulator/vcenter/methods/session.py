# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""ServiceInstance and SessionManager: what a client does first and last."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim

from .. import soap
from ..model import Managed
from ..services import AuthenticationFailed
from . import Context, method, service

# The content's references: name -> moid. Those without methods of ours answer MethodNotFound.
CONTENT = {
    "propertyCollector": "propertyCollector",
    "viewManager": "ViewManager",
    "setting": "VpxSettings",
    "userDirectory": "UserDirectory",
    "sessionManager": "SessionManager",
    "authorizationManager": "AuthorizationManager",
    "perfManager": "PerfMgr",
    "scheduledTaskManager": "ScheduledTaskManager",
    "alarmManager": "AlarmManager",
    "eventManager": "EventManager",
    "taskManager": "TaskManager",
    "extensionManager": "ExtensionManager",
    "customizationSpecManager": "CustomizationSpecManager",
    "customFieldsManager": "CustomFieldsManager",
    "diagnosticManager": "DiagMgr",
    "licenseManager": "LicenseManager",
    "searchIndex": "SearchIndex",
    "fileManager": "FileManager",
    "datastoreNamespaceManager": "DatastoreNamespaceManager",
    "virtualDiskManager": "virtualDiskManager",
    "ovfManager": "OvfManager",
    "dvSwitchManager": "DVSManager",
    "localizationManager": "LocalizationManager",
    "storageResourceManager": "StorageResourceManager",
    "guestOperationsManager": "guestOperationsManager",
}
# Those that a host does not have.
VCENTER_ONLY = (
    "customFieldsManager",
    "extensionManager",
    "alarmManager",
    "scheduledTaskManager",
    "virtualDiskManager",
    "storageResourceManager",
    "dvSwitchManager",
)


@service("ServiceInstance")
class ServiceInstance(Managed):
    type = vim.ServiceInstance

    def p_serverClock(self) -> Any:
        return self.simulator.clock()

    def p_capability(self) -> Any:
        return vim.Capability(provisioningSupported=True, multiHostSupported=True, userShellAccessSupported=False)

    def p_content(self) -> Any:
        about = vim.AboutInfo(
            name="VMware vCenter Server",
            fullName="VMware vCenter Server 8.0.3 build-24022515",
            vendor="VMware, Inc.",
            version="8.0.3",
            patchLevel="00000",
            build="24022515",
            localeVersion="INTL",
            localeBuild="000",
            osType="linux-x64",
            productLineId="vpx",
            apiType="VirtualCenter",
            apiVersion="8.0.3.0",
            instanceUuid=self.simulator.instance_uuid,
            licenseProductName="VMware VirtualCenter Server",
            licenseProductVersion="8.0",
        )
        if self.simulator.settings.esxi:  # it has no instance UUID (VADP facts 55)
            about.apiType, about.instanceUuid, about.productLineId = "HostAgent", None, "embeddedEsx"
            about.name, about.fullName = "VMware ESXi", "VMware ESXi 8.0.3 build-24022510"
        content = vim.ServiceInstanceContent(rootFolder=vim.Folder("group-d1"), about=about)
        for name, moid in CONTENT.items():
            if self.simulator.settings.esxi and name in VCENTER_ONLY:
                continue
            setattr(content, name, content._GetPropertyInfo(name).type(moid))
        return content


@method("ServiceInstance", "RetrieveServiceContent")
def retrieve_content(context: Context, instance: ServiceInstance) -> Any:
    return instance.p_content()


@method("ServiceInstance", "CurrentTime")
def current_time(context: Context, instance: ServiceInstance) -> Any:
    return context.simulator.clock()


@service("SessionManager")
class SessionManager(Managed):
    type = vim.SessionManager

    def p_sessionList(self) -> Any:
        return soap.array(vim.UserSession, [session.info() for session in self.simulator.sessions.all()])

    def p_currentSession(self) -> Any:
        session = self.simulator.current.session
        return session.info() if session is not None and session.alive else None

    def p_message(self) -> str:
        return ""

    def p_defaultLocale(self) -> str:
        return "en"

    def p_messageLocaleList(self) -> Any:
        return soap.array(str, ["en"])

    def p_supportedLocaleList(self) -> Any:
        return soap.array(str, ["en"])


@method("SessionManager", "Login")
def login(context: Context, manager: SessionManager, userName: str, password: str, locale: str | None) -> Any:
    if context.session is not None:
        raise vim.fault.InvalidLogin(msg="The session is already logged in.")
    try:
        session = context.simulator.sessions.login(userName, password, context.address, context.agent)
    except AuthenticationFailed:
        raise vim.fault.InvalidLogin() from None
    context.session = session
    context.new_cookie = session.cookie
    return session.info()


@method("SessionManager", "Logout")
def logout(context: Context, manager: SessionManager) -> None:
    assert context.session is not None
    context.simulator.sessions.end(context.session)
    context.end_cookie = True


@method("SessionManager", "SessionIsActive")
def session_is_active(context: Context, manager: SessionManager, sessionID: str, userName: str) -> bool:
    return any(one.key == sessionID and one.user.name == userName.lower() for one in context.simulator.sessions.all())


@method("SessionManager", "TerminateSession")
def terminate(context: Context, manager: SessionManager, sessionId: list[str]) -> None:
    sessions = {one.key: one for one in context.simulator.sessions.all()}
    for key in sessionId:
        if key not in sessions:
            raise vim.fault.NotFound()
        context.simulator.sessions.end(sessions[key])


@method("SessionManager", "SetLocale")
def set_locale(context: Context, manager: SessionManager, locale: str) -> None:
    """Messages are English whatever is asked for."""
