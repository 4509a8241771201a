"""Quarantines: backends that failed in production, and must not be chosen until someone lifts that.

One small JSON file each, in a spool directory beside choices.db that any engine may be allowed to
write. A quarantine can only take a candidate away, so the worst a forged file does is to make a
choice slower; what does not look like one of ours is ignored, with a warning. Names in it are
matched against what is published and used for nothing else. Standard library only.
"""

from __future__ import annotations

import os
import time

from . import state
from .errors import Missing, translate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

FOLDER = "quarantine"
"""The spool's name in a state directory."""
VARIABLE = "FP4TUNE_SPOOL"
"""A spool elsewhere, for engines that mount the state read-only."""
SCOPES = ("backend", "layer", "bucket")
"""How far one reaches: the backend everywhere, on one layer (n, k), or in one bucket of m too."""

_BYTES = 4096
_FILES = 4096
_TEXT = 500
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+")


class Quarantine:
    """One backend, or one of its tactics, that must not be chosen. Immutable.

    id           its file's name without ``.json``
    scope        one of `SCOPES`; `n`, `k` and the like matter only as far as it reaches
    tactic       None: all of the backend's
    fingerprint  the environment it was seen in: a quarantine ends where that ends. None: any
    at           seconds since 1970
    by           ``report``, by a running engine, or ``operator``
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

    def __init__(self, **values: Any) -> None:
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
        name = self.backend if self.tactic is None else f"{self.backend} {self.tactic}"
        if self.scope == "backend":
            return name
        at = f"n={self.n} k={self.k}"
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
    return 0 < len(value) <= 128 and _NAME.issuperset(value) and value[0] not in "-."


def _printable(text: str) -> str:
    """`text` in one line that no terminal takes for commands, and not too long."""
    return "".join(c if c.isprintable() else " " for c in text[:_TEXT])


def make(
    backend: str,
    m: int,
    n: int,
    k: int,
    *,
    tactic: str | None = None,
    scope: str = "backend",
    format: str = "nvfp4",
    activation: str = "bf16",
    out_dtype: str = "bf16",
    groups: int = 1,
    fingerprint: str | None = None,
    reason: object = "",
    by: str = "report",
) -> Quarantine:
    """A new quarantine of now. Raises ValueError, one sentence, for what cannot be one."""
    at = time.time()
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at))
    return Quarantine(
        id=f"{stamp}-{os.urandom(4).hex()}",
        backend=backend,
        tactic=tactic,
        scope=scope,
        m=int(m),
        n=int(n),
        k=int(k),
        format=format,
        activation=activation,
        out_dtype=out_dtype,
        groups=int(groups),
        fingerprint=fingerprint,
        reason=_printable(str(reason)),
        by=by,
        at=at,
    )


def spools(state_dir: str | None) -> list[str]:
    """The spool directories there may be: FP4TUNE_SPOOL, then the state's own."""
    own = [os.path.join(state_dir, FOLDER)] if state_dir else []
    named = os.environ.get(VARIABLE)
    return list(dict.fromkeys([os.path.abspath(p) for p in ([named] if named else []) + own]))


def stamp(folders: Iterable[str]) -> tuple[Any, ...]:
    """Changes whenever a quarantine is added or lifted, as far as the file system can tell.

    A folder that changed less than two seconds ago is told by its names too: time stamps of
    directories are coarse.
    """
    seen: list[Any] = []
    for folder in folders:
        try:
            found = os.stat(folder)
            names = tuple(sorted(os.listdir(folder))) if time.time() - found.st_mtime < 2 else ()
        except OSError:
            continue
        seen.append((folder, found.st_ino, found.st_mtime_ns, names))
    return tuple(seen)


def read(folders: Iterable[str]) -> tuple[list[Quarantine], list[str]]:
    """Every quarantine in `folders`, oldest first, and a sentence for each file ignored.

    Never raises: a folder that is not there or cannot be read holds none.
    """
    found: dict[str, Quarantine] = {}
    ignored: list[str] = []
    for folder in folders:
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            continue
        except OSError as error:
            ignored.append(f"{folder} cannot be read: {error.strerror}")
            continue
        names = [name for name in names if not name.startswith(".")]
        if len(names) > _FILES:
            ignored.append(f"{folder} holds {len(names)} files; the oldest {_FILES} are read")
        for name in names[:_FILES]:
            try:
                entry = _read_one(folder, name)
                found[entry.id] = entry
            except FileNotFoundError:
                continue  # lifted just now
            except (OSError, ValueError, RecursionError) as error:
                ignored.append(f"{folder}: {_printable(name)} is ignored: {_printable(str(error))}")
    return sorted(found.values(), key=lambda q: (q.at, q.id)), ignored


def _read_one(folder: str, name: str) -> Quarantine:
    # Not through a link, and without waiting for whoever may never write to a pipe.
    fd = os.open(
        os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    )
    try:
        kind = os.fstat(fd)
        if kind.st_mode & 0o170000 != 0o100000:
            raise ValueError("it is no plain file")
        if kind.st_size > _BYTES:
            raise ValueError(f"it has {kind.st_size} bytes, more than a quarantine's {_BYTES}")
        text = os.read(fd, _BYTES + 1).decode()
    finally:
        os.close(fd)
    import json

    values = json.loads(text)
    if not isinstance(values, dict) or f"{values.get('id')}.json" != name:
        raise ValueError("its content does not go with its name")
    return Quarantine(**values)


def write(entry: Quarantine, folder: str) -> str:
    """Put `entry` into a spool, whole or not at all; returns the file's path.

    The folder is made if it is missing, for everyone to write to and nobody to remove others'
    files from. Raises StateError.
    """
    import json

    path = os.path.join(folder, f"{entry.id}.json")
    temporary = os.path.join(folder, f".{entry.id}.{os.getpid()}")
    try:
        if not os.path.isdir(folder):
            os.makedirs(folder, exist_ok=True)
            os.chmod(folder, 0o1777)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, json.dumps(entry.json(), sort_keys=True).encode())
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError as error:
        _forget(temporary)
        raise translate(error, folder) from error
    return path


def _forget(path: str) -> None:
    if os.path.lexists(path):
        os.unlink(path)


def lift(identity: str, folders: Iterable[str]) -> None:
    """Remove a quarantine from every spool that holds it. Raises Missing, and StateError."""
    gone = False
    where = "the spool"
    for where in folders:
        if os.sep in identity or identity.startswith("."):
            break
        try:
            os.unlink(os.path.join(where, f"{identity}.json"))
            gone = True
        except FileNotFoundError:
            continue
        except OSError as error:
            raise translate(error, where) from error
    if not gone:
        raise Missing(where, f"there is no quarantine {_printable(identity)!r}")


def state_dir(explicit: str | None) -> str:
    """Whose spool a command looks at: the directory given, else the place readers take."""
    if explicit is not None:
        return explicit
    return next(iter(state.holding_places()), None) or os.fspath(state.directory())
