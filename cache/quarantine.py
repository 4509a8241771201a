"""Quarantines: backends that failed in production, and must not be chosen until someone lifts that.

One small JSON file each, in a folder of the state that only its owner (or root) may write and that
every reader reads. What others report comes by a drop box, and is put here by who may (`dropbox`).
A quarantine can only take a candidate away. What does not look like one of ours is ignored, with a
warning; where it cannot be known what is quarantined, everything is. Names are matched against what
is published and used for nothing else. Standard library only.
"""

from __future__ import annotations

import errno
import os
import time

from ..errors import printable
from ..machine import files
from . import state
from .errors import Missing, StateError, translate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

FOLDER = "quarantine"
"""The store's name in a state directory."""
SCOPES = ("backend", "layer", "bucket")
"""How far one reaches: the backend everywhere, on one layer (n, k), or in one bucket of m too."""
EVERYTHING = "node"
"""The scope of what stands for quarantines that cannot be known; no file has it."""

BYTES = 1 << 15
"""Of one file: more than the longest texts take, each of their characters as an escape of JSON."""
MOST = 4096
"""Quarantines of the state's owner at once."""
OF_ONE_USER = 64
"""Reports of one other user; of more than that, whole backends are taken away."""
_NAMES = 1 << 16
OTHERS = -1
"""Stands for all users together that are not told apart."""
_USERS = 32
_SAID = 100
_TEXT = 500
_LONGEST = 128
"""Characters of an id or a name."""
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+")
_SHAPE = {"format": "nvfp4", "activation": "bf16", "out_dtype": "bf16", "groups": 1}


class Quarantine:
    """One backend, or one of its tactics, that must not be chosen. Immutable.

    id           its file's name without ``.json``
    scope        one of `SCOPES`; `n`, `k` and the like matter only as far as it reaches
    tactic       None: all of the backend's
    fingerprint  the environment it was seen in: a quarantine ends where that ends. None: any
    at           seconds since 1970
    by           ``report``, by a running engine, ``operator``, ``canary`` or ``fleet``
    """

    __slots__ = (
        "id", "backend", "tactic", "scope", "m", "n", "k", "format", "activation", "out_dtype",
        "groups", "fingerprint", "reason", "by", "at",
    )  # fmt: skip
    id: str
    backend: str
    tactic: str | None
    scope: str
    m: int
    n: int
    k: int
    format: str
    activation: str
    out_dtype: str
    groups: int
    fingerprint: str | None
    reason: str
    by: str
    at: float

    def __init__(self, /, **values: Any) -> None:
        """Raises ValueError, one sentence, for a field that is missing, foreign or malformed."""
        unknown = values.keys() ^ set(self.__slots__)
        if unknown:
            raise ValueError(f"a quarantine has exactly its own fields, not {sorted(unknown)[0]!r}")
        for name, value in values.items():
            if not _fits(name, value):
                raise ValueError(f"{name}={_printable(repr(value))} is not what a quarantine has")
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a quarantine cannot be changed: {name}")

    def changed(self, **values: Any) -> Quarantine:
        """The same, but for these fields."""
        return Quarantine(**{**self.json(), **values})

    def json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quarantine) and self.json() == other.json()

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Quarantine({', '.join(f'{k}={v!r}' for k, v in self.json().items())})"

    def covers(self, row: dict[str, Any]) -> bool:
        """Whether a row of ``choice`` or ``candidate`` is taken away by this."""
        if self.scope == EVERYTHING:
            return True
        if row["backend"] != self.backend or self.tactic not in (None, row["tactic"]):
            return False
        if self.fingerprint not in (None, row["fingerprint"]):
            return False
        if self.scope == "backend":
            return True
        same = all(
            row[name] == getattr(self, name)
            for name in ("n", "k", "format", "activation", "out_dtype", "groups")
        )
        return same and (self.scope == "layer" or row["m_lo"] <= self.m <= row["m_hi"])

    def where(self) -> str:
        """What it reaches, in words."""
        if self.scope == EVERYTHING:
            return "everything here"
        name = self.backend if self.tactic is None else f"{self.backend} {self.tactic}"
        if self.scope == "backend":
            return name
        from .experts import layer_words  # not at the reader's start

        named = ("activation", "groups", "n", "k")
        at = layer_words({name: getattr(self, name) for name in named})
        return f"{name} at {at}" if self.scope == "layer" else f"{name} at m={self.m} {at}"


def _fits(name: str, value: object) -> bool:
    if name in ("m", "n", "k", "groups"):
        return type(value) is int and 0 <= value < 1 << 40
    if name == "at":
        return type(value) in (int, float) and 0 <= value < 1e11  # type: ignore[operator]
    if name in ("tactic", "fingerprint") and value is None:
        return True
    if not isinstance(value, str) or len(value) > _TEXT or value != _printable(value):
        return False
    if name == "scope":
        return value in SCOPES
    if name in ("tactic", "reason"):
        return True
    return 0 < len(value) <= _LONGEST and _NAME.issuperset(value) and value[0] not in "-."


def _printable(text: str) -> str:
    """`text` in one line that no terminal takes for commands, and not too long."""
    return "".join(c if c.isprintable() else " " for c in text[:_TEXT])


class Reach:
    """How far a quarantine reaches: `scope`, one of `SCOPES`; m, n and k; and of `shape` format,
    activation, out_dtype and groups, where they are not what is usual."""

    __slots__ = ("fields",)

    def __init__(
        self, m: int = 0, n: int = 0, k: int = 0, scope: str = "backend", **shape: Any
    ) -> None:
        self.fields = {"m": int(m), "n": int(n), "k": int(k), "scope": scope, **_SHAPE, **shape}


def make(
    backend: str,
    reach: Reach,
    *,
    tactic: str | None = None,
    fingerprint: str | None = None,
    reason: object = "",
    by: str = "report",
) -> Quarantine:
    """A new quarantine of now. Raises ValueError, one sentence, for what cannot be one."""
    at = max(0.0, time.time())  # a clock that was never set
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at))
    return Quarantine(
        id=f"{stamp}-{os.urandom(4).hex()}",
        backend=backend,
        tactic=tactic,
        fingerprint=fingerprint,
        reason=_printable(printable(reason)),
        by=by,
        at=at,
        **reach.fields,
    )


def store(state_dir: str | os.PathLike[str]) -> str:
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


class ReportTally:
    """Reports of users who may write nothing but reports: what they amount to, however many.

    Two of one user that reach the same are one, and an id is its user's: none replaces another's.
    A user who reports more than `OF_ONE_USER` things takes whole backends away instead, so that
    none is lost among many; then those count that are `known` to be published. Where that is not
    known, and a user names more backends than are kept apart, everything is taken away.
    """

    __slots__ = ("_known", "_of", "_wide")

    def __init__(self, known: Iterable[str] | None = None) -> None:
        self._known = None if known is None else frozenset(known)
        self._of: dict[int, dict[tuple[Any, ...], Quarantine]] = {}
        self._wide: set[int] = set()

    def add(self, user: int, entry: Quarantine) -> None:
        if user not in self._of and len(self._of) >= _USERS:
            user = OTHERS
        mine = self._of.setdefault(user, {})
        _put(mine, _widened(user, entry) if user in self._wide else _owned(user, entry))
        if user not in self._wide and len(mine) > OF_ONE_USER:
            self._wide.add(user)
            every = list(mine.values())
            mine.clear()
            for each in every:
                _put(mine, _widened(user, each))
        if user in self._wide:
            self._leave_out(mine)

    def _leave_out(self, mine: dict[tuple[Any, ...], Quarantine]) -> None:
        over = [key for key, each in mine.items() if each.backend not in (self._known or ())]
        # Where what is published is not known, one more than there may be stays to tell by.
        for key in over if self._known is not None else over[OF_ONE_USER + 1 :]:
            del mine[key]

    def entries(self) -> list[Quarantine]:
        """Every report that counts."""
        found: list[Quarantine] = []
        for user, mine in self._of.items():
            if self._known is None and len(mine) > OF_ONE_USER:
                found.append(closed(f"user {user} has reported more than can be kept apart"))
            found += mine.values()
        return found


def _put(mine: dict[tuple[Any, ...], Quarantine], entry: Quarantine) -> None:
    mine.setdefault(_key(entry), entry)


def _key(entry: Quarantine) -> tuple[Any, ...]:
    """What it reaches."""
    at: tuple[Any, ...] = (entry.scope, entry.backend, entry.tactic, entry.fingerprint)
    if entry.scope != "backend":
        at += (entry.n, entry.k, *(getattr(entry, name) for name in _SHAPE))
    return (*at, entry.m) if entry.scope == "bucket" else at


def _owned(user: int, entry: Quarantine) -> Quarantine:
    """`entry` under an id of its user's own, as a report, and not of the future."""
    own = f"u{user}." if user >= 0 else "others."
    name = entry.id if entry.id.startswith(own) else own + entry.id
    return entry.changed(id=_short(name), by="report", at=min(entry.at, time.time()))


def _short(name: str) -> str:
    """`name`, or where it is too long one that is as much its own."""
    if len(name) <= _LONGEST:
        return name
    import hashlib

    return name[: _LONGEST - 33] + "." + hashlib.sha256(name.encode()).hexdigest()[:32]


def _widened(user: int, entry: Quarantine) -> Quarantine:
    own = f"u{user}." if user >= 0 else "others."
    return entry.changed(
        id=_short(f"{own}all-{entry.backend}"),
        scope="backend",
        tactic=None,
        fingerprint=None,
        reason=f"user {user} reported more than {OF_ONE_USER} faults, of this backend, too",
        by="report",
        at=min(entry.at, time.time()),
    )


def closed(why: str) -> Quarantine:
    """What stands for quarantines that cannot be known: everything is taken away."""
    entry = object.__new__(Quarantine)
    values = {
        **Reach(scope=EVERYTHING).fields,
        "id": "everything", "backend": "all", "tactic": None, "fingerprint": None,
        "reason": _printable(why), "by": "fp4tune", "at": 0.0,
    }  # fmt: skip
    for name, value in values.items():
        object.__setattr__(entry, name, value)
    return entry


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
                ignored.append(f"{folder}: {_printable(name)} is ignored: {_printable(str(error))}")
        except OSError as error:
            why = f"{folder}: {_printable(name)} cannot be read: {error.strerror}"
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
            make_folder(folder, 0o755)
    except OSError as error:
        raise translate(error, folder) from error
    return put(entry, folder)


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
        state.give_to_owner(fd, os.path.dirname(folder))
    finally:
        os.close(fd)


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
            make_folder(folder, 0o755)
        # From here on by its descriptor: its owner may put something else in its place.
        fd = files.folder(folder)
        if os.fstat(fd).st_uid not in ours:
            raise StateError(folder, "another user's folder has taken its place; remove it")
        os.fchmod(fd, 0o755)
        place = files.within(fd)
        taken = [entry for entry in entries if entry.scope != EVERYTHING]
        for entry in taken:
            if _owner_of(os.path.join(place, f"{entry.id}.json")) not in ours:
                put(entry, place)
        for name in os.listdir(place):
            if _owner_of(os.path.join(place, name)) not in ours:
                forget(os.path.join(place, name))
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
        raise Missing(folder, f"there is no quarantine {_printable(identity)!r}")
    try:
        os.unlink(os.path.join(folder, f"{identity}.json"))
    except FileNotFoundError:
        raise Missing(folder, f"there is no quarantine {_printable(identity)!r}") from None
    except OSError as error:
        raise translate(error, folder) from error


def state_dir(explicit: str | None) -> str:
    """Whose quarantines a command looks at: the directory given, else the place readers take."""
    if explicit is not None:
        return explicit
    return next(iter(state.holding_places()), None) or os.fspath(state.directory())
