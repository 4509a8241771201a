"""Where the state directory is, what its files are called, and locks between processes.

A place that was named, by an argument or by FP4TUNE_STATE, is final for both, also where it is
empty or missing: what another place holds is no answer to that. Where none is named they look
differently: a writer needs a place it can write, a reader takes the first place that *holds* a
published choice, so that an engine without rights still finds the node's.
Standard library only, and `pathlib` only when called: the engine's reader imports this.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from ..machine import files
from .errors import Busy, StateError, Unpublished, translate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

LEDGER = "ledger.db"
CHOICES = "choices.db"
LOCKS = "locks"
"""The folder of writers' locks, of mode 0700."""
VARIABLE = "FP4TUNE_STATE"
SYSTEM = "/var/lib/fp4tune"


def directory(explicit: str | os.PathLike[str] | None = None) -> Path:
    """Where to write: `explicit`, else FP4TUNE_STATE, else /var/lib/fp4tune where writable, else
    ``$XDG_STATE_HOME/fp4tune`` (``~/.local/state/fp4tune``). The directory may not exist yet."""
    from pathlib import Path

    named = explicit or os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return Path(SYSTEM if _writable(SYSTEM) else _home())


def holding() -> list[Path]:
    """Every place a reader looks that holds a choices.db, in the order a reader tries them.

    One at most where FP4TUNE_STATE names it. More than one is worth a warning: the writer may be
    publishing where no reader looks.
    """
    from pathlib import Path

    return [Path(place) for place in holding_places()]


def holding_places() -> list[str]:
    """`holding`, as strings and without importing pathlib."""
    return [p for p in _reading_places() if os.path.isfile(os.path.join(p, CHOICES))]


def nothing_published() -> Unpublished:
    """The error where no place that a reader looks holds a choices.db: which, and what to do."""
    first, *others = _reading_places()
    if os.environ.get(VARIABLE):
        why = f"nothing is published in this place, which {VARIABLE} names, and no other is looked"
        return Unpublished(first, f"{why} at; run fp4tune probe, or name another")
    also = f" nor in {' nor in '.join(others)}" if others else ""
    how = f"run fp4tune probe, or name the place with --state or {VARIABLE}"
    return Unpublished(first, f"nothing is published here{also}; {how}")


def _reading_places() -> list[str]:
    named = os.environ.get(VARIABLE)
    return [os.path.abspath(named)] if named else default_places()


def default_places() -> list[str]:
    """Where a reader looks that was told of no place, in that order."""
    return list(dict.fromkeys(map(os.path.abspath, (SYSTEM, _home()))))


def generation_file(state_dir: str, generation: int) -> str:
    """Where one generation stays readable after newer ones were published."""
    return os.path.join(state_dir, f"choices-{generation}.db")


def generations(state_dir: str) -> list[int]:
    """The generations that are kept under names of their own, ascending."""
    try:
        names = os.listdir(state_dir)
    except OSError:
        return []
    numbers = [name[8:-3] for name in names if name[:8] == "choices-" and name[-3:] == ".db"]
    return sorted(int(number) for number in numbers if number.isdecimal())


def trusted(state_dir: str | os.PathLike[str]) -> frozenset[int]:
    """The users whose word counts in a state directory: root, its owner, and this process's own."""
    ours = {0, os.geteuid()}
    try:
        owner = os.stat(state_dir).st_uid
    except OSError:
        return frozenset(ours)  # it is not there: nobody else's, then
    return frozenset((*ours, owner))


def probe_lock(state_dir: str | os.PathLike[str], device: str) -> str:
    """The lock file that one probe of `device` (a GPU's UUID, or ``cpu``) holds at a time."""
    return lock_file(state_dir, "probe", device)


def build_lock(state_dir: str | os.PathLike[str], what: str) -> str:
    """The lock file that one build of `what` (an architecture and a backend) holds at a time."""
    return lock_file(state_dir, "build", what)


def lock_file(state_dir: str | os.PathLike[str], kind: str, name: str = "") -> str:
    """The lock of writers ``KIND-NAME.lock``, or ``KIND.lock``, in their folder of the state."""
    return os.path.join(os.fspath(state_dir), LOCKS, lock_name(kind, name))


def lock_name(kind: str, name: str = "") -> str:
    """``KIND-NAME.lock``, with a dash for whatever of `name` does not belong into a file's name."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return f"{kind}-{safe}.lock" if safe else f"{kind}.lock"


class exclusive:  # noqa: N801 - used as ``with exclusive(path):``
    """Hold `path` alone among all processes, or raise `Busy` naming who holds it.

    An advisory `flock`: it goes with its process, however that dies. The file stays, because
    removing a lock file lets two processes hold two files of one name. `wait` is in seconds.
    Whoever can read a file can hold it, so locks of writers lie in a folder of mode 0700, which is
    made here; see `lock_file`.
    """

    def __init__(
        self, path: str | os.PathLike[str], what: str = "this lock", wait: float = 0.0
    ) -> None:
        self.path = os.fspath(path)
        self.what = what
        self.wait = wait
        self._fd: int | None = None

    def acquire(self) -> exclusive:
        deadline = time.monotonic() + self.wait
        try:
            folder = os.path.dirname(self.path)
            _make_lock_folder(folder)
            made = not os.path.lexists(self.path)
            fd = files.descriptor(self.path, flags=os.O_RDWR | os.O_CREAT)
            if made and os.path.basename(folder) == LOCKS:
                give_to_owner(fd, folder)
        except OSError as error:
            raise translate(error, self.path) from error
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                pid = _holder(fd)
                os.close(fd)
                who = f"process {pid}" if pid else "another process"
                raise Busy(self.path, f"{who} holds {self.what}", pid) from None
            except OSError as error:
                os.close(fd)
                raise translate(error, self.path) from error
        self._fd = fd
        older = _held_by_older(self.path, tidy=True)
        if older is not None:
            self.release()
            raise Busy(self.path, f"process {older} holds {self.what}", older)
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # the name in the file is a courtesy; on a full disk the lock holds without it
        return self

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> exclusive:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def held(path: str | os.PathLike[str], shared: bool = False) -> bool:
    """Whether a living process holds the lock at `path` alone, or, with `shared`, in any way.

    Needs no right to write. True where the file may not be read: nobody is said to be gone of whom
    nothing is known.
    """
    try:
        fd = files.descriptor(path)
    except PermissionError:
        return True
    except OSError:
        return _held_by_older(os.fspath(path)) is not None
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if shared else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def give_to_owner(fd: int, place: str) -> None:
    """Have what root made in a state belong to who owns that: it would lock them out. Does nothing
    for others. Raises OSError."""
    if os.geteuid() == 0:
        about = os.stat(place)
        os.fchown(fd, about.st_uid, about.st_gid)


def _make_lock_folder(folder: str) -> None:
    """Make the folder of writers' locks, which its owner alone can enter. Raises StateError."""
    if os.path.basename(folder) != LOCKS:
        return
    if not os.path.lexists(folder):
        try:
            make_folder(folder, 0o700)
        except OSError:
            if not os.path.lexists(folder):
                raise  # what is there, whoever made it, is looked at below
    found = os.lstat(folder)
    if found.st_mode & 0o170000 != 0o040000:
        raise StateError(folder, "this is no folder, and locks are to be kept in one; remove it")
    if found.st_uid not in trusted(os.path.dirname(folder)):
        raise StateError(
            folder, f"user {found.st_uid} made this folder and could stop every writer; remove it"
        )
    if found.st_mode & 0o077:
        fd = files.folder(folder)
        try:
            os.fchmod(fd, 0o700)
        finally:
            os.close(fd)


def make_folder(folder: str, mode: int) -> None:
    """Make one folder with that mode, whatever the umask, for the owner of what it lies in where
    root makes it. Raises OSError, also where another's has taken its place meanwhile."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        return  # by another process, just now
    fd = files.folder(folder)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise OSError(errno.EPERM, "another user's folder has taken the place of this one")
        os.fchmod(fd, mode)
        give_to_owner(fd, os.path.dirname(folder))
    finally:
        os.close(fd)


def _held_by_older(path: str, tidy: bool = False) -> int | None:
    """The process of an earlier fp4tune that holds this lock where it lay then, in the state
    directory itself. With `tidy` a file that nobody of ours holds there is removed."""
    folder, name = os.path.split(path)
    if os.path.basename(folder) != LOCKS:
        return None
    place = os.path.dirname(folder)
    old = os.path.join(place, name)
    if not os.path.lexists(old):
        return None
    from ..machine.holders import holders

    # Anyone who may read that file can hold it: it counts who may write here.
    mine = trusted(place)
    for holder in holders(old):
        if holder.alone and holder.users is not None and mine.issuperset(holder.users):
            return holder.pid
    if tidy and os.access(place, os.W_OK):
        _forget(old)
    return None


def _forget(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # a lock file means nothing by itself


def file_stamp(path: str) -> tuple[int, int, int] | None:
    """(inode, size, mtime in ns) of a file, None if it is not there.

    The inode is kept to 63 bits, what an SQLite integer holds.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_ino & (1 << 63) - 1, found.st_size, found.st_mtime_ns


def _holder(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _home() -> str:
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "fp4tune")


def _writable(path: str) -> bool:
    """Whether a file can be made in `path`, or `path` in its parent."""
    place = path if os.path.isdir(path) else os.path.dirname(path)
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)
