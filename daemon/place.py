"""The state directory as the daemon holds it: its own, there, and to be read; or why not."""

from __future__ import annotations

import os
from pathlib import Path

from ..cache import state
from ..cache.errors import Busy, StateError
from ..errors import Refused

LOCK = f"{state.LOCKS}/{state.lock_name('daemon')}"


class StatePlace:
    """A state directory with the lock that makes this the only daemon of it.

    It may go while the daemon runs (a volume that is unmounted, a folder that is removed), come
    back, or be another one under the same name. It is never made again: what was mounted there is
    to come back, and not to be hidden by an empty folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: state.exclusive | None = None
        self._held: tuple[int, int] | None = None
        """Device and inode of the lock file that is held."""

    def take(self) -> None:
        """Make the directory where it is not there, and be its only daemon. Raises Refused."""
        try:
            os.makedirs(self.path, 0o755, exist_ok=True)
            self._acquire()
        except Busy as error:
            raise Refused(str(error)) from None
        except StateError as error:
            raise Refused(f"{self.path}: {error.sentence}") from None
        except OSError as error:
            raise Refused(f"{self.path}: {error.strerror}") from None

    def look(self) -> tuple[str, bool]:
        """Why it cannot be used now, empty where it can; and whether it is another directory than
        at the last look that could use it."""
        try:
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            return f"the state directory {self.path} {_wrong(error)}", False
        os.close(folder)
        if self._held is not None and self._held == _file_identity(self.path / LOCK):
            return "", False
        self.release()
        try:
            self._acquire()
        except Busy as error:
            return f"the state directory {self.path} is another daemon's: {error.sentence}", False
        except (StateError, OSError) as error:
            why = getattr(error, "sentence", None) or getattr(error, "strerror", None) or str(error)
            return f"the state directory {self.path} cannot be held: {why}", False
        return "", True

    def _acquire(self) -> None:
        path = self.path / LOCK
        self._lock = state.exclusive(path, "the daemon of this state").acquire()
        self._held = _file_identity(path)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = self._held = None


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _wrong(error: OSError) -> str:
    """What is wrong with the directory, and what to do."""
    if isinstance(error, FileNotFoundError):
        return "is gone; mount or make it again"
    if isinstance(error, NotADirectoryError):
        return "is not a directory any more; put it back"
    if isinstance(error, PermissionError):
        return "cannot be read; give its user the right to"
    return f"cannot be read: {error.strerror}"
