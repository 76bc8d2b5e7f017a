# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What every module's ``main`` has in common: options that merge, and the one place where errors become failures."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Callable, Dict, List, Sequence

from ansible.module_utils.basic import AnsibleModule, env_fallback, missing_required_lib

from .datapath.processes import no_core_files
from .errors import InputError, VadpError
from .exhausted import told_as_errors
from .lease import Ended, ends_in_order
from .libraries import first_missing
from .shown import LINES, shown, shown_deep


class Options:
    """An argument spec together with its cross-field rules, so that fragments can be added up.

    The keyword arguments are those of :class:`AnsibleModule` (``required_one_of`` and friends).
    """

    RULES = ("mutually_exclusive", "required_together", "required_one_of", "required_if")

    def __init__(self, argument_spec: Dict[str, Any], **rules: Sequence[Any]) -> None:
        unknown = set(rules) - set(self.RULES)
        if unknown:
            raise TypeError(f"unknown rules: {sorted(unknown)}")
        self.argument_spec = dict(argument_spec)
        self.rules: Dict[str, List[Any]] = {name: list(rules.get(name, ())) for name in self.RULES}

    def __add__(self, other: Options) -> Options:
        merged = {name: self.rules[name] + other.rules[name] for name in self.RULES}
        return Options({**self.argument_spec, **other.argument_spec}, **merged)


def connection_options() -> Options:
    """Doc fragment ``openvadp.backup.connection``."""
    return Options(
        dict(
            hostname=dict(type="str", required=True, fallback=(env_fallback, ["VMWARE_HOST"])),
            username=dict(type="str", required=True, fallback=(env_fallback, ["VMWARE_USER"])),
            password=dict(type="str", required=True, no_log=True, fallback=(env_fallback, ["VMWARE_PASSWORD"])),
            port=dict(type="int", default=443, fallback=(env_fallback, ["VMWARE_PORT"])),
            validate_certs=dict(type="bool", default=True, fallback=(env_fallback, ["VMWARE_VALIDATE_CERTS"])),
            ca_path=dict(type="path"),
            thumbprint=dict(type="str"),
            reconnect_timeout=dict(type="int", default=60),
        )
    )


def vm_options() -> Options:
    """Doc fragment ``openvadp.backup.vm``."""
    return Options(
        dict(
            name=dict(type="str"),
            uuid=dict(type="str"),
            use_instance_uuid=dict(type="bool", default=False),
            moid=dict(type="str"),
            folder=dict(type="str"),
            datacenter=dict(type="str"),
        ),
        required_one_of=[("name", "uuid", "moid")],
        mutually_exclusive=[("name", "uuid", "moid")],
    )


def repository_options() -> Options:
    """Doc fragment ``openvadp.backup.repository``: the repository alone."""
    return Options(dict(repository=dict(type="path", required=True)))


def repository_write_options() -> Options:
    """Doc fragment ``openvadp.backup.repository_write``: of modules that back up into it."""
    return Options(
        dict(
            create=dict(type="bool", default=False),
            adopt=dict(type="str", choices=["moved", "copy", "another_path"]),
        )
    )


def lock_options() -> Options:
    """Doc fragment ``openvadp.backup.lock``: of modules that take a virtual machine's lock."""
    return Options(dict(lock_timeout=dict(type="int", default=60)))


def repository_vm_options(required: bool = True) -> Options:
    """Doc fragment ``openvadp.backup.repository_vm``: a VM and a point, as the repository knows them."""
    return Options(
        dict(vm_uuid=dict(type="str"), vm_name=dict(type="str"), point=dict(type="str", default="latest")),
        required_one_of=[("vm_uuid", "vm_name")] if required else [],
        mutually_exclusive=[("vm_uuid", "vm_name")],
    )


def transport_options(transports: Sequence[str]) -> Options:
    """Doc fragment ``openvadp.backup.transport``.

    :param transports: the default order, which differs between reading and writing.
    """
    return Options(
        dict(
            transports=dict(
                type="list",
                elements="str",
                choices=["san", "hotadd", "nbdssl", "nbd", "https"],
                default=list(transports),
            ),
            require_transport=dict(type="bool", default=False),
            vddk_libdir=dict(type="path"),
            device_dir=dict(type="path", default="/dev/disk/by-id"),
            sysfs_dir=dict(type="path", default="/sys"),
            proxy_name=dict(type="str"),
            proxy_uuid=dict(type="str"),
            proxy_moid=dict(type="str"),
            proxy_physical=dict(type="bool", default=False),
            nfc_port=dict(type="int", default=902),
            nfc_host_limit=dict(type="int"),
            wire_compression=dict(type="str", choices=["none", "zlib", "fastlz", "skipz"], default="none"),
            io_timeout=dict(type="int", default=180),
        )
    )


def lan_target_options() -> Options:
    """Doc fragment ``openvadp.backup.lan_targets``: the hosts of a backup LAN that are to be proved."""
    target = dict(host=dict(type="str", required=True), address=dict(type="str", required=True))
    return Options(
        dict(
            targets=dict(type="list", elements="dict", required=True, options=target),
            nfc_port=dict(type="int", default=902),
        )
    )


def progress_options() -> Options:
    """Doc fragment ``openvadp.backup.progress``: of modules that run for long, beside an action plugin."""
    lease = dict(
        processes=dict(type="list", elements="str", default=[]),
        file=dict(type="path"),
        seconds=dict(type="int"),
    )
    return Options(dict(progress_file=dict(type="path"), lease=dict(type="dict", options=lease)))


def _check_texts(params: Dict[str, Any]) -> None:
    """:raises InputError: an option is not UTF-8: such a path can stand neither in results nor in records."""
    for name, value in params.items():
        for text in _texts(value):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise InputError(
                    f"The option {name} is not UTF-8",
                    subject=shown(text),
                    reason="it holds bytes that are not characters",
                    remedy="Rename what it names, or reach it by another path (a bind mount)",
                ) from None


def _texts(value: Any) -> List[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [text for item in value for text in _texts(item)] if isinstance(value, (list, tuple)) else []


class _Module(AnsibleModule):
    """An AnsibleModule that gets as far as :func:`_check_texts`."""

    def _log_invocation(self) -> None:
        # What is not UTF-8 can't be written to the system's log: Ansible fails with a traceback.
        with suppress(UnicodeEncodeError):
            super()._log_invocation()


def run_module(
    options: Options, body: Callable[[AnsibleModule], Dict[str, Any]], libraries: Sequence[str] = ()
) -> None:
    """Parse the options, check the libraries, run *body* and exit with what it returns.

    :param body: takes the module, returns the result (``changed`` included; ``warnings`` are given out, ``diff`` is
        passed on in diff mode only); a :class:`VadpError` becomes ``fail_json``
        with the message and an ``error`` dictionary, anything else keeps its traceback. Texts are as
        :func:`.shown.shown` has them: they end on screens and in logs. SIGTERM, and the loss of the
        option ``lease``, end it in order.
    :param libraries: import names (see ``libraries``) without which the module can't do its work.
    """
    module = _Module(argument_spec=options.argument_spec, supports_check_mode=True, **options.rules)
    # What is censored is censored as it is shown, too.
    module.no_log_values.update([shown(str(value), LINES) for value in module.no_log_values])
    name, what, trace = first_missing(*libraries)
    if name:
        module.fail_json(msg=missing_required_lib(what), exception=trace)
    no_core_files()
    try:
        _check_texts(module.params)
        with told_as_errors(), ends_in_order(module.params.get("lease")):
            result = body(module)
    except VadpError as error:
        module.fail_json(msg=shown(str(error), LINES), error=shown_deep(error.to_result()))
    except Ended as end:
        module.fail_json(msg=f"The module was ended before its work was done: {end}. Run it again.")
    for warning in result.pop("warnings", ()):
        module.warn(shown(str(warning)))
    if not module._diff:
        result.pop("diff", None)
    module.exit_json(**shown_deep(result))
