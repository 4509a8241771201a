"""Where quarantines are kept: a small JSON file each, in a folder of the state that only its owner
(or root) may write and that every reader reads.

What others report comes by a drop box, and is put here by who may (`dropbox`). What does not look
like one of ours is ignored, with a warning. Standard library only.
"""

from __future__ import annotations

import os
import time

from ..machine import files
from . import state
from .errors import Missing, StateError, translate
from .quarantine import EVERYTHING, Quarantine, ReportTally, closed, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FOLDER = "quarantine"
"""The store's name in a state directory."""
BYTES = 1 << 15
"""Of one file: more than the longest texts take, each of their characters as an escape of JSON."""
MOST = 4096
"""Quarantines of the state's owner at once."""
_NAMES = 1 << 16
_SAID = 100


def place(state_dir: str | os.PathLike[str]) -> str:
    """The folder of a state's quarantines."""
    return os.path.join(os.path.abspath(state_dir), FOLDER)


def stamp(folder: str | None) -> tuple[Any, ...]:
    """Changes whenever a quarantine is added or lifted, as far as the file system can tell.

    A folder that changed less than two seconds ago is told by its names too: time stamps of
    directories are coarse.
    """
    if folder is None:
        return ()
    try:
        found = os.stat(folder)
        names = tuple(sorted(os.listdir(folder))) if time.time() - found.st_mtime < 2 else ()
    except OSError as error:
        return (folder, error.errno)
    return folder, found.st_ino, found.st_mtime_ns, names


def read(folder: str | None) -> tuple[list[Quarantine], list[str]]:
    """Every quarantine in the store `folder`, oldest first, and a sentence for each file of the
    owner's that was ignored, up to a hundred.

    Never raises: a folder that is not there holds none. One that cannot be read, or holds more than
    it may, or a file of the owner's that cannot be read, takes everything away. Files of other
    users are there where an earlier fp4tune let everyone write: they count as reports.
    """
    if folder is None:
        return [], []
    found: list[Quarantine] = []
    ignored: list[str] = []
    reports = ReportTally()
    ours = state.trusted(os.path.dirname(folder))
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return [], []
    except NotADirectoryError:
        return [], [f"{folder} is no folder, so nothing is quarantined by it"]
    except OSError as error:
        why = f"{folder} cannot be read: {error.strerror}"
        return [closed(why)], [why]
    for name in [name for name in names if not name.startswith(".")][:_NAMES]:
        try:
            user, entry = read_one(os.path.join(folder, name))
            if user in ours:
                found.append(entry)
            else:
                reports.add(user, entry)
        except FileNotFoundError:
            continue  # lifted just now
        except ValueError as error:
            # What others than the owner left is not even answered: they could go on for ever.
            if _owner_of(os.path.join(folder, name)) in ours and len(ignored) < _SAID:
                ignored.append(f"{folder}: {one_line(name)} is ignored: {one_line(str(error))}")
        except OSError as error:
            why = f"{folder}: {one_line(name)} cannot be read: {error.strerror}"
            ignored.append(why)
            if _owner_of(os.path.join(folder, name)) in ours:
                found.append(closed(why))
    if len(names) > _NAMES or len(found) > MOST:
        why = f"{folder} holds {len(names)} files, more than are read; lift what is over"
        ignored.append(why)
        found = [closed(why), *found[:MOST]]
    return sorted([*found, *reports.entries()], key=lambda q: (q.at, q.id)), ignored


def read_one(path: str) -> tuple[int, Quarantine]:
    """The quarantine in a file, and the user whose file it is. Raises ValueError, one sentence, for
    what is none (a link, a pipe, another's content), and OSError."""
    fd = files.descriptor(path)  # not through a link, and not waiting for who may never write
    try:
        about = os.fstat(fd)
        if about.st_size > BYTES:
            raise ValueError(f"it has {about.st_size} bytes, more than a quarantine's {BYTES}")
        text = os.read(fd, BYTES + 1).decode()
    finally:
        os.close(fd)
    import json

    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict) or f"{values.get('id')}.json" != os.path.basename(path):
        raise ValueError("its content does not go with its name")
    return about.st_uid, Quarantine(**values)


def _owner_of(path: str) -> int | None:
    try:
        return os.lstat(path).st_uid
    except OSError:
        return None


def may_write(folder: str) -> bool:
    """Whether this process is one of those whose quarantines readers go by."""
    me = os.geteuid()
    return me == 0 or me == _owner_of(os.path.dirname(folder))


def write(entry: Quarantine, folder: str) -> str:
    """Put `entry` into a store, whole or not at all; returns the file's path.

    The folder is made if it is missing, for its owner to write to and everyone to read; one that
    an earlier fp4tune let everyone write to is taken over (`take_over`). Raises StateError.
    """
    take_over(folder)
    try:
        if not os.path.isdir(folder):
            state.make_folder(folder, 0o755)
    except OSError as error:
        raise translate(error, folder) from error
    return put(entry, folder)


def put(entry: Quarantine, folder: str) -> str:
    """Write `entry` into a folder that is there; returns the file's path. Raises StateError."""
    import json

    path = os.path.join(folder, f"{entry.id}.json")
    temporary = os.path.join(folder, f".{entry.id[:100]}.{os.urandom(4).hex()}")
    data = json.dumps(entry.json(), sort_keys=True).encode()
    if len(data) > BYTES:
        raise StateError(path, f"a quarantine of {len(data)} bytes would not be read; shorten it")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o644)
            files.write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        files.settle(folder)
    except OSError as error:
        forget(temporary)
        raise translate(error, folder) from error
    return path


def take_over(folder: str) -> list[str]:
    """Make a store that others may write to (as an earlier fp4tune made it) the owner's own, with
    all that counts in it; what was done, in sentences. Does nothing for who may not.

    Raises StateError.
    """
    try:
        about = os.lstat(folder)
    except OSError:
        return []
    if about.st_mode & 0o170000 != 0o040000:
        raise StateError(folder, "this is no folder, and quarantines are to be kept in one")
    ours = state.trusted(os.path.dirname(folder))
    if about.st_uid in ours and not about.st_mode & 0o022:
        return []
    if not may_write(folder):
        return []
    entries, _ = read(folder)
    fd = -1
    try:
        if about.st_uid not in ours:  # who made it can remove what is in it
            os.rename(folder, f"{folder}.of-user-{about.st_uid}-{os.urandom(4).hex()}")
            state.make_folder(folder, 0o755)
        # From here on by its descriptor: its owner may put something else in its place.
        fd = files.folder(folder)
        if os.fstat(fd).st_uid not in ours:
            raise StateError(folder, "another user's folder has taken its place; remove it")
        os.fchmod(fd, 0o755)
        within = files.within(fd)
        taken = [entry for entry in entries if entry.scope != EVERYTHING]
        for entry in taken:
            if _owner_of(os.path.join(within, f"{entry.id}.json")) not in ours:
                put(entry, within)
        for name in os.listdir(within):
            if _owner_of(os.path.join(within, name)) not in ours:
                forget(os.path.join(within, name))
    except OSError as error:
        raise translate(error, folder) from error
    finally:
        if fd >= 0:
            os.close(fd)
    return [f"{folder} could be written by others: it cannot any more, and keeps all {len(taken)}"]


def forget(path: str) -> None:
    """Remove a file, where that is possible."""
    try:
        os.unlink(path)
    except OSError:
        return


def lift(identity: str, folder: str) -> None:
    """Remove a quarantine from a store. Raises Missing, and StateError."""
    if os.sep in identity or identity.startswith(".") or "\0" in identity:
        raise Missing(folder, f"there is no quarantine {one_line(identity)!r}")
    try:
        os.unlink(os.path.join(folder, f"{identity}.json"))
    except FileNotFoundError:
        raise Missing(folder, f"there is no quarantine {one_line(identity)!r}") from None
    except OSError as error:
        raise translate(error, folder) from error


def state_dir(explicit: str | None) -> str:
    """Whose quarantines a command looks at: the directory given, else the place readers take."""
    if explicit is not None:
        return explicit
    return next(iter(state.holding_places()), None) or os.fspath(state.directory())
