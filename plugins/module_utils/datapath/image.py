# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Images and layers: all that calls ``qemu-img`` and ``qemu-nbd``, and the writing of files that survive a crash.

A layer is a qcow2 image with zstd and 64 KiB clusters; an overlay names its parent by a bare file name in the same
folder, format stated. Nothing here follows a backing file that points anywhere else: an image could otherwise make
qemu read any file of the host.

A layer is made in these steps: :func:`create_layer` (size rounded up to a cluster, which the compress filter needs),
:func:`serve` with ``compress`` for the copier, :func:`shrink_to` the exact size, :func:`fsync_file`, rename,
:func:`fsync_dir`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import uuid
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import quote

from ..errors import DamagedError, DataPathError
from . import files, stream_vmdk
from .processes import Child, allow_open_files, run_prefix, run_tool, tool_result

CLUSTER_BYTES = 65536

# What qemu may keep in memory of the tables of all layers below the first one together, and of each at least. By itself
# it keeps 1/8192 of the disk's size for each layer: 1.3 GB for 40 layers of 256 GiB. 128 KiB are the tables of a GiB.
_TABLES_BYTES = 64 << 20
_LEAST_TABLES_BYTES = 256 << 10
# An argument has 128 KiB at most, and the name of an option grows with each layer: it does for some 150.
_OPTIONS_BYTES = 100_000
# qemu opens each file of a chain once; besides that it has sockets, logs and event descriptors open.
_OTHER_FILES = 64

#: Formats that :func:`convert` writes.
FORMATS = ("raw", "qcow2", "vmdk", "vmdk_stream")
# What each of them is to qemu: driver, type of a VMDK.
_VMDK_TYPES = {"vmdk": "monolithicSparse", "vmdk_stream": "streamOptimized"}
_VMDK_MAGIC = b"KDMV"
_VMDK_TYPE = re.compile(rb'createType="([A-Za-z0-9]+)"')
_SECTOR_BYTES = 512

_HEADER_BYTES = 2 * CLUSTER_BYTES
_QCOW2_MAGIC = 0x514649FB
_INCOMPATIBLE_DATA_FILE = 1 << 2
_EXTENSION_BACKING_FORMAT = 0xE2792ACA

_PERCENT = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")


def driver_of(image_format: str) -> str:
    """The name of a format of :data:`FORMATS` in qemu, and the extension of such a file."""
    return "vmdk" if image_format in _VMDK_TYPES else image_format


def is_of_format(image: int, image_format: str, offset: int = 0) -> bool:
    """Whether an open file may be what :func:`convert_into` writes in that format, as far as its header tells.

    :param offset: where a VMDK begins in the file.
    """
    if image_format == "qcow2":
        try:
            header = _parse_header(os.pread(image, _HEADER_BYTES, 0), "")
        except DamagedError:
            return False
        return header.backing is None and not header.external_data
    if image_format in _VMDK_TYPES:
        # A stream without an end, as qemu-img leaves it, is not what is written here.
        finished = image_format != "vmdk_stream" or stream_vmdk.is_finished(image, offset)
        return finished and _vmdk_type(image, offset) == _VMDK_TYPES[image_format]
    return True


def _vmdk_type(image: int, start: int) -> Optional[str]:
    """What a sparse VMDK calls itself in the descriptor that it holds."""
    header = os.pread(image, _SECTOR_BYTES, start)
    if len(header) < _SECTOR_BYTES or not header.startswith(_VMDK_MAGIC):
        return None
    offset, length = struct.unpack_from("<QQ", header, 28)
    if not 0 < length <= 2048 or offset > 1 << 32:
        return None
    found = _VMDK_TYPE.search(os.pread(image, length * _SECTOR_BYTES, start + offset * _SECTOR_BYTES))
    return found.group(1).decode("ascii") if found else None


class Qcow2Header(NamedTuple):
    """What a qcow2 header says about other files."""

    capacity_bytes: int
    backing: Optional[str]
    backing_format: Optional[str]
    external_data: bool


def read_header(path: str) -> Qcow2Header:
    """The header of a qcow2 image, read without qemu and without following it anywhere.

    :raises DamagedError: no qcow2 image, or a header that makes no sense.
    """
    try:
        with files.open_stream(path, what="A layer can't be used") as image:
            data = image.read(_HEADER_BYTES)
    except FileNotFoundError:
        raise DamagedError(
            "A layer is missing", subject=path, remedy="Bring the file back; without it its overlays can't be read"
        ) from None
    except OSError as error:
        raise DataPathError("A layer can't be read", subject=path, reason=error.strerror) from error
    return _parse_header(data, path)


def _parse_header(data: bytes, path: str) -> Qcow2Header:
    try:
        magic, version, backing_offset, backing_length = struct.unpack_from(">IIQI", data)
        if magic != _QCOW2_MAGIC or version not in (2, 3):
            raise DamagedError("A layer is no qcow2 image", subject=path)
        capacity = struct.unpack_from(">Q", data, 24)[0]
        incompatible, header_length = 0, 72
        if version == 3:
            incompatible = struct.unpack_from(">Q", data, 72)[0]
            header_length = struct.unpack_from(">I", data, 100)[0]
        backing = None
        if backing_offset:
            raw = data[backing_offset : backing_offset + backing_length]
            if len(raw) != backing_length or not raw:
                raise DamagedError("The backing file's name of a layer is damaged", subject=path)
            backing = raw.decode("utf-8", "surrogateescape")
        backing_format = None
        position = header_length
        while position < len(data):
            kind, length = struct.unpack_from(">II", data, position)
            if kind == 0:
                break
            if kind == _EXTENSION_BACKING_FORMAT:
                backing_format = data[position + 8 : position + 8 + length].decode("ascii", "replace")
            position += 8 + length + -length % 8
    except struct.error:
        raise DamagedError("A layer's header is damaged", subject=path) from None
    return Qcow2Header(capacity, backing, backing_format, bool(incompatible & _INCOMPATIBLE_DATA_FILE))


def chain_files(path: str) -> List[str]:
    """The files of a layer's chain, the layer first, its base last; read from the headers.

    :raises DamagedError: a file is missing, a backing file is not a bare name of a qcow2 image in the same folder, or
        the chain goes in a circle.
    """
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    files: List[str] = []
    while True:
        if path in files:
            raise DamagedError("A chain of layers goes in a circle", subject=path)
        header = read_header(path)
        files.append(path)
        if header.external_data:
            raise DamagedError("A layer keeps its data in another file", subject=path)
        if header.backing is None:
            return files
        if not _is_bare(header.backing):
            raise DamagedError(
                "A layer's backing file is not in its folder",
                subject=path,
                reason=f"it names {header.backing!r}",
                remedy="Don't open this image: it was not written by openvadp.backup",
            )
        if header.backing_format != "qcow2":
            raise DamagedError(
                "A layer does not state its backing file as qcow2", subject=path, reason=str(header.backing_format)
            )
        path = os.path.join(folder, header.backing)


def openable_chain(path: str) -> List[str]:
    """As :func:`chain_files`, and qemu may open as many files: the soft limit is raised where that is needed.

    :raises DataPathError: the hard limit is too low.
    """
    files = chain_files(path)
    limit = allow_open_files(len(files) + _OTHER_FILES)
    if limit is not None:
        raise DataPathError(
            "A chain of layers is too long to be opened",
            subject=path,
            reason=f"it has {len(files)} layers, and a process may open {limit} files here (RLIMIT_NOFILE)",
            remedy="Raise the limit of open files of this user (ulimit -n, LimitNOFILE), and make a full restore point,"
            " with which a new chain begins",
        )
    return files


def _is_bare(name: str) -> bool:
    """A plain file name: no folder, and nothing qemu would take for a protocol or JSON."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/:\0\n")


def create_layer(path: str, capacity_bytes: int, *, backing: Optional[str] = None) -> None:
    """Make an empty layer: qcow2, zstd, 64 KiB clusters, its size *capacity_bytes* rounded up to a cluster.

    :param backing: bare file name of the parent's layer in the same folder, for an overlay.
    :raises DataPathError: *path* exists, or qemu-img refused.
    """
    path = os.path.abspath(path)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compression_type=zstd,cluster_size={CLUSTER_BYTES}"]
    if backing is not None:
        if not _is_bare(backing):
            raise ValueError(f"the backing file must be a bare file name: {backing!r}")
        openable_chain(os.path.join(os.path.dirname(path), backing))
        command += ["-b", backing, "-F", "qcow2"]
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, files.PRIVATE))
    except OSError as error:
        raise DataPathError("A layer can't be made", subject=path, reason=error.strerror) from error
    size = capacity_bytes + -capacity_bytes % CLUSTER_BYTES
    try:
        run_tool(command + [path, str(size)], what="A layer can't be made", subject=path)
    except DataPathError as error:
        # qemu-img itself removes what it could not make, where the disk is full.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if "compression" in (error.reason or "").lower() or "zstd" in (error.reason or "").lower():
            error.remedy = "This qemu-img knows no zstd: install qemu 5.1 or newer, built with zstd"
        raise


def shrink_to(path: str, capacity_bytes: int) -> None:
    """Give a finished layer its exact size. Nothing else may have it open.

    :raises DataPathError: qemu-img refused, or the size is another one afterwards.
    """
    path = os.path.abspath(path)
    if read_header(path).capacity_bytes > capacity_bytes:
        openable_chain(path)
        run_tool(
            ["qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", path, str(capacity_bytes)],
            what="A layer could not be given its exact size",
            subject=path,
        )
    size = image_info(path)["virtual-size"]
    if size != capacity_bytes:
        raise DataPathError(
            "A layer has the wrong size", subject=path, reason=f"{size} bytes instead of {capacity_bytes}"
        )


def _image_opts(path: str, image_format: str, compress: bool, alone: bool = False) -> str:
    """The value of ``--image-opts``; a comma in a file name is doubled.

    :param alone: it is known to stand on no other image.
    :raises DamagedError, DataPathError: the chain of a qcow2 image leaves its folder, or can't be opened.
    """
    name = os.path.abspath(path).replace(",", ",,")
    top = "file." if compress else ""
    layers = 1 if alone or image_format != "qcow2" else len(openable_chain(path))
    tables = _tables_opts(f"{top}backing.", layers - 1)
    opts = f"{top}driver={image_format},{top}file.driver=file,{top}file.filename={name}{tables}"
    return f"driver=compress,{opts}" if compress else opts


def _tables_opts(prefix: str, layers: int) -> str:
    """What bounds the memory for the tables of *layers*, the first of which has the options *prefix*."""
    if layers < 1:
        return ""
    value = max(_LEAST_TABLES_BYTES, _TABLES_BYTES // layers)
    opts, length = [], 0
    for number in range(layers):
        option = f",{prefix}{'backing.' * number}l2-cache-size={value}"
        length += len(option)
        if length > _OPTIONS_BYTES:
            break
        opts.append(option)
    return "".join(opts)


@contextlib.contextmanager
def serve(
    path: str,
    *,
    run_dir: str | os.PathLike[str],
    writable: bool = False,
    compress: bool = False,
    connections: int = 2,
    format: str = "qcow2",
) -> Iterator[Child]:
    """Serve an image by qemu-nbd on a private Unix socket; ``.uri`` of the child is what to connect to.

    The thread that enters must be the one that leaves (see :mod:`.processes`). On leaving, the clients must have
    disconnected; qemu-nbd then writes what it holds back and ends.

    :param run_dir: folder for the socket and the log; its path is short (:class:`.processes.RuntimeDir`).
    :param writable: otherwise read-only; a writable image is locked against every other user.
    :param compress: writes are compressed. They must then cover whole clusters, each cluster once.
    :param connections: how many clients may be connected at once.
    :param format: what the image is ("qcow2", "raw" or "vmdk"); never guessed, for a guest could forge it.
    :raises DamagedError: the chain leaves the image's folder (qcow2).
    :raises DataPathError: qemu-nbd could not serve, or did not end well after writing.
    """
    options = _image_opts(path, format, compress)
    stem = os.path.join(os.fspath(run_dir), f"nbd-{uuid.uuid4().hex[:8]}")
    socket_path, log_path, pid_path = stem + ".sock", stem + ".log", stem + ".pid"
    command = ["qemu-nbd", "--persistent", f"--shared={connections}", f"--socket={socket_path}", "--cache=writeback"]
    command += ["--discard=unmap", "--detect-zeroes=off"] if writable else ["--read-only"]
    # It listens first and opens the image then; the pid file comes when both are done.
    command += [f"--pid-file={pid_path}", "--image-opts", options]
    child = Child.start(command, log_path=log_path, name=f"qemu-nbd of {os.path.basename(path)}")
    clean = False
    try:
        child.wait_for_socket(socket_path, timeout=60, ready_file=pid_path)
        child.uri = "nbd+unix:///?socket=" + quote(socket_path)
        yield child
        clean = True
    finally:
        returncode = child.stop(timeout=60 if clean else 5)
        if clean and writable and returncode != 0:
            raise DataPathError(
                "An image was not closed properly",
                subject=path,
                reason=child.log_tail() or f"qemu-nbd ended with status {returncode}",
                retryable=True,
            )


def overlay_opts(layer: str, overlay: str, *, bounded: bool = True) -> str:
    """``--image-opts`` of a throw-away overlay over a layer, which itself is only read.

    :param bounded: with a bound for the tables; ``-blockdev`` takes no options of a layer that it has to find itself.
    """
    files = openable_chain(layer)
    base = os.path.abspath(layer).replace(",", ",,")
    name = os.path.abspath(overlay).replace(",", ",,")
    top = f"driver=qcow2,file.driver=file,file.filename={name}"
    tables = _tables_opts("backing.backing.", len(files) - 1) if bounded else ""
    return f"{top},backing.driver=qcow2,backing.file.driver=file,backing.file.filename={base}{tables}"


def layer_opts(layer: str) -> str:
    """``--image-opts`` of a layer."""
    return _image_opts(layer, "qcow2", compress=False)


def create_overlay(path: str, capacity_bytes: int) -> None:
    """Make the empty image of :func:`overlay_opts`. It names no backing file: who opens it does."""
    run_tool(
        ["qemu-img", "create", "-q", "-f", "qcow2", os.path.abspath(path), str(capacity_bytes)],
        what="An overlay can't be made",
        subject=path,
    )


def image_info(path: str, chain: bool = False) -> Any:
    """What ``qemu-img info`` says: a dictionary, or with *chain* a list of them, the layer first.

    :raises DamagedError: with *chain*, see :func:`chain_files`.
    """
    if chain:
        return [image_info(link) for link in chain_files(path)]
    text = run_tool(
        ["qemu-img", "info", "--output=json", "-f", "qcow2", os.path.abspath(path)],
        what="An image's facts can't be read",
        subject=path,
    )
    return json.loads(text)


def check(path: str) -> Dict[str, Any]:
    """The report of ``qemu-img check`` on one qcow2 file. Leaked clusters waste space and are no damage.

    :raises DamagedError: the file's structure is damaged.
    """
    with contextlib.suppress(DamagedError):  # it is checked all the same
        openable_chain(path)
    result = tool_result(
        ["qemu-img", "check", "--output=json", "-f", "qcow2", os.path.abspath(path)],
        what="An image can't be checked",
        subject=path,
        accept=(0, 1, 2, 3),
    )
    try:
        report = json.loads(result.stdout)
    except ValueError:
        report = {}
    problems = {name: report.get(name, 0) for name in ("corruptions", "check-errors")}
    if result.returncode in (1, 2) or any(problems.values()):
        words = result.stderr.strip().splitlines()[:3]
        reason = " ".join(words) or ", ".join(f"{count} {name}" for name, count in problems.items())
        raise DamagedError("An image is damaged", subject=path, reason=reason, details=report)
    return report


def compare(
    a: str,
    b: str,
    *,
    a_format: str = "qcow2",
    b_format: str = "qcow2",
    b_window: Optional[Tuple[int, int]] = None,
    b_descriptor: Optional[int] = None,
) -> bool:
    """Both images hold the same bytes and have the same size.

    :param b_window: offset and length of the image within the file *b*, if it does not fill it (an archive).
    :param b_descriptor: *b* is this open file; what it is called does not count. Who opened it looked at its header.
    :raises DataPathError: one of them can't be read.
    """
    opened = b_descriptor is not None
    b_path = b if b_descriptor is None else f"/proc/self/fd/{b_descriptor}"
    a_opts = _image_opts(a, driver_of(a_format), False)
    b_opts = _image_opts(b_path, driver_of(b_format), False, alone=opened)
    if b_window is not None:
        within = f"file.driver=raw,file.offset={b_window[0]},file.size={b_window[1]},file.file.driver=file,file.file."
        b_opts = b_opts.replace("file.driver=file,file.", within, 1)
    result = tool_result(
        ["qemu-img", "compare", "--image-opts", a_opts, b_opts],
        what="Two images can't be compared",
        subject=f"{a} and {b}",
        accept=(0, 1),
        pass_fds=() if b_descriptor is None else (b_descriptor,),
    )
    # qemu-img takes images for identical if the longer one ends in zeros, and says so.
    return result.returncode == 0 and "image size mismatch" not in (result.stdout + result.stderr).lower()


def convert(
    source: str,
    dest: str,
    format: str,
    *,
    part_id: Optional[str] = None,
    on_progress: Optional[Callable[[int, int], None]] = None,
) -> None:
    """As :func:`convert_into`, to a path in a folder that nobody else can write (the repository).

    Written to ``<dest>.part-<part_id>``, synced, then renamed, so *dest* is either whole or what it was.

    :param part_id: the run's id; a random one otherwise.
    """
    dest = os.path.abspath(dest)
    part = f"{dest}.part-{part_id or uuid.uuid4().hex[:12]}"
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, files.PRIVATE)
        try:
            _convert(source, part, dest, format, descriptor, (), on_progress)
        finally:
            os.close(descriptor)
        os.rename(part, dest)
    except OSError as error:
        raise DataPathError("An image could not be written", subject=dest, reason=error.strerror) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
    fsync_dir(os.path.dirname(dest))


def convert_into(
    stage: files.Stage,
    name: str,
    source: str,
    format: str,
    *,
    on_progress: Optional[Callable[[int, int], None]] = None,
) -> int:
    """Write a layer with all it stands on into an image file (mode 0600) that stands alone, and sync it.

    :param name: what it is called in the stage. A VMDK tells its own name: it should be the final one.
    :param source: a qcow2 layer.
    :param format: raw, qcow2, vmdk (monolithicSparse) or vmdk_stream (streamOptimized, with footer and end marker).
    :param on_progress: gets done and total bytes.
    :returns: the open file; the caller closes it.
    :raises DamagedError: the chain leaves the layer's folder, or a file of it is missing.
    :raises DataPathError: qemu-img failed. OSError: the file can't be made. The stage's end removes what was written.
    """
    descriptor = stage.create(name)
    try:
        shown = os.path.join(stage.folder.path, name)
        _convert(source, stage.path(name), shown, format, descriptor, (stage.descriptor,), on_progress)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _convert(
    source: str,
    target: str,
    shown: str,
    format: str,
    descriptor: int,
    pass_fds: Tuple[int, ...],
    on_progress: Optional[Callable[[int, int], None]],
) -> None:
    """qemu-img into a file that is there, empty, so that it is nobody else's. :raises OSError: as its caller says."""
    if format not in FORMATS:
        raise ValueError(f"not one of {FORMATS}: {format!r}")
    options = layer_opts(os.path.abspath(source))
    total = read_header(source).capacity_bytes
    command = ["qemu-img", "convert", "-O", driver_of(format), "-m", "16"]
    # Who imports a streamOptimized VMDK reads it once, from the beginning to the end: its grains stay in order.
    command += ["-o", "subformat=streamOptimized,adapter_type=lsilogic"] if format == "vmdk_stream" else ["-W"]

    def percent(piece: bytes) -> None:
        found = _PERCENT.findall(piece)
        if found and on_progress is not None:
            on_progress(int(total * float(found[-1]) / 100), total)

    tool_result(
        command + (["-p"] if on_progress else []) + ["--image-opts", options, target],
        what="An image could not be written",
        subject=shown,
        on_output=percent if on_progress else None,
        pass_fds=pass_fds,
    )
    if format == "vmdk_stream":
        stream_vmdk.finish(descriptor, shown)
    os.fsync(descriptor)


def fsync_file(path: str) -> None:
    """Return when the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_dir(path: str) -> None:
    """Return when the folder's entries (new files, renames) are on the disk."""
    fsync_file(path)


def atomic_write(path: str, data: str | bytes, mode: int = 0o644) -> None:
    """Give the file *path* the content *data* at once and for good: a reader or a crash sees the old or the new file.

    :param data: text is written as UTF-8.
    :param mode: the file's permissions, whatever the umask.
    """
    path = os.path.abspath(path)
    # With a run's id, who recovers that run knows whose it is.
    part = f"{path}.part-{run_prefix()}{uuid.uuid4().hex[:12]}"
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data.encode("utf-8") if isinstance(data, str) else data)
            stream.flush()
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.rename(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise
    fsync_dir(os.path.dirname(path))
