"""Faults reported by those who may not write a state: left in a drop box, taken up by who may.

A drop box is a folder that everyone may write to. What is in it is anybody's, so no reader looks at
it: the daemon does, or without one a command run by the state's owner or root. Each report that is
one becomes a quarantine of the store, under an id of the user whose file it was; however many there
are of one user, they do not press out another's. Standard library only.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from itertools import islice

from ..machine import files
from . import quarantine, quarantine_store, state
from .errors import Busy, ReadOnly, StateError, translate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from .quarantine import Quarantine

FOLDER = "reports"
"""A state's own drop box."""
VARIABLE = "FP4TUNE_SPOOL"
"""A drop box elsewhere, for engines that mount the state read-only."""
MODE = 0o1777
_STALE = 3600.0
"""Seconds after which an unfinished report in a state's own drop box is removed."""
_BATCH = 256
_LISTED = 2048
"""Files that are listed, and of those that are read, at a time."""
_MOST = 1 << 18
_FEW = 16
"""Files that one pass goes through, and those of each user that it goes through beyond that."""
_WAIT = 10.0


def boxes(state_dir: str | os.PathLike[str] | None) -> list[str]:
    """The drop boxes there may be: FP4TUNE_SPOOL, then the state's own."""
    own = [os.path.join(os.path.abspath(state_dir), FOLDER)] if state_dir else []
    named = os.environ.get(VARIABLE)
    return list(dict.fromkeys([*([os.path.abspath(named)] if named else []), *own]))


def report(entry: Quarantine, state_dir: str | None) -> str:
    """Have others learn of `entry`: by the store itself where this process may write it, else by a
    drop box; returns the file's path. Raises StateError, the last of them, where none can be
    written."""
    problem = StateError(state_dir or "reports", "there is no state directory")
    if state_dir is not None:
        store = quarantine_store.place(state_dir)
        try:
            if quarantine_store.may_write(store):
                return quarantine_store.write(entry, store)
        except ReadOnly as error:
            problem = error  # a state that is mounted read-only, even for root
        except StateError as error:
            if not os.environ.get(VARIABLE):
                raise
            problem = error
    for box in boxes(state_dir):
        try:
            if not os.path.isdir(box):
                _make_box(box)
            return quarantine_store.put(entry, box)
        except StateError as error:
            problem = error
    if state_dir is not None and _open_to_all(quarantine_store.place(state_dir)):
        return quarantine_store.put(
            entry, quarantine_store.place(state_dir)
        )  # an earlier fp4tune's spool
    raise problem


def prepare(state_dir: str | os.PathLike[str]) -> list[str]:
    """Make the store and the drop boxes of a state ready, for who may; what was done or is to be
    known, in sentences. Raises StateError."""
    store = quarantine_store.place(state_dir)
    if not quarantine_store.may_write(store):
        return []
    said = quarantine_store.take_over(store)
    for box in boxes(state_dir):
        if not os.path.isdir(box):
            _make_box(box)
        said += _box_warnings(box, state.trusted(state_dir))
    return said


def _make_box(box: str) -> None:
    try:
        state.make_folder(box, MODE)
    except OSError as error:
        raise translate(error, box) from error


def _open_to_all(folder: str) -> bool:
    try:
        return bool(os.stat(folder).st_mode & 0o002)
    except OSError:
        return False


def _box_warnings(box: str, ours: frozenset[int]) -> list[str]:
    try:
        about = os.stat(box)
    except OSError as error:
        return [f"{box} cannot be looked at: {error.strerror}"]
    if about.st_uid not in ours:
        return [
            f"{box} belongs to user {about.st_uid}, who can remove what others report before it is "
            "taken up"
        ]
    if not about.st_mode & 0o002:
        return [f"{box} cannot be written by users who would report; chmod 1777 it"]
    if not about.st_mode & 0o1000:
        return [f"{box} lets everyone remove what others report; chmod +t it"]
    return []


class Collector:
    """Takes up what lies in the drop boxes of a state, a little at a time: `step` again and again.

    A box that holds more than can be looked at in one step is gone through in several, from where
    the last one stopped, so that no number of files keeps one from being reached.
    """

    def __init__(self, state_dir: str | os.PathLike[str]) -> None:
        self.state_dir = os.path.abspath(state_dir)
        self._passes: dict[str, _Pass] = {}
        self._seen: dict[str, Any] = {}

    def step(self, known: Iterable[str], seconds: float = 0.1) -> list[str]:
        """Look for up to that long; what was taken up, in sentences. `known` are the backends that
        are published. Raises StateError where the store cannot be written (Busy, at once, while
        a command does the same); what was found lies there for the next step."""
        said: list[str] = []
        if not quarantine_store.may_write(quarantine_store.place(self.state_dir)):
            return said
        deadline = time.monotonic() + seconds
        every = boxes(self.state_dir)
        for box in every:
            going = self._going(box)
            while going is not None and not going.ended and time.monotonic() < deadline:
                try:
                    said += _take_up(
                        self.state_dir, going.batch(box == every[-1]), frozenset(known)
                    )
                except StateError:
                    self._end(box)
                    self._seen.pop(box, None)
                    raise
        return said

    def once(self, known: Iterable[str], seconds: float) -> list[str]:
        """Once through every box, for up to that long. As `step`."""
        said: list[str] = []
        deadline = time.monotonic() + seconds
        every = boxes(self.state_dir)
        for box in every:
            try:
                going = _Pass(box, quarantine_store.place(self.state_dir))
            except OSError:
                continue
            while not going.ended and time.monotonic() < deadline:
                found = going.batch(box == every[-1])
                said += _take_up(self.state_dir, found, frozenset(known), _WAIT)
            going.close()
        return said

    def _going(self, box: str) -> _Pass | None:
        """The pass through a box that is to go on; None where there is nothing new in it."""
        going = self._passes.get(box)
        if going is not None and not going.ended:
            return going
        self._end(box)
        try:
            about = os.stat(box)
            stamp = (about.st_ino, about.st_mtime_ns)
            if self._seen.get(box) == stamp:
                return None
            # Time stamps are coarse: one of just now may hide what comes a moment later.
            self._seen[box] = stamp if time.time() - about.st_mtime > 1.0 else None
            self._passes[box] = _Pass(box, quarantine_store.place(self.state_dir))
        except OSError:
            return None
        return self._passes[box]

    def _end(self, box: str) -> None:
        going = self._passes.pop(box, None)
        if going is not None:
            going.close()


class _Pass:
    """Once through one drop box: who has left what, then the files of each user in turn, so that
    however many one leaves, another's is soon reached.

    The box is gone through as it was opened, whatever is put in its place meanwhile. Raises OSError
    where it is no folder of its own: a link of a stranger's, or the store itself.
    """

    def __init__(self, box: str, store: str) -> None:
        self.ended = False
        self._listed = False
        self._count = 0
        self._names: dict[int, deque[str]] = {}
        self._folder = -1
        self._folder = _opened_box(box, store)
        self._is_a_box = _is_a_box(self._folder, store)
        self._place = f"/proc/self/fd/{self._folder}"
        self._entries = os.scandir(self._place)

    def close(self) -> None:
        if self._folder >= 0:
            self._entries.close()
            os.close(self._folder)
            self._folder = -1

    __del__ = close

    def batch(self, ours: bool) -> list[tuple[int, Quarantine, str]]:
        """The reports among the next files: user, report, path. In a box of our own what is no
        report is removed; elsewhere it is left, and so it is in a folder that is no drop box."""
        ours = ours and self._is_a_box
        if not self._listed:
            self._list(ours)
            return []
        found: list[tuple[int, Quarantine, str]] = []
        for path in islice(self._next_paths(), _BATCH):
            try:
                user, report_ = quarantine_store.read_one(path)
                if os.lstat(path).st_nlink > 1:
                    user = quarantine.OTHERS  # it need not be who wrote it that has put it here
                found.append((user, report_, path))
            except FileNotFoundError:
                continue
            except OSError:
                continue  # not to be read by this user: of nobody's use
            except Exception:  # whatever it is: one file must not keep the others from being read
                if ours:
                    _discard(path)
        self.ended = not self._names
        return found

    def _list(self, ours: bool) -> None:
        """Note the owners of the next files, as many of each as one pass goes through."""
        for _ in range(_LISTED):
            try:
                entry = next(self._entries)
            except (StopIteration, OSError):
                self._listed = True
                self.ended = not self._names
                break
            try:
                about = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if entry.name.startswith("."):
                if ours and time.time() - about.st_mtime > _STALE:
                    quarantine_store.forget(entry.path)
                continue
            names = self._names.setdefault(about.st_uid, deque())
            if self._count < _MOST or len(names) < _FEW:
                names.append(entry.name)
                self._count += 1

    def _next_paths(self) -> Iterator[str]:
        """One file of each user, then the next of each, and so on."""
        while self._names:
            for user, names in list(self._names.items()):
                path = os.path.join(self._place, names.popleft())
                if not names:
                    del self._names[user]
                yield path


def _is_a_box(folder: int, store: str) -> bool:
    """Whether an open folder is one that everyone may write to, and only owners remove from, of
    root's or the state's owner."""
    about = os.fstat(folder)
    return about.st_mode & 0o1002 == 0o1002 and about.st_uid in state.trusted(
        os.path.dirname(store)
    )


def _opened_box(box: str, store: str) -> int:
    """A descriptor of the folder `box`; a link is followed where root named that box. Raises
    OSError."""
    about = os.lstat(box)
    own = os.path.dirname(box) == os.path.dirname(store)
    if own or about.st_uid not in {0, os.geteuid()}:
        folder = files.folder(box)
    else:
        folder = os.open(box, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.path.exists(store) and os.path.samestat(os.fstat(folder), os.stat(store)):
            raise OSError(errno.EINVAL, "the store of quarantines is no drop box")
        return folder
    except BaseException:
        os.close(folder)
        raise


def _discard(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        quarantine_store.forget(path)


def _take_up(
    state_dir: str,
    found: list[tuple[int, Quarantine, str]],
    known: frozenset[str],
    wait: float = 0.0,
) -> list[str]:
    """Put reports into the store and take them out of the box; a sentence for each new one."""
    if not found:
        return []
    store = quarantine_store.place(state_dir)
    with state.exclusive(state.lock_file(state_dir, "quarantine"), "the quarantines", wait):
        before, _ = quarantine_store.read(store)
        kept = {each.id: each for each in before if _user(each) is not None}
        tally = quarantine.ReportTally(known)
        for each in kept.values():
            tally.add(_user(each) or 0, each)
        for user, entry, _ in found:
            tally.add(user, entry)
        wanted = {each.id: each for each in tally.entries()}
        said = []
        for name, each in wanted.items():
            if name not in kept:
                quarantine_store.write(each, store)
                said.append(f"{each.where()} is quarantined as {name}, as was reported")
        for name in kept.keys() - wanted.keys():
            quarantine_store.forget(os.path.join(store, f"{name}.json"))
        for _, _, path in found:
            quarantine_store.forget(path)
    return said


def _user(entry: Quarantine) -> int | None:
    """Whose report an entry of the store is; None where it is no report that was taken up."""
    first, _, rest = entry.id.partition(".")
    if first == "others" and rest:
        return quarantine.OTHERS
    return int(first[1:]) if rest and first[:1] == "u" and first[1:].isdecimal() else None


def collect(
    state_dir: str | os.PathLike[str], known: Iterable[str], seconds: float = 20.0
) -> list[str]:
    """`prepare`, and take up all that was reported, for who may write the state: for commands,
    where no daemon does. Never raises StateError; what cannot be done is a sentence."""
    place = os.path.abspath(state_dir)
    if not os.path.isdir(place) or not quarantine_store.may_write(quarantine_store.place(place)):
        return []
    said: list[str] = []
    try:
        said += prepare(place)
        said += Collector(place).once(known, seconds)
    except (Busy, ReadOnly):
        return said  # the daemon does, just now; or this is a place that nobody can write
    except StateError as error:
        said.append(f"what was reported is not taken up: {error}")
    return said


def withdrawn(identity: str, state_dir: str | os.PathLike[str]) -> None:
    """Called after a lift: raises StateError where the report still lies in a drop box, from which
    it would come back."""
    _, _, name = identity.partition(".")
    for box in boxes(state_dir) if name else ():
        path = os.path.join(box, f"{name}.json")
        if os.path.lexists(path):
            raise StateError(path, "this report cannot be removed, and will come back; remove it")
