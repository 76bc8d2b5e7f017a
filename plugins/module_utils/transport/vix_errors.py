# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""What VDDK's log says, in words: error numbers and the lines that tell more than the number (VADP facts 26, 27, 47).

NBD itself reports nothing but EIO. Only numbers whose meaning is published stand here; any other stays unknown. One
set of tables words the errors of a run of ours (:func:`decode_log`) and the diagnosis of any log (:func:`signs_of`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Pattern, Sequence, Tuple

CERTAIN = "certain"
LIKELY = "likely"
POSSIBLE = "possible"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """What a log means.

    :param code: the VIX or DiskLib number, or None where the text alone tells.
    :param meaning: what happened, a clause without a full stop.
    :param remedy: what to do about it, or None if that is not known.
    :param evidence: the line of the log it was read from.
    :param retryable: may succeed later without anybody changing anything.
    :param cause: a key of CAUSES, or UNKNOWN.
    """

    code: Optional[int]
    meaning: str
    remedy: Optional[str]
    evidence: str
    retryable: bool = False
    cause: str = UNKNOWN


@dataclass(frozen=True)
class Cause:
    """Something that is wrong, and how to be sure of it.

    :param meaning: a sentence without a full stop.
    :param remedy: what to do about it.
    :param confirm: the check that would confirm it.
    """

    code: str
    meaning: str
    remedy: str
    confirm: str


_OPEN_902 = (
    "Open the NFC port (902) from this machine to every ESXi host that sees the datastore, and check that their names"
    " resolve here"
)
_PRIVILEGES = (
    "Grant the user VirtualMachine.Provisioning.DiskRandomRead (for writing DiskRandomAccess) and GetVmFiles on the VM,"
    " and Datastore.Browse and Datastore.FileManagement on its datastores"
)
_SERVER = (
    "Check that this machine reaches the server named in 'hostname' on its port, and its hosts on the NFC port (902)"
)
_MAINTENANCE = "Wait for the host to leave maintenance mode, and run again"
_RESOLVE = "Make the names of the server and of all hosts that see the datastore resolve here (DNS or /etc/hosts)"
_FEWER_DISKS = "Copy fewer disks of that host at a time"
_THUMBPRINT = "Leave 'thumbprint' out so that it is worked out, or correct it"
_FREE_ESXI = "Free ESXi can't be backed up: license the host"
_GLOBAL = "Grant Global.DisableMethods and Global.EnableMethods at vCenter's level, or license the host"
_OWN_SUBNET = (
    "Give the host's backup traffic a VMkernel NIC in a subnet of its own: no two VMkernel NICs of one TCP/IP stack may"
    " lie in one subnet"
)
_NETWORK = "Check the network between this machine and the ESXi hosts (firewalls, MTU, cabling), and run again"
_CRYPTO = "Grant the user Cryptographer.Access"
_SLOTS = (
    "Detach what is attached to the proxy VM and not needed, give it another SCSI controller (PVSCSI), or let the disk"
    " go by nbdssl"
)
_LUN = (
    "Present the datastore's LUNs to the proxy, which must be a physical machine, and name their devices in device_dir;"
    " VMFS on shared block storage only"
)
_VDDK = (
    "Check that nbdkit's VDDK plugin is installed, that the whole VDDK (Linux x86-64) was unpacked, and that"
    " vddk_libdir names the folder that holds lib64"
)
_PARAMETERS = (
    "Check what VDDK is given: the thumbprint (SHA-1, 20 bytes with colons), the transports, the machine and its"
    " snapshot, and its configuration file (buffers of 16 MB at most)"
)
_INDEPENDENT = (
    "Set the disk to dependent while the machine is off, or back it up by other means; it is skipped meanwhile"
)

# In the order in which causes of the same certainty are reported: what one can act on first.
_CAUSES = (
    Cause(
        "shared_subnet",
        "two VMkernel NICs of the ESXi host lie in one subnet, so its answers may leave by the wrong one",
        _OWN_SUBNET,
        "the host's list of VMkernel NICs (option esxi_nics, or esxcli network ip interface ipv4 get on the host)",
    ),
    Cause(
        "port_902",
        "the NFC port (902) of an ESXi host is not reached from this machine: closed, filtered, or without a route",
        _OPEN_902,
        "vadp_preflight, check host_port",
    ),
    Cause(
        "name_resolution",
        "the name of the server or of an ESXi host does not resolve on this machine",
        _RESOLVE,
        "vadp_preflight, check host_name",
    ),
    Cause(
        "host_memory",
        "the ESXi host is out of memory for disk data (NFC)",
        f"{_FEWER_DISKS}: set nfc_host_limit, and let backups of the same hosts begin at different times",
        "the host's hostd.log at that time, and how many disks were open on it",
    ),
    Cause(
        "thumbprint",
        "the server's certificate is not the one whose thumbprint was given, or it is no longer valid",
        _THUMBPRINT,
        "vadp_preflight, check certificate",
    ),
    Cause(
        "credentials",
        "the server refused the user name or the password",
        "Check username and password, and that the account is neither locked nor expired",
        "a login to the vSphere client with the same account",
    ),
    Cause(
        "session_expired",
        "the login at vCenter has ended",
        "Run again; look at vCenter's session limits, and for who ends sessions, if it happens again",
        "vCenter's events of the user's logins and logouts at that time",
    ),
    Cause(
        "privileges",
        "the user lacks a privilege",
        _PRIVILEGES,
        "vadp_preflight, check privileges",
    ),
    Cause(
        "licence",
        "the licence of the ESXi host does not allow backups",
        _FREE_ESXI,
        "the host's licence in the vSphere client",
    ),
    Cause(
        "global_privileges",
        "the server calls the host not licensed, which it also does where the user lacks Global.DisableMethods or"
        " Global.EnableMethods at vCenter's level",
        _GLOBAL,
        "vadp_preflight, check privileges",
    ),
    Cause(
        "snapshot_missing",
        "the snapshot is gone, or was never there",
        "Look who removed it (vCenter's events), make a new one and run again",
        "the virtual machine's snapshots in the vSphere client",
    ),
    Cause(
        "vm_missing",
        "the virtual machine was not found",
        "Check its name or moid, that it still exists, and that the user may see it",
        "vadp_preflight, check vm",
    ),
    Cause(
        "disk_missing",
        "the disk's file is not where it was named",
        "Run again: a snapshot or a Storage vMotion renames a disk's file",
        "the disks of the virtual machine as vadp_preflight lists them",
    ),
    Cause(
        "disk_locked",
        "the disk's file is in use elsewhere",
        "End what else uses it (another backup, a disk hot-added to a proxy)",
        "vadp_preflight, check leftovers",
    ),
    Cause(
        "encrypted",
        "the virtual machine or its disk is encrypted, and the key was not had",
        _CRYPTO,
        "vadp_preflight, check privileges",
    ),
    Cause(
        "independent_disk",
        "the disk is independent, or a physical RDM, and so in no snapshot",
        _INDEPENDENT,
        "vadp_preflight, check disk",
    ),
    Cause(
        "snapshot_limit",
        "the virtual machine has as many snapshots as it may have",
        "Remove or consolidate snapshots",
        "vadp_preflight, check snapshots",
    ),
    Cause(
        "broken_chain",
        "the disk's chain of delta files does not fit together",
        "Consolidate the virtual machine's disks",
        "vadp_preflight, check consolidation",
    ),
    Cause(
        "disk_full",
        "there is no room left",
        "Free space on the datastore that the log names, and in the repository",
        "vadp_preflight, checks datastore_space and repository",
    ),
    Cause(
        "proxy_memory",
        "this machine is out of memory",
        "Copy fewer disks in parallel, or give the proxy more memory",
        "the system's log of the proxy (out of memory killer)",
    ),
    Cause(
        "lun_access",
        "the proxy does not reach the datastore's LUNs",
        _LUN,
        "vadp_preflight, the reasons against san",
    ),
    Cause(
        "hotadd_slots",
        "the proxy VM has no free SCSI unit for another disk",
        _SLOTS,
        "vadp_preflight, the reasons against hotadd",
    ),
    Cause(
        "hotadd_impossible",
        "the disk can't be attached to this proxy VM",
        "The proxy must be a VM of the same datacenter whose host sees the datastore, and the disk a SCSI disk",
        "vadp_preflight, the reasons against hotadd",
    ),
    Cause(
        "mode_replaced",
        "VDDK could not have the transport that was asked for and silently took another",
        "Make the first one work on this machine, or ask for the one that was used; require_transport makes it fail",
        "vadp_preflight, the reasons against the transport that was asked for first",
    ),
    Cause(
        "maintenance_mode",
        "the ESXi host is not available: it enters maintenance mode or is shutting down",
        _MAINTENANCE,
        "vadp_preflight, check host_state",
    ),
    Cause(
        "vddk_load",
        "VDDK, nbdkit's plugin for it, or a library that they need can't be loaded",
        _VDDK,
        "nbdkit vddk --dump-plugin libdir=<vddk_libdir>, or vadp_preflight, check vddk",
    ),
    Cause(
        "invalid_parameter",
        "VDDK was given a parameter that it does not accept, and does not say which",
        _PARAMETERS,
        "the lines before it in VDDK's log; vadp_preflight, checks vm and certificate",
    ),
    Cause(
        "invalid_disk_file",
        "the disk's file is invalid: a section that it must have is missing",
        "Check in the vSphere client that the virtual machine starts and its disks can be consolidated",
        "the disk's descriptor (.vmdk) on its datastore; vadp_preflight, check consolidation",
    ),
    Cause(
        "host_refused_disk",
        "the ESXi host was reached and could not open or ask the disk, without saying why: it is in use elsewhere, was"
        " moved, or the host lacks memory for it",
        "Read hostd.log and vpxa.log of the ESXi host at that time; end what else uses the disk, and run again",
        "hostd.log of the ESXi host at that time; vadp_preflight, check leftovers",
    ),
    Cause(
        "allocation_query",
        "the ESXi host does not report which blocks of the disk are allocated",
        "Nothing is lost: a full reads the whole disk then. If reading fails too, read hostd.log of the ESXi host",
        "hostd.log of the ESXi host at that time",
    ),
    Cause(
        "connection_cut",
        "the connection to the ESXi host was there and was cut",
        _NETWORK,
        "vadp_preflight, check host_port, while a backup runs; the host's vmkernel.log and hostd.log at that time",
    ),
    Cause(
        "server_unreachable",
        "the server itself can't be reached",
        _SERVER,
        "vadp_preflight, which begins with a connection to it",
    ),
)
CAUSES: Dict[str, Cause] = {cause.code: cause for cause in _CAUSES}
UNKNOWN_CAUSE = Cause(
    UNKNOWN,
    "the log has errors, and none of them is known here",
    "Read the lines given as evidence; the log of the ESXi host (hostd.log, vpxa.log) at that time may say more",
    "vadp_preflight, all checks",
)


class _Meaning(NamedTuple):
    """
    :param cause: a key of CAUSES; UNKNOWN where what happened is known and why is not.
    :param certainty: how certain that cause is when there is nothing but this. CERTAIN only where no other is possible.
    :param others: what else ends so; possible.
    :param weak: work goes on after it: whatever else is found is the better reason for a failure.
    """

    text: str
    remedy: Optional[str] = None
    retryable: bool = False
    cause: str = UNKNOWN
    certainty: str = LIKELY
    others: Tuple[str, ...] = ()
    weak: bool = False


# VADP facts, "VIX error numbers"
_CODES: Dict[int, _Meaning] = {
    1: _Meaning(
        "VDDK failed without saying why (1); a wrong thumbprint does that at the open",
        "Check that the thumbprint is that of the server named in 'hostname'; the log's last lines may say more",
        cause="thumbprint",
        certainty=POSSIBLE,
    ),
    2: _Meaning("out of memory (2)", "Copy fewer disks in parallel", True, "proxy_memory"),
    3: _Meaning("VDDK was given an argument it does not accept (3)", _PARAMETERS, cause="invalid_parameter"),
    4: _Meaning(
        "the disk's file was not found (4)",
        "Run again: a migration may have moved the disk meanwhile",
        cause="disk_missing",
    ),
    5: _Meaning("the handle of the disk is busy with another function of VDDK (5)", "Run again", True),
    6: _Meaning("not supported (6)"),
    8: _Meaning("the disk is full (8)", "Free space on the datastore", cause="disk_full", certainty=CERTAIN),
    10: _Meaning("cancelled (10)"),
    11: _Meaning("the file can only be read (11)"),
    12: _Meaning("the file exists already (12)"),
    # VDDK before 8.0.2.1 ends so without a free SCSI unit for HotAdd; a file that something else has open ends so too.
    13: _Meaning(
        "no access to the disk's file (13): a privilege is missing, the file is in use, or HotAdd has no free unit",
        _PRIVILEGES,
        cause="privileges",
        others=("hotadd_slots", "disk_locked"),
    ),
    15: _Meaning(
        "the disk's file is locked (15)",
        "End what else uses it (another backup, a hot-added disk)",
        True,
        "disk_locked",
        CERTAIN,
    ),
    24: _Meaning("a buffer is too small (24)"),
    27: _Meaning("a name is not valid UTF-8 (27)"),
    30: _Meaning("the disk is encrypted and its key was not had (30)", _CRYPTO, cause="encrypted", certainty=CERTAIN),
    32: _Meaning("the licence does not allow it (32)", _FREE_ESXI, cause="licence"),
    35: _Meaning(
        "the authentication for an encrypted virtual machine failed (35)",
        _CRYPTO,
        cause="encrypted",
        certainty=CERTAIN,
    ),
    36: _Meaning(
        "the connection to the host was lost (36)",
        "Check the network to the ESXi hosts, and run again",
        True,
        "connection_cut",
    ),
    # DiskLib's numbers that logs show with their names; there is no public table of them.
    290: _Meaning(
        "the ESXi host could not open the disk and does not say why (290 NBD_ERR_GENERIC)",
        CAUSES["host_refused_disk"].remedy,
        True,
        "host_refused_disk",
    ),
    4898: _Meaning(
        "the ESXi host's disk library failed (4898 NBD_ERR_DISKLIB)",
        CAUSES["host_refused_disk"].remedy,
        True,
        "host_refused_disk",
    ),
    2000: _Meaning(
        "the file is invalid: a required section is missing (2000)",
        CAUSES["invalid_disk_file"].remedy,
        cause="invalid_disk_file",
    ),
    2338: _Meaning(
        "no connection to the ESXi host that serves the disk (2338 NBD_ERR_NETWORK_CONNECT)",
        _OPEN_902,
        True,
        "port_902",
    ),
    3014: _Meaning(
        "the user lacks a privilege, or the login was refused (3014)",
        f"{_PRIVILEGES}. Check username and password too",
        cause="privileges",
        others=("credentials",),
    ),
    4000: _Meaning("the VM was not found (4000)", cause="vm_missing", certainty=CERTAIN),
    4003: _Meaning("the VM is a template (4003)"),
    13000: _Meaning("a snapshot operation failed (13000)"),
    13003: _Meaning(
        "the snapshot was not found (13003)",
        "Look who removed it, make a new one and run again",
        cause="snapshot_missing",
        certainty=CERTAIN,
    ),
    13006: _Meaning("the user lacks a snapshot privilege (13006)", _PRIVILEGES, cause="privileges", certainty=CERTAIN),
    13010: _Meaning("the snapshot is locked (13010)", None, True, "disk_locked"),
    13014: _Meaning("the snapshot's disk is locked (13014)", None, True, "disk_locked"),
    13016: _Meaning(
        "a running virtual machine with independent disks can't be snapshotted (13016)",
        _INDEPENDENT,
        cause="independent_disk",
        certainty=CERTAIN,
    ),
    13019: _Meaning(
        "the VM has as many snapshots as it may have (13019)",
        "Remove or consolidate snapshots",
        cause="snapshot_limit",
        certainty=CERTAIN,
    ),
    14006: _Meaning("the handshake with the host's disk service failed (14006)", None, True, "connection_cut"),
    14008: _Meaning(
        "the server was not found (14008)",
        "Check that the names of vCenter and its hosts resolve here",
        cause="name_resolution",
    ),
    14009: _Meaning("the ESXi host refused the connection for disk data (14009)", _OPEN_902, True, "port_902"),
    14010: _Meaning("TCP error on the way to the ESXi host (14010)", _OPEN_902, True, "port_902"),
    14011: _Meaning(
        "the connection to the ESXi host was lost (14011)",
        "Check the network, and run again",
        True,
        "connection_cut",
    ),
    14012: _Meaning("the host's hash file can't be used (14012)"),
    14013: _Meaning("the host's hash file can't be used (14013)"),
    14014: _Meaning(
        "the host is shutting down or entering maintenance mode (14014)", _MAINTENANCE, True, "maintenance_mode"
    ),
    14015: _Meaning(
        "the host is not available, as in maintenance mode (14015)", _MAINTENANCE, True, "maintenance_mode"
    ),
    16000: _Meaning("VDDK was given a parameter that is invalid (16000)", _PARAMETERS, cause="invalid_parameter"),
    16007: _Meaning("beyond the end of the disk (16007)"),
    16008: _Meaning(
        "the chain of delta disks does not fit together (16008)",
        "Consolidate the VM's disks",
        cause="broken_chain",
        certainty=CERTAIN,
    ),
    16014: _Meaning(
        "the disk is encrypted and its key was not had (16014)", _CRYPTO, cause="encrypted", certainty=CERTAIN
    ),
    16053: _Meaning("VDDK could not start one of its parts (16053)", cause="vddk_load"),
    16054: _Meaning("the connection is not valid (16054)", None, True, "session_expired", POSSIBLE),
    16064: _Meaning(
        "no licence for this feature (16064)",
        "License the host, and grant Global.DisableMethods and Global.EnableMethods at vCenter's level",
        cause="global_privileges",
    ),
    16067: _Meaning("the capacities of the chain differ (16067)", cause="broken_chain"),
    18000: _Meaning("no connection to the server (18000)", _SERVER, True, "server_unreachable"),
}

# Lines that say more than a number, the most telling first.
_TEXTS: List[Tuple[Pattern[str], Optional[int], _Meaning]] = [
    (
        re.compile(
            r"(Failed to verify SSL certificate|thumbprint.*(mismatch|expected)|expected.*thumbprint"
            r"|SSLVerifyException)",
            re.I,
        ),
        1,
        _Meaning(
            "the server's certificate has another thumbprint than the one given",
            _THUMBPRINT,
            cause="thumbprint",
            certainty=CERTAIN,
        ),
    ),
    (
        re.compile(r"(certificate (verify failed|has expired|is not (trusted|yet valid))|SSLVerifyFault)", re.I),
        1,
        _Meaning(
            "the server's certificate is not valid (expired, or of an unknown authority)",
            "Renew the server's certificate, or set ca_path to its authority's",
            cause="thumbprint",
            certainty=CERTAIN,
        ),
    ),
    (
        re.compile(r"Current license or ESXi version prohibits", re.I),
        None,
        _Meaning("the host's licence does not allow backups", _FREE_ESXI, cause="licence", certainty=CERTAIN),
    ),
    (
        re.compile(r"host is not licensed for this feature", re.I),
        16064,
        _Meaning(
            "the server says the host is not licensed for this feature",
            _GLOBAL,
            cause="global_privileges",
        ),
    ),
    (
        re.compile(r"(incorrect user ?name or password|InvalidLogin|Cannot complete login)", re.I),
        None,
        _Meaning(
            "the server refused the user name or the password",
            "Check username and password, and that the account is neither locked nor expired",
            cause="credentials",
            certainty=CERTAIN,
        ),
    ),
    (
        re.compile(
            r"(NotAuthenticated|session is not authenticated|session (has )?(expired|timed out|is not valid))", re.I
        ),
        None,
        _Meaning(
            "the login at vCenter has ended",
            "Run again; look at vCenter's session limits if it happens again",
            True,
            "session_expired",
            CERTAIN,
        ),
    ),
    (
        re.compile(r"(Permission to perform this operation was denied|\bNoPermission\b)", re.I),
        None,
        _Meaning("the user lacks a privilege", _PRIVILEGES, cause="privileges", certainty=CERTAIN),
    ),
    (
        re.compile(
            r"(Host address lookup for server \S+ failed|Name or service not known|failure in name resolution"
            r"|server name could not be resolved|No such host is known)",
            re.I,
        ),
        2338,
        _Meaning(
            "the name of the ESXi host that serves the disk does not resolve on this machine",
            _RESOLVE,
            cause="name_resolution",
            certainty=CERTAIN,
        ),
    ),
    (
        re.compile(r"(Failed to allocate the requested|NFC error 5\b|NFC_NO_MEMORY)", re.I),
        None,
        _Meaning(
            "the ESXi host is out of memory for disk data (NFC error 5)",
            _FEWER_DISKS,
            True,
            "host_memory",
            CERTAIN,
        ),
    ),
    (
        re.compile(
            r"(snapshot-\d+\W.*(already been deleted|not found|not (been )?created|does not exist)"
            r"|(Failed|Unable|Cannot|Could not) (to )?find (the )?snapshot)",
            re.I,
        ),
        13003,
        _Meaning(
            "the snapshot is gone, or was never there",
            "Look who removed it, make a new one and run again",
            cause="snapshot_missing",
            certainty=CERTAIN,
        ),
    ),
    (
        re.compile(r"((\bis|\benter\w*|going|now) (in(to)? )?maintenance mode|HostInMaintenance)", re.I),
        14015,
        _Meaning("the host is in maintenance mode or enters it", _MAINTENANCE, True, "maintenance_mode", CERTAIN),
    ),
    (
        re.compile(
            r"((\bno (more )?|failed to find (a )?)(free|available) (SCSI )?(unit|slot|target)|TooManyDevices"
            r"|(exceed\w*|reached) the maximum number of (SCSI |virtual )*(device|disk|unit)"
            r"|all (SCSI )?(slots|units|targets) .*(in use|taken))",
            re.I,
        ),
        None,
        _Meaning("the proxy VM has no free SCSI unit", _SLOTS, cause="hotadd_slots", certainty=CERTAIN),
    ),
    (
        re.compile(r"(Cannot use mode hotadd|hot-?add.*(failed|not possible|cannot|is not available))", re.I),
        None,
        _Meaning(
            "the disk could not be attached to this proxy VM",
            CAUSES["hotadd_impossible"].remedy,
            cause="hotadd_impossible",
        ),
    ),
    (
        re.compile(
            r"(Cannot use mode san|\bNo (matching )?LUNs?\b|\bLUN\b.*(not (found|visible|accessible)"
            r"|cannot be (found|opened))|(Cannot|Failed to|Unable to) (open|find|access|read)\b.*\b(LUN|naa\.[0-9a-f]|san://))",
            re.I,
        ),
        None,
        _Meaning("the proxy does not reach the datastore's LUN", _LUN, cause="lun_access"),
    ),
    (
        # What nbdkit itself can't load; lines of VDDK about parts that it can do without are others.
        re.compile(
            r"((libvixDiskLib|libdir).*|nbdkit: (\S+ )?error: .*\.so\b.*)(cannot open shared object|undefined symbol"
            r"|wrong ELF class|invalid ELF|version `\S+' not found|could not be loaded|failed to load)",
            re.I,
        ),
        None,
        _Meaning("VDDK can't be loaded", _VDDK, cause="vddk_load", certainty=CERTAIN),
    ),
    (
        re.compile(r"Cannot create disk spec for disk", re.I),
        None,
        _Meaning(
            "the disk is not in the snapshot: it is independent, or a physical RDM",
            _INDEPENDENT,
            cause="independent_disk",
        ),
    ),
    (
        re.compile(
            r"(DiskLibBlockListOpen|QueryBlockList|QueryAllocatedBlocks)\b.*\bfail|fail.*QueryAllocatedBlocks", re.I
        ),
        None,
        _Meaning(
            "the ESXi host does not report which blocks of the disk are allocated",
            CAUSES["allocation_query"].remedy,
            True,
            "allocation_query",
            weak=True,
        ),
    ),
    (
        # VDDK's own HTTPS client goes to the server that it was given, and to nobody else.
        re.compile(
            r"(Failed to connect; <io_obj .*\be: \d+\(|Failed to get pooled connection; .*SystemException"
            r"|connect(ing)? to (server|host) \S+:443\b)",
            re.I,
        ),
        18000,
        _Meaning("no connection to the server", _SERVER, True, "server_unreachable", CERTAIN),
    ),
    (
        re.compile(r"Cannot get compatible version for vim|User agent failed to send request", re.I),
        18000,
        _Meaning("no conversation with the server", _SERVER, True, "server_unreachable", weak=True),
    ),
    (
        re.compile(
            r"(Timed out connecting to server|Cannot connect to server|Failed to connect to (server|host)"
            r"|Couldn't connect to \S+:902\b)",
            re.I,
        ),
        2338,
        _Meaning("no connection to the ESXi host that serves the disk", _OPEN_902, True, "port_902", CERTAIN),
    ),
    (
        re.compile(r"NfcFssrvrClientOpen: failed to send open message", re.I),
        2338,
        _Meaning(
            "the ESXi host took the connection, which was cut before the disk was opened (NFC_NETWORK_ERROR); two"
            " VMkernel NICs in one subnet do that",
            _OWN_SUBNET,
            True,
            "shared_subnet",
        ),
    ),
    (
        re.compile(
            r"(NfcNetTcp(Write|Read): b(Written|Read): -1|failed: NFC_NETWORK_ERROR|vmware-authd socket)",
            re.I,
        ),
        None,
        _Meaning("the connection to the ESXi host was cut", _NETWORK, True, "connection_cut"),
    ),
    (
        re.compile(r"\bauthentication failed\b", re.I),
        None,
        _Meaning("an authentication failed", "Check username and password", cause="credentials", weak=True),
    ),
    (
        re.compile(r"\.so(\.\d+)*: (cannot open shared object|undefined symbol|wrong ELF class|invalid ELF)", re.I),
        None,
        _Meaning("a library can't be loaded", _VDDK, cause="vddk_load", certainty=POSSIBLE, weak=True),
    ),
]

# VDDK's texts of errors, for logs that do not give the number (nbdkit's "VixDiskLib_Open: <file>: <text>").
_NAMED = [
    (re.compile(pattern, re.I), number)
    for pattern, number in (
        (r"NBD_ERR_NETWORK_CONNECT", 2338),
        (r"server refused connection", 14009),
        (r"The virtual machine cannot be found", 4000),
        (r"A file was not found", 4),
        (r"do not have access rights to this file", 13),
        (r"The file is already in use", 15),
        (r"Insufficient permissions in the host operating system", 3014),
        (r"One of the parameters (supplied )?(was|is) invalid", 16000),
        (r"NBD_ERR_GENERIC", 290),
        (r"NBD_ERR_DISKLIB", 4898),
        (r"The connection was lost", 14011),
    )
]

_NUMBERS = re.compile(
    r"(?:DiskLib error |\bErr(?:or)?(?: code)?[:=]? ?|\bVIX(?:_E\w*)?[ :=]+|\(VIX )(0x[0-9a-fA-F]+|\d{1,20})\b"
    r"|\((\d{4,20})\)"
)
_OPENED = "debug: transport mode: "
_ERROR_LINE = re.compile(r"(\berror\b|\bfail|\[NFC ERROR\]|\bcannot\b)", re.I)
_TROUBLE_LINE = re.compile(
    r"(\berrors?\b|\bfail(s|ed|ing|ures?)?\b|\bcannot\b|\bcan't\b|\bunable to\b|\bcould ?n[o']t\b|timed out|refused"
    r"|denied|\bexpired|\bNo (route|space|more|free|matching|such)\b|NotAuthenticated|NoPermission|TooManyDevices"
    r"|do not have|(\bis|\benter\w*|going|now) (in(to)? )?maintenance mode|NBD_ERR_|\bNFC_(?!SUCCESS)[A-Z]+_|VIX_E_"
    r"|not (found|known|licensed|authenticated|visible)|prohibits|already been deleted|Broken pipe|reset by peer"
    r"|\bInsufficient\b|\b(was|is) invalid\b)",
    re.I,
)
# Each match of the expression above holds one of these.
_TROUBLE_WORDS = (
    *("error", "fail", "cannot", "can't", "unable to", "could not", "couldn't", "timed out", "refused", "denied"),
    *("expired", "no route", "no space", "no more", "no free", "no matching", "no such", "notauthenticated"),
    *("nopermission", "toomanydevices", "do not have", "maintenance mode", "nbd_err_", "nfc_", "vix_e_", "not found"),
    *("not known", "not licensed", "not authenticated", "not visible", "prohibits", "already been deleted"),
    *("broken pipe", "reset by peer", "insufficient", "was invalid", "is invalid"),
)
_NO_TROUBLE = re.compile(
    r"(\b(no|0|without) (errors?|failures?)\b|\berrors?[ :=]+(0|none)\b|NFC_SUCCESS|GetErrorText|NBD_REP_ERR"
    r"|TLS disabled|error-filter|filter=error|operation was successful)",
    re.I,
)
# What VDDK says when it can do without: its own plugins and files of settings, keys that a disk does not have.
_BENIGN = re.compile(
    r"(\b(default )?plugins? from \S|libdiskLibPlugin\.so|\bDictionaryLoad\b|dictionary\.load\.openFailed"
    r"|Optional preferences file|Advanced transport(s| module) not (loaded|available)"
    r"|Unable to get DDB value for key|DiskLibError ?: The operation completed successfully"
    r"|Failed to get the IO filter list)",
    re.I,
)
_VDDK_LINE = re.compile(r"(vix|vddk|disklib|\bnfc|\bnbd|vpxa)", re.I)
# Below, a number is as likely an errno or a Windows error as one of VIX.
_SMALL_NUMBER = 100

# What so many things end in that a line nearby which names one of them is the better witness.
VAGUE = frozenset({1, 3, 13, 290, 3014, 4898, 16000, 16053, 2000, 2338, 14008, 14009, 14010, 14011, 18000})


class Sign(NamedTuple):
    """What one line of a log points at.

    :param vague: a number that so many things end in that another line nearby may explain it.
    :param witness: it may be what explains such numbers nearby.
    :param others: causes that are possible beside it.
    """

    cause: str
    certainty: str
    meaning: str
    vague: bool
    witness: bool
    others: Tuple[str, ...] = ()


def is_trouble(line: str) -> bool:
    """Whether a line of any product's log reports something that went wrong."""
    lower = line.lower()
    # Nearly all lines of a log end here, and a search for plain words is much quicker than the expression.
    if not any(word in lower for word in _TROUBLE_WORDS):
        return False
    return _TROUBLE_LINE.search(line) is not None and not _is_harmless(line)


def _is_harmless(line: str) -> bool:
    return _NO_TROUBLE.search(line) is not None or _BENIGN.search(line) is not None


def signs_of(line: str) -> List[Sign]:
    """What a line that :func:`is_trouble` points at, the clearest first; nothing where the tables don't know it."""
    for pattern, _code, meaning in _TEXTS:
        if pattern.search(line):
            return [_sign(meaning, False)]
    ours = _VDDK_LINE.search(line) is not None
    codes = [code for code in _codes_in(line) if code in _CODES and (ours or code >= _SMALL_NUMBER)]
    return [_sign(_CODES[code], code in VAGUE) for code in sorted(codes, key=_vagueness)]


def _sign(meaning: _Meaning, vague: bool) -> Sign:
    witness = not vague and not meaning.weak and meaning.certainty != POSSIBLE
    return Sign(meaning.cause, meaning.certainty, meaning.text, vague, witness, meaning.others)


def _vagueness(code: int) -> int:
    """A number of DiskLib says more than the number of VIX that it ends in, and anything more than VIX 1."""
    return 2 if code == 1 else 1 if code in VAGUE else 0


def _codes_in(line: str) -> List[int]:
    """The numbers of a line, and those whose text or name stands in it."""
    found = _numbers(line)
    return found + [code for pattern, code in _NAMED if code not in found and pattern.search(line)]


def decode_log(text: str) -> Optional[Finding]:
    """What the newest error in *text* means; None when the log has no error that this table knows or can quote.

    A line that names the cause wins over a number; the number of the operation wins over VIX 1, which says nothing.
    What lies before the last successful open was healed by it, and counts only if nothing else is found.
    """
    return _decode(text.rpartition(_OPENED)[2]) or _decode(text)


def _decode(text: str) -> Optional[Finding]:
    lines = [line for line in text.splitlines() if _ERROR_LINE.search(line) and not _is_harmless(line)]
    return _text_finding(lines, weak=False) or _code_finding(lines)


def _text_finding(lines: Sequence[str], weak: bool) -> Optional[Finding]:
    for pattern, code, meaning in _TEXTS:
        if meaning.weak is not weak:
            continue
        for line in reversed(lines):
            if pattern.search(line):
                return _finding(code, meaning, line)
    return None


def _code_finding(lines: Sequence[str]) -> Optional[Finding]:
    """The newest number that says something; where there is none, the newest line that says little."""
    unknown: Optional[Finding] = None
    vague: Optional[Finding] = None
    for line in reversed(lines):
        little = _text_finding([line], weak=True)
        if little is not None:
            vague = vague or little
            continue
        for code in _codes_in(line):
            if code == 1:
                vague = vague or _finding(1, _CODES[1], line)
            elif code in _CODES:
                return _finding(code, _CODES[code], line)
            elif code and unknown is None:
                unknown = Finding(code, f"error {code}, which has no published meaning", None, _clean(line))
    return vague or unknown


def explain_code(code: int, text: str = "") -> Finding:
    """What a number that a call returned means.

    :param text: the library's own words, for a number that stands in no published table.
    """
    meaning = _CODES.get(code)
    if meaning is None:
        words = f" ({text})" if text else ""
        return Finding(code, f"error {code}, which has no published meaning{words}", None, text)
    return _finding(code, meaning, text)


def may_be_thumbprint(cause: str) -> bool:
    """Whether a call of VDDK that failed with this cause may have wanted the thumbprint in another form.

    A thumbprint that does not match is a plain 1 without words, one of another length may be an invalid parameter.
    """
    return cause in ("thumbprint", "invalid_parameter")


def last_error_line(text: str) -> Optional[str]:
    """The newest line that nbdkit itself marks as an error, without its prefix."""
    for line in reversed(text.splitlines()):
        match = re.search(r"nbdkit: (?:\S+ )?error: (.*)", line)
        if match:
            return match.group(1).strip()
    return None


def _numbers(line: str) -> List[int]:
    """Error numbers in a line; the code is in the low 16 bits (VADP facts 47)."""
    found = [match.group(1) or match.group(2) for match in _NUMBERS.finditer(line)]
    return [int(digits, 16 if digits[:2].lower() == "0x" else 10) & 0xFFFF for digits in found]


def _finding(code: Optional[int], meaning: _Meaning, line: str) -> Finding:
    return Finding(code, meaning.text, meaning.remedy, _clean(line), meaning.retryable, meaning.cause)


def _clean(line: str) -> str:
    return line.strip()[:500]
