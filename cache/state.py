"""Where the state directory is, what its files are called, and locks between processes.

A place that was named, by an argument or by FP4TUNE_STATE, is final for both, also where it is
empty or missing: what another place holds is no answer to that. Where none is named they look
differently: a writer needs a place it can write, a reader takes the first place that *holds* a
published choice, so that an engine without rights still finds the node's.
Standard library only, and `pathlib` only when called: the engine's reader imports this.
"""

from __future__ import annotations

import fcntl
import os
import time

from .errors import Busy, Missing, translate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

LEDGER = "ledger.db"
CHOICES = "choices.db"
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


def nothing_published() -> Missing:
    """The error where no place that a reader looks holds a choices.db: which, and what to do."""
    first, *others = _reading_places()
    if os.environ.get(VARIABLE):
        why = f"nothing is published in this place, which {VARIABLE} names, and no other is looked"
        return Missing(first, f"{why} at; run fp4tune probe, or name another")
    also = f" nor in {' nor in '.join(others)}" if others else ""
    how = f"run fp4tune probe, or name the place with --state or {VARIABLE}"
    return Missing(first, f"nothing is published here{also}; {how}")


def _reading_places() -> list[str]:
    named = os.environ.get(VARIABLE)
    places = [named] if named else [SYSTEM, _home()]
    return list(dict.fromkeys(map(os.path.abspath, places)))


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


def probe_lock(state_dir: str | os.PathLike[str], device: str) -> str:
    """The lock file that one probe of `device` (a GPU's UUID, or ``cpu``) holds at a time."""
    return lock_file(state_dir, "probe", device)


def build_lock(state_dir: str | os.PathLike[str], what: str) -> str:
    """The lock file that one build of `what` (an architecture and a backend) holds at a time."""
    return lock_file(state_dir, "build", what)


def lock_file(state_dir: str | os.PathLike[str], kind: str, name: str) -> str:
    """``KIND-NAME.lock``, with a dash for whatever of `name` does not belong into a file's name."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return os.path.join(os.fspath(state_dir), f"{kind}-{safe}.lock")


class exclusive:  # noqa: N801 - used as ``with exclusive(path):``
    """Hold `path` alone among all processes, or raise `Busy` naming who holds it.

    An advisory `flock`: it goes with its process, however that dies. The file stays, because
    removing a lock file lets two processes hold two files of one name. `wait` is in seconds.
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
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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

    Needs no right to write.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if shared else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


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
