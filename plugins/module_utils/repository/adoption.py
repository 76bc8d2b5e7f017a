# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""A repository that is in a place which it does not list is taken into use there, by the user's word (proofs 2).

``moved``: it is here now, and nowhere else: the list is replaced. ``copy``: the original is used on elsewhere, so this
one gets an id of its own, and the records of runs, which are the original's, are discarded without acting on them.
``another_path``: the same storage by another path. That is proved: what is written by one is read by the other.
"""

from __future__ import annotations

import os
import re
import secrets
import uuid
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, List, Optional, Tuple

from ..datapath.image import fsync_dir
from ..errors import DamagedError, InputError, RepositoryError
from . import places
from .documents import read_description
from .lock import VmLock
from .places import Place
from .shapes import RUN_ID_PATTERN

if TYPE_CHECKING:
    from .layout import Repository
    from .store import VmStore

MOVED, COPY, ANOTHER_PATH = WAYS = ("moved", "copy", "another_path")

# Named as an unfinished description, so that recovery removes what a crash leaves.
_TOKEN = "repository.json.part-token-"

_OF_A_RUN = re.compile(rf"{RUN_ID_PATTERN}(\.json|\.[0-9]+\.journal)(\.part-[A-Za-z0-9._-]+)?")


def wanted(repository: Repository, how: str) -> bool:
    """Whether there is anything to do. What was adopted once stays so however often the option is given."""
    _check_word(how)
    if not repository.listed:
        return True
    if how != MOVED:
        return False
    return len(repository.places) != 1 or (repository.moved_machine or _is_noted_otherwise(repository))


def _is_noted_otherwise(repository: Repository) -> bool:
    # Of a share that keeps locks to the machine, the note says whose it is.
    if repository.place is None:
        return False
    return places.is_other_machine(repository.places[0].machine, repository.place.machine) is not False and bool(
        places.mount_of(str(repository.path)).local_locks
    )


def check(repository: Repository, how: str) -> None:
    """What would be refused before anything is written. :raises RepositoryError:"""
    _place(repository)
    _require_access(repository)
    if how == ANOTHER_PATH:
        _other_way(repository)


def adopt(repository: Repository, how: str) -> List[str]:
    """Change repository.json, under the repository's lock; the caller opens it again.

    :returns: what was done, in sentences.
    :raises LockedError: a run is at work in what was called a copy. RepositoryError: the proof failed.
    """
    place = _place(repository)
    _require_access(repository)
    with repository.lock(f"adopt {how}"):
        # Another may have adopted it since the first look.
        fresh = type(repository)(repository.path, read_description(repository.path))
        if not wanted(fresh, how):
            return []
        if how == MOVED:
            fresh.write_description(fresh.id, [place])
            return [f"The repository is now in this place alone: {place}."]
        if how == COPY:
            return _make_copy(fresh, place)
        _prove_same(fresh, _other_way(fresh))
        fresh.write_description(fresh.id, [*fresh.places, place])
        return [f"The repository is now in this place too: {place}."]


def note_machine(repository: Repository) -> None:
    """Let the list say that this machine uses this place."""
    place = _place(repository)
    with repository.lock("note the machine"):
        fresh = type(repository)(repository.path, read_description(repository.path))
        fresh.write_description(fresh.id, [place if entry.is_same(place) else entry for entry in fresh.places])


def _check_word(how: str) -> None:
    if how not in WAYS:
        raise InputError("A repository can't be adopted so", subject=repr(how), remedy=f"Choose {', '.join(WAYS)}")


def _place(repository: Repository) -> Place:
    return repository.place or places.place_of(str(repository.path))


def _require_access(repository: Repository) -> None:
    if not os.access(str(repository.path), os.W_OK | os.X_OK):
        raise RepositoryError(
            "The repository is not writable, so it was not adopted",
            subject=str(repository.path),
            reason=f"user id {os.geteuid()} may not write there, or it is mounted read-only",
            remedy="Give that user the folder, or mount it for writing",
        )


# A copy


def _make_copy(repository: Repository, place: Place) -> List[str]:
    """The records go first: what is cut then is a copy without records, which is adopted again."""
    for path in _listed_here(repository):
        if _is_same_storage(repository, path):
            raise RepositoryError(
                "This is not a copy",
                subject=str(repository.path),
                reason=f"what is written to it shows in {path}",
                remedy="It is the same storage by another path: set adopt to another_path",
            )
    with ExitStack() as stack:
        for store in repository.vms():
            # A run that is at work holds its lock here, where this is the original after all.
            stack.enter_context(VmLock(store.path / "lock", "", "adopt copy"))
        discarded = [name for store in repository.vms() for name in _discard_runs(store)]
        new_id = str(uuid.uuid4())
        repository.write_description(new_id, [place])
    done = [f"The repository is a copy with an id of its own now, {new_id}."]
    if discarded:
        shown = ", ".join(discarded[:5]) + (", ..." if len(discarded) > 5 else "")
        done.append(
            f"The records of {len(discarded)} runs of the original were discarded ({shown}); what they left on VMs is"
            " the original's to remove."
        )
    return done


def _discard_runs(store: VmStore) -> List[str]:
    """Records, their journals, and what was being written of either; nothing else, and nothing by a link."""
    folder = store.path / "runs"
    try:
        names = sorted(os.listdir(str(folder)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RepositoryError("The records of runs can't be read", str(folder), error.strerror) from None
    if folder.is_symlink():
        raise DamagedError(
            "The records of runs are not where they must be",
            subject=str(folder),
            reason="it is a link, and what it leads to is not removed",
            remedy="Remove the link",
        )
    found = [name for name in names if _OF_A_RUN.fullmatch(name)]
    for name in found:
        path = folder / name
        try:
            path.unlink()
        except OSError as error:
            raise RepositoryError("The record of a run can't be discarded", str(path), error.strerror) from None
    fsync_dir(str(folder))
    return [name[: -len(".json")] for name in found if name.endswith(".json")]


# The same storage


def _listed_here(repository: Repository) -> Iterator[str]:
    """The paths by which this machine sees the places that are listed, where there is such a repository."""
    for entry in repository.places:
        for path in places.seen_here(entry):
            if path != str(repository.path) and os.path.exists(os.path.join(path, "repository.json")):
                yield path


def _other_way(repository: Repository) -> str:
    if repository.format < 2:
        raise RepositoryError(
            "A repository of format 1 lists no place that another path could be proved by",
            subject=str(repository.path),
            remedy="Set adopt to moved, once, by the path that backups use",
        )
    for path in _listed_here(repository):
        return path
    raise RepositoryError(
        "It can't be proved that this is another path to the same repository",
        subject=str(repository.path),
        reason="no place that it lists is mounted on this machine: " + "; ".join(map(str, repository.places)),
        remedy="Mount one of them here too, for this once; or set adopt to moved, if it is used by no other path",
    )


def _prove_same(repository: Repository, path: str) -> None:
    if not _is_same_storage(repository, path):
        raise RepositoryError(
            "This is not the same storage, but a copy",
            subject=str(repository.path),
            reason=f"what is written to it does not show in {path}",
            remedy="Set adopt to copy, or to moved if the other is no longer used",
        )


def _is_same_storage(repository: Repository, path: str) -> bool:
    """Whether a random token that is written here is read by the other path; nothing is written by that one."""
    with _token(repository.path) as (name, content):
        return _content(Path(path) / name) == content


@contextmanager
def _token(folder: Path) -> Iterator[Tuple[str, bytes]]:
    name, content = _TOKEN + secrets.token_hex(16), secrets.token_hex(32).encode("ascii")
    path = str(folder / name)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RepositoryError("The proof of one storage can't be written", path, error.strerror) from None
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield name, content
    finally:
        os.unlink(path)


def _content(path: Path) -> Optional[bytes]:
    try:
        descriptor = os.open(str(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read(1024)
