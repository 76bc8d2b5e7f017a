# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The environment browser: what a VM's virtual hardware can have."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim

from ..inventory import VirtualMachine
from ..model import Managed
from . import Context, method

device = vim.vm.device
CONTROLLERS = {
    device.VirtualLsiLogicControllerOption: device.VirtualLsiLogicController,
    device.VirtualLsiLogicSASControllerOption: device.VirtualLsiLogicSASController,
    device.ParaVirtualSCSIControllerOption: device.ParaVirtualSCSIController,
}


def _vm(context: Context, browser: Managed) -> VirtualMachine:
    number = browser.moid.removeprefix("envbrowser-")
    machines = context.simulator.inventory.all(VirtualMachine)
    found: VirtualMachine = next(vm for vm in machines if vm.moid.split("-")[-1] == number)
    return found


def _range(count: int) -> Any:
    return vim.option.IntOption(valueIsReadonly=False, min=0, max=count, defaultValue=0)


def _option(vm: VirtualMachine, key: str | None) -> Any:
    """The SCSI controllers of a hardware version (VADP facts 28); nothing else is told."""
    hardware = vim.vm.VirtualHardwareOption(hwVersion=int((key or vm.config.version).rsplit("-", 1)[-1]))
    for option, kind in CONTROLLERS.items():
        units = 64 if kind is device.ParaVirtualSCSIController and hardware.hwVersion >= 14 else 16
        hardware.virtualDeviceOption.append(
            option(
                type=kind,
                plugAndPlay=False,
                hotRemoveSupported=True,
                devices=_range(units - 1),
                numSCSIDisks=_range(units - 1),
                numSCSICdroms=_range(units - 1),
                numSCSIPassthrough=_range(units - 1),
                sharing=["noSharing", "virtualSharing", "physicalSharing"],
                defaultSharedIndex=0,
                hotAddRemove=vim.option.BoolOption(valueIsReadonly=True, supported=True, defaultValue=True),
                scsiCtlrUnitNumber=7,
            )
        )
    return vim.vm.ConfigOption(
        version=f"vmx-{hardware.hwVersion:02d}", description="ESXi 8.0 virtual machine", hardwareOptions=hardware
    )


@method("EnvironmentBrowser", "QueryConfigOption", privilege="System.View")
def query_config_option(context: Context, browser: Managed, key: str | None, host: Any) -> Any:
    return _option(_vm(context, browser), key)


@method("EnvironmentBrowser", "QueryConfigOptionEx", privilege="System.View")
def query_config_option_ex(context: Context, browser: Managed, spec: Any) -> Any:
    return _option(_vm(context, browser), spec.key if spec is not None else None)
